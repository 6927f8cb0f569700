"""The merge recipe: what to merge and how. Typed, validated as a whole, YAML in and out; mergekit's keys are understood.

Two levels hold parameters: ``parameters`` of the recipe and ``parameters`` of a model; the model's win. A key that the
method does not use is an error, because an option that changes nothing is a mistake in the recipe.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from ota_core.addresses import places_of_secrets
from ota_core.errors import RecipeError, raise_all
from ota_core.names import why_unsafe
from ota_core.reading import cut
from ota_core.recipe.checks import as_written, of_one_method, of_slices
from ota_core.recipe.explain import explain
from ota_core.recipe.identity import later_keys
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
from ota_core.recipe.slices import Module, Slice, base_range, same_model
from ota_core.recipe.spellings import mergekit_spellings
from ota_core.recipe.varying import Varying, least
from ota_core.recipe.yaml_text import dump_yaml, lines_of, parse_documents, read_text

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
    "ffg",
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
NEEDS_BASE = {
    "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "rowspace", "slerp", "nearswap", "arcee_fusion",
    "ram", "ramplus_tl", "sce", "della", "della_linear", "model_stock", "ffg",
}  # fmt: skip
WITHOUT_BASE = {"linear", "karcher", "passthrough"}
"""Methods in which a base takes no part, even where one is named."""
NEEDS_MOMENTS = {"ota", "fisher", "ffg"}
FFG = {"ota", "ffg"}
"""Methods with Fast Fisher Grafting: ``ffg`` grafts a single expert's masked edit onto the base."""
KEEPS_BASE = {"fisher", "slerp", "nearswap", "arcee_fusion"} | WITHOUT_BASE
"""Methods in which the base counts when it is listed among the models; all others work on edits of it, and it has none."""
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
    slices: tuple[Slice, ...] | None = Field(None, description="Ranges of layers that the result is put together from.")
    modules: dict[str, Module] | None = Field(None, description="The same for each part of a model with layers of its own.")
    parameters: MergeParameters = Field(
        MergeParameters(), description="Of the method, for all experts; what is left out has its default."
    )
    dtype: DType | None = Field(
        None, description="Data type of the output, by default each tensor's own in the base; arithmetic never depends on it."
    )
    out_dtype: DType | None = Field(None, description="Wins over dtype.")
    tokenizer_source: str = Field("base", description="base, model:<name> or union.")
    chat_template: str | None = Field(
        None,
        description="Of the result: auto, the models' most common; chatml, llama3, alpaca or mistral; or a Jinja template. By default the tokenizer's own.",
    )
    scales: str | None = Field(
        None, description="File of learned scales (`ota tune`), beside the recipe or s3://…: a factor for each expert and tensor."
    )
    ignore_config_differences: tuple[str, ...] | None = Field(
        None, description="Settings of config.json that may differ between the models, such as rope_theta; others are refused."
    )

    allow_nonfinite: bool | None = Field(
        None, description="Merge models that hold infinite numbers or NaN (`--allow-nonfinite`); by default they are an error."
    )

    @model_validator(mode="before")
    @classmethod
    def _understand(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        if held := list(places_of_secrets(raw)):
            raise ValueError("\n".join(f"{place}: {NO_SECRETS}" for place in held))
        return mergekit_spellings(raw)

    @model_validator(mode="after")
    def _fits_together(self) -> "MergeRecipe":
        places = range(len(self.models))
        base = self.base_model if self.merge_method not in KEEPS_BASE else None
        kept = [i for i in places if not same_model(self.models[i].model, base)] or list(places)
        object.__setattr__(self, "models", tuple(self.models[i] for i in kept))  # frozen for everybody else
        problems = as_written(self.problems(), kept)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def setting(self, key: str, expert: int | None = None) -> Any:
        """The value of a parameter for one expert (by position) or, without one, for the whole merge; a ``Varying`` where it differs between tensors."""
        if key == "rank" and self.setting("compression", expert) != "rank_k":
            return None
        if expert is not None:
            parameters = self.models[expert].parameters
            own = parameters.given(key)
            if own is not None:
                return own.before(self._common(key)) if isinstance(own, Varying) else own
            # An expert that names one of the two thresholds overrides both of the recipe's.
            if key in {"density", "precond_threshold"} and {"density", "precond_threshold"} & parameters.given_keys():
                return None
        return self._common(key)

    def _common(self, key: str) -> Any:
        """The value of a parameter for all experts that name none of their own."""
        if key in OF_REFINE and not self.refined:
            return None
        value = self.parameters.given(key)
        if value is None and key == "lambda" and self.refined and key in USED[self.merge_method]:
            return "auto"
        own = default(self.merge_method, key)
        return own if value is None else value.before(own) if isinstance(value, Varying) else value

    @property
    def sliced(self) -> bool:
        """Whether the result is put together from ranges of layers."""
        return self.slices is not None or self.modules is not None

    @property
    def varies(self) -> bool:
        """Whether tensors differ in what is merged of them, or how: by slices, gradients or filters."""
        return self.sliced or any(one.varying for one in (self.parameters, *(entry.parameters for entry in self.models)))

    def check_uniform(self, what: str) -> None:
        """Raise RecipeError where ``what`` is asked for, and values differ between tensors."""
        if self.varies:
            seen = "slices" if self.sliced else "values that differ between tensors"
            raise RecipeError(
                f"{what} takes whole models and one value for each key, this recipe has {seen}; `ota merge` takes it"
            )

    def at(self, tensor: str, position: float) -> "MergeRecipe":
        """The recipe of one tensor, whose layer lies at this position of its slice (0 … 1): single values everywhere. Not checked again."""
        models = tuple(entry.model_copy(update={"parameters": entry.parameters.at(tensor, position)}) for entry in self.models)
        return self.model_copy(update={"parameters": self.parameters.at(tensor, position), "models": models})

    def of_slice(self, one: Slice) -> "MergeRecipe":
        """The recipe of a slice: its sources are the models, its parameters come before the recipe's. Not checked again."""
        base = one.base_model or self.base_model
        skip = self.merge_method not in KEEPS_BASE
        sources = [source for source in one.sources if not (skip and same_model(source.model, base))]
        models = tuple(
            ModelEntry.model_construct(model=s.model, name=None, capability=None, parameters=s.parameters) for s in sources
        )
        parameters = one.parameters.over(self.parameters, MergeParameters)
        return self.model_copy(
            update={
                "models": models,
                "base_model": base,
                "parameters": parameters,
                "slices": None,
                "modules": None,
                "scales": None,
            }
        )

    def problems(self) -> list[str]:
        """What contradicts itself, of a recipe that was made of a checked one."""
        return _sliced_contradictions(self) if self.sliced else _contradictions(self)

    def places(self) -> list[tuple[str, Slice]]:
        """Every slice and where the recipe has it, such as ``slices[0]`` and ``modules.encoder[1]``."""
        found = [(f"slices[{i}]", one) for i, one in enumerate(self.slices or ())]
        for name, module in (self.modules or {}).items():
            found += [(f"modules.{name}[{i}]", one) for i, one in enumerate(module.as_slices())]
        return found

    @property
    def needs_moments(self) -> bool:
        """Whether second moments are read: also of ``ffg`` only where it ranks by curvature."""
        return self.merge_method in NEEDS_MOMENTS and not (self.merge_method == "ffg" and self.setting("metric") == "magnitude")

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

    def ignoring(self, keys: Sequence[str] | None) -> "MergeRecipe":
        """The recipe with further settings of config.json that may differ between the models."""
        if not keys:
            return self
        return self.model_copy(update={"ignore_config_differences": (*(self.ignore_config_differences or ()), *keys)})

    def allowing_nonfinite(self, allow: bool) -> "MergeRecipe":
        """The same recipe, which with ``allow`` merges infinite numbers and NaN, too."""
        return self.model_copy(update={"allow_nonfinite": True}) if allow else self

    def effective(self) -> dict[str, Any]:
        """Every parameter in force, defaults included: two recipes that say the same in different words are equal here."""
        used = USED[self.merge_method] - {"preconditioner_path", "estimate"}  # known by the digests of second moments
        own = of_experts(self.merge_method)
        found: dict[str, Any] = {
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
        }
        template: dict[str, Any] = {} if self.chat_template is None else {"chat_template": self.chat_template}
        template |= {"allow_nonfinite": True} if self.allow_nonfinite else {}
        return later_keys(found | template, self.merge_method, self.models, self.places() if self.sliced else None)

    def ffg(self, expert: int) -> bool:
        """Whether Fast Fisher Grafting masks this expert (docs/methods.md section 3: density 1 means no mask)."""
        if self.merge_method not in FFG:
            return False
        density = least(self.setting("density", expert))
        return self.setting("precond_threshold", expert) is not None or (density is not None and density < 1)

    @property
    def estimates(self) -> EstimateSettings | None:
        """How second moments are estimated where training kept none; None where they are not."""
        return self.parameters.estimate if self.needs_moments else None

    @property
    def adds_up(self) -> bool:
        """Whether the merged task vector is a sum over the experts, not an average: of M experts that agree it is M times each one's."""
        return "lambda" in USED[self.merge_method] and self.setting("normalize") is False and self.merge_method != "ota"

    def to_yaml(self) -> str:
        """The recipe as YAML, with only what it says; ``load_recipe`` reads it back to an equal recipe."""
        said = self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)
        if self.sliced and not any(set(entry) - {"model"} for entry in said["models"]):
            del said["models"]  # the slices name them
        return dump_yaml(said)


