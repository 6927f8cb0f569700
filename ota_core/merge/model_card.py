"""The model card (README.md) of a merge: what a reader, and a model hub, must know of it."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ota_core.merge.licences import card_head, licences
from ota_core.plan.inputs import MergeInputs, ModelInput
from ota_core.recipe.recipe import MergeRecipe

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
``<capability>_stderr``, ``average`` (over the capabilities that every row has) and ``retention``."""


def model_card(
    recipe: MergeRecipe,
    inputs: MergeInputs,
    results: Mapping[str, Any],
    fingerprint: str,
    scores: Sequence[ScoreRow] = (),
    suite: str | None = None,
    *,
    limit: int | None = None,
    documents: Mapping[str, int] | None = None,
) -> str:
    """Markdown with the metadata head that model hubs read.

    The head names the base model and the experts that lie on the hub, how they are related, the tags, the licence where all inputs
    state the same, and the merge's scores (``model-index``), unless these are a quick look: a hub compares them with those of whole
    suites. The text gives the method, every input with its digest and licence, the realised densities, the scores of base, experts and
    merge where they are known, and the recipe.

    suite: names what was measured. limit: at how many documents of a task the benchmark stopped, None for none. documents: capability →
    how many were scored.
    """
    terms = licences(inputs)
    names = ", ".join(e.name for e in inputs.experts)
    title = f"Merge: {recipe.merge_method} of {names}"
    head = _head(recipe, inputs, terms.head, scores if limit is None else (), suite, title)
    lines = ["---", head, "---", "", f"# {title}", ""]
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
        lines += ["", SCORES, "", *_score_table(scores), "", _what_scores(suite, limit, documents or {})]
    lines += ["", "## Recipe", "", "```yaml", recipe.to_yaml().rstrip(), "```", ""]
    return "\n".join(lines)


def _models(inputs: MergeInputs) -> list[tuple[str, ModelInput]]:
    base = [("base", inputs.base)] if inputs.base is not None else []
    return [*base, *((f"expert {expert.name}", expert) for expert in inputs.experts)]


def _head(
    recipe: MergeRecipe,
    inputs: MergeInputs,
    licence: Mapping[str, Any],
    scores: Sequence[ScoreRow],
    suite: str | None,
    title: str,
) -> str:
    """The card's metadata as YAML, by the hub's own library; what a card does not state is left out."""
    from huggingface_hub.repocard_data import EvalResult, ModelCardData  # 50 ms, which only a card costs

    names = list(dict.fromkeys(name for _, model in _models(inputs) for name in _hub_names(model)))
    merged = next((row for row in scores if row["role"] == "merge"), {})
    measured = {name: merged[name] for name in _capabilities(scores) if merged.get(name) is not None}
    results = [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            # The hub's type is a data set's id there. A suite is none: it takes tasks of many sets together, of files that lie anywhere.
            dataset_type="custom",
            dataset_name=f"lm-eval, suite {suite}" if suite else "lm-eval",
            metric_type=name,
            metric_value=round(float(value), 6),
            metric_name=f"{name} (0 to 1)",
        )
        for name, value in measured.items()
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["merge", "ota-merging", recipe.merge_method],
        base_model=names or None,
        base_model_relation="merge" if names else None,
        language=_languages(inputs) or None,
        model_name=title if results else None,
        eval_results=results or None,
        **licence,
    )
    return data.to_yaml()


def _hub_names(model: ModelInput) -> list[str]:
    """The model's name on the hub; for one that lies elsewhere, what its own card names as its base there. A hub knows no other names."""
    own = _HUB_ID.fullmatch(model.source)
    if own and _is_from_hub(own["id"], model):
        return [own["id"]]
    named = card_head(model.path).get("base_model") or []
    return [str(name) for name in ([named] if isinstance(named, str) else named) if _HUB_ID.fullmatch(str(name))]


def _is_from_hub(name: str, model: ModelInput) -> bool:
    """``experts/math`` looks like a hub's name, and may be a folder's, or a link's to one. What comes from the hub lies in its cache."""
    return f"models--{name.replace('/', '--')}" in model.path.parts


def _languages(inputs: MergeInputs) -> list[str]:
    found: list[str] = []
    for _, model in _models(inputs):
        named = card_head(model.path).get("language")
        # YAML 1.1 takes Norwegian's ``no`` for a truth value.
        codes = ["no" if one is False else one for one in (named if isinstance(named, list) else [named])]
        found += [code for code in codes if isinstance(code, str) and code]
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
    averaged = [name for name in _capabilities(scores) if all(row.get(name) is not None for row in scores)]
    for row in scores:
        row = {"average_stderr": _average_error(row, averaged), **row}
        cells = [_percent(row.get(column), row.get(f"{column}_stderr")) for column in columns]
        name = f"**{_cell(str(row['model']))}**" if row["role"] == "merge" else _cell(str(row["model"]))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _average_error(row: ScoreRow, averaged: Sequence[str]) -> float | None:
    """The average's standard error, where every capability in it has one: their documents are independent."""
    errors = [row.get(f"{name}_stderr") for name in averaged]
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(known) if known and len(known) == len(errors) else None


def _percent(value: float | None, error: float | None) -> str:
    if value is None or value != value:
        return "–"
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error is not None and error == error else "")


def _what_scores(suite: str | None, limit: int | None, documents: Mapping[str, int]) -> str:
    measured = f" on the suite {suite}" if suite else ""
    counts = ", ".join(f"{name} {count:,}" for name, count in documents.items())
    scored = f" Documents: {counts}." if counts else ""
    text = (
        f"Percent, measured with lm-eval{measured}; ± one standard error over documents.{scored} Retention: the merge's score by the expert's "
        "own, on the capability that each expert was trained for, on average."
    )
    if limit is None:
        return text
    return f"> **A quick look:** the benchmark stopped at {limit:,} documents of each task; these are not the suite's scores.\n\n{text}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
