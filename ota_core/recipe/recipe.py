"""The merge recipe: what to merge and how. Typed, validated as a whole, YAML in and out; mergekit's keys are understood.

Two levels hold parameters: ``parameters`` of the recipe and ``parameters`` of a model; the model's win. A key that the
method does not use is an error, because an option that changes nothing is a mistake in the recipe.
"""

import math
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from ota_core.errors import RecipeError, raise_all
from ota_core.names import why_unsafe
from ota_core.recipe.parameters import (
    AUTO,
    USED,
    EstimateSettings,
    MergeParameters,
    ModelParameters,
    Strict,
    default,
    of_experts,
)
from ota_core.recipe.yaml_text import dump_yaml, load_yaml, nearest

Method = Literal[
    "ota",
    "linear",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "fisher",
    "slerp",
    "rowspace",
    "passthrough",
    "nearswap",
    "arcee_fusion",
    "ram",
    "ramplus_tl",
    "sce",
    "della",
    "della_linear",
    "multislerp",
    "nuslerp",
    "karcher",
    "model_stock",
]
DType = Literal["float32", "float16", "bfloat16"]
# mergekit's and mergekit-OTA's spellings, and what they are called here.
_SPELLINGS = {"masked_task_vector_merge_method": "masked_merge"}
NEEDS_BASE = {
    "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "rowspace", "slerp", "nearswap", "arcee_fusion",
    "ram", "ramplus_tl", "sce", "della", "della_linear", "model_stock",
}  # fmt: skip
WITHOUT_BASE = {"linear", "karcher", "passthrough"}
"""Methods in which a base takes no part, even where one is named."""
_EXPERTS = {"passthrough": (1, 1), "nuslerp": (2, 2), "nearswap": (1, 2), "arcee_fusion": (1, 2), "model_stock": (2, math.inf)}
"""How many models a method takes, beside a base; of two that it interpolates between, the base may be one."""
NEEDS_MOMENTS = {"ota", "fisher"}
RESERVED_NAMES = ("base", "merged")
OF_REFINE = ("ridge", "input_curvature")
"""Parameters of the row-space regression."""


class ModelEntry(Strict):
    """One expert of the recipe."""

    model: str = Field(description="s3://…, a folder, or a Hugging Face id (org/name@revision).")
    name: str | None = Field(
        None, description="Label in tables and metrics; by default the capability or the last part of the path."
    )
    capability: str | None = Field(
        None, description="The capability that the expert was trained for, if its expert.json does not say."
    )
    parameters: ModelParameters = Field(
        ModelParameters(), description="Of this expert alone; what is left out is as for all experts."
    )


