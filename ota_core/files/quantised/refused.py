"""Kinds of quantisation that are not read here, by name, with the command that turns such a model into plain weights."""

from pathlib import Path
from typing import Any

_GPTQMODEL = 'python -c "from gptqmodel.utils.model_dequant import dequantize_model; dequantize_model({model!r}, {plain!r})" (pip install gptqmodel)'
_COMPRESSED = (
    'python -c "from compressed_tensors.entrypoints.convert import *; convert_checkpoint({model!r}, {plain!r}, '
    'CompressedTensorsDequantizer({model!r}))" (pip install compressed-tensors)'
)
_HIGGS = (
    'python -c "from transformers import AutoModelForCausalLM as A; m = A.from_pretrained({model!r}); m.dequantize(); '
    'm.save_pretrained({plain!r})" (on a machine with a GPU)'
)
_MLX = "mlx_lm.convert --hf-path {model} --mlx-path {plain} --dequantize (pip install mlx-lm, on a Mac)"

NAMES = {
    "gptq": "GPTQ", "awq": "AWQ", "aqlm": "AQLM", "vptq": "VPTQ", "quanto": "quanto", "eetq": "EETQ", "higgs": "HIGGS", "hqq": "HQQ",
    "torchao": "torchao", "bitnet": "BitNet", "spqr": "SpQR", "quark": "Quark", "fp_quant": "FP-Quant", "auto-round": "AutoRound",
    "metal": "Metal", "fouroversix": "Four Over Six", "sinq": "SINQ", "exl2": "EXL2", "exl3": "EXL3", "mlx": "MLX", "gguf": "GGUF",
    "compressed-tensors": "compressed-tensors", "modelopt": "modelopt", "bitsandbytes": "bitsandbytes", "fp8": "FP8", "mxfp4": "MXFP4",
}  # fmt: skip
COMMANDS = {
    "gptq": _GPTQMODEL, "awq": _GPTQMODEL, "auto-round": _GPTQMODEL, "compressed-tensors": _COMPRESSED, "higgs": _HIGGS, "mlx": _MLX,
}  # fmt: skip


def refusal(folder: Path, method: str, settings: dict[str, Any], tensor: str, why: str = "") -> str:
    """The sentence that names a quantisation that cannot be read: where it was seen, and what to do."""
    name = NAMES.get(method, method or "an unknown method")
    bits = settings.get("bits") or settings.get("w_bit") or settings.get("weight_bits")
    seen = f"{name}{f', {bits} bits' if bits else ''}"
    text = f"{folder}: the weights are quantised ({seen}; '{tensor}' holds codes, not numbers){f': {why}' if why else ''}. "
    text += "Codes cannot be averaged: merge the model as it was before quantisation"
    command = COMMANDS.get(method)
    if command is None:
        return text
    return f"{text}, or write it as plain weights first: {command.format(model=str(folder), plain=f'{folder.name}-plain')}"
