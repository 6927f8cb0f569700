"""What ``ota inspect`` says of a LoRA adapter. Nothing here reads its numbers."""

from collections import Counter
from math import prod
from pathlib import Path

from ota_core.files.byte_source import SourceOf
from ota_core.files.checkpoint import open_weights, weight_files
from ota_core.files.lora.config import read_config
from ota_core.files.lora.tensors import sorted_tensors


def describe_adapter(folder: Path, source_of: SourceOf | None = None) -> list[str]:
    """Its kind, rank, base, and what it edits. Raises CheckpointError where it is no LoRA that can be read."""
    config = read_config(folder)
    file = open_weights(weight_files(folder)[0], source_of)
    try:
        tensors = sorted_tensors(file)
        infos = list(file.infos.values())
    finally:
        file.close()
    kind = " and ".join([*(["DoRA"] if config.dora else []), *(["rsLoRA"] if config.rslora else [])]) or "LoRA"
    ranks = sorted({*config.ranks.numbers.values(), config.rank})
    scale = f"α {config.alpha:g}" + (", by module" if config.alphas.numbers else "")
    parts = Counter(module.replace(".base_layer", "").rsplit(".", 1)[-1] for module in tensors.modules)
    lines = [
        f"adapter: {kind} of rank {' to '.join(str(rank) for rank in dict.fromkeys((ranks[0], ranks[-1])))}, {scale}, "
        f"{sum(prod(info.shape) for info in infos):,} parameters in {len(infos):,} tensors ({', '.join(sorted({str(info.dtype) for info in infos}))})",
        f"  base: {config.base or 'not named'}; as a model of a recipe: on its base_model, or BASE+{folder}",
        "  edits: " + ", ".join(f"{name} ({count})" for name, count in sorted(parts.items())),
    ]
    return lines + ([f"  trained whole: {', '.join(sorted(tensors.whole)[:8])}"] if tensors.whole else [])
