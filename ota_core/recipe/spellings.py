"""What mergekit and mergekit-OTA spell otherwise, translated before a recipe is checked."""

from collections.abc import Mapping
from typing import Any

from ota_core.recipe.ignored import take_ignored
from ota_core.recipe.slices import same_model, sources_in
from ota_core.recipe.tokenizer import tokenizer_spelling

# mergekit's and mergekit-OTA's spellings, and what they are called here.
SPELLINGS: dict[Any, str] = {"masked_task_vector_merge_method": "masked_merge", "random_seed": "seed"}
_METRICS = {"fisher": "curvature"}


def mergekit_spellings(raw: dict[str, Any]) -> dict[str, Any]:
    """The recipe in the words of ``MergeRecipe``. raw: as the YAML has it; what has another form stays as it is, for the checks to name."""
    raw = {key: value for key, value in raw.items() if not str(key).startswith("x-")}  # holders of YAML anchors
    for key in (
        "out_path",
        "name",
    ):  # how other documents of the file call the result, which the command line has written elsewhere
        raw.pop(key, None)
    raw = {key: value for key, value in raw.items() if value is not None or key not in {"modules", "tokenizer_source"}}
    tokenizer_spelling(raw, _model_name)
    raw = _of_types(_spelled(raw))
    _name_tokenizer(raw)
    if isinstance(raw.get("modules"), Mapping):
        raw["modules"] = {name: _spelled(module) for name, module in raw["modules"].items()}
    raw = take_ignored(raw)
    if isinstance(raw.get("modules"), Mapping) and set(raw["modules"]) == {"default"}:
        raw |= _of_default(raw.pop("modules")["default"], raw.get("parameters"))
    if "slices" in raw or "modules" in raw:
        raw["models"] = _sliced_models(raw)
    if raw.get("merge_method") == "ota":
        raw = _of_ota(raw)
    return _one_compression(raw)


def _name_tokenizer(raw: dict[str, Any]) -> None:
    """mergekit names the model of the tokenizer bare; here it is model:<name>, or base."""
    if "tokenizer_source" in raw:
        raw["tokenizer_source"] = _named_source(raw["tokenizer_source"], raw)
    if isinstance(raw.get("tokenizer"), Mapping):
        raw["tokenizer"] = {**raw["tokenizer"], "source": _named_source(raw["tokenizer"].get("source"), raw)}


def _named_source(source: Any, raw: Mapping[str, Any]) -> Any:
    if not isinstance(source, str) or source in {"base", "union"} or source.startswith("model:"):
        return source
    if same_model(source, raw.get("base_model")):
        return "base"
    entries = raw.get("models")
    for entry in entries if isinstance(entries, list | tuple) else ():
        if isinstance(entry, Mapping) and (entry.get("name") == source or same_model(entry.get("model"), source)):
            return f"model:{entry['model']}"
    named = [model for model, _ in sources_in(raw) if same_model(model, source)]
    return f"model:{named[0]}" if named else source


def _model_name(value: Any) -> Any:
    """A model that mergekit wrote as a mapping, of path and revision, or of a model and a LoRA adapter on it, as one word."""
    if not isinstance(value, Mapping):
        return value
    if isinstance(value.get("path"), str) and set(value) <= {"path", "revision"}:
        return f"{value['path']}@{value['revision']}" if value.get("revision") else value["path"]
    if set(value) <= {"model", "lora", "override_architecture"} and value.get("override_architecture") is None:
        parts = [_model_name(value.get(key)) for key in ("model", "lora") if value.get(key) is not None]
        if parts and all(isinstance(part, str) for part in parts):
            return "+".join(parts)
    return value


def _of_types(raw: dict[str, Any]) -> dict[str, Any]:
    """Types as torch names them; float64 for the arithmetic alone, which is done in it always."""
    for key in ("dtype", "out_dtype"):
        if isinstance(raw.get(key), str):
            raw[key] = raw[key].removeprefix("torch.")
    if raw.get("dtype") == "float64" and raw.get("out_dtype"):
        del raw["dtype"]
    return raw


def _of_default(module: Any, parameters: Any) -> dict[str, Any]:
    """What mergekit calls the module ``default`` is a model with layers in one place."""
    if not isinstance(module, Mapping) or not isinstance(module.get("parameters", {}), Mapping):
        return {"modules": {"default": module}}
    above = parameters if isinstance(parameters, Mapping) else {}
    return {
        **{key: value for key, value in module.items() if key in {"slices", "models"}},
        "parameters": {**above, **module.get("parameters", {})},
    }


