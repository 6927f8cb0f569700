"""What a merge leaves out of its experts with the tokens that the output does not have."""

from math import sqrt

import numpy as np

from ota_core.plan.plan import MergePlan
from ota_core.plan.views import ExpertView
from ota_core.plan.vocabulary.match import is_vocabulary_tensor

SHOWN = 4


def dropped_notes(plan: MergePlan, *, read: bool = True) -> list[str]:
    """For each expert with tokens that the output lacks, which these are and, with ``read``, the norm of what training made of their rows."""
    if plan.vocabulary is None or not plan.vocabulary.dropped:
        return []
    notes = []
    for expert, tokens in zip(plan.experts, plan.vocabulary.dropped[len(plan.models) - len(plan.experts) :], strict=True):
        if not tokens:
            continue
        shown = ", ".join(repr(token) for token in list(tokens)[:SHOWN]) + (", …" if len(tokens) > SHOWN else "")
        size = f"; {_norm(plan, expert, sorted(tokens.values()))}" if read else ""
        notes.append(
            f"{expert.name}: {len(tokens)} of its tokens are not in the output's tokenizer and left out ({shown}){size}. "
            "tokenizer_source: union, or model:<name>, keeps them"
        )
    return notes


def _norm(plan: MergePlan, expert: ExpertView, rows: list[int]) -> str:
    """What has which norm, over all tensors with a row a token: the edits to what the base has in these rows or, where it has fewer, the rows."""
    total, edited = 0.0, False
    for name in expert.checkpoint.names():
        if not is_vocabulary_tensor(name) or not expert.checkpoint.info(name).dtype.is_floating_point:
            continue
        base = plan.base.checkpoint if plan.base is not None and name in plan.base.checkpoint else None
        held = base.info(name).shape[0] if base is not None else 0
        for row in rows:
            values = expert.checkpoint.read_rows(name, row, row + 1).to_float32().astype(np.float64)
            if base is not None and row < held and base.info(name).shape[1:] == expert.checkpoint.info(name).shape[1:]:
                values = values - base.read_rows(name, row, row + 1).to_float32()
                edited = True
            total += float(np.sum(values * values))
    return f"{'their edit of the base' if edited else 'what their rows hold'} has the norm {sqrt(total):.3g}"
