"""Checks of a recipe that concern one method or one key."""

import math
import re
from collections.abc import Sequence
from typing import Any, Protocol

from ota_core.recipe.chat_templates import AUTO_TEMPLATE, TEMPLATES, is_template
from ota_core.recipe.parameters import MergeParameters
from ota_core.recipe.varying import Varying


class Checked(Protocol):
    """What the checks look at of a recipe."""

    @property
    def merge_method(self) -> str: ...
    @property
    def models(self) -> Sequence[Any]: ...
    @property
    def parameters(self) -> MergeParameters: ...
    @property
    def chat_template(self) -> str | None: ...
    def setting(self, key: str, expert: int | None = None) -> Any: ...
    def ffg(self, expert: int) -> bool: ...


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
