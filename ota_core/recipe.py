"""The merge recipe: what to merge and how. Typed, validated as a whole, YAML in and out; mergekit's keys are understood.

Two levels hold parameters: ``parameters`` of the recipe and ``parameters`` of a model; the model's win. A key that the
method does not use is an error, because an option that changes nothing is a mistake in the recipe.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from ota_core.errors import RecipeError, raise_all
from ota_core.recipe_yaml import dump_yaml, load_yaml, nearest

Method = Literal[
    "ota", "linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "fisher", "slerp"
]
DType = Literal["float32", "float16", "bfloat16"]


def _no_switch(value: Any) -> Any:
    """``density: true`` would otherwise pass as 1.0."""
    if isinstance(value, bool):
        raise PydanticCustomError("no_number", "expected a number")
    return value


Number = Annotated[float, BeforeValidator(_no_switch)]
Finite = Annotated[Number, Field(allow_inf_nan=False)]
NonNegative = Annotated[Number, Field(ge=0, allow_inf_nan=False)]
Density = Annotated[Number, Field(gt=0, le=1)]

# mergekit's and mergekit-OTA's spellings, and what they are called here.
_SPELLINGS = {"masked_task_vector_merge_method": "masked_merge"}


_DEFAULTS: dict[str, Any] = {
    "lambda": 1.0, "power": 0.5, "scope": "global", "metric": "curvature", "mask_curvature": "merge", "compression": "none", "rank": 4,
    "bias_correction": False, "normalise": "none", "epsilon": 0.0, "denominator": "kept", "fallback": "base",
    "masked_merge": "precond", "rescale": False, "missing_curvature": "error", "seed": 0, "scaling_factor": 1.0, "weight": 1.0,
    "gamma": 0.01, "density": 1.0, "normalize": False,
}  # fmt: skip
_METHOD_DEFAULTS: dict[tuple[str, str], Any] = {
    ("ota", "density"): None,
    ("linear", "normalize"): True,
    ("ties", "normalize"): True,
    ("dare_linear", "rescale"): True,
    ("dare_ties", "rescale"): True,
}


def default(method: str, key: str) -> Any:
    """The value of a parameter that a recipe does not give. mergekit's defaults for mergekit's methods."""
    return _METHOD_DEFAULTS.get((method, key), _DEFAULTS.get(key))


def _told(key: str, text: str) -> str:
    """A form's text on a parameter, with its default, which the form itself does not know: null there is the method's own."""
    others: dict[str, list[str]] = {}
    for (method, name), value in _METHOD_DEFAULTS.items():
        if name == key:
            others.setdefault(_word(value), []).append(method)
    exceptions = "".join(f", {value} for {' and '.join(methods)}" for value, methods in others.items())
    return f"{text}; {_word(_DEFAULTS.get(key))} by default{exceptions}."


def _word(value: Any) -> str:
    """A value as YAML and the form spell it, none where there is none."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class ExpertParameters(_Strict):
    """Parameters that may differ between experts. Each may also be given once for all in the recipe's ``parameters``."""

    density: Density | None = Field(
        None, description=_told("density", "Fraction of the expert's elements that is kept, in (0, 1]")
    )
    precond_threshold: NonNegative | None = Field(
        None, description=_told("precond_threshold", "FFG threshold in units of v·Δ², instead of a density")
    )
    scaling_factor: NonNegative | None = Field(
        None, description=_told("scaling_factor", "Factor on this expert's curvature weight (ota)")
    )
    weight: Finite | None = Field(None, description=_told("weight", "Weight of this expert (all methods but ota and slerp)"))
    gamma: Annotated[Number, Field(ge=0, lt=1)] | None = Field(
        None, description=_told("gamma", "Fraction of largest edits dropped (breadcrumbs)")
    )


class ModelParameters(ExpertParameters):
    """``parameters`` of one model."""

    preconditioner_path: str | None = Field(
        None, description="File with this expert's second moments; by default the one found in its folder."
    )


