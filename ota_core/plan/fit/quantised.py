"""Quantised models in one merge: whether their differences from the base are training's, or the rounding of the quantisation."""

from collections.abc import Sequence

from ota_core.files.checkpoint import Checkpoint


def quantised_problems(names: Sequence[str], checkpoints: Sequence[Checkpoint]) -> list[str]:
    """One problem for each expert that is quantised in another way than the base. names, checkpoints: base first.

    Rounding to 4 or 8 bits moves every weight by more than fine-tuning does. Where the base was rounded in the same way most of that cancels, and
    an expert that is not quantised may have been trained from the dequantised base.
    """
    base, *experts = checkpoints
    problems = []
    for name, expert in zip(names[1:], experts, strict=True):
        if expert.quantised is None or (base.quantised is not None and base.quantised.kinds == expert.quantised.kinds):
            continue
        start = f"the base is not quantised ({base.path})" if base.quantised is None else f"the base has {base.quantised.label}"
        problems.append(
            f"{expert.path} ({name}): the expert is quantised ({expert.quantised.label}) and {start}: their difference would be the rounding "
            "of the quantisation rather than what training changed. Give the expert as it was before quantisation, or a base that is quantised in the "
            "same way; to merge it all the same, write it dequantised first: a recipe of merge_method: linear with this model alone and no base_model"
        )
    return problems
