"""Step and β₂ of Megatron-LM and NeMo, which lie beside the tensors in ``common.pt``: what all ranks have in common.

From the public source: megatron/core/dist_checkpointing/strategies/common.py; megatron/core/optimizer/distrib_optimizer.py leaves the
optimizer's groups there under ``fully_reshardable``, each with ``betas`` and ``step``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ota_core.errors import MomentsError
from ota_core.moments.dcp.folder import COMMON
from ota_core.moments.deepspeed.saved import beta2_of, open_saved, step_of

# The training program's arguments and enumerations, which are not read.
_RECORDS = ("nemo.", "torch.nn.", "transformer_engine.", "pathlib.", "signal.")


def common_facts(folder: Path) -> tuple[float | None, int | None]:
    """β₂ and the number of steps, each None where it is not told. Raises MomentsError for a damaged file, or groups that differ."""
    path = folder / COMMON
    if not path.is_file():
        return None, None
    file = open_saved(path, None, _RECORDS)
    try:
        groups = list(_groups(file.saved.get("optimizer") if isinstance(file.saved, dict) else None))
        steps = {step for group in groups if (step := step_of(file, group.get("step"))) is not None}
        if len(steps) > 1:
            raise MomentsError(f"{path}: the parameter groups have different steps ({sorted(steps)}); one for all was expected")
        return beta2_of(groups, str(path)), steps.pop() if steps else None
    finally:
        file.close()


def _groups(state: Any) -> Iterator[dict[str, Any]]:
    """All groups of an optimizer, or of several that are chained."""
    if not isinstance(state, dict):
        return
    for key, value in state.items():
        if key == "param_groups" and isinstance(value, list):
            yield from (group for group in value if isinstance(group, dict))
        else:
            yield from _groups(value)