class MergeParameters(ExpertParameters):
    """``parameters`` of the recipe. None means: the method's default."""

    lambda_: Finite | None = Field(None, alias="lambda", description=_told("lambda", "Scale λ of the merged task vector"))
    power: NonNegative | None = Field(None, description=_told("power", "Exponent of the curvature in an expert's weight"))
    scope: Literal["global", "per_tensor"] | None = Field(
        None, description=_told("scope", "Whether a density holds over the whole expert")
    )
    metric: Literal["curvature", "magnitude"] | None = Field(
        None, description=_told("metric", "What FFG ranks by: √v̂·|Δ| or |Δ|")
    )
    mask_curvature: Literal["merge", "full"] | None = Field(
        None, description=_told("mask_curvature", "Second moments that FFG scores with: those of the merge, or in full")
    )
    compression: Literal["none", "rank1", "log8", "rank_k"] | None = Field(
        None, description=_told("compression", "Compression of the second moments")
    )
    rank: Annotated[int, BeforeValidator(_no_switch), Field(ge=1)] | None = Field(
        None, description=_told("rank", "Rank of compression rank_k")
    )
    bias_correction: bool | None = Field(None, description=_told("bias_correction", "Divide v by 1 − β₂^t"))
    normalise: Literal["none", "global"] | None = Field(
        None, description=_told("normalise", "Divide curvature weights by the expert's mean")
    )
    epsilon: NonNegative | None = Field(None, description=_told("epsilon", "Added to every curvature weight before masking"))
    denominator: Literal["kept", "all"] | None = Field(
        None, description=_told("denominator", "Experts whose weights the denominator sums")
    )
    fallback: Literal["base", "mean"] | None = Field(
        None, description=_told("fallback", "Value of elements that no expert keeps")
    )
    masked_merge: Literal["precond", "linear", "ties"] | None = Field(
        None, description=_told("masked_merge", "How masked task vectors combine")
    )
    rescale: bool | None = Field(
        None, description=_told("rescale", "Scale masked task vectors back: to their norm (ota), by 1/density (dare)")
    )
    missing_curvature: Literal["error", "mean"] | None = Field(
        None,
        description=_told("missing_curvature", "What becomes of tensors that moved but have no curvature: an error, or the mean"),
    )
    normalize: bool | None = Field(
        None, description=_told("normalize", "Divide by the sum of the weights (all methods but ota, fisher and slerp)")
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(None, description=_told("seed", "Seed of DARE's random masks"))
    t: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        None, description="Position between the two models (slerp, which needs it)."
    )


