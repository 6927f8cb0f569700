"""The parameters of merge recipes: their types, defaults and descriptions, and which of them a method uses."""

from functools import partial
from typing import Annotated, Any, Literal, Self, TypeVar, cast

from pydantic import (
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue, SkipJsonSchema
from pydantic_core import CoreSchema, PydanticCustomError

from ota_core.reading import quoted
from ota_core.recipe.estimate import EstimateSettings
from ota_core.recipe.values import Compression, Density, Finite, NonNegative, Number, Positive, Scale, Strict, no_switch
from ota_core.recipe.varying import Varying, is_varying, read

_DEFAULTS: dict[str, Any] = {
    "lambda": 1.0, "power": 0.5, "scope": "global", "metric": "curvature", "mask_curvature": "merge", "compression": "none", "rank": 4,
    "bias_correction": False, "normalise": "none", "epsilon": 0.0, "denominator": "kept", "fallback": "base",
    "masked_merge": "precond", "rescale": False, "missing_curvature": "error", "seed": 0, "scaling_factor": 1.0, "weight": 1.0,
    "gamma": 0.01, "density": 1.0, "normalize": False, "refine": "none", "ridge": 0.3, "input_curvature": 0.0, "normalize_weights": True,
    "eps": 1e-8, "nuslerp_row_wise": False, "nuslerp_flatten": True, "max_iter": 10, "tol": 1e-5, "filter_wise": False, "r": 0.1, "alpha": 0.2,
    "rescale_relative_threshold": 0.0, "approximate_norm": False, "ties_density": 1.0,
}  # fmt: skip
_METHOD_DEFAULTS: dict[tuple[str, str], Any] = {
    ("ota", "density"): None,
    ("ffg", "density"): None,
    ("ffg", "masked_merge"): "linear",
    ("linear", "normalize"): True,
    ("ties", "normalize"): True,
    ("dare_linear", "rescale"): True,
    ("dare_ties", "rescale"): True,
    ("della", "normalize"): True,
    ("della", "rescale"): True,
    ("della_linear", "rescale"): True,
    ("della", "epsilon"): 0.15,
    ("della_linear", "epsilon"): 0.15,
    ("ram", "epsilon"): 1e-5,
    ("ramplus_tl", "epsilon"): 1e-5,
    ("rowspace", "normalize"): True,
    ("rowspace", "lambda"): "auto",
    ("rowspace", "refine"): "rowspace",
}


def default(method: str, key: str) -> Any:
    """The value of a parameter that a recipe does not give. mergekit's defaults for mergekit's methods."""
    return _METHOD_DEFAULTS.get((method, key), _DEFAULTS.get(key))


def _own(key: str, text: str, alias: str | None = None) -> Any:
    """A field that may stay empty, for the method's own default. A form does not know that, so that the text ends with it."""
    others: dict[str, list[str]] = {}
    for (method, name), value in _METHOD_DEFAULTS.items():
        if name == key:
            others.setdefault(_word(value), []).append(method)
    exceptions = "".join(f", {value} for {' and '.join(methods)}" for value, methods in others.items())
    return Field(None, alias=alias, description=f"{text}; {_word(_DEFAULTS.get(key))} by default{exceptions}.")


def _word(value: Any) -> str:
    """A value as YAML and the form spell it, none where there is none."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, float):
        return str(value)
    text = f"{value:g}"
    return text.replace("e", ".0e") if "e" in text and "." not in text else text  # 1e-08 is a word to YAML 1.1


P = TypeVar("P", bound="ExpertParameters")


UNIFORM = {
    "preconditioner_path", "compression", "rank", "bias_correction", "missing_curvature", "estimate", "refine", "scope", "metric",
    "mask_curvature", "normalise", "seed", "masked_merge", "rank1_approx", "input_curvature",
}  # fmt: skip
"""What holds for whole models, so that it cannot differ between tensors."""


class ExpertParameters(Strict):
    """Parameters that may differ between experts. Each may also be given once for all in the recipe's ``parameters``."""

    varying: SkipJsonSchema[dict[str, Varying]] = Field({}, exclude=True, repr=False)
    """The parameters whose values differ between tensors, by the names of the recipe; those fields are None."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """A list, of a gradient or of filters, wherever values may differ between tensors: Prefect's server holds recipes against this."""
        schema = handler(core)
        for key, one in handler.resolve_ref_schema(schema)["properties"].items():
            if key not in UNIFORM and "anyOf" in one:
                one["anyOf"].append({"type": "array", "items": {}})
        return schema

    @model_validator(mode="before")
    @classmethod
    def _split(cls, raw: Any) -> Any:
        """Gradients and filters go into ``varying``, each of their values checked as a single one would be."""
        if not isinstance(raw, dict):
            return raw
        names = {(field.alias or name): name for name, field in cls.model_fields.items()} | {n: n for n in cls.model_fields}
        own = raw.get("varying") or {}
        if not (isinstance(own, dict) and all(isinstance(one, Varying) for one in own.values())):
            return raw  # of a file that has such a key: said as of any other wrong value
        found: dict[str, Varying] = dict(own)
        problems: list[str] = []
        for key, value in raw.items():
            if key == "varying" or key not in names or not is_varying(value):
                continue
            key = "lambda" if names[key] == "lambda_" else key
            if key in UNIFORM:
                problems.append(f"{{at}}.{key}: got a list; {key} holds for whole models and takes one value")
                continue
            try:
                found[key] = read(value, partial(cls._one, key))
            except ValueError as error:
                problems += [f"{{at}}.{key}: {line}" for line in str(error).split("\n")]
        if problems:
            raise PydanticCustomError("varying", "{problems}", {"problems": "\n".join(problems)})
        left = {k: v for k, v in raw.items() if k not in found and not (k == "lambda_" and "lambda" in found) and k != "varying"}
        return left | ({"varying": found} if found else {})

    @classmethod
    def _one(cls, key: str, value: Any) -> Any:
        """A single value as the field takes it. Raises ValueError in words that go on behind the key."""
        if value is None:
            raise ValueError("got nothing where a value stands in a list, expected a number")
        try:
            checked = cls.model_validate({key: value})
        except ValidationError as error:
            raise ValueError(
                "; ".join(f"got {quoted(value)}, {one['msg'][0].lower()}{one['msg'][1:]}" for one in error.errors())
            ) from None
        return getattr(checked, "lambda_" if key == "lambda" else key)

    @model_serializer(mode="wrap")
    def _joined(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped: dict[str, Any] = handler(self)
        return dumped | {key: value.dump() for key, value in self.varying.items()}

    def given(self, key: str) -> Any:
        """What stands under a key: a single value, a ``Varying``, or None."""
        return self.varying.get(key, getattr(self, "lambda_" if key == "lambda" else key, None))

    def given_keys(self) -> set[str]:
        """The keys that are given, as a recipe spells them."""
        names = {name for name in type(self).model_fields if name != "varying" and getattr(self, name) is not None}
        return {"lambda" if name == "lambda_" else name for name in names} | set(self.varying)

    def at(self, tensor: str, position: float) -> Self:
        """The single values of a tensor at this position of its slice (0 … 1)."""
        if not self.varying:
            return self
        values = {key: value.at(tensor, position) for key, value in self.varying.items()}
        fields = {"lambda_" if key == "lambda" else key: value for key, value in values.items()}
        return self.model_copy(update=fields | {"varying": {}})

    def over(self, below: "ExpertParameters", kind: type[P]) -> P:
        """These before those of the next level: filters that fit nothing, and keys that are not given, fall to it."""
        merged: dict[str, Any] = {}
        for key in self.given_keys() | below.given_keys():
            own, other = self.given(key), below.given(key)
            merged[key] = other if own is None else own.before(other) if isinstance(own, Varying) else own
        # One of the two thresholds overrides both of the next level.
        if {"density", "precond_threshold"} & self.given_keys():
            merged = {k: v for k, v in merged.items() if k not in {"density", "precond_threshold"} or k in self.given_keys()}
        varying = {key: value for key, value in merged.items() if isinstance(value, Varying)}
        single = {"lambda_" if k == "lambda" else k: v for k, v in merged.items() if k not in varying}
        known = {k: v for k, v in single.items() if k in kind.model_fields}
        return cast(P, kind.model_construct(**known, varying=varying))

    density: Density | None = _own("density", "Fraction of the expert's elements that is kept, in (0, 1]")
    precond_threshold: NonNegative | None = _own("precond_threshold", "FFG threshold in units of v·Δ², instead of a density")
    scaling_factor: NonNegative | None = _own("scaling_factor", "Factor on this expert's curvature weight (ota)")
    weight: Finite | None = _own(
        "weight",
        "Weight of this expert, in the methods that weigh experts by a number; with ota of its tensors without curvature alone",
    )
    gamma: Annotated[Number, Field(ge=0, lt=1)] | None = _own("gamma", "Fraction of largest edits dropped (breadcrumbs)")
    epsilon: NonNegative | None = _own(
        "epsilon",
        "Added to every curvature weight before masking (ota); how far the chance of keeping an edit lies from the density at most (della); edits "
        "that count are larger (ram, ramplus_tl)",
    )
    scale: Finite | None = _own("scale", "Factor on the model's weights (passthrough)")


class ModelParameters(ExpertParameters):
    """``parameters`` of one model."""

    preconditioner_path: str | None = Field(
        None, description="File with this expert's second moments; by default the one found in its folder."
    )
    compression: Compression | None = Field(
        None, description="Compression of this expert's second moments; by default as for all."
    )
    rank: Annotated[int, BeforeValidator(no_switch), Field(ge=1)] | None = Field(
        None, description="Rank of its compression rank_k."
    )


class MergeParameters(ExpertParameters):
    """``parameters`` of the recipe. None means: the method's default."""

    lambda_: Scale | None = _own(
        "lambda", "Scale λ of the merged task vector: a number, or auto and auto_per_tensor; auto with refine", alias="lambda"
    )
    refine: Literal["none", "rowspace"] | None = _own(
        "refine", "Regression on the row spaces of the task vectors, towards what the method merges"
    )
    ridge: Positive | None = _own("ridge", "Weight of what the method merges in that regression")
    input_curvature: NonNegative | None = _own(
        "input_curvature", "Weight of the second moments' column sums in that regression (ota, fisher)"
    )
    power: NonNegative | None = _own("power", "Exponent of the curvature in an expert's weight")
    scope: Literal["global", "per_tensor"] | None = _own("scope", "Whether a density holds over the whole expert")
    metric: Literal["curvature", "magnitude"] | None = _own("metric", "What FFG ranks by: √v̂·|Δ| or |Δ|")
    mask_curvature: Literal["merge", "full"] | None = _own(
        "mask_curvature", "Second moments that FFG scores with: those of the merge, or in full"
    )
    compression: Compression | None = _own("compression", "Compression of the second moments")
    rank: Annotated[int, BeforeValidator(no_switch), Field(ge=1)] | None = _own("rank", "Rank of compression rank_k")
    bias_correction: bool | None = _own("bias_correction", "Divide v by 1 − β₂^t")
    normalise: Literal["none", "global"] | None = _own("normalise", "Divide curvature weights by the expert's mean")
    denominator: Literal["kept", "all"] | None = _own("denominator", "Experts whose weights the denominator sums")
    fallback: Literal["base", "mean"] | None = _own("fallback", "Value of elements that no expert keeps")
    masked_merge: Literal["precond", "linear", "ties"] | None = _own("masked_merge", "How masked task vectors combine")
    rescale: bool | None = _own(
        "rescale",
        "Scale masked task vectors back: to their norm (ota), to their sum of magnitudes (ties, breadcrumbs), by 1/density (dare)",
    )
    rescale_relative_threshold: Annotated[Number, Field(ge=0, le=1)] | None = _own(
        "rescale_relative_threshold",
        "With rescale: a masked task vector whose norm is at most this share of the whole one's is left as it is (ota)",
    )
    approximate_norm: bool | None = _own(
        "approximate_norm", "Accepted from published recipes and without effect: norms are exact (ota)"
    )
    ties_density: Density | None = _own(
        "ties_density",
        "With masked_merge ties: share of each tensor's elements, by their masked edit, that takes part in the election (ota)",
    )
    missing_curvature: Literal["error", "mean", "estimate"] | None = _own(
        "missing_curvature",
        "What becomes of tensors that moved but have no curvature: an error, or the mean; estimate: where an expert has no second moments, those of "
        "all are estimated",
    )
    estimate: EstimateSettings | None = _own("estimate", "How second moments are estimated, with missing_curvature: estimate")
    normalize: bool | None = _own(
        "normalize", "Divide by the sum of the weights (linear and the methods that add up task vectors)"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = _own("seed", "Seed of the random masks of DARE and DELLA")
    t: NonNegative | None = Field(
        None,
        description="Position between the two models, at most 1 (slerp, which needs it), or the largest change of a weight (nearswap, which needs it too).",
    )
    normalize_weights: bool | None = _own("normalize_weights", "Divide the weights by their sum (multislerp)")
    eps: NonNegative | None = _own("eps", "Keeps divisions by norms finite (multislerp)")
    nuslerp_flatten: bool | None = _own(
        "nuslerp_flatten", "One angle for a whole tensor, not one for each row or column (nuslerp)"
    )
    nuslerp_row_wise: bool | None = _own(
        "nuslerp_row_wise", "Without nuslerp_flatten: angles along the first axis of a tensor, not along the last one (nuslerp)"
    )
    max_iter: Annotated[int, BeforeValidator(no_switch), Field(ge=0)] | None = _own("max_iter", "Steps to the mean (karcher)")
    tol: NonNegative | None = _own("tol", "A step shorter than this angle ends the search for the mean (karcher)")
    filter_wise: bool | None = _own("filter_wise", "One ratio for each row, not one for the whole tensor (model_stock)")
    r: NonNegative | None = _own("r", "How much edits of one expert alone are scaled up (ramplus_tl)")
    alpha: NonNegative | None = _own("alpha", "The largest ratio of shared to unique edits that counts in it (ramplus_tl)")


_REFINE = {"refine", "ridge"}
_FFG = {"density", "precond_threshold", "scope", "metric", "mask_curvature"}
_CURVATURE = {"compression", "rank", "bias_correction", "missing_curvature", "estimate"}
USED: dict[str, set[str]] = {
    "ota": _FFG | _CURVATURE | {"scaling_factor", "weight", "power", "normalise", "epsilon", "denominator", "fallback", "masked_merge",
                                "rescale", "rescale_relative_threshold", "approximate_norm", "ties_density", "lambda", "preconditioner_path",
                                "input_curvature"} | _REFINE,
    "ffg": _FFG | _CURVATURE | {"lambda", "preconditioner_path"},
    "fisher": _CURVATURE | {"weight", "preconditioner_path", "input_curvature"} | _REFINE,
    "linear": {"weight", "normalize"} | _REFINE,
    "task_arithmetic": {"weight", "normalize", "lambda"} | _REFINE,
    "ties": {"weight", "density", "normalize", "lambda", "rescale"} | _REFINE,
    "dare_linear": {"weight", "density", "normalize", "lambda", "rescale", "seed"} | _REFINE,
    "dare_ties": {"weight", "density", "normalize", "lambda", "rescale", "seed"} | _REFINE,
    "breadcrumbs": {"weight", "density", "gamma", "normalize", "lambda", "rescale"} | _REFINE,
    "breadcrumbs_ties": {"weight", "density", "gamma", "normalize", "lambda", "rescale"} | _REFINE,
    "rowspace": {"weight", "normalize", "lambda", "ridge"},
    "slerp": {"t"} | _REFINE,
    "passthrough": {"scale"},
    "nearswap": {"t", "lambda"} | _REFINE,
    "arcee_fusion": {"lambda"} | _REFINE,
    "ram": {"epsilon", "lambda"} | _REFINE,
    "ramplus_tl": {"epsilon", "r", "alpha", "lambda"} | _REFINE,
    "sce": {"density", "lambda"} | _REFINE,
    "della": {"weight", "density", "epsilon", "normalize", "lambda", "rescale", "seed"} | _REFINE,
    "della_linear": {"weight", "density", "epsilon", "normalize", "lambda", "rescale", "seed"} | _REFINE,
    "multislerp": {"weight", "normalize_weights", "eps", "lambda"} | _REFINE,
    "nuslerp": {"weight", "nuslerp_flatten", "nuslerp_row_wise", "lambda"} | _REFINE,
    "karcher": {"max_iter", "tol"} | _REFINE,
    "model_stock": {"filter_wise", "lambda"} | _REFINE,
}  # fmt: skip
"""Method to its parameters; any other is a mistake in a recipe."""

_OF_THE_MERGE = {"ota": {"epsilon"}, "ram": {"epsilon"}, "ramplus_tl": {"epsilon"}, "sce": {"density"}}
"""Parameters that other methods take for each expert and this one for the whole merge."""


def of_experts(method: str) -> set[str]:
    """The parameters of a method that may differ between experts, beside the place of their second moments."""
    return (USED[method] & set(ExpertParameters.model_fields)) - _OF_THE_MERGE.get(method, set())
