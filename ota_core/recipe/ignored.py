"""What recipes of mergekit carry that its methods never look at: taken out before a recipe is checked, and said in a note.

mergekit asks for the parameters that a method has and leaves all others unread, so that many published recipes hold some. What is
taken out here is a parameter of another of its methods, or an option of its command line; a key that it does not know either stays
for the checks to name, since it is likely mistyped.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ota_core.recipe.checks import no_effect
from ota_core.recipe.methods import OF_MERGEKIT
from ota_core.recipe.parameters import USED, MergeParameters, of_experts
from ota_core.recipe.slices import same_model

PARAMETERS = {
    "weight", "density", "gamma", "epsilon", "lambda", "normalize", "rescale", "t", "scale", "filter_wise", "nuslerp_row_wise", "nuslerp_flatten",
    "max_iter", "tol", "eps", "normalize_weights", "r", "alpha", "select_topk", "seed",
}  # fmt: skip
"""The parameters of mergekit's methods."""
_NOWHERE = {"embed_slerp"}
"""Parameters of earlier versions of mergekit."""
WITH_LAMBDA = {
    "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear"
}  # fmt: skip
"""Methods whose lambda mergekit has, too."""
_AT_THE_TOP = {
    "allow_negative_weights", "embed_slerp", "int8_mask", "trust_remote_code", "allow_crimes", "lazy_unpickle", "low_cpu_memory", "copy_tokenizer",
    "clone_tensors", "write_model_card", "safe_serialization", "transformers_cache", "lora_merge_cache", "quiet", "random_seed",
}  # fmt: skip
"""Options of mergekit's command line, and what its searches leave behind."""


def take_ignored(raw: dict[str, Any]) -> dict[str, Any]:
    """The recipe without them; the places where they stood are in ``ignored``. raw: with all parameters in our words."""
    found: list[str] = []
    raw = _without(raw, _AT_THE_TOP, "", found)
    method = raw.get("merge_method")
    if method == "sce":
        raw = _levels(raw, "", _select_topk(found))
    if isinstance(method, str) and method in OF_MERGEKIT:
        used = USED[method]
        raw = _levels(raw, "", _reader((PARAMETERS | _NOWHERE) - used, found))
        raw = _entries(raw, "", _reader((PARAMETERS | _NOWHERE) - of_experts(method), found))
    raw = _slices(raw, "", method, found)
    if isinstance(raw.get("modules"), Mapping):
        raw["modules"] = {
            name: _slices(module, f"modules.{name}.", method, found) if isinstance(module, Mapping) else module
            for name, module in raw["modules"].items()
        }
    known = raw.get("ignored") or ()
    if isinstance(known, list | tuple) and (found or known):
        raw["ignored"] = list(dict.fromkeys([*known, *found]))
    return raw


Read = Callable[[Mapping[str, Any], str], dict[str, Any]]


def _reader(keys: set[str], found: list[str]) -> Read:
    """Takes the keys out of the parameters of what stands at a place."""

    def read(level: Mapping[str, Any], place: str) -> dict[str, Any]:
        own = level.get("parameters")
        if not isinstance(own, Mapping):
            return dict(level)
        return {**level, "parameters": _without(own, keys, f"{place}parameters.", found)}

    return read


def _select_topk(found: list[str]) -> Read:
    """``select_topk`` is sce's density; one that stands beside it is another method's."""

    def read(level: Mapping[str, Any], place: str) -> dict[str, Any]:
        own = level.get("parameters")
        if not isinstance(own, Mapping) or "select_topk" not in own:
            return dict(level)
        left = _without(own, {"density"}, f"{place}parameters.", found)
        return {**level, "parameters": {"density" if key == "select_topk" else key: value for key, value in left.items()}}

    return read


def _without(level: Mapping[str, Any], keys: set[str], place: str, found: list[str]) -> dict[str, Any]:
    found += [f"{place}{key}" for key, value in level.items() if key in keys and value is not None]
    return {key: value for key, value in level.items() if key not in keys}


