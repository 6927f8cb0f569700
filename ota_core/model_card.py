"""The model card (README.md) of a merge: what a reader, and a model hub, must know of it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ota_core.inputs import MergeInputs, ModelInput
from ota_core.licences import card_head, licences
from ota_core.recipe import MergeRecipe
from ota_core.recipe_yaml import dump_yaml

PAPERS = {
    "ota": "[OTA merging with Fast Fisher Grafting](https://arxiv.org/abs/2509.11167)",
    "task_arithmetic": "[task arithmetic](https://arxiv.org/abs/2212.04089)",
    "ties": "[TIES](https://arxiv.org/abs/2306.01708)",
    "dare_linear": "[DARE](https://arxiv.org/abs/2311.03099)",
    "dare_ties": "[DARE](https://arxiv.org/abs/2311.03099) with [TIES](https://arxiv.org/abs/2306.01708)",
    "breadcrumbs": "[Model Breadcrumbs](https://arxiv.org/abs/2312.06795)",
    "breadcrumbs_ties": "[Model Breadcrumbs](https://arxiv.org/abs/2312.06795) with [TIES](https://arxiv.org/abs/2306.01708)",
    "fisher": "[Fisher-weighted averaging](https://arxiv.org/abs/2111.09832)",
    "linear": "[a weighted mean](https://arxiv.org/abs/2203.05482)",
    "slerp": "spherical interpolation",
}
_HUB_ID = re.compile(r"(?P<id>[\w][\w.-]*/[\w][\w.-]*)(@[\w./-]+)?")

SCORES = "## Scores"
"""The heading that a card has where scores are known."""
ScoreRow = Mapping[str, Any]
"""One model's scores: ``model``, ``role`` (base, expert or merge), capability → score (0 … 1, None where not measured), optionally
``<capability>_stderr``, ``average`` and ``retention``."""


def model_card(
    recipe: MergeRecipe,
    inputs: MergeInputs,
    results: Mapping[str, Any],
    fingerprint: str,
    scores: Sequence[ScoreRow] = (),
    suite: str | None = None,
) -> str:
    """Markdown with the metadata head that model hubs read.

    The head names the base model and the experts that lie on the hub, how they are related, the tags, the licence where all inputs
    state the same, and the merge's scores (``model-index``). The text gives the method, every input with its digest and licence, the
    realised densities, the scores of base, experts and merge where they are known (``suite`` names what was measured), and the recipe.
    """
    terms = licences(inputs)
    names = ", ".join(e.name for e in inputs.experts)
    title = f"Merge: {recipe.merge_method} of {names}"
    lines = ["---", dump_yaml(_head(recipe, inputs, terms.head, scores, suite, title)).rstrip(), "---", "", f"# {title}", ""]
    lines += [
        f"{len(inputs.experts)} fine-tuned models ({names}) of one base, merged by {PAPERS[recipe.merge_method]}. Fingerprint "
        f"`{fingerprint}`. Arithmetic in float64, stored as {recipe.output_dtype or 'the base model’s data types'}.",
        "",
    ]
    if terms.warning:
        lines += [f"> **Licence:** {terms.warning}.", ""]
    lines += ["## Inputs", "", "| role | source | licence | digest |", "|---|---|---|---|"]
    lines += [
        f"| {role} | {_cell(model.source)} | {terms.stated[model.name] or 'not stated'} | {model.digest or 'not computed'} |"
        for role, model in _models(inputs)
    ]
    lines += [
        f"| second moments of {e.name} | {_cell(e.moments.name)} | | {e.moments_digest} |"
        for e in inputs.experts
        if e.moments is not None and e.moments_digest is not None
    ]
    densities = results.get("densities", {})
    if densities:
        lines += ["", "## Realised densities", "", "| expert | kept | of | density |", "|---|---:|---:|---:|"]
        lines += [f"| {name} | {d['kept']:,} | {d['total']:,} | {d['density']:.6f} |" for name, d in densities.items()]
    if scores:
        lines += ["", SCORES, "", *_score_table(scores), "", _what_scores(suite)]
    lines += ["", "## Recipe", "", "```yaml", recipe.to_yaml().rstrip(), "```", ""]
    return "\n".join(lines)


def _models(inputs: MergeInputs) -> list[tuple[str, ModelInput]]:
    base = [("base", inputs.base)] if inputs.base is not None else []
    return [*base, *((f"expert {expert.name}", expert) for expert in inputs.experts)]


def _head(
    recipe: MergeRecipe,
    inputs: MergeInputs,
    licence: Mapping[str, str],
    scores: Sequence[ScoreRow],
    suite: str | None,
    title: str,
) -> dict[str, Any]:
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    head |= licence
    head["tags"] = ["merge", "ota-merging", recipe.merge_method]
    listed = [name for _, model in _models(inputs) for name in _hub_names(model)]
    if listed:
        head |= {"base_model": list(dict.fromkeys(listed)), "base_model_relation": "merge"}
    languages = _languages(inputs)
    if languages:
        head["language"] = languages
    merged = [row for row in scores if row["role"] == "merge"]
    measured = {name: merged[0][name] for name in _capabilities(scores) if merged and merged[0].get(name) is not None}
    if measured:
        metrics = [
            {"type": name, "value": round(float(value), 6), "name": f"{name} (0 to 1)"} for name, value in measured.items()
        ]
        task = {"type": "text-generation", "name": "Text generation"}
        data = {"type": suite or "lm-eval", "name": f"lm-eval, suite {suite}" if suite else "lm-eval"}
        head["model-index"] = [{"name": title, "results": [{"task": task, "dataset": data, "metrics": metrics}]}]
    return head


def _hub_names(model: ModelInput) -> list[str]:
    """The model's name on the hub; for one that lies elsewhere, what its own card names as its base there. A hub knows no other names."""
    own = _HUB_ID.fullmatch(model.source)
    if own and not model.source.startswith((".", "/")) and not _is_folder_name(model):
        return [own["id"]]
    named = card_head(model.path).get("base_model") or []
    return [str(name) for name in ([named] if isinstance(named, str) else named) if _HUB_ID.fullmatch(str(name))]


