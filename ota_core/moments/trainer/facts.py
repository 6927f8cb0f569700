"""The count of steps and β₂ of an optimizer's state, which every library keeps in its own place."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ota_core.errors import MomentsError
from ota_core.moments.safetensors_file import as_beta2
from ota_core.moments.trainer.refusals import some

STEPS = ("step", "k")  # in the group: fused optimizers and optimi; schedule-free ones
DECAYS = ("decay_rate", "beta2_decay")  # Adafactor of transformers and of torch


def raw_step(entry: Mapping[str, Any], group: Mapping[str, Any]) -> Any:
    """t of one parameter, a number or a tensor; None where the state does not say."""
    return entry["step"] if "step" in entry else next((group[key] for key in STEPS if key in group), None)


def decay_of(path: Path, groups: Sequence[Mapping[str, Any]]) -> float | None:
    """The exponent d of Adafactor's β₂ = 1 − t^d, −0.8 by default (arXiv 1804.04235, section 7.2); None for other optimizers.

    Raises MomentsError where the groups differ.
    """
    found = {float(group[key]) for group in groups if not group.get("betas") for key in DECAYS if group.get(key) is not None}
    if len(found) > 1:
        raise MomentsError(
            f"{path}: the parameter groups have different decays of β₂ ({some(sorted(found))}); one for all was expected"
        )
    return found.pop() if found else None


def is_unbiased(path: Path, groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether v needs no bias correction: the weights of its average add up to 1 from the first step on.

    So it is with Adafactor, whose β₂ is 0 in the first step, and with optimi (StableAdamW), which corrects β₂ and not v.
    """
    optimi = any("beta2" in group and "decouple_lr" in group for group in groups)
    return optimi or decay_of(path, groups) is not None


def beta2_of(path: Path, groups: Sequence[Mapping[str, Any]]) -> float | None:
    """The β₂ that all groups share. Raises MomentsError where they differ."""
    found = {
        as_beta2(value, f"{path}: β₂ in {key}") for group in groups if group["params"] for key, value in [_decay(group)] if key
    }
    if len(found) > 1:
        raise MomentsError(f"{path}: the parameter groups have different β₂ ({some(sorted(found))}); one for all was expected")
    return found.pop() if found else None


def _decay(group: Mapping[str, Any]) -> tuple[str, Any]:
    """Where a group says how slowly v forgets: the key, empty where there is none, and the value."""
    if isinstance(group.get("betas"), (tuple, list)) and len(group["betas"]) >= 2:
        return "betas", group["betas"][1]  # AdEMAMix has a third for its slow momentum
    return next(((key, group[key]) for key in ("beta2", "alpha", "rho") if group.get(key) is not None), ("", None))
