"""What a model's folder says of its quantisation: ``quantization_config`` of config.json, or hf_quant_config.json of NVIDIA's modelopt."""

from pathlib import Path
from typing import Any

from ota_core.reading import json_value, read_file

KEYS = ("quantization_config", "compression_config", "quantization")
"""Keys of config.json that describe a quantisation: transformers', old compressed-tensors', MLX'. An output never has them."""
MODELOPT = "hf_quant_config.json"


def quantisation_settings(folder: Path, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(method, settings): the method in transformers' words (``fp8``, ``gptq``, …), empty where the folder says nothing of one."""
    for level in (config, config.get("text_config")):
        for key in KEYS if isinstance(level, dict) else ():
            if isinstance(level, dict) and isinstance(settings := level.get(key), dict) and settings:
                return _method(settings, key), settings
    if (folder / MODELOPT).is_file():
        try:
            found = json_value(read_file(folder / MODELOPT))
        except (OSError, ValueError):
            return "", {}
        settings = found.get("quantization") if isinstance(found, dict) else None
        if isinstance(settings, dict):
            return "modelopt", settings
    return "", {}


def _method(settings: dict[str, Any], key: str) -> str:
    method = str(settings.get("quant_method") or "").lower()
    if method in {"fbgemm_fp8", "mxfp8", "finegrained_fp8"}:
        return "fp8"
    if method:
        return {"bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes"}.get(method, method)
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    if "quant_algo" in settings:
        return "modelopt"
    if "config_groups" in settings:
        return "compressed-tensors"
    return "mlx" if key == "quantization" else ""


def without_quantisation(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the same model with plain weights, nested ones (``text_config``) too."""
    return {
        key: without_quantisation(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in config.items()
        if not (key in KEYS and isinstance(value, dict))
    }
