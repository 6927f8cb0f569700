"""Which trainer's names a reader has, and the reader under the names of Hugging Face."""

from collections.abc import Mapping
from math import prod
from pathlib import Path

from ota_core.compute.blocks import matrix_shape
from ota_core.errors import MomentsError
from ota_core.moments.base import Moments
from ota_core.moments.foreign import decoders, megatron
from ota_core.moments.foreign.model import model_of
from ota_core.moments.foreign.taken import Taken, TakenMoments
from ota_core.moments.match import Layout


def translated(path: Path, moments: Moments, layout: Layout) -> Moments:
    """The same v for the Hugging Face model; ``moments`` itself where its names are no known trainer's.

    layout: gives the model's configuration, which says how heads lie. Raises MomentsError where it is missing or does not fit.
    """
    shapes = moments.shapes()
    trainer = decoders.trainer_of(shapes)
    if trainer is not None:
        taken = decoders.take_all(path, trainer, shapes, model_of(path, trainer.title, layout))
    elif megatron.is_megatron(shapes):
        taken = megatron.take_all(path, shapes, model_of(path, "Megatron", layout))
    else:
        return moments
    return renamed(path, moments, taken)


def renamed(path: Path, moments: Moments, taken: Mapping[str, Taken]) -> TakenMoments:
    """v under the names of ``taken``. Raises MomentsError where that does not take every row of ``moments`` once."""
    _check_cover(path, moments.shapes(), taken)
    return TakenMoments(path, moments, taken)


def _check_cover(path: Path, shapes: Mapping[str, tuple[int, ...]], taken: Mapping[str, Taken]) -> None:
    """Every row of what is turned or cut is taken once, but for a padded vocabulary: otherwise the configuration is another model's."""
    used: dict[str, int] = {}
    for name, one in taken.items():
        if one.rows is not None and name not in ("model.embed_tokens.weight", "lm_head.weight"):
            used[one.source] = used.get(one.source, 0) + len(one.rows)
            if matrix_shape(one.shape)[0] != len(one.rows):
                used[one.source] = -1
    for source, count in used.items():
        shape = shapes[source]
        vector = any(one.row is not None for one in taken.values() if one.source == source)
        if count != (prod(shape) if vector else matrix_shape(shape)[0]):
            raise MomentsError(
                f"{path}: {source!r} has the shape {list(shape)}, which does not fit the heads and the width of a head in the model's "
                "config.json: use the one of this model"
            )
