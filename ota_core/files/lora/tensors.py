"""The tensors of an adapter's file, sorted by what they do: factors, magnitudes, trained rows, whole tensors.

Names as PEFT writes them, with or without the adapter's own name in them, and without what wrappers of a model add.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from ota_core.errors import CheckpointError
from ota_core.files.checkpoint import WeightFile
from ota_core.files.prefixes import FRONTS, PARTS
from ota_core.files.rows import F64, Rows

_NAME = r"(\.(?P<adapter>[^.]+))?"
_KINDS = (
    ("A", re.compile(rf"(?P<module>.+)\.lora_A{_NAME}\.weight")),
    ("B", re.compile(rf"(?P<module>.+)\.lora_B{_NAME}\.weight")),
    ("bias", re.compile(rf"(?P<module>.+)\.lora_B{_NAME}\.bias")),
    ("embedding A", re.compile(rf"(?P<module>.+)\.lora_embedding_A{_NAME}")),
    ("embedding B", re.compile(rf"(?P<module>.+)\.lora_embedding_B{_NAME}")),
    ("magnitude", re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.(?P<adapter>(?!weight$)[^.]+))?(\.weight)?")),
    ("rows", re.compile(rf"(?P<module>.+)\.token_adapter\.trainable_tokens_delta{_NAME}")),
)
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save(\.(?P<adapter>[^.]+))?\.(?P<last>weight|bias)")
_OTHERS = re.compile(r"lora_|\.lora\.|hada_|lokr_|oft_|vera_|prompt_|original_module")


@dataclass(frozen=True)
class AdapterTensors:
    """What an adapter's file holds, by the module of the base that it belongs to; values are names in the file."""

    file: WeightFile
    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    """Module, with a ``.base_layer`` for each wrapper outside its own, to kind (A, B, bias, …) to name."""
    whole: dict[str, str] = field(default_factory=dict)
    """Tensor of the base to the name of what takes its place."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor in the file."""
        return self.file.infos[name].shape

    def read(self, name: str) -> Rows:
        """All of a tensor in the file, as the matrix of ``blocks.matrix_shape``."""
        from ota_core.compute.blocks import matrix_shape

        return self.file.read_rows(name, 0, matrix_shape(self.shape(name))[0])


def sorted_tensors(file: WeightFile) -> AdapterTensors:
    """The file's tensors by what they do. Raises CheckpointError for what is not PEFT's LoRA, and for several adapters in one file."""
    found, adapters, unknown = AdapterTensors(file), set[str](), list[str]()
    taken: dict[object, str] = {}
    for stored in file.infos:
        name = _plain(stored)
        kind, match = next(((kind, match) for kind, one in _KINDS if (match := one.fullmatch(name))), (None, None))
        saved = _SAVED.fullmatch(name) if match is None else None
        place: object
        if match is not None and kind is not None:
            place = (match["module"], kind, match["adapter"])
            found.modules.setdefault(match["module"], {})[kind] = stored
        elif saved is not None:
            place = (f"{saved['module']}.{saved['last']}", saved["adapter"])
            found.whole[f"{saved['module']}.{saved['last']}"] = stored
        elif _OTHERS.search(name):
            unknown.append(stored)
            continue
        else:
            whole = name.replace(".base_layer", "").replace(".token_adapter", "")
            place = (whole, None)
            found.whole[whole] = stored
        one = match or saved
        adapters |= {one["adapter"]} if one is not None and one["adapter"] else set()
        if place in taken:
            unknown.append(f"{stored}, beside {taken[place]}")
        taken[place] = stored
    if len(adapters) > 1:
        raise CheckpointError(
            f"{file.path} holds several adapters ({', '.join(sorted(adapters))}); save each into a folder of its own and name the one that "
            "is meant"
        )
    if unknown:
        raise CheckpointError(
            f"{file.path} holds tensors that are none of a LoRA as PEFT writes it: {_some(unknown)}; expected names such as "
            "base_model.model.….q_proj.lora_A.weight. Convert the adapter, or merge it with the program that made it"
        )
    if not found.modules and not found.whole:
        raise CheckpointError(
            f"{file.path} holds no tensors: the adapter was saved empty; save it again with PEFT's save_pretrained"
        )
    return found


def _plain(name: str) -> str:
    """A name without what wrappers add, and without PEFT's own front."""
    name = ".".join(part for part in name.split(".") if part not in PARTS)
    for front in FRONTS:
        name = name.removeprefix(front)
    return name


def numbers(rows: Rows) -> Rows:
    """The same as float32, or float64 where that is stored."""
    return rows if rows.dtype == F64 else Rows.float32(rows.to_float32())


def _some(items: Iterable[str]) -> str:
    listed = list(items)
    return ", ".join(listed[:4]) + (f", and {len(listed) - 4} more" if len(listed) > 4 else "")
