"""The model card (README.md) of a merge: what a reader, and a model hub, must know of it."""

from collections.abc import Mapping
from typing import Any

from ota_core.inputs import MergeInputs
from ota_core.recipe import MergeRecipe
from ota_core.recipe_yaml import dump_yaml


def model_card(
    recipe: MergeRecipe,
    inputs: MergeInputs,
    results: Mapping[str, Any],
    fingerprint: str,
    scores: Mapping[str, float] | None = None,
) -> str:
    """Markdown with a metadata head: recipe, inputs with their digests, realised densities, scores when known (0 … 1)."""
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "ota-merging", recipe.merge_method],
    }
    if inputs.base is not None:
        head["base_model"] = [inputs.base.source or inputs.base.name]
        head["base_model_relation"] = "merge"
    lines = [
        "---",
        dump_yaml(head).rstrip(),
        "---",
        "",
        f"# Merge: {recipe.merge_method} of {', '.join(e.name for e in inputs.experts)}",
        "",
    ]
    lines += [
        f"Fingerprint `{fingerprint}`. Arithmetic in float64, stored as {recipe.output_dtype or 'the base model’s data types'}.",
        "",
    ]
    lines += ["## Inputs", "", "| role | source | digest |", "|---|---|---|"]
    if inputs.base is not None:
        lines.append(f"| base | {inputs.base.source} | {inputs.base.digest or 'not computed'} |")
    lines += [f"| expert {e.name} | {e.source} | {e.digest or 'not computed'} |" for e in inputs.experts]
    densities = results.get("densities", {})
    if densities:
        lines += ["", "## Realised densities", "", "| expert | kept | of | density |", "|---|---|---|---|"]
        lines += [f"| {name} | {d['kept']:,} | {d['total']:,} | {d['density']:.6f} |" for name, d in densities.items()]
    if scores:
        lines += ["", "## Scores", "", "| capability | score |", "|---|---|"]
        lines += [f"| {capability} | {100 * score:.1f} % |" for capability, score in scores.items()]
    lines += ["", "## Recipe", "", "```yaml", recipe.to_yaml().rstrip(), "```", ""]
    return "\n".join(lines)