def _contradictions(recipe: MergeRecipe) -> list[str]:
    method = recipe.merge_method
    used = USED[method]
    problems = [
        f"{where}: '{key}' has no effect with merge_method {method}; remove it ({method} uses: {', '.join(sorted(used))})"
        for where, parameters in [
            ("parameters", recipe.parameters),
            *((f"models[{i}].parameters", entry.parameters) for i, entry in enumerate(recipe.models)),
        ]
        for key in sorted(parameters.given_keys() - used)
    ]
    problems += [
        f"models[{i}].parameters: '{key}' holds for the whole merge with merge_method {method}; move it to the recipe's parameters"
        for i, entry in enumerate(recipe.models)
        for key in sorted(
            (entry.parameters.given_keys() & used) - of_experts(method) - {"preconditioner_path", "compression", "rank"}
        )
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
        if method in FFG and recipe.setting("density", i) is not None and recipe.setting("precond_threshold", i) is not None:
            problems.append(
                f"models[{i}] ({recipe.models[i].model}): both density and precond_threshold are given; they set the same threshold, keep one"
            )
        if method in FFG and recipe.setting("metric") == "magnitude" and recipe.setting("precond_threshold", i) is not None:
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
        if "/" not in n and (why := why_unsafe(n))
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
    return problems + of_one_method(recipe)


def _sliced_contradictions(recipe: MergeRecipe) -> list[str]:
    """What is wrong with slices: each is checked as a recipe of its own."""
    problems = of_slices(recipe.slices, recipe.modules)
    if recipe.scales is not None:
        problems.append("scales: they are learned for whole experts, and do not go with slices; remove the key")
    for place, one in recipe.places():
        own = recipe.of_slice(one)
        if not own.models:
            problems.append(f"{place}: its only source is the base; name an expert, or merge_method: passthrough to copy layers")
            continue
        problems += [f"{place}: {text}" if text.startswith(("models", "base_model")) else text for text in _contradictions(own)]
        if (
            own.base_model is not None
            and recipe.merge_method not in {"linear", "passthrough"}
            and base_range(own.base_model, one) == "unclear"
        ):
            problems.append(
                f"{place}: its sources give different layers, so that it is not clear which of the base {own.base_model} belong to them; name the base "
                "among the sources, with its layer_range"
            )
    names = [entry.name for entry in recipe.models if entry.name]
    problems += [f"models: the name '{name}' is given twice" for name in sorted({n for n in names if names.count(n) > 1})]
    return list(dict.fromkeys(problems))


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
        ("lambda", (1.0,)), ("masked_merge", ("precond",)), ("rescale", (False,)), ("missing_curvature", ("error", "estimate", "mean"))
    ):  # fmt: skip
        if recipe.setting(key) not in neutral:
            problems.append(f"base_model is missing: parameters.{key} acts on task vectors, which need the base")
    return problems


