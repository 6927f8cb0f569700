"""Second moments of one model estimated on this machine: from its folder and its texts to a file of v, going on where a killed run stopped."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from ota_core.compute.stream import Progress
from ota_core.errors import CheckpointError
from ota_core.recipe.estimate import EstimateSettings
from tasks.evaluation.gradients.documents import Block
from tasks.evaluation.in_memory import few_threads
from tasks.merging.architecture import parameter_layout

SAVE_SECONDS = 60.0
"""Between two copies of what was added so far."""
SAVE_SHARE = 20
"""Copying takes at most one part in so many of the time."""

BlocksOf = Callable[[Any, int], list[Block]]
"""The texts as blocks, of (the vocabulary's size, tokens of a block at most)."""


def estimate(
    model: Path,
    out: Path,
    settings: EstimateSettings,
    blocks_of: BlocksOf,
    *,
    said: Mapping[str, Any],
    partial: Path,
    identity: str,
    base: Path | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    what: str = "estimate",
) -> dict[str, Any]:
    """Write v of the model in a folder as the safetensors file ``out``, and tell what was measured.

    said: how it is estimated, for the file. base: tensors that are the base's, to the bit, were frozen and have no second moments. partial: where
    what was added so far is kept and found, known by its ``identity``; it is gone at the end. Raises OtaError.
    """
    import torch

    from ota_core.learn.curvature import SquaredGradients
    from tasks.evaluation.gradients.network import loaded, mean_loss

    dtype = getattr(torch, settings.dtype) if settings.dtype else None
    with few_threads(model), loaded(model, dtype, device) as network:
        parameters = trained_parameters(network, model, base)
        text = network.config.get_text_config()
        length = min(settings.max_length, getattr(text, "max_position_embeddings", None) or settings.max_length)
        blocks = blocks_of(text.vocab_size, length)
        found = SquaredGradients(network, parameters, settings.clip)
        found.load(partial, identity)
        total, saved, cost, at = len(blocks) // settings.batch, time.monotonic(), 0.0, settings.points
        for number in range(total):
            if progress:
                progress(what, number, total)
            if number < found.batches:
                continue
            if base is not None and (point := number * settings.points // total + 1) != at:
                move(parameters, model, base, point / settings.points, network.dtype, back=at != settings.points)
                at = point
            batch = blocks[number * settings.batch : (number + 1) * settings.batch]
            found.add(lambda: mean_loss(network, batch))  # noqa: B023 - called at once
            if time.monotonic() - saved > max(SAVE_SECONDS, SAVE_SHARE * cost) and number + 1 < total:
                began = time.monotonic()
                partial.parent.mkdir(parents=True, exist_ok=True)
                found.save(partial, identity)
                saved = time.monotonic()
                cost = saved - began
        found.write(out, said)
        partial.unlink(missing_ok=True)
        if progress:
            progress(what, total, total)
    clipped = 0 if settings.clip is None else sum(norm > settings.clip for norm in found.norms)
    return {
        "parameters": sum(one.numel() for one in parameters.values()), "tensors": len(parameters), "batches": total,
        "tokens": sum(len(one.ids) - one.first for one in blocks), "loss": fmean(found.losses), "gradient_norm": fmean(found.norms),
        "largest_gradient_norm": max(found.norms), "clipped_batches": clipped,
    }  # fmt: skip


def move(parameters: Mapping[str, Any], model: Path, base: Path, share: float, dtype: Any, *, back: bool) -> None:
    """Set parameters to θ₀ + share · (θ − θ₀), θ of the model, θ₀ of the base; one of them at a time is in memory beside them.

    back: the parameters are elsewhere on that way; without it they are the model's. Raises CheckpointError where base and model differ in form.
    """
    import torch

    from tasks.evaluation.gradients.network import loaded

    for folder, weight in ((model, 1.0), (base, 1.0 - share)):
        if weight == 0 or (folder is model and not back):
            continue
        with loaded(folder, dtype, "cpu") as other, torch.no_grad():
            held = dict(other.named_parameters())
            for name, one in parameters.items():
                if name not in held or held[name].shape != one.shape:
                    raise CheckpointError(
                        f"{folder}: '{name}' has another shape than in the expert, so that nothing lies between them; set points: 1"
                    )
                one.lerp_(held[name].to(one.device), weight)


def trained_parameters(network: Any, model: Path, base: Path | None) -> dict[str, Any]:
    """The network's floating-point parameters by their names, each once; with a base, those that differ from it.

    Readers of second moments bring the checkpoint's own names. Raises CheckpointError where the checkpoint does not become this network, or
    nothing differs.
    """
    layout = parameter_layout(model, base)
    found = dict(network.named_parameters())
    if odd := sorted(found.keys() ^ layout.shapes.keys()):
        raise CheckpointError(
            f"{model}: its config.json names a model with other parameters than {type(network).__name__} ({', '.join(odd[:3])}, …); gradients are taken of "
            "causal language models"
        )
    if layout.changed is not None:
        changed = layout.changed()
        if not changed:
            raise CheckpointError(
                f"{model}: every weight equals that of the base in {base}; an expert that training changed was expected"
            )
        found = {name: one for name, one in found.items() if name in changed}
    return {name: one for name, one in found.items() if one.is_floating_point()}
