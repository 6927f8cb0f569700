"""What of a recipe decides the bytes of its merge, beyond the keys of its first version."""

from collections.abc import Sequence
from typing import Any, Protocol

from ota_core.recipe.parameters import ExpertParameters, ModelParameters, default
from ota_core.recipe.slices import Slice, same_model
from ota_core.recipe.varying import Varying

_YOUNGER = {"rescale_relative_threshold", "approximate_norm", "ties_density"}
_RESCALED_LATER = {"ties", "breadcrumbs", "breadcrumbs_ties"}
"""Methods whose ``rescale`` is younger than they are."""


class Entry(Protocol):
    """A model of a recipe."""

    @property
    def model(self) -> str: ...
    @property
    def parameters(self) -> ModelParameters: ...


def later_keys(
    found: dict[str, Any], method: str, models: Sequence[Entry], places: Sequence[tuple[str, Slice]] | None
) -> dict[str, Any]:
    """``found``, the parameters in force, with what younger versions know, absent where it changes nothing: old recipes keep their identity."""
    younger = _YOUNGER | ({"rescale"} if method in _RESCALED_LATER else set())
    parameters = {
        key: _plain(value) for key, value in found["parameters"].items() if key not in younger or value != default(method, key)
    }
    parameters.pop("approximate_norm", None)  # decides nothing
    experts: list[dict[str, Any]] = [{key: _plain(value) for key, value in own.items()} for own in found["experts"]]
    if method == "ota" and all(own.get("weight") == 1.0 for own in experts):
        experts = [{key: value for key, value in own.items() if key != "weight"} for own in experts]
    for entry, own in zip(models, experts, strict=True):
        own |= {key: value for key in ("compression", "rank") if (value := getattr(entry.parameters, key)) is not None}
    found = found | {"parameters": parameters, "experts": experts}
    if (parameters.get("masked_merge"), parameters.get("denominator")) == ("ties", "all"):
        found["ties_divided_by"] = "all"  # versions before divided by the experts that agree, whatever the denominator
    return found if places is None else found | {"slices": [_slice(models, place, one) for place, one in places]}


def _slice(models: Sequence[Entry], place: str, one: Slice) -> dict[str, Any]:
    def position(model: str) -> int:
        """Among the recipe's models; −1 for the base."""
        return next((i for i, entry in enumerate(models) if same_model(entry.model, model)), -1)

    sources = [{"model": position(s.model), "layers": s.layer_range, "parameters": _said(s.parameters)} for s in one.sources]
    base = position(one.base_model) if one.base_model else None
    return {"place": place, "parameters": _said(one.parameters), "base": base, "sources": sources}


def _plain(value: Any) -> Any:
    return value.dump() if isinstance(value, Varying) else value


def _said(parameters: ExpertParameters) -> dict[str, Any]:
    said = {key: _plain(parameters.given(key)) for key in sorted(parameters.given_keys())}
    return {key: value for key, value in said.items() if key != "preconditioner_path"}