_FFG = {"density", "precond_threshold", "scope", "metric", "mask_curvature"}
_CURVATURE = {"compression", "rank", "bias_correction", "missing_curvature"}
_USED: dict[str, set[str]] = {
    "ota": _FFG | _CURVATURE | {"scaling_factor", "power", "normalise", "epsilon", "denominator", "fallback", "masked_merge",
                                "rescale", "lambda", "preconditioner_path"},
    "fisher": _CURVATURE | {"weight", "preconditioner_path"},
    "linear": {"weight", "normalize"},
    "task_arithmetic": {"weight", "normalize", "lambda"},
    "ties": {"weight", "density", "normalize", "lambda"},
    "dare_linear": {"weight", "density", "normalize", "lambda", "rescale", "seed"},
    "dare_ties": {"weight", "density", "normalize", "lambda", "rescale", "seed"},
    "breadcrumbs": {"weight", "density", "gamma", "normalize", "lambda"},
    "breadcrumbs_ties": {"weight", "density", "gamma", "normalize", "lambda"},
    "slerp": {"t"},
}  # fmt: skip
NEEDS_BASE = {"task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "slerp"}
NEEDS_MOMENTS = {"ota", "fisher"}
RESERVED_NAMES = ("base", "merged")


class ModelEntry(_Strict):
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


class MergeRecipe(_Strict):
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
        value = getattr(self.parameters, field, None)
        return default(self.merge_method, key) if value is None else value

    @property
    def output_dtype(self) -> DType | None:
        """The data type of the output, or None for each tensor's own in the base."""
        return self.out_dtype or self.dtype

    def effective(self) -> dict[str, Any]:
        """Every parameter in force, defaults included: two recipes that say the same in different words are equal here."""
        used = _USED[self.merge_method] - {"preconditioner_path"}
        own = {key for key in used if key in ExpertParameters.model_fields}
        return {
            "merge_method": self.merge_method,
            "dtype": self.output_dtype,
            "parameters": {key: value for key in sorted(used - own) if (value := self.setting(key)) is not None or key != "rank"},
            "experts": [{key: self.setting(key, i) for key in sorted(own)} for i in range(len(self.models))],
        }

    def ffg(self, expert: int) -> bool:
        """Whether Fast Fisher Grafting masks this expert (methods.md section 3: density 1 means no mask)."""
        if self.merge_method != "ota":
            return False
        density = self.setting("density", expert)
        return self.setting("precond_threshold", expert) is not None or (density is not None and density < 1)

    @property
    def adds_up(self) -> bool:
        """Whether the merged task vector is a sum over the experts, not an average: of M experts that agree it is M times each one's."""
        return "lambda" in _USED[self.merge_method] and self.setting("normalize") is False and self.merge_method != "ota"

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
    used = _USED[method]
    problems = [
        f"{where}: '{key}' has no effect with merge_method {method}; remove it ({method} uses: {', '.join(sorted(used))})"
        for where, parameters in [
            ("parameters", recipe.parameters),
            *((f"models[{i}].parameters", entry.parameters) for i, entry in enumerate(recipe.models)),
        ]
        for key in sorted(_given(parameters) - used)
    ]
    compression = recipe.setting("compression")
    if "rank" in used and recipe.parameters.rank is not None and compression != "rank_k":
        problems.append(f"parameters: 'rank' has no effect with compression {compression}; remove it, or set compression: rank_k")
    for i in range(len(recipe.models)):
        if method == "ota" and recipe.setting("density", i) is not None and recipe.setting("precond_threshold", i) is not None:
            problems.append(
                f"models[{i}] ({recipe.models[i].model}): both density and precond_threshold are given; they set the same threshold, keep one"
            )
        if method == "ota" and recipe.setting("metric") == "magnitude" and recipe.setting("precond_threshold", i) is not None:
            problems.append(f"models[{i}]: precond_threshold is in units of v·Δ²; with metric magnitude give a density instead")
    problems += _base_contradictions(recipe)
    names = [entry.name for entry in recipe.models if entry.name]
    problems += [
        f"models: the name '{name}' is given twice; names label the results"
        for name in sorted({n for n in names if names.count(n) > 1})
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
    if method == "slerp" and recipe.parameters.t is None:
        problems.append("parameters: slerp needs 't', the position between the two models in [0, 1]")
    return problems


def _base_contradictions(recipe: MergeRecipe) -> list[str]:
    if recipe.base_model is not None:
        return []
    method = recipe.merge_method
    if method in NEEDS_BASE and not (method == "slerp" and len(recipe.models) == 2):
        return [f"base_model is missing: {method} works on task vectors, the difference of each expert to the base"]
    if method != "ota":
        return []
    problems = []
    if any(recipe.ffg(i) for i in range(len(recipe.models))):
        problems.append("base_model is missing: FFG (density or precond_threshold) needs the base to know each expert's edits")
    for key, neutral in (("lambda", 1.0), ("masked_merge", "precond"), ("rescale", False), ("missing_curvature", "error")):
        if recipe.setting(key) != neutral:
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
    spellings = set(_SPELLINGS) | {"rank1_approx", "fallback_to_base"} if level is MergeParameters else set()
    return {"lambda" if name == "lambda_" else name for name in level.model_fields} | spellings