def _is_folder_name(model: ModelInput) -> bool:
    """``experts/math`` looks like a hub's name; it is a folder's where the model lies in one that ends so."""
    return model.path.as_posix().endswith("/" + model.source)


def _languages(inputs: MergeInputs) -> list[str]:
    found: list[str] = []
    for _, model in _models(inputs):
        named = card_head(model.path).get("language") or []
        found += [named] if isinstance(named, str) else [str(one) for one in named]
    return list(dict.fromkeys(found))


_NO_CAPABILITY = {"model", "role", "capability", "average", "retention", "negative_transfer"}


def _capabilities(scores: Sequence[ScoreRow]) -> list[str]:
    keys = dict.fromkeys(key for row in scores for key in row)
    return [key for key in keys if key not in _NO_CAPABILITY and not key.endswith("_stderr")]


def _score_table(scores: Sequence[ScoreRow]) -> list[str]:
    columns = [
        *_capabilities(scores),
        *(key for key in ("average", "retention") if any(row.get(key) is not None for row in scores)),
    ]
    lines = [f"| model | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for row in scores:
        cells = [_percent(row.get(column), row.get(f"{column}_stderr")) for column in columns]
        name = f"**{_cell(str(row['model']))}**" if row["role"] == "merge" else _cell(str(row["model"]))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _percent(value: float | None, error: float | None) -> str:
    if value is None or value != value:
        return "–"
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error is not None and error == error else "")


def _what_scores(suite: str | None) -> str:
    measured = f" on the suite {suite}" if suite else ""
    return (
        f"Percent, measured with lm-eval{measured}; ± one standard error over documents. Retention: the merge's score by the expert's own, "
        "on the capability that each expert was trained for, on average."
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
