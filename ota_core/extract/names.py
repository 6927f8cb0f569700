"""A checkpoint under the names of the model that transformers makes of it: those by which PEFT finds what an adapter edits."""

from ota_core.files.checkpoint import Checkpoint
from ota_core.files.layouts.relaid import RelaidWeights
from ota_core.files.layouts.relayout import gone, relayout
from ota_core.files.layouts.stored import Loaded, whole


def as_loaded(checkpoint: Checkpoint, loaded: Loaded) -> None:
    """Know every tensor by the name of its parameter, and put stacks together whose parts are stored one by one. Nothing is read."""
    held = set(checkpoint.names())
    wanted = loaded.shapes.keys() - set(loaded.own.values())
    layout = relayout(
        {name: whole(name, loaded.shapes[name]) for name in wanted if name not in held}, loaded,
        {name: tuple(checkpoint.info(name).shape) for name in held},
    )  # fmt: skip
    if layout is not None:
        checkpoint.replace(gone(layout, ()), RelaidWeights(checkpoint.as_it_is(), layout))
    names = {tensor: name for tensor, name in loaded.own.items() if tensor != name and name not in held and tensor in checkpoint}
    checkpoint.rename({tensor: name for name, tensor in {name: tensor for tensor, name in names.items()}.items()})
