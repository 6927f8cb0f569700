"""The merge recipe: what to merge and how. Typed, validated as a whole, YAML in and out; mergekit's keys are understood.

Two levels hold parameters: ``parameters`` of the recipe and ``parameters`` of a model; the model's win. A key that the
method does not use is an error, because an option that changes nothing is a mistake in the recipe.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import Field, ValidationError, model_validator

from ota_core.addresses import places_of_secrets
from ota_core.errors import RecipeError, raise_all
from ota_core.reading import cut
from ota_core.recipe.checks import as_written, contradictions, position_of, sliced_contradictions
from ota_core.recipe.estimate import EstimateSettings
from ota_core.recipe.explain import explain
from ota_core.recipe.identity import later_keys
from ota_core.recipe.ignored import remarks, why_ignored
from ota_core.recipe.methods import FFG, KEEPS_BASE, NEEDS_MOMENTS, OF_REFINE, DType, Method
from ota_core.recipe.parameters import USED, MergeParameters, ModelParameters, default, of_experts
from ota_core.recipe.slices import Module, Slice, same_model
from ota_core.recipe.spellings import mergekit_spellings
from ota_core.recipe.tokenizer import TokenizerSettings
from ota_core.recipe.values import AUTO, Strict
from ota_core.recipe.varying import Varying, least
from ota_core.recipe.yaml_text import dump_yaml, lines_of, parse_documents, read_text


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
    tokenizer: TokenizerSettings | None = Field(
        None, description="Rows of single tokens, and how many rows there are; its source is tokenizer_source."
    )
    chat_template: str | None = Field(
        None,
        description="Of the result: auto, the models' most common; chatml, llama3, alpaca, mistral or exaone; or a Jinja template. By default the tokenizer's own.",
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
    ignored: tuple[str, ...] | None = Field(
        None, description="Not for people: where the recipe had keys that mergekit takes and that mean nothing to its method."
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
                "tokenizer": None,
            }
        )

    def problems(self) -> list[str]:
        """What contradicts itself, of a recipe that was made of a checked one."""
        return sliced_contradictions(self) if self.sliced else contradictions(self)

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

    def remarks(self) -> list[str]:
        """What is to be said of keys that are taken and do nothing, or that do here what they do not in mergekit."""
        return remarks(self)

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
        template |= self.token_rows()
        return later_keys(found | template, self.merge_method, self.models, self.places() if self.sliced else None)

    def token_rows(self) -> dict[str, Any]:
        """What of ``tokenizer`` decides bytes, with models by their position; empty where the recipe has none."""
        if self.tokenizer is None:
            return {}
        known = [("base", self.base_model), *((entry.name, entry.model) for entry in self.models)]
        return {"tokenizer": self.tokenizer.decisive(lambda model: position_of(model, known) or 0)}

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


NO_SECRETS = (
    "the address holds a user name, a password, a signature or a token, which would be kept with the recipe; give a model as s3://bucket/prefix, a folder or "
    "org/name, and credentials in the environment"
)
MAX_MODELS = 1000
"""Of a recipe."""


def parse_recipe(
    raw: Any, where: str = "recipe", *, text: str | None = None, document: int = 0, strict: bool = False
) -> MergeRecipe:
    """Validate a recipe. Raises RecipeError that lists every problem: unknown keys with the nearest known, values out of range.

    text: the YAML that ``raw`` is a document of, for the lines of what is wrong. strict: keys that mergekit leaves unread are errors, too.
    """
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: expected a mapping with merge_method, base_model and models, got {type(raw).__name__}")
    for key in ("models", "slices"):
        if isinstance(raw.get(key), list | tuple) and len(raw[key]) > MAX_MODELS:
            raise RecipeError(f"{where}: {key} has {len(raw[key])} entries, at most {MAX_MODELS} are taken")
    try:
        recipe = MergeRecipe.model_validate(raw)
        unread = [place for place in recipe.ignored or () if place not in (raw.get("ignored") or ())] if strict else []
        raise_all([f"{where}: {why}" for why in why_ignored(unread, recipe.merge_method)], RecipeError)
        return recipe
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