class MergeRecipe(Strict):
    """A validated recipe. ``setting(key, expert)`` gives the value in force, with the method's default where none is given."""

    merge_method: Method = Field(description="How the experts' edits of the base are combined.")
    base_model: str | None = Field(None, description="The model that all experts were fine-tuned from.")
    models: tuple[ModelEntry, ...] = Field(min_length=1, description="The experts.")
    parameters: MergeParameters = Field(
        MergeParameters(), description="Of the method, for all experts; what is left out has its default."
    )
    dtype: DType | None = Field(
        None, description="Data type of the output, by default each tensor's own in the base; arithmetic never depends on it."
    )
    out_dtype: DType | None = Field(None, description="Wins over dtype.")
    tokenizer_source: str = Field("base", description="base, model:<name> or union.")
    scales: str | None = Field(
        None, description="File of learned scales (`ota tune`), beside the recipe or s3://…: a factor for each expert and tensor."
    )

    allow_nonfinite: bool = Field(
        False, description="Merge models that hold infinite numbers or NaN (`--allow-nonfinite`); by default they are an error."
    )

    @model_validator(mode="before")
    @classmethod
    def _understand(cls, raw: Any) -> Any:
        return _mergekit_spellings(raw) if isinstance(raw, dict) else raw

    @model_validator(mode="after")
    def _fits_together(self) -> "MergeRecipe":
        problems = _contradictions(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def setting(self, key: str, expert: int | None = None) -> Any:
        """The value of a parameter for one expert (by position) or, without one, for the whole merge."""
        field = "lambda_" if key == "lambda" else key
        if expert is not None:
            parameters = self.models[expert].parameters
            own = getattr(parameters, field, None)
            if own is not None:
                return own
            # An expert that names one of the two thresholds overrides both of the recipe's.
            if key in {"density", "precond_threshold"} and (parameters.density, parameters.precond_threshold) != (None, None):
                return None
        if key == "rank" and self.setting("compression") != "rank_k":
            return None
        if key in OF_REFINE and not self.refined:
            return None
        value = getattr(self.parameters, field, None)
        if value is None and key == "lambda" and self.refined and key in USED[self.merge_method]:
            return "auto"
        return default(self.merge_method, key) if value is None else value

    @property
    def refined(self) -> bool:
        """Whether a row-space regression follows on what the method merges (docs/methods.md section 8)."""
        return bool((self.parameters.refine or default(self.merge_method, "refine")) == "rowspace")

    @property
    def auto(self) -> bool:
        """Whether λ is found from the row spaces of the task vectors (docs/methods.md section 8)."""
        return "lambda" in USED[self.merge_method] and self.setting("lambda") in AUTO

    @property
    def output_dtype(self) -> DType | None:
        """The data type of the output, or None for each tensor's own in the base."""
        return self.out_dtype or self.dtype

    def allowing_nonfinite(self, allow: bool) -> "MergeRecipe":
        """The same recipe, which with ``allow`` merges infinite numbers and NaN, too."""
        return self.model_copy(update={"allow_nonfinite": True}) if allow else self

    def effective(self) -> dict[str, Any]:
        """Every parameter in force, defaults included: two recipes that say the same in different words are equal here."""
        used = USED[self.merge_method] - {"preconditioner_path", "estimate"}  # known by the digests of second moments
        own = of_experts(self.merge_method)
        return {
            "merge_method": self.merge_method,
            "dtype": self.output_dtype,
            "parameters": {
                key: value
                for key in sorted(used - own)
                # Absent where they change nothing, so that a recipe from before they existed is still the same recipe.
                if ((value := self.setting(key)) is not None or key not in {"rank", *OF_REFINE})
                and (key, value) != ("refine", "none")
            },
            "experts": [{key: self.setting(key, i) for key in sorted(own)} for i in range(len(self.models))],
        } | ({"allow_nonfinite": True} if self.allow_nonfinite else {})

    def ffg(self, expert: int) -> bool:
        """Whether Fast Fisher Grafting masks this expert (docs/methods.md section 3: density 1 means no mask)."""
        if self.merge_method != "ota":
            return False
        density = self.setting("density", expert)
        return self.setting("precond_threshold", expert) is not None or (density is not None and density < 1)

    @property
    def estimates(self) -> EstimateSettings | None:
        """How second moments are estimated where training kept none; None where they are not."""
        return self.parameters.estimate if self.merge_method in NEEDS_MOMENTS else None

    @property
    def adds_up(self) -> bool:
        """Whether the merged task vector is a sum over the experts, not an average: of M experts that agree it is M times each one's."""
        return "lambda" in USED[self.merge_method] and self.setting("normalize") is False and self.merge_method != "ota"

    def to_yaml(self) -> str:
        """The recipe as YAML, with only what it says; ``load_recipe`` reads it back to an equal recipe."""
        return dump_yaml(self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True))


def _mergekit_spellings(raw: dict[str, Any]) -> dict[str, Any]:
    """Translate what mergekit and mergekit-OTA spell otherwise."""
    raw = dict(raw)
    tokenizer = raw.pop("tokenizer", None)
    if isinstance(tokenizer, dict) and set(tokenizer) == {"source"} and "tokenizer_source" not in raw:
        raw["tokenizer_source"] = tokenizer["source"]
    elif tokenizer is not None:
        raw["tokenizer"] = tokenizer
    if isinstance(raw.get("parameters"), dict):
        raw["parameters"] = _parameter_spellings(raw["parameters"])
        if raw.get("merge_method") == "sce" and "density" not in raw["parameters"] and "select_topk" in raw["parameters"]:
            raw["parameters"]["density"] = raw["parameters"].pop("select_topk")
    if isinstance(raw.get("models"), list | tuple):
        raw["models"] = [
            {**entry, "parameters": _parameter_spellings(entry["parameters"])}
            if isinstance(entry, dict) and isinstance(entry.get("parameters"), dict)
            else entry
            for entry in raw["models"]
        ]
    return raw


def _parameter_spellings(raw: dict[str, Any]) -> dict[str, Any]:
    parameters = {_SPELLINGS.get(key, key): value for key, value in raw.items()}
    if isinstance(parameters.get("rank1_approx"), bool) and "compression" not in parameters:
        parameters["compression"] = "rank1" if parameters.pop("rank1_approx") else "none"
    if isinstance(parameters.get("fallback_to_base"), bool) and "fallback" not in parameters:
        parameters["fallback"] = "base" if parameters.pop("fallback_to_base") else "mean"
    # int8_mask only chooses how mergekit stores its masks; it never changes a result.
    parameters.pop("int8_mask", None)
    return parameters


