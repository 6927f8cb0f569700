"""Second moments under the names of the weights that they belong to."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ota_core.errors import MomentsError, OtaError
from ota_core.files.prefixes import plain_names, twice
from ota_core.moments.base import Moments, ParameterLayout, Shape, Stored
from ota_core.moments.converted import ConvertedMoments, whole
from ota_core.moments.match import Layout

SHOWN = 4


class Once:
    """A layout that is built at most once, and only when it is asked for."""

    def __init__(self, layout: Layout) -> None:
        self._layout, self.built = layout, None if callable(layout) else layout

    def __call__(self) -> ParameterLayout:
        if self.built is None:
            assert callable(self._layout)
            self.built = self._layout()
        return self.built

    @property
    def given(self) -> bool:
        return self._layout is not None


def fitted(moments: Moments, layout: Once, tensors: Collection[str] | None) -> Moments:
    """The same v under the checkpoint's names.

    tensors: the names of the weights and of what is tied to them; None where they are not known, and then only what the layout
    says, if it was built, is done. Prefixes of wrappers are undone, and what the model's library renames, fuses or stacks on loading.
    Raises MomentsError, and closes ``moments``, when a name is none of the weights' in the end.
    """
    try:
        return _fitted(moments, layout, tensors)
    except BaseException:
        moments.close()
        raise


def _fitted(moments: Moments, layout: Once, tensors: Collection[str] | None) -> Moments:
    shapes = moments.shapes()
    if layout.built is None and (tensors is None or all(name in tensors for name in shapes)):
        return moments
    plain = plain_names(shapes)
    if double := twice(plain):
        raise MomentsError(
            f"{moments.path}: {double[0]!r} and another name are both {plain[double[0]]!r} without the prefixes of wrappers; keep one"
        )
    reason = ""
    if tensors is not None and layout.given and not all(name in tensors for name in plain.values()):
        try:
            layout()
        except OtaError as error:  # the names decide below whether it was needed
            reason = f" Nor could the model's own names be told: {error}"
    from ota_core.moments.compression import RankOneMoments, kept_as_trained, split  # it imports this package

    as_file = moments.compressed and not kept_as_trained(moments)
    if as_file:  # they bear the checkpoint's names or none of them
        plain = {name: name for name in shapes}
    stored = _stored(moments.path, {short: name for name, short in plain.items()}, shapes, layout.built)
    if tensors is not None and (lost := [name for name in stored if name not in tensors]):
        own = [name for name in tensors if name not in stored]
        raise MomentsError(
            f"{moments.path}: {len(lost)} of its {len(stored)} names are no tensors of the weights ({_some(lost)}); the weights hold "
            f"{len(own)} others ({_some(own)}). Give the second moments of this model, under the names of its weights.{reason}"
        )
    same = stored.keys() == shapes.keys() and all(one == whole(name, tuple(shapes[name])) for name, one in stored.items())
    if same or as_file:
        return moments
    return split(moments, stored) if isinstance(moments, RankOneMoments) else ConvertedMoments(moments, stored)


def _stored(path: Path, own: Mapping[str, str], shapes: Mapping[str, Shape], model: ParameterLayout | None) -> dict[str, Stored]:
    """Each tensor that has v, by its name in the checkpoint.

    own: parameter to its name in the file. Raises MomentsError where v of a parameter would have nowhere to go.
    """
    made = model.stored if model is not None else {}
    parts = {name: [view.parameter for view in one.views] for name, one in made.items()}
    used = {parameter for those in parts.values() for parameter in those} & own.keys()
    whole_ones = {name for name, those in parts.items() if own.keys() >= set(those)}
    reached = {parameter for name in whole_ones for parameter in parts[name]}
    if alone := sorted(used - reached):
        name = next(name for name, those in parts.items() if alone[0] in those)
        raise MomentsError(
            f"{path}: {name!r} of the checkpoint is made of several parameters, and only some of them ({_some(alone)}) have second "
            "moments: save those of the others, too, or train all of them"
        )
    for parameter in used:
        seen, expected = tuple(shapes[own[parameter]]), tuple(model.shapes[parameter]) if model is not None else ()
        if seen != expected:
            raise MomentsError(
                f"{path}: the second moment of {parameter!r} has the shape {list(seen)}, {list(expected)} was expected by config.json; "
                "do they belong to this model?"
            )
    stored = {short: whole(name, tuple(shapes[name])) for short, name in own.items() if short not in used}
    for name in whole_ones:
        views = tuple(replace(view, parameter=own[view.parameter]) for view in made[name].views)
        stored[name] = Stored(made[name].shape, views)
    return stored


def _some(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)[:SHOWN]) + (", …" if len(names) > SHOWN else "") if names else "none"
