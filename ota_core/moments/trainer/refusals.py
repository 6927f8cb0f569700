"""Why the state of an optimizer gives no second moments: the true reason, from what it keeps."""

from collections.abc import Mapping, Sequence
from typing import Any

ESTIMATE = "Measure them on data instead: ota estimate MODEL --data FILE --samples 256"

PROJECTED = "has a projector: GaLore and APOLLO average the squares of gradients projected to a low rank, and no v of the weights can be had from that"
# Keys of optimizers that keep something else under the names of an average, or beside it.
_FOREIGN = {
    "projector": PROJECTED,
    "GG": "has v in the rotated axes of SOAP (keys Q, GG), which is not that of the weights",
    "exp_avg_diff": "is Adan's: its exp_avg_sq averages squares of extrapolated gradients, not of gradients",
    "p0": "is Prodigy's: its exp_avg_sq is scaled by a step size that changed during the training",
}
# Keys of which one alone, without an average, tells the optimizer.
_WITHOUT = {
    "z": "is that of schedule-free SGD, which keeps the iterate z and no second moments",
    "sum": "is Adagrad's, which adds squared gradients up and does not average them",
    "exp_inf": "is Adamax's, which keeps largest gradients and no squares",
    "exp_avg_var": "is AdaBelief's, which averages squared distances from the mean gradient, not squared gradients",
    "state1": (
        "has state1 and no state2: bitsandbytes' optimizers with one state (Lion, SGD, RMSprop, Adagrad, LARS) write the same keys, so that it "
        "is a momentum for most and a second moment for some, and the file does not tell which"
    ),
}
_HOLDS_V = {"exp_avg_sq", "square_avg", "state2", "exp_avg_sq_row", "row_var"}


def not_v(entry: Mapping[str, Any], group: Mapping[str, Any]) -> str | None:
    """Why an entry that is not empty holds no v, as the end of a sentence; None where it may hold one."""
    for key, reason in _FOREIGN.items():
        if key in entry:
            return reason
    if "rank" in group and {"proj_type", "update_proj_gap"} & group.keys():
        return PROJECTED
    if _HOLDS_V & entry.keys() or ("variance" in entry and "beta2_decay" in group):
        return None
    if "momentum_buffer" in entry and "momentum" in group:
        name = "SGD" if "dampening" in group else "Muon"
        return f"is {name}'s, which keeps a momentum and no second moments"
    for key, reason in _WITHOUT.items():
        if key in entry:
            return reason
    if entry.keys() <= {"exp_avg", "step"} and len(group.get("betas") or ()) == 2:
        return "is Lion's, which keeps a momentum (exp_avg) and no second moments"
    return f"has the keys {some(sorted(map(str, entry)))}; exp_avg_sq, or one that stands for it, was expected"


def nothing_kept(groups: Sequence[Mapping[str, Any]]) -> str:
    """Why a state without entries is empty, as a sentence without its subject."""
    keys = {key for group in groups for key in group}
    parameters = sum(len(group["params"]) for group in groups)
    if "clip_grad_norm" in keys and "betas" not in keys:
        return f"has an empty state: LOMO keeps none, and AdaLomo keeps its own outside of what it saves. {ESTIMATE}"
    if {"momentum", "dampening"} <= keys:
        return f"has an empty state: SGD without momentum keeps none. {ESTIMATE}"
    if parameters == 1 and keys <= {"lr", "initial_lr", "params"}:
        return (
            "is the stand-in that the Trainer saves of layer-wise optimizers (GaLore, APOLLO): their states are not in any file. "
            f"{ESTIMATE}"
        )
    return f"holds no second moments: it was saved before the first step; use a later checkpoint's. {ESTIMATE}"


def some(items: Sequence[Any]) -> str:
    """A list in a message, cut where it is long."""
    return ", ".join(f"{item!r:.80}" for item in items[:8]) + (", …" if len(items) > 8 else "") if items else "none"
