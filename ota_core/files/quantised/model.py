"""A model's quantised weights as one more file of tensors, in the type that transformers would dequantise them to."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ota_core.errors import CheckpointError, raise_all
from ota_core.files.quantised.bnb4 import Bnb4
from ota_core.files.quantised.codes import as_rows
from ota_core.files.quantised.formats import Found, find
from ota_core.files.quantised.refused import refusal
from ota_core.files.quantised.settings import quantisation_settings
from ota_core.files.quantised.stored import Coded, Stored
from ota_core.files.rows import BF16, F16, F32, NAMED, NUMBERS, Dtype, Rows
from ota_core.files.safetensors_io import TensorInfo

_PLAIN = {dtype.code for dtype in NUMBERS}
_COUNTERS = {"I64", "BOOL"}
"""Types of buffers that plain models have, too: positions, masks, steps."""
_WORDS = {
    "fp8": "FP8", "int8": "8-bit integers", "int4": "4-bit integers", "int2": "2-bit integers", "int1": "1-bit integers", "nf4": "NF4 (4-bit)", "fp4": "FP4 (4-bit)", "mxfp4": "MXFP4", "nvfp4": "NVFP4",
}  # fmt: skip
# Formats of compressed-tensors whose weights are something else than codes times scales.
_OTHER_FORMATS = {"marlin-24", "sparse-24-bitmask", "sparse-bitmask", "mxfp6-pack-quantized"}
SHOWN = 4


class QuantisedWeights:
    """The weights of one model that are stored as codes. What is asked of a ``checkpoint.WeightFile`` is answered from codes and scales."""

    def __init__(self, path: Path, found: Found, dtype: Dtype) -> None:
        self.path, self._found = path, found
        self.infos: dict[str, TensorInfo] = {
            name: coded.info(name, self._dtype_of(coded, dtype)) for name, coded in found.weights.items()
        }

    @staticmethod
    def _dtype_of(coded: Coded, dtype: Dtype) -> Dtype:
        own = coded.dtype if isinstance(coded, Bnb4) else None
        return own if own in (F32, F16, BF16) else dtype

    @property
    def kinds(self) -> list[str]:
        """What the codes are, sorted: fp8, int8, nf4, …"""
        return sorted({coded.kind for coded in self._found.weights.values()})

    @property
    def label(self) -> str:
        """The same in words, with how many tensors."""
        counts = Counter(coded.kind for coded in self._found.weights.values())
        return ", ".join(
            f"{count} tensor{'' if count == 1 else 's'} in {_WORDS.get(kind, kind)}" for kind, count in sorted(counts.items())
        )

    def read_rows(self, name: str, start: int, stop: int) -> Rows:
        """Rows start:stop of a weight's matrix, dequantised."""
        return as_rows(self._found.weights[name].values(start, stop), self.infos[name].dtype)

    def prefetch(self, name: str, start: int, stop: int) -> None:
        self._found.weights[name].prefetch(start, stop)

    def drop_pages(self) -> None:
        """The files that hold the codes do it."""

    def close(self) -> None:
        """The files that hold the codes do it."""

    def place(self, name: str) -> str:
        """The name under which a weight's codes are stored."""
        return self._found.places[name]

    @property
    def parts(self) -> set[str]:
        """Stored tensors that are no weights: scales, tables, descriptions."""
        return self._found.parts


def quantised_weights(folder: Path, config: dict[str, Any], tensors: Mapping[str, Stored]) -> QuantisedWeights | None:
    """The weights that are stored as codes; None where all are plain numbers.

    tensors: every stored tensor, by its name in the model. Raises CheckpointError for a quantisation that cannot be read, by its name, and for
    codes whose scales are missing or do not fit.
    """
    method, settings = quantisation_settings(folder, config)
    method = method or _told_by_names(tensors)
    why = _why_not(method, settings)
    codes = [name for name, one in tensors.items() if one.code not in _PLAIN | _COUNTERS]
    if why is not None and codes:
        raise CheckpointError(refusal(folder, method, settings, codes[0], why))
    found = find(tensors, method, settings)
    raise_all([f"{folder}: {problem}" for problem in _shown(found.problems)], CheckpointError)
    if method:
        # What is left of codes once the known ones are taken belongs to nothing that is understood.
        left = [
            name for name in codes if name not in found.parts | set(found.places.values()) and _is_weight(tensors[name], name)
        ]
        if left:
            missing = "no scale lies beside it" if tensors[left[0]].code.startswith("F8") else ""
            raise CheckpointError(refusal(folder, method, settings, left[0], missing))
    return QuantisedWeights(folder, found, _dtype(config)) if found.weights else None


def _is_weight(stored: Stored, name: str) -> bool:
    """Whether a tensor that is not of plain numbers must be codes: not a mask, a counter or a table of positions."""
    if stored.code.startswith("F8"):
        return True
    return (
        stored.code in {"I8", "U8", "I32", "U32"}
        and len(stored.shape) >= 2
        and name.endswith(("weight", "packed", "blocks", "qweight"))
    )


def _told_by_names(tensors: Mapping[str, Stored]) -> str:
    """The method that the tensors' names tell, where no configuration does."""
    for name, one in tensors.items():
        module = name.rpartition(".")[0]
        if name.endswith(".qweight"):
            return "gptq" if f"{module}.g_idx" in tensors else "awq"
        if one.code == "U32" and f"{module}.scales" in tensors:
            return "mlx"
        if name.endswith(".W_q"):
            return "hqq"
    return ""


def _why_not(method: str, settings: dict[str, Any]) -> str | None:
    """Why a method's codes are not read; None where they are, and empty where its name says it all."""
    if method == "compressed-tensors":
        formats = {str(settings.get("format", ""))}
        groups = settings.get("config_groups")
        given = groups.values() if isinstance(groups, dict) else ()
        formats |= {str(group.get("format") or "") for group in given if isinstance(group, dict)}
        if other := sorted(formats & _OTHER_FORMATS):
            return f"format {other[0]}"
        sparse = settings.get("sparsity_config") or {}
        if isinstance(sparse, dict) and sparse.get("format") not in {None, "dense"}:
            return f"format {sparse['format']}"
        return "its transform_config turns the weights" if settings.get("transform_config") else None
    if method == "modelopt":
        algorithm = str(settings.get("quant_algo") or "")
        known = algorithm.startswith(("FP8", "NVFP4", "MIXED_PRECISION", "MXFP8")) or not algorithm
        return None if known else f"quant_algo {algorithm}"
    return None if method in {"", "fp8", "bitsandbytes", "mxfp4", "nvfp4"} else ""


def _dtype(config: dict[str, Any]) -> Dtype:
    """The type of the model's weights, as its configuration has it; bfloat16 where it has none."""
    text = config.get("text_config")
    for level in (config, text if isinstance(text, dict) else {}):
        named = NAMED.get(str(level.get("dtype") or level.get("torch_dtype") or "").removeprefix("torch."))
        if named in (F32, F16, BF16):
            return named
    return BF16


def _shown(problems: list[str]) -> list[str]:
    more = len(problems) - SHOWN
    return problems[:SHOWN] + ([f"and {more} more tensors like these"] if more > 0 else [])
