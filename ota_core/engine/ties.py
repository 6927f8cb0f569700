"""Aliases that a merge leaves out must be what they are tied to: transformers loads them as tensors of their own where their values differ."""

from ota_core.errors import CheckpointError, raise_all
from ota_core.files.compare import same_tensor
from ota_core.plan.plan import MergePlan


def check_ties(plan: MergePlan) -> None:
    """Compare every stored alias that the output does not hold with what it is tied to. Raises CheckpointError for all that differ."""
    written = {job.name for job in plan.jobs}
    problems = []
    for view in plan.models:
        stored = view.checkpoint
        for alias, source in view.tied.items():
            if alias in stored and alias not in written and source in stored and not same_tensor(stored, alias, stored, source):
                problems.append(
                    f"{stored.path} ({view.name}): '{alias}' and '{source}' are one tensor by its configuration, and hold different values, so that "
                    f"transformers keeps both; {plan.source_view.name} has one alone. Say tie_word_embeddings: false in the config.json of all models and store "
                    "both in each, or remove the one that is not meant"
                )
    raise_all(problems, CheckpointError)
