"""What is made small: the mean of the capabilities' losses, the worst, the mean above floors, or the distance to the experts.

Losses are compared with those of base and experts on the same blocks, so that a block that is hard for all counts as no loss of the merge.
Legend: L_c loss of capability c (bits per byte), l_c the limit that it is held against.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch

from ota_core.errors import OtaError, raise_all
from ota_core.plan.inputs import ExpertInput, MergeInputs
from ota_core.plan.plan import MergePlan
from ota_core.recipe.yaml_text import nearest
from tasks.evaluation.gradients.documents import Block
from tasks.evaluation.gradients.network import loaded
from tasks.experiments.search.config import DEFAULT
from tasks.experiments.tune.config import ScalesConfig
from tasks.experiments.tune.documents import Blocks
from tasks.experiments.tune.network import Teacher, answered, losses_of, teacher_of

SHARPNESS = 50.0
"""Per bit per byte: how much more a capability that lies higher above its limit weighs in the soft maximum of objective ``worst``."""
MEMORY = 0.7
"""Share that the distances of earlier steps keep in the running ones."""

Limits = Mapping[str, Sequence[float]]
"""Capability to the limit of each of its blocks, those to learn from first."""


@dataclass
class Goal:
    """An objective on one set of blocks."""

    config: ScalesConfig
    blocks: Mapping[str, Blocks]
    limits: Limits = field(default_factory=dict)
    teachers: Mapping[str, Sequence[Teacher]] = field(default_factory=dict)
    """With objective kl, capability to the expert's predictions on each of its blocks."""
    _above: dict[str, float] = field(default_factory=dict)
    """L_c − l_c of the last steps, a running mean."""

    def weights(self) -> dict[str, float]:
        """∂ objective / ∂ L_c, by the distances of the steps before."""
        mean = 1 / len(self.blocks)
        if self.config.objective == "worst" and self._above:
            top = max(self._above.values())
            shares = {name: math.exp(SHARPNESS * (value - top)) for name, value in self._above.items()}
            return {name: share / sum(shares.values()) for name, share in shares.items()}
        below = {name for name, above in self._above.items() if above > 0}
        extra = self.config.floor_weight if self.config.objective == "floors" else 0.0
        return {name: mean + (extra if name in below else 0.0) for name in self.blocks}

    def saw(self, name: str, places: Sequence[int], losses: Sequence[float]) -> None:
        """Note a step's losses of one capability on the blocks at these places."""
        if name in self.limits:
            above = fmean(losses) - fmean(self.limits[name][i] for i in places)
            self._above[name] = MEMORY * self._above.get(name, above) + (1 - MEMORY) * above

    def held_out(self, network: Any) -> dict[str, float]:
        """Capability to its loss on what is held out."""
        found = {}
        for name, blocks in self.blocks.items():
            teachers = self.teachers[name][len(blocks.train) :] if self.teachers else None
            found[name] = fmean(losses_of(network, blocks.held_out, teachers))
        return found

    def value(self, losses: Mapping[str, float]) -> float:
        """The objective, of losses on what is held out."""
        limits = {name: fmean(rows[len(self.blocks[name].train) :]) for name, rows in self.limits.items()}
        above = {name: losses[name] - limit for name, limit in limits.items()}
        if self.config.objective == "worst":
            return max(above.values())
        mean = fmean(losses.values())
        if self.config.objective == "floors":
            return mean + self.config.floor_weight * sum(max(0.0, value) for value in above.values())
        return mean