def _levels(raw: Mapping[str, Any], place: str, read: Read) -> dict[str, Any]:
    """``read`` on every level that holds for the whole merge: the recipe's, its modules', its slices'."""
    result = read(raw, place)
    if isinstance(result.get("slices"), list | tuple):
        result["slices"] = _each(result["slices"], f"{place}slices", read)
    if isinstance(result.get("modules"), Mapping):
        result["modules"] = {
            name: _levels(module, f"{place}modules.{name}.", read) if isinstance(module, Mapping) else module
            for name, module in result["modules"].items()
        }
    return result


def _entries(raw: Mapping[str, Any], place: str, read: Read) -> dict[str, Any]:
    """``read`` on every level that holds for one model."""
    result = dict(raw)
    if isinstance(result.get("models"), list | tuple):
        result["models"] = _each(result["models"], f"{place}models", read)
    if isinstance(result.get("slices"), list | tuple):
        result["slices"] = _each(result["slices"], f"{place}slices", _sources(read))
    if isinstance(result.get("modules"), Mapping):
        result["modules"] = {
            name: _entries(module, f"{place}modules.{name}.", read) if isinstance(module, Mapping) else module
            for name, module in result["modules"].items()
        }
    return result


def _sources(read: Read) -> Read:
    def of_slice(one: Mapping[str, Any], place: str) -> dict[str, Any]:
        sources = one.get("sources")
        return {**one, "sources": _each(sources, f"{place}sources", read)} if isinstance(sources, list | tuple) else dict(one)

    return of_slice


def _each(entries: Any, place: str, read: Read) -> list[Any]:
    return [read(one, f"{place}[{i}].") if isinstance(one, Mapping) else one for i, one in enumerate(entries)]


def _slices(raw: Mapping[str, Any], place: str, method: Any, found: list[str]) -> dict[str, Any]:
    """Slices without what mergekit reads of none: a residual weight, and the method, where it is the recipe's own."""

    def read(one: Mapping[str, Any], where: str) -> dict[str, Any]:
        keys = {"residual_weight"} | ({"merge_method"} if one.get("merge_method", 0) == method else set())
        return _without(one, keys, where, found)

    result = dict(raw)
    if isinstance(result.get("slices"), list | tuple):
        result["slices"] = _each(result["slices"], f"{place}slices", read)
    return result


def why_ignored(places: Sequence[str], method: str) -> list[str]:
    """What an error says of each of these places, where such keys are mistakes."""
    split = [place.rpartition(".") for place in places]
    return [
        no_effect(where, key, method) if where.endswith("parameters") else f"'{where}{dot}{key}' has no effect; remove it"
        for where, dot, key in split
    ]


class Said(Protocol):
    """What the remarks look at of a recipe."""

    @property
    def merge_method(self) -> str: ...
    @property
    def base_model(self) -> str | None: ...
    @property
    def models(self) -> Sequence[Any]: ...
    @property
    def parameters(self) -> MergeParameters: ...
    @property
    def ignored(self) -> Sequence[str] | None: ...


def remarks(recipe: Said) -> list[str]:
    """Notes on keys that are taken and do nothing, and on those that do here what they do not in mergekit."""
    method, notes = recipe.merge_method, []
    if recipe.ignored:
        notes.append(f"without meaning for {method}, and ignored, as mergekit ignores them: {', '.join(recipe.ignored)}")
    if recipe.parameters.approximate_norm:
        notes.append("approximate_norm has no effect: norms are exact")
    scale = recipe.parameters.given("lambda")
    if scale not in (None, 1.0) and method in OF_MERGEKIT - WITH_LAMBDA:
        notes.append(f"lambda scales the merged edit here; mergekit's {method} has no such parameter and would ignore it")
    listed = any(same_model(entry.model, recipe.base_model) for entry in recipe.models)
    if method in {"linear", "karcher"} and recipe.base_model is not None and not listed:
        notes.append(
            f"the base takes no part in {method} unless it is listed among the models; mergekit adds one that is not listed, as one model more"
        )
    return notes