def _spelled(value: Any) -> Any:
    """What stands under models, slices, sources or modules, with every ``parameters`` in our words."""
    if isinstance(value, list | tuple):
        return [_spelled(one) for one in value]
    if not isinstance(value, Mapping):
        return value
    spelled = {key: _spelled(one) if key in {"models", "slices", "sources"} else one for key, one in value.items()}
    spelled |= {key: _model_name(spelled[key]) for key in ("model", "base_model") if key in spelled}
    if "parameters" in spelled:
        spelled["parameters"] = parameter_spellings(spelled["parameters"])
    return {key: one for key, one in spelled.items() if key not in {"parameters", "models", "slices"} or one is not None}


def parameter_spellings(raw: Any) -> Any:
    """Parameters of one level in our words."""
    if not isinstance(raw, Mapping):
        return raw
    parameters: dict[str, Any] = {str(SPELLINGS.get(key, key)): value for key, value in raw.items()}
    if isinstance(parameters.get("rank1_approx"), bool) and "compression" not in parameters:
        approx = parameters.pop("rank1_approx")
        parameters["compression"] = "rank1" if approx else "rank_k" if _above_one(parameters) else "none"
    elif "compression" not in parameters and _above_one(parameters):
        parameters["compression"] = "rank_k"
    elif "compression" not in parameters and parameters.get("rank") == 1 and not isinstance(parameters["rank"], bool):
        parameters["compression"] = "rank1"
        del parameters["rank"]
    if isinstance(parameters.get("fallback_to_base"), bool) and "fallback" not in parameters:
        parameters["fallback"] = "base" if parameters.pop("fallback_to_base") else "mean"
    if isinstance(parameters.get("metric"), str):
        parameters["metric"] = _METRICS.get(parameters["metric"], parameters["metric"])
    if "masked_task_vector_merge_method" in raw and parameters.get("masked_merge") in {"linear", "ties"}:
        # The published program divides by all experts there, not by those that keep the element.
        parameters.setdefault("denominator", "all")
    # int8_mask only chooses how mergekit stores its masks; it never changes a result.
    parameters.pop("int8_mask", None)
    return parameters


def _above_one(parameters: Mapping[str, Any]) -> bool:
    rank = parameters.get("rank")
    return isinstance(rank, int) and not isinstance(rank, bool) and rank > 1


def _one_compression(raw: dict[str, Any]) -> dict[str, Any]:
    """A compression that every model names alike, as published recipes do, is the merge's."""
    models = raw.get("models")
    if not isinstance(models, list | tuple) or not models:
        return raw
    base = raw.get("base_model")
    own: list[Mapping[str, Any]] = [
        one["parameters"] if isinstance(one.get("parameters"), Mapping) else {}
        for one in models
        if isinstance(one, Mapping) and not same_model(one.get("model"), base)
    ]
    wanted = own[0] if own else {}
    shared = {
        key: wanted[key] for key in ("compression", "rank") if wanted.get(key) and all(p.get(key) == wanted[key] for p in own)
    }
    parameters = raw.get("parameters") or {}
    if not shared or not isinstance(parameters, Mapping):
        return raw
    left = [
        {**one, "parameters": {k: v for k, v in one["parameters"].items() if k not in shared}}
        if isinstance(one, Mapping) and isinstance(one.get("parameters"), Mapping)
        else one
        for one in models
    ]
    return raw | {"models": left, "parameters": {**parameters, **shared}}


def _of_ota(raw: dict[str, Any]) -> dict[str, Any]:
    """``weight`` says what tensors without curvature weigh, so that these are averaged."""
    models = raw.get("models")
    own = [one.get("parameters") for one in models if isinstance(one, Mapping)] if isinstance(models, list | tuple) else []
    parameters = raw.get("parameters", {})
    levels = [level for level in [parameters, *own] if isinstance(level, Mapping)]
    if any("weight" in level for level in levels) and isinstance(parameters, Mapping):
        raw["parameters"] = {"missing_curvature": "mean", **parameters}
    return raw


def _sliced_models(raw: Mapping[str, Any]) -> list[Any]:
    """The models that slices name, each once. ``models`` beside slices may name and label them; second moments are a whole model's."""
    given = raw.get("models")
    entries = list(given) if isinstance(given, list | tuple) else []
    for model, parameters in sources_in(raw):
        known = [one for one in entries if isinstance(one, Mapping) and same_model(one.get("model"), model)]
        if not known:
            entries.append({"model": model})
        path = parameters.get("preconditioner_path") if isinstance(parameters, Mapping) else None
        if path is not None:
            place = next(i for i, one in enumerate(entries) if isinstance(one, Mapping) and same_model(one.get("model"), model))
            own = dict(entries[place].get("parameters") or {})
            entries[place] = {**entries[place], "parameters": {"preconditioner_path": path} | own}
    return entries