def goal_of(config: ScalesConfig, blocks: Mapping[str, Blocks], plan: MergePlan, dtype: torch.dtype, device: str) -> Goal:
    """The objective, with base and experts measured, one at a time, where it needs them. Raises OtaError with all that is missing."""
    check_goal(config, list(blocks), plan.inputs)
    if config.objective == "mean":
        return Goal(config, blocks)
    every = {name: [*one.train, *one.held_out] for name, one in blocks.items()}
    same = {view.name: view.as_it_stands for view in plan.models}
    wanted = {name: kind for name in blocks if (kind := _held_against(config, name)) is not None}
    own = {name: _experts(plan.inputs, name) for name, kind in wanted.items() if kind == "expert"}
    needed = {one.name: one.path for experts in own.values() for one in experts}
    if "base" in wanted.values() and plan.inputs.base is not None:
        needed["base"] = plan.inputs.base.path
    other = [name for name in needed if not same[name]]
    if other:
        raise OtaError(
            f"objective {config.objective}: {', '.join(other)} have other tokens than the merge, so that their predictions cannot be compared token by "
            "token; take objective mean"
        )
    limits: dict[str, list[float]] = {}
    teachers: dict[str, list[Teacher]] = {}
    for model, path in needed.items():
        of = [
            n
            for n, kind in wanted.items()
            if (kind == "base") == (model == "base") and (kind == "base" or model in _names(own[n]))
        ]
        with loaded(path, dtype, device) as network:
            for name in of:
                if config.objective == "kl":
                    every[name] = [answered(network, block, config.answer) for block in every[name]]
                    teachers[name] = [teacher_of(network, block, config.top) for block in every[name]]
                else:
                    limits[name] = _lower(losses_of(network, every[name]), limits.get(name))
    cut = {name: len(one.train) for name, one in blocks.items()}
    blocks = {name: Blocks(tuple(every[name][:at]), tuple(every[name][at:])) for name, at in cut.items()}
    return Goal(config, blocks, _limits(config, every, limits), teachers)


def check_goal(config: ScalesConfig, capabilities: Sequence[str], inputs: MergeInputs) -> None:
    """Raises OtaError, before anything is loaded, for floors of unknown capabilities, and for capabilities without the expert they need."""
    problems = [
        f"floor: the suite has no capability '{name}'; {nearest(name, capabilities)}"
        for name in config.floor
        if config.objective == "floors" and name not in {DEFAULT, *capabilities}
    ]
    for name in capabilities:
        experts = _experts(inputs, name) if _held_against(config, name) == "expert" else None
        if experts == []:
            hint = (
                f"give it a floor of its own, such as {name}=base"
                if config.objective == "floors"
                else "take objective mean or floors"
            )
            problems.append(
                f"objective {config.objective}: no expert of the recipe has the capability '{name}'; name it with the expert's 'capability', or {hint}"
            )
        elif config.objective == "kl" and experts is not None and len(experts) > 1:
            names = ", ".join(one.name for one in experts)
            problems.append(f"objective kl: {names} all have the capability '{name}'; expected one teacher: take objective mean")
    raise_all(problems)


def _held_against(config: ScalesConfig, name: str) -> str | None:
    """What a capability's loss is compared with: ``base``, ``expert``, a ``score``, or nothing."""
    if config.objective in {"worst", "kl"}:
        return "expert"
    if config.objective == "floors":
        floors = config.floors()
        kind = floors.get(name, floors[DEFAULT]).kind
        return None if kind == "none" else kind
    return None


def _experts(inputs: MergeInputs, capability: str) -> list[ExpertInput]:
    return [one for one in inputs.experts if (one.capability or one.name) == capability]


def _names(experts: Sequence[ExpertInput]) -> set[str]:
    return {one.name for one in experts}


def _lower(losses: list[float], others: list[float] | None) -> list[float]:
    """Of several experts of a capability the better one."""
    return losses if others is None or fmean(losses) < fmean(others) else others


def _limits(config: ScalesConfig, blocks: Mapping[str, Sequence[Block]], measured: Limits) -> Limits:
    """The limits as losses. A floor is a likelihood of a byte, 2 to the minus bits per byte: a fraction of it is a sum of bits."""
    if config.objective != "floors":
        return measured
    floors, found = config.floors(), {}
    for name, some in blocks.items():
        floor = floors.get(name, floors[DEFAULT])
        bits = -math.log2(max(floor.value, 1e-9))
        if floor.kind == "score":
            found[name] = [bits] * len(some)
        elif floor.kind != "none":
            found[name] = [loss + (bits if floor.kind == "expert" else 0.0) for loss in measured[name]]
    return found
