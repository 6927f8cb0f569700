"""Finds the codes among the tensors of a folder and what belongs to each: one function for each way of storing them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ota_core.files.quantised.bnb4 import PARTS, STATE, Bnb4
from ota_core.files.quantised.codes import TABLES
from ota_core.files.quantised.mxfp4 import Mxfp4
from ota_core.files.quantised.packed import Packed
from ota_core.files.quantised.scaled import Grid, Misfit, Scaled, unpacked
from ota_core.files.quantised.stored import Coded, Stored

Tensors = Mapping[str, Stored]

# What a weight's scales are called: behind the weight's own name. The last three replace ``weight`` (DeepSeek's own, Mistral's, bitsandbytes').
_SCALES = ("_scale_inv", "_scale")
_FACTORS = {"_scale_2": False, "_global_scale": True}
"""The scales' own factor, and whether it divides: modelopt's and compressed-tensors' NVFP4."""
# Of activations and of the cache of keys and values: they mean nothing for plain weights.
_OF_ACTIVATIONS = (
    "input_scale", "activation_scale", "output_scale", "k_scale", "v_scale", "q_scale", "kv_scale", "input_global_scale", "input_zero_point",
    "output_zero_point", "qscale_act", "input_scale_ub", "k_bmm_quantizer._scale", "prob_output_scale", "pre_quant_scale",
)  # fmt: skip


@dataclass
class Found:
    """What is read through its codes, and which stored tensors vanish with that."""

    weights: dict[str, Coded] = field(default_factory=dict)
    """By the weight's name as the model has it."""
    places: dict[str, str] = field(default_factory=dict)
    """The same weight to the stored name of its codes."""
    parts: set[str] = field(default_factory=set)
    """Scales, tables, descriptions: no tensors of the model."""
    problems: list[str] = field(default_factory=list)

    def add(self, weight: str, codes: str, coded: Coded, parts: set[str]) -> None:
        self.weights[weight], self.places[weight] = coded, codes
        self.parts |= parts


def find(tensors: Tensors, method: str, settings: Mapping[str, Any]) -> Found:
    """All codes of the known ways among a model's tensors, whatever the configuration says of them."""
    found = Found()
    for finder in (_bitsandbytes4, _bitsandbytes8, _mxfp4, _packed, _scaled):
        taken = {*found.places.values(), *found.parts}
        finder({name: one for name, one in tensors.items() if name not in taken}, method, settings, found)
    if found.weights:
        found.parts |= {name for name in tensors if name.endswith(_OF_ACTIVATIONS) and name not in found.weights}
    return found


def _bitsandbytes4(tensors: Tensors, method: str, settings: Mapping[str, Any], found: Found) -> None:
    for name in [name for name in tensors if STATE in name]:
        weight = name.split(STATE)[0]
        parts = {part: weight + part for part in PARTS if weight + part in tensors}
        if weight not in tensors:
            found.problems.append(f"'{name}' describes '{weight}', which no file holds")
            continue
        try:
            coded = Bnb4(tensors[weight], tensors[name], {part: tensors[held] for part, held in parts.items()})
        except Misfit as error:
            found.problems.append(f"'{weight}' (bitsandbytes, 4-bit) {error}")
            continue
        found.add(weight, weight, coded, {name, *parts.values()})


def _bitsandbytes8(tensors: Tensors, method: str, settings: Mapping[str, Any], found: Found) -> None:
    """LLM.int8: W ≈ codes · SCB / 127, one SCB a row (Dettmers et al. 2022, arXiv 2208.07339, section 2.1)."""
    for name in [name for name in tensors if name.endswith(".SCB")]:
        module = name.removesuffix("SCB")
        weight = module + "weight"
        if weight not in tensors or tensors[weight].code != "I8":
            continue
        try:
            grid = Grid(tensors[name], tensors[weight].shape)
            coded = Scaled("int8", tensors[weight], grid, post=1 / 127)
        except Misfit as error:
            found.problems.append(f"'{weight}' (bitsandbytes, 8-bit) {error}")
            continue
        found.add(weight, weight, coded, {name, *({module + "weight_format"} & tensors.keys())})


def _mxfp4(tensors: Tensors, method: str, settings: Mapping[str, Any], found: Found) -> None:
    for name in [name for name in tensors if name.endswith("_blocks") and tensors[name].code == "U8"]:
        weight = name.removesuffix("_blocks")
        if weight + "_scales" not in tensors:
            found.problems.append(f"'{name}' (MXFP4) has no '{weight}_scales' beside it")
            continue
        try:
            coded = Mxfp4(tensors[name], tensors[weight + "_scales"])
        except Misfit as error:
            found.problems.append(f"'{weight}' (MXFP4) {error}")
            continue
        found.add(weight, name, coded, {weight + "_scales"})


