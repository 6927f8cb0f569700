"""How merges are called: by their method and every setting that is not its default."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ota_core.recipe.estimate import EstimateSettings
from ota_core.recipe.parameters import default
from ota_core.recipe.recipe import MergeRecipe

FFG_SETTINGS = ("density", "precond_threshold", "metric", "scope", "mask_curvature")
"""What says which elements of an expert FFG keeps."""

_NAME = 200
"""Characters."""
_FIRST = ("density", "precond_threshold", "compression", "metric", "power", "masked_merge", "lambda", "t", "weight")
_SHORT = {"density": "rho", "precond_threshold": "tau"}


def merge_name(recipe: MergeRecipe) -> str:
    """A short name that says what is merged, for example ``ota math+code rho=0.40``."""
    experts = "+".join(entry.name or entry.capability or short_name(entry.model) for entry in recipe.models)
    method, *settings = merge_label(recipe).split(" ")
    # MLflow knows the experts besides; what sets this merge apart from others of them is in the settings.
    room = max(_NAME - len(" ".join([method, *settings])) - 1, _NAME // 4)
    return " ".join([method, experts[:room], *settings])[:_NAME].replace("'", "").replace("`", "")


def merge_label(recipe: MergeRecipe) -> str:
    """How it is merged, for tables and charts that name the experts anyway: ``ota rho=0.40``.

    Every setting that is not the method's default, so that two merges of the same experts do not read alike. What varies most
    comes first: that is left where a name is cut.
    """
    settings = settings_of(recipe)
    said = unusual(recipe.merge_method, settings)
    keys = [*(key for key in _FIRST if key in said), *(key for key in said if key not in {*_FIRST, "rank"})]
    learned = ["scales"] if recipe.scales else []
    return " ".join([recipe.merge_method, *(_said(key, said[key], settings.get("rank")) for key in keys), *learned])


def _said(key: str, value: Any, rank: int | None) -> str:
    """One setting in a label; of several experts' values that differ all, in the experts' order."""
    if key == "compression":
        return f"{value}={rank}" if rank else str(value)
    spelling = _decimals if key == "density" else spell
    values = value if isinstance(value, tuple) else (value,)
    return f"{_SHORT.get(key, key)}={'/'.join('-' if one is None else spelling(one) for one in values)}"


def _decimals(value: float) -> str:
    """At least two decimals, so that names line up: 0.40, 0.005."""
    return f"{value:.2f}" if round(value, 2) == value else spell(value)


def short_name(model: str) -> str:
    """The part of a path that names the expert: the capability in the S3 layout …/<capability>/<expert>."""
    parts = [part for part in model.split("@")[0].split("/") if part and part != "s3:"]
    last = parts[-1] if parts else model
    return parts[-2] if len(parts) > 1 and last[:1].isdigit() else last


def settings_of(recipe: MergeRecipe) -> dict[str, Any]:
    """See ``Cell.settings``."""
    effective = recipe.effective()
    found: dict[str, Any] = {"merge_method": recipe.merge_method, **effective["parameters"]}
    for key in dict.fromkeys(key for expert in effective["experts"] for key in expert):
        values = tuple(expert.get(key) for expert in effective["experts"])
        found[key] = values[0] if all(value == values[0] for value in values) else values
    if recipe.merge_method == "ota" and not any(recipe.ffg(i) for i in range(len(recipe.models))):
        for key in FFG_SETTINGS:
            found.pop(key, None)
        found["density"] = 1.0
    if recipe.estimates is not None:
        found["missing_curvature"], found["estimate"] = None, spell_estimate(recipe.estimates)
    return {key: value for key, value in found.items() if value is not None}


def spell_estimate(settings: EstimateSettings) -> str:
    """How second moments are estimated, in a word for labels: the number of documents, and what else is not the default."""
    given = settings.model_dump(
        mode="json", exclude_defaults=True, exclude={"data", "data_dir", "samples", "random_tokens", "replace"}
    )
    what = "random" if settings.random_tokens else Path(settings.data or "").name.removesuffix(".jsonl")
    return "/".join(
        [str(settings.samples), what, *(f"{key}:{'none' if value is None else spell(value)}" for key, value in given.items())]
    )


def unusual(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of the settings that ``settings_of`` gives those that are not the method's defaults: what tells this merge from a plain one."""
    usual = {key: default(method, key) for key in settings} | {"merge_method": method, "density": 1.0}
    return {key: value for key, value in settings.items() if value != usual[key]}


def spell(value: Any) -> str:
    """A parameter's value as YAML has it, 1.0 as 1; of several experts all values."""
    if isinstance(value, tuple):
        return "/".join(map(spell, value))
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)  # every digit: two values never read alike