NO_SECRETS = (
    "the address holds a user name, a password, a signature or a token, which would be kept with the recipe; give a model as s3://bucket/prefix, a folder or "
    "org/name, and credentials in the environment"
)
MAX_MODELS = 1000
"""Of a recipe."""


def parse_recipe(raw: Any, where: str = "recipe", *, text: str | None = None, document: int = 0) -> MergeRecipe:
    """Validate a recipe. Raises RecipeError that lists every problem: unknown keys with the nearest known, values out of range.

    text: the YAML that ``raw`` is a document of, for the lines of what is wrong.
    """
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: expected a mapping with merge_method, base_model and models, got {type(raw).__name__}")
    for key in ("models", "slices"):
        if isinstance(raw.get(key), list | tuple) and len(raw[key]) > MAX_MODELS:
            raise RecipeError(f"{where}: {key} has {len(raw[key])} entries, at most {MAX_MODELS} are taken")
    try:
        return MergeRecipe.model_validate(raw)
    except ValidationError as error:
        problems: list[str] = []
        items = [item for item in error.errors() if not (item["type"] == "too_short" and item["input"])]
        lines = lines_of(text, document) if text is not None else {}
        for item in items:
            problems += [
                f"{where}: {cut(line)}" for line in explain(dict(item), MergeRecipe, ModelEntry, get_args(Method), lines)
            ]
        raise_all(list(dict.fromkeys(problems)), RecipeError)
        raise


def load_recipe(path: Path) -> MergeRecipe:
    """Read and validate a recipe file. Raises RecipeError."""
    return parse_text(read_text(path), str(path))


def parse_text(text: str, where: str) -> MergeRecipe:
    """The recipe in a YAML text, which holds no other. Raises RecipeError."""
    documents = parse_documents(text, where)
    if len(documents) > 1:
        raise RecipeError(
            f"{where} holds {len(documents)} recipes (---), and this command takes one; `ota merge {where} OUT` carries them all out, or merge the stages "
            "one by one and name their folders"
        )
    return parse_recipe(documents[0] if documents else None, where, text=text)