def _scaled(tensors: Tensors, method: str, settings: Mapping[str, Any], found: Found) -> None:
    block = block_size(settings)
    for name, codes in tensors.items():
        packed = _is_packed(name, codes, method)
        if not packed and codes.code not in {"F8_E4M3", "F8_E5M2", "I8"}:
            continue
        weight = name.removesuffix("_packed") if name.endswith("weight_packed") else name
        scale = next((one for one in _scale_names(weight) if one in tensors and one != name), None)
        if scale is None:
            continue
        zero, shape = weight + "_zero_point", weight + "_shape"
        try:
            size = unpacked(codes.shape) if packed else codes.shape
            factors = {weight + end: inverse for end, inverse in _FACTORS.items() if weight + end in tensors}
            factor = next(iter(factors), None)
            grid = Grid(tensors[scale], size, block)
            zeros = Grid(tensors[zero], size, block) if zero in tensors and tensors[zero].code in TABLES else None
            coded = Scaled(
                _kind(codes, packed, tensors[scale]), codes, grid, zeros=zeros, packed=packed,
                factor=tensors[factor] if factor else None, inverse=bool(factor and factors[factor]),
            )  # fmt: skip
        except Misfit as error:
            found.problems.append(f"'{name}' {error}")
            continue
        found.add(weight, name, coded, {scale, *({zero, shape} & tensors.keys()), *factors})


def _packed(tensors: Tensors, method: str, settings: Mapping[str, Any], found: Found) -> None:
    for name in [name for name in tensors if name.endswith("weight_packed") and tensors[name].code == "I32"]:
        weight = name.removesuffix("_packed")
        beside = {end: tensors.get(weight + end) for end in ("_shape", "_scale", "_zero_point", "_g_idx")}
        scale = beside["_scale"]
        if scale is None:
            found.problems.append(f"'{name}' (packed integers) has no '{weight}_scale' beside it")
            continue
        bits, group = _widths(settings)
        try:
            coded = Packed(
                tensors[name], beside["_shape"], scale, beside["_zero_point"], beside["_g_idx"], bits=bits, group=group
            )
        except Misfit as error:
            found.problems.append(f"'{name}' {error}")
            continue
        found.add(weight, name, coded, {weight + end for end, one in beside.items() if one is not None})


def _widths(settings: Mapping[str, Any]) -> tuple[tuple[int, ...], int | None]:
    """Bits of a code that the configuration speaks of, 4 where it is silent, and columns of a group where that is one number for all."""
    weights = _of_weights(settings)
    bits = {one["num_bits"] for one in weights if type(one.get("num_bits")) is int}
    sizes = [one.get("group_size") for one in weights]
    size = sizes[0] if sizes and all(one == sizes[0] for one in sizes) else None
    return tuple(sorted(bits)) or (4,), size if type(size) is int and size > 0 else None


def _of_weights(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What compressed-tensors' groups of modules say of their weights."""
    groups = settings.get("config_groups")
    stated = [group.get("weights") for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    return [one for one in stated if isinstance(one, dict)]


def _is_packed(name: str, codes: Stored, method: str) -> bool:
    """Whether bytes are two codes of FP4 each: as compressed-tensors and modelopt call them, or transformers' fp8 with int8 (DeepSeek-V4)."""
    if codes.code == "U8":
        return name.endswith("weight_packed") or (method == "modelopt" and name.endswith("weight"))
    return codes.code == "I8" and method == "fp8"


def _kind(codes: Stored, packed: bool, scales: Stored) -> str:
    if packed:
        return "nvfp4" if scales.code == "F8_E4M3" else "mxfp4"
    return "int8" if codes.code == "I8" else "fp8"


def _scale_names(weight: str) -> Iterator[str]:
    yield from (weight + end for end in _SCALES)
    if weight.endswith(".weight"):
        module = weight.removesuffix("weight")
        yield from (module + end for end in ("scale", "qscale_weight", "weight_scales"))


def block_size(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where the configuration says so."""
    size = settings.get("weight_block_size")
    if not size:
        size = next((one["block_structure"] for one in _of_weights(settings) if one.get("block_structure")), None)
    if isinstance(size, list | tuple) and len(size) == 2 and all(type(axis) is int and axis > 0 for axis in size):
        return int(size[0]), int(size[1])
    return None
