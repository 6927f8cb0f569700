"""The promotion gate: what it is told and says, what it decides of a candidate, and of several the best."""

from tasks.evaluation.gate.choice import choosing_documents, decide_all, first_choice
from tasks.evaluation.gate.decide import best, check_margins, decide
from tasks.evaluation.gate.decision import Check, Choice, GateDecision, GateSettings, TierCheck
from tasks.evaluation.pairs import GateError

__all__ = [
    "Check", "Choice", "GateDecision", "GateError", "GateSettings", "TierCheck", "best", "check_margins", "choosing_documents", "decide",
    "decide_all", "first_choice",
]  # fmt: skip
