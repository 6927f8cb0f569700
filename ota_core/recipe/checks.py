"""What contradicts itself in a recipe: of all methods, then of one method or one key."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ota_core.names import why_unsafe
from ota_core.recipe.chat_templates import AUTO_TEMPLATE, TEMPLATES, is_template
from ota_core.recipe.methods import FFG, NEEDS_BASE, OF_REFINE, RESERVED_NAMES
from ota_core.recipe.parameters import USED, MergeParameters, of_experts
from ota_core.recipe.slices import Slice, base_range, same_model
from ota_core.recipe.tokenizer import TokenizerSettings, same_source
from ota_core.recipe.varying import Varying


class Checked(Protocol):
    """What the checks look at of a recipe."""

    @property
    def merge_method(self) -> str: ...
    @property
    def base_model(self) -> str | None: ...
    @property
    def models(self) -> Sequence[Any]: ...
    @property
    def slices(self) -> Sequence[Slice] | None: ...
    @property
    def modules(self) -> Mapping[str, Any] | None: ...
    @property
    def parameters(self) -> MergeParameters: ...
    @property
    def tokenizer_source(self) -> str: ...
    @property
    def tokenizer(self) -> TokenizerSettings | None: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def scales(self) -> str | None: ...
    @property
    def refined(self) -> bool: ...
    def setting(self, key: str, expert: int | None = None) -> Any: ...
    def ffg(self, expert: int) -> bool: ...
    def places(self) -> list[tuple[str, Slice]]: ...
    def of_slice(self, one: Slice) -> "Checked": ...


def as_written(problems: Sequence[str], kept: Sequence[int]) -> list[str]:
    """Problems that name models by their position in the recipe as it was written. kept: of each model that counts, its position there."""
    return [re.sub(r"models\[(\d+)\]", lambda found: f"models[{kept[int(found[1])]}]", text) for text in problems]


def of_one_method(recipe: Checked) -> list[str]:
    """What is wrong, each in a line that begins with the place."""
    problems = _of_numbers(recipe)
    template = recipe.chat_template
    if template is not None and template not in {AUTO_TEMPLATE, *TEMPLATES} and not is_template(template):
        problems.append(
            f"chat_template: got {template!r}; expected auto, {', '.join(TEMPLATES)} or a Jinja template with {{{{ … }}}}"
        )
    if recipe.merge_method == "ota":
        problems += _of_ota(recipe)
    if recipe.merge_method == "ffg":
        problems += _of_ffg(recipe)
    return problems


EXPERTS = {"passthrough": (1, 1), "nuslerp": (2, 2), "nearswap": (1, 2), "arcee_fusion": (1, 2), "model_stock": (2, math.inf)}
"""How many models a method takes, beside a base; of two that it interpolates between, the base may be one."""


def _of_numbers(recipe: Checked) -> list[str]:
    """What is wrong with the numbers of models and of parameters that one method alone restricts."""
    method, count, t = recipe.merge_method, len(recipe.models), recipe.setting("t")
    largest = max(t.values()) if isinstance(t, Varying) else t
    problems = []
    if method == "slerp" and (t is None or largest > 1):
        problems.append(
            f"parameters: slerp needs 't', the position between the two models in [0, 1]{'' if t is None else f', got {largest:g}'}"
        )
    if method == "nearswap" and t is None:
        problems.append("parameters: nearswap needs 't', the largest change of a weight, such as 0.0001")
    fewest, most = EXPERTS.get(method, (1, math.inf))
    if not fewest <= count <= most:
        expected = f"{fewest}" if fewest == most else f"{fewest} or {most}" if most < math.inf else f"at least {fewest}"
        problems.append(f"models: {method} takes {expected}, the recipe names {count}")
    for i in range(count) if method in {"della", "della_linear"} else ():
        density, epsilon = recipe.setting("density", i), recipe.setting("epsilon", i)
        if isinstance(density, Varying) or isinstance(epsilon, Varying):
            continue  # said of the tensors where they meet
        if density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            problems.append(
                f"models[{i}]: {method} keeps edits with chances from density - epsilon to density + epsilon, which must lie between 0 and 1; got density "
                f"{density:g} and epsilon {epsilon:g}"
            )
    return problems


def _of_ota(recipe: Checked) -> list[str]:
    problems = []
    weights = [recipe.setting("weight", i) for i in range(len(recipe.models))]
    single = [weight for weight in weights if not isinstance(weight, Varying)]
    if min(single, default=1.0) < 0 or (len(single) == len(weights) and sum(single) == 0):
        problems.append(
            f"parameters: with ota, 'weight' averages tensors without curvature; got {single}, expected no negative one, and not all 0"
        )
    if recipe.parameters.given("ties_density") is not None and recipe.setting("masked_merge") != "ties":
        problems.append(
            f"parameters: 'ties_density' has no effect with masked_merge {recipe.setting('masked_merge')}; remove it, or set masked_merge: ties"
        )
    return problems


def _of_ffg(recipe: Checked) -> list[str]:
    problems = []
    if len(recipe.models) != 1:
        problems.append(
            f"models: ffg grafts the edit of one expert onto the base, the recipe names {len(recipe.models)}; merge several with merge_method: ota"
        )
    if not recipe.ffg(0):
        problems.append(
            "parameters: ffg needs 'density', the fraction of the expert's edits that is grafted, below 1, or precond_threshold"
        )
    return problems


def of_slices(slices: Sequence[Any] | None, modules: Any) -> list[str]:
    """What is wrong with slices as a whole."""
    problems = []
    if slices is not None and modules is not None:
        problems.append("slices: both slices and modules are given; put the slices under the module that they are of")
    if slices is not None and not slices:
        problems.append("slices: the list is empty, expected at least one slice with its sources")
    if modules is not None and not modules:
        problems.append("modules: it names none, expected such as modules: {decoder: {slices: […]}}")
    return problems


def no_effect(where: str, key: str, method: str) -> str:
    """What an error says of a parameter that a method does not use."""
    return (
        f"{where}: '{key}' has no effect with merge_method {method}; remove it ({method} uses: {', '.join(sorted(USED[method]))})"
    )


def contradictions(recipe: Checked) -> list[str]:
    method = recipe.merge_method
    used = USED[method]
    problems = [
        no_effect(where, key, method)
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
    problems += _of_tokenizer(recipe)
    if method == "slerp" and len(recipe.models) not in {1, 2}:
        problems.append(f"slerp interpolates between two models, the recipe names {len(recipe.models)}")
    return problems + of_one_method(recipe)


def sliced_contradictions(recipe: Checked) -> list[str]:
    """What is wrong with slices: each is checked as a recipe of its own."""
    problems = of_slices(recipe.slices, recipe.modules) + _of_tokenizer(recipe)
    if recipe.scales is not None:
        problems.append("scales: they are learned for whole experts, and do not go with slices; remove the key")
    for place, one in recipe.places():
        own = recipe.of_slice(one)
        if not own.models:
            problems.append(f"{place}: its only source is the base; name an expert, or merge_method: passthrough to copy layers")
            continue
        problems += [f"{place}: {text}" if text.startswith(("models", "base_model")) else text for text in contradictions(own)]
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


def _base_contradictions(recipe: Checked) -> list[str]:
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
        problems.append(
            "base_model is missing: FFG (density or precond_threshold) needs the base to know each expert's edits; add base_model, or leave the threshold out"
        )
    for key, neutral in (
        ("lambda", (1.0,)), ("masked_merge", ("precond",)), ("rescale", (False,)), ("missing_curvature", ("error", "estimate", "mean"))
    ):  # fmt: skip
        if recipe.setting(key) not in neutral:
            problems.append(f"base_model is missing: parameters.{key} acts on task vectors, which need the base")
    return problems


def _of_tokenizer(recipe: Checked) -> list[str]:
    """What is wrong with the block ``tokenizer``."""
    block = recipe.tokenizer
    if block is None:
        return []
    problems = []
    if not same_source(block.source, recipe.tokenizer_source):
        problems.append(
            f"tokenizer: its source is {block.source} and tokenizer_source says {recipe.tokenizer_source}; keep one of the two"
        )
    known = [("base", recipe.base_model), *((entry.name, entry.model) for entry in recipe.models)]
    for token, row in (block.tokens or {}).items():
        if row.model is not None and position_of(row.model, known) is None:
            shown = ", ".join(str(model) for _, model in known if model is not None)
            problems.append(
                f"tokenizer.tokens: {token!r} takes its row from {row.model!r}, which is no model of the recipe; expected one of: {shown}"
            )
    return problems


def position_of(model: str, known: Sequence[tuple[str | None, str | None]]) -> int | None:
    """Which of the models (name, where it lies) is meant by a name of one, or by the last part of its place, ``model:`` before it or not; None for none."""
    wanted = model.removeprefix("model:")
    places = [(i, name, place) for i, (name, place) in enumerate(known) if place is not None]
    exact = [i for i, name, place in places if name == wanted or same_model(place, wanted)]
    last = [i for i, _, place in places if place.rstrip("/").rpartition("/")[2].split("@")[0] == wanted]
    return next(iter([*exact, *last]), None)