def _given(parameters: BaseModel) -> set[str]:
    names = {name for name, value in parameters if value is not None}
    return {"lambda" if name == "lambda_" else name for name in names}


def _contradictions(recipe: MergeRecipe) -> list[str]:
    method = recipe.merge_method
    used = USED[method]
    problems = [
        f"{where}: '{key}' has no effect with merge_method {method}; remove it ({method} uses: {', '.join(sorted(used))})"
        for where, parameters in [
            ("parameters", recipe.parameters),
            *((f"models[{i}].parameters", entry.parameters) for i, entry in enumerate(recipe.models)),
        ]
        for key in sorted(_given(parameters) - used)
    ]
    problems += [
        f"models[{i}].parameters: '{key}' holds for the whole merge with merge_method {method}; move it to the recipe's parameters"
        for i, entry in enumerate(recipe.models)
        for key in sorted((_given(entry.parameters) & used) - of_experts(method) - {"preconditioner_path"})
    ]
    compression = recipe.setting("compression")
    if "rank" in used and recipe.parameters.rank is not None and compression != "rank_k":
        problems.append(f"parameters: 'rank' has no effect with compression {compression}; remove it, or set compression: rank_k")
    problems += [
        f"parameters: '{key}' has no effect without a row-space regression; remove it, or set refine: rowspace"
        for key in OF_REFINE
        if key in used and getattr(recipe.parameters, key) is not None and not recipe.refined
    ]
    if "estimate" in used and (recipe.setting("missing_curvature") == "estimate") is (recipe.parameters.estimate is None):
        problems.append(
            "parameters: missing_curvature: estimate and estimate, which says how, go together: expected both, such as estimate: {data: texts.jsonl}, or "
            "neither"
        )
    for i in range(len(recipe.models)):
        if method == "ota" and recipe.setting("density", i) is not None and recipe.setting("precond_threshold", i) is not None:
            problems.append(
                f"models[{i}] ({recipe.models[i].model}): both density and precond_threshold are given; they set the same threshold, keep one"
            )
        if method == "ota" and recipe.setting("metric") == "magnitude" and recipe.setting("precond_threshold", i) is not None:
            problems.append(f"models[{i}]: precond_threshold is in units of v·Δ²; with metric magnitude give a density instead")
    if recipe.scales is not None and "lambda" not in used:
        able = ", ".join(sorted(name for name, keys in USED.items() if "lambda" in keys))
        problems.append(
            f"scales: {method} has no merged edit of the base that could be scaled; remove the key, or merge with one of: {able}"
        )
    problems += _base_contradictions(recipe)
    names = [entry.name for entry in recipe.models if entry.name]
    problems += [
        f"models: the name '{name}' is given twice; names label the results"
        for name in sorted({n for n in names if names.count(n) > 1})
    ]
    problems += [
        f"models: the name {n!r} cannot be a file's name: {why}; choose another label"
        for n in names
        if (why := why_unsafe(n) or ("it holds a slash" if "/" in n else None))
    ]
    problems += [f"models: the name '{n}' is kept for another model; choose another label" for n in names if n in RESERVED_NAMES]
    problems += [
        f"models: the name '{n}' has a slash; names also label files, write {n.replace('/', '-')!r}" for n in names if "/" in n
    ]
    source = recipe.tokenizer_source
    if source not in {"base", "union"} and not (source.startswith("model:") and source.removeprefix("model:")):
        problems.append(f"tokenizer_source: got '{source}', expected base, model:<name> or union")
    if method == "slerp" and len(recipe.models) not in {1, 2}:
        problems.append(f"slerp interpolates between two models, the recipe names {len(recipe.models)}")
    return problems + _number_problems(recipe)


def _number_problems(recipe: MergeRecipe) -> list[str]:
    """What is wrong with the numbers of models and of parameters that one method alone restricts."""
    method, count, t = recipe.merge_method, len(recipe.models), recipe.parameters.t
    problems = []
    if method == "slerp" and (t is None or t > 1):
        problems.append(
            f"parameters: slerp needs 't', the position between the two models in [0, 1]{'' if t is None else f', got {t:g}'}"
        )
    if method == "nearswap" and t is None:
        problems.append("parameters: nearswap needs 't', the largest change of a weight, such as 0.0001")
    least, most = _EXPERTS.get(method, (1, math.inf))
    if not least <= count <= most:
        expected = f"{least}" if least == most else f"{least} or {most}" if most < math.inf else f"at least {least}"
        problems.append(f"models: {method} takes {expected}, the recipe names {count}")
    for i in range(count) if method in {"della", "della_linear"} else ():
        density, epsilon = recipe.setting("density", i), recipe.setting("epsilon", i)
        if density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            problems.append(
                f"models[{i}]: {method} keeps edits with chances from density - epsilon to density + epsilon, which must lie between 0 and 1; got density "
                f"{density:g} and epsilon {epsilon:g}"
            )
    return problems


