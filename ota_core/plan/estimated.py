"""Which experts' second moments are estimates, and whether those of a merge can be compared."""

from collections.abc import Sequence
from typing import Any

from ota_core.plan.views import ExpertView
from ota_core.recipe.recipe import MergeRecipe

OWN = ("texts", "weights", "trained")
"""What differs between experts that are estimated alike."""


def estimates_of(experts: Sequence[ExpertView]) -> dict[str, dict[str, Any]]:
    """Expert to how its second moments were estimated, of those that no optimizer computed."""
    found = {expert.name: expert.moments.estimated for expert in experts if expert.moments is not None}
    return {name: dict(said) for name, said in found.items() if said is not None}


def unlike(experts: Sequence[ExpertView], recipe: MergeRecipe) -> str | None:
    """A note where one expert may weigh more than another because of how its second moments came about; None where there is nothing to say."""
    found = estimates_of(experts)
    kept = [expert.name for expert in experts if expert.moments is not None and expert.name not in found]
    if found and kept:
        return (
            f"the second moments of {', '.join(found)} are estimated, those of {', '.join(kept)} come from training: their scales may differ; "
            "estimate those of all experts alike (estimate: {replace: true})"
        )
    ways = [{key: value for key, value in said.items() if key not in OWN} for said in found.values()]
    if any(way != ways[0] for way in ways):
        return (
            f"the second moments of {', '.join(found)} are estimated with different settings; estimate those of all experts alike"
        )
    at_the_end = [said for said in found.values() if said.get("points", 1) == 1]
    if len(at_the_end) > 1 and recipe.merge_method == "ota" and recipe.setting("normalise") == "none":
        return (
            "the second moments are estimated at the trained weights alone: an expert that has fitted its data has small gradients left, and weighs "
            "little for that alone; take points: 2, or normalise: global, which weighs the experts alike"
        )
    return None
