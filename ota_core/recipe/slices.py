"""Slices: a result put together from ranges of layers, and modules, the parts of a model that have layers of their own. mergekit's dialect.

slices:
  - sources: [{model: models/a, layer_range: [0, 24]}]
  - sources: [{model: models/b, layer_range: [8, 32]}]
    parameters: {…}                   of this slice; those of a source win, those of the recipe come last
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from ota_core.recipe.parameters import MergeParameters, ModelParameters
from ota_core.recipe.values import Strict


def _range(value: Any) -> Any:
    whole = isinstance(value, list | tuple) and len(value) == 2 and all(type(one) is int for one in value)
    if not whole or not 0 <= value[0] < value[1]:
        raise PydanticCustomError("layer_range", "expected two layers [first, end], first from 0 and the end itself left out")
    return tuple(value)


class SliceSource(Strict):
    """One model of a slice."""

    model: str = Field(description="As under models.")
    layer_range: Annotated[tuple[int, int], BeforeValidator(_range)] | None = Field(
        None, description="[first, end]: the layers that it gives, the end itself left out."
    )
    parameters: ModelParameters = Field(ModelParameters(), description="Of this model in this slice.")


class Slice(Strict):
    """Layers of the result, from the same number of layers of each source."""

    sources: tuple[SliceSource, ...] = Field(min_length=1, description="The models that are merged here.")
    parameters: MergeParameters = Field(MergeParameters(), description="Of this slice.")
    base_model: str | None = Field(None, description="The base in this slice; by default the recipe's.")

    @model_validator(mode="after")
    def _ranged(self) -> Self:
        counts = [one.layer_range[1] - one.layer_range[0] for one in self.sources if one.layer_range]
        if len(counts) < len(self.sources):
            if counts:
                raise ValueError("a source of the slice has no layer_range; give each its own")
        elif len(set(counts)) > 1:
            shown = ", ".join(f"{one.model}: {list(one.layer_range or ())}" for one in self.sources)
            raise ValueError(f"the sources of a slice give different numbers of layers ({shown}); expected the same of each")
        return self


class ModuleSource(Strict):
    """A model of a module that is merged whole."""

    model: str = Field(description="As under models.")
    parameters: ModelParameters = Field(ModelParameters(), description="Of this model in this module.")


class Module(Strict):
    """A part of the model with layers of its own: an encoder, a decoder, a vision tower."""

    slices: tuple[Slice, ...] | None = Field(None, description="Ranges of its layers.")
    models: tuple[ModuleSource, ...] | None = Field(None, description="The models that are merged here, with all of its layers.")
    parameters: MergeParameters = Field(MergeParameters(), description="Of this module.")

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.slices is None) is (self.models is None):
            raise ValueError("a module takes either slices or models")
        return self

    def as_slices(self) -> tuple[Slice, ...]:
        """Its slices; with ``models`` a single one, of all layers."""
        if self.slices is not None:
            return tuple(
                one.model_copy(update={"parameters": one.parameters.over(self.parameters, MergeParameters)})
                for one in self.slices
            )
        assert self.models is not None
        sources = tuple(SliceSource(model=one.model, parameters=one.parameters) for one in self.models)
        return (Slice(sources=sources, parameters=self.parameters),)


def sources_in(raw: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(model, its parameters as written) of every source of every slice, in their order; what has another form is left out."""
    slices: list[Any] = []
    for holder in [raw, *_values(raw.get("modules"))]:
        if isinstance(holder, Mapping):
            slices += _list(holder.get("slices"))
            if holder is not raw:
                slices += [{"sources": holder.get("models")}]
    found = []
    for one in slices:
        for source in _list(one.get("sources")) if isinstance(one, Mapping) else ():
            if isinstance(source, Mapping) and isinstance(source.get("model"), str):
                found.append((source["model"], source.get("parameters")))
    return found


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _values(value: Any) -> Sequence[Any]:
    return list(value.values()) if isinstance(value, Mapping) else ()


def same_model(one: Any, other: Any) -> bool:
    """Whether two names of models mean the same place; what is no name means none."""
    return isinstance(one, str) and isinstance(other, str) and _plain(one) == _plain(other)


def _plain(name: str) -> str:
    while name.startswith("./"):
        name = name[2:]
    return name.rstrip("/")


def base_range(base: str, one: Slice) -> tuple[int, int] | Literal["unclear"] | None:
    """The layers of the base that belong to a slice: those it names, else those that all sources share; None for all layers."""
    own = [source.layer_range for source in one.sources if same_model(source.model, base)]
    ranges = set(own) or {source.layer_range for source in one.sources}
    return next(iter(ranges)) if len(ranges) == 1 else "unclear"