def _base_contradictions(recipe: MergeRecipe) -> list[str]:
    if recipe.base_model is not None:
        return []
    method = recipe.merge_method
    if recipe.refined and (method not in NEEDS_BASE or method == "slerp"):
        return ["base_model is missing: refine: rowspace works on task vectors, the difference of each expert to the base"]
    if method in NEEDS_BASE and not (method == "slerp" and len(recipe.models) == 2):
        return [f"base_model is missing: {method} works on task vectors, the difference of each expert to the base"]
    if method in {"multislerp", "nuslerp"} and recipe.setting("lambda") != 1.0:
        return ["base_model is missing: parameters.lambda acts on task vectors, which need the base"]
    if method in {"multislerp", "nuslerp"} and recipe.scales is not None:
        return ["base_model is missing: scales act on task vectors, which need the base"]
    if method != "ota":
        return []
    problems = []
    if recipe.scales is not None:
        problems.append("base_model is missing: scales act on task vectors, which need the base")
    if any(recipe.ffg(i) for i in range(len(recipe.models))):
        problems.append("base_model is missing: FFG (density or precond_threshold) needs the base to know each expert's edits")
    for key, neutral in (
        ("lambda", (1.0,)), ("masked_merge", ("precond",)), ("rescale", (False,)), ("missing_curvature", ("error", "estimate"))
    ):  # fmt: skip
        if recipe.setting(key) not in neutral:
            problems.append(f"base_model is missing: parameters.{key} acts on task vectors, which need the base")
    return problems


def parse_recipe(raw: Any, where: str = "recipe") -> MergeRecipe:
    """Validate a recipe. Raises RecipeError that lists every problem: unknown keys with the nearest known, values out of range."""
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: expected a mapping with merge_method, base_model and models, got {type(raw).__name__}")
    try:
        return MergeRecipe.model_validate(raw)
    except ValidationError as error:
        problems: list[str] = []
        items = [item for item in error.errors() if not (item["type"] == "too_short" and item["input"])]
        for item in items:
            problems += [f"{where}: {line}" for line in _explain(dict(item))]
        raise_all(problems, RecipeError)
        raise


def load_recipe(path: Path) -> MergeRecipe:
    """Read and validate a recipe file. Raises RecipeError."""
    return parse_recipe(load_yaml(path), str(path))


def _explain(item: dict[str, Any]) -> list[str]:
    """One pydantic problem in the recipe's own words."""
    location = item["loc"]
    where = (
        "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
        .lstrip(".")
        .replace("lambda_", "lambda")
    )
    if item["type"] == "extra_forbidden":
        key = str(location[-1])
        if key in {"slices", "modules"}:
            return [f"{where}: layer-wise assembly is not supported; name whole models under 'models'"]
        return [f"unknown key '{where}'; {nearest(key, _known_keys(location))}"]
    if item["type"] == "missing":
        return [f"the key '{where}' is missing"]
    if item["type"] == "literal_error" and where == "merge_method":
        return [f"unknown merge_method {item['input']!r}; {nearest(str(item['input']), get_args(Method))}"]
    if item["type"] == "value_error":
        return str(item["ctx"]["error"]).split("\n")
    if isinstance(item["input"], float) and math.isnan(item["input"]):
        return [f"{where}: got NaN, expected a number"]
    if isinstance(item["input"], list) and where.rpartition(".")[0].endswith("parameters"):
        return [f"{where}: got a list; per-layer lists and filters are not supported, give one value"]
    message = item["msg"][0].lower() + item["msg"][1:]
    return [f"{where}: got {item['input']!r}; {message}"]


def _known_keys(location: tuple[Any, ...]) -> set[str]:
    level: type[BaseModel] = MergeRecipe
    if "parameters" in location[:-1]:
        level = ModelParameters if location[0] == "models" else MergeParameters
    elif location[0] == "models":
        level = ModelEntry
    if "estimate" in location[:-1]:
        level = EstimateSettings
    spellings = set(_SPELLINGS) | {"rank1_approx", "fallback_to_base", "select_topk"} if level is MergeParameters else set()
    return {"lambda" if name == "lambda_" else name for name in level.model_fields} | spellings
