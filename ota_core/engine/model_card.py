"""The model card (README.md) of a merge: what a reader, and a model hub, must know of it."""

import re
from collections.abc import Mapping
from typing import Any

from ota_core.engine.licences import Cards, licences, read_cards
from ota_core.engine.markdown import cell, fenced, table
from ota_core.moments import how_estimated
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
    "rowspace": "the mean of their edits",
    "ffg": "[Fast Fisher Grafting](https://arxiv.org/abs/2509.11167)",
    "passthrough": "copying its weights",
    "nearswap": "[NearSwap](https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001)",
    "arcee_fusion": "[Arcee Fusion](https://www.arcee.ai/blog/meet-mergekit-v0-1-arcee-fusion-expanded-model-support-multi-gpu-acceleration)",
    "ram": "[Reinforced Agent Merging](https://arxiv.org/abs/2601.13572)",
    "ramplus_tl": "[Reinforced Agent Merging](https://arxiv.org/abs/2601.13572) with rescaling in each tensor",
    "sce": "[SCE](https://arxiv.org/abs/2408.07990)",
    "della": "[DELLA](https://arxiv.org/abs/2406.11617) with [TIES](https://arxiv.org/abs/2306.01708)",
    "della_linear": "[DELLA](https://arxiv.org/abs/2406.11617)",
    "multislerp": "a weighted spherical mean",
    "nuslerp": "spherical interpolation of two",
    "karcher": "the [Karcher mean](https://arxiv.org/abs/2603.04972) on the sphere",
    "model_stock": "[Model Stock](https://arxiv.org/abs/2403.19522)",
}
_HUB_ID = re.compile(r"(?P<id>[\w][\w.-]{0,95}/[\w][\w.-]{0,95})(@[\w./-]+)?")
_LANGUAGE = re.compile(r"[A-Za-z][\w-]{0,30}")
_MOST = 200
"""Languages, or bases, that an input's card may name."""

SCORES = "## Scores"
"""The heading that a card has where scores are known."""


def model_card(
    recipe: MergeRecipe,
    inputs: MergeInputs,
    results: Mapping[str, Any],
    fingerprint: str,
    *,
    scores: str = "",
    measured: Mapping[str, float] | None = None,
    suite: str | None = None,
    cards: Cards | None = None,
) -> str:
    """Markdown with the metadata head that model hubs read.

    The head names the base model and the experts that lie on the hub, how they are related, the tags, the licence where all inputs
    state the same, and the merge's scores (``model-index``). The text gives the method, every input with its digest and licence, the realised densities, the scores of base, experts and
    merge where they are known, and the recipe.

    scores: what stands below the heading of the scores, in Markdown. measured: capability → the merge's own score (0 … 1), for the head: a
    hub compares it with those of whole suites, so that a quick look is none. suite: names what was measured. cards: the inputs' own, where they
    were read already.
    """
    cards = read_cards(inputs) if cards is None else cards
    terms = licences(inputs, cards)
    names = ", ".join(e.name for e in inputs.experts)
    title = f"Merge: {recipe.merge_method} of {names}"
    head = _head(recipe, inputs, cards, terms.head, measured or {}, suite, title)
    lines = ["---", head, "---", "", f"# {cell(title)}", ""]
    lines += [
        f"{len(inputs.experts)} fine-tuned models ({cell(names)}) of one base, merged by {PAPERS[recipe.merge_method]}{_refinement(recipe)}. Fingerprint "
        f"`{fingerprint}`. Arithmetic in float64, stored as {recipe.output_dtype or 'the base model’s data types'}.",
        "",
    ]
    if terms.warning:
        lines += [f"> **Licence:** {cell(terms.warning)}.", ""]
    rows = [
        [role, model.source, terms.stated[model.name] or "not stated", model.digest or "not computed"]
        for role, model in _models(inputs)
    ]
    rows += [
        [f"second moments of {e.name}", e.moments.name, "", e.moments_digest]
        for e in inputs.experts
        if e.moments is not None and e.moments_digest is not None
    ]
    lines += ["## Inputs", "", table(["role", "source", "licence", "digest"], rows)]
    if estimated := results.get("estimated"):
        lines += [
            "",
            "## Second moments",
            "",
            *(f"- {cell(name)}: {cell(how_estimated(said))}." for name, said in estimated.items()),
        ]
        trained = [expert.name for expert in inputs.experts if expert.name not in estimated]
        lines += [f"- {cell(', '.join(trained))}: from training."] if trained else []
    if scale := results.get("lambda"):
        each = list(scale["per_tensor"].values())
        lines += [
            "",
            "## Scale",
            "",
            f"λ = {scale['value']:g}, found from the row spaces of the task vectors; by tensor {min(each):g} to {max(each):g}",
        ]
        lines[-1] += ", each with its own." if recipe.setting("lambda") == "auto_per_tensor" else "."
    densities = results.get("densities", {})
    if densities:
        kept = [[name, f"{d['kept']:,}", f"{d['total']:,}", f"{d['density']:.6f}"] for name, d in densities.items()]
        lines += ["", "## Realised densities", "", table(["expert", "kept", "of", "density"], kept, numbers=range(1, 4))]
    if scores:
        lines += ["", SCORES, "", scores]
    lines += ["", "## Recipe", "", fenced(recipe.to_yaml(), "yaml"), ""]
    return "\n".join(lines)


def _refinement(recipe: MergeRecipe) -> str:
    """What follows on the method, in the card's first sentence."""
    if not recipe.refined:
        return ""
    return f", each weight matrix then fitted to the row spaces of all task vectors (ridge {recipe.setting('ridge'):g})"


def _models(inputs: MergeInputs) -> list[tuple[str, ModelInput]]:
    return [("base" if model is inputs.base else f"expert {model.name}", model) for model in inputs.models]


def _head(
    recipe: MergeRecipe,
    inputs: MergeInputs,
    cards: Cards,
    licence: Mapping[str, Any],
    measured: Mapping[str, float],
    suite: str | None,
    title: str,
) -> str:
    """The card's metadata as YAML, by the hub's own library; what a card does not state is left out."""
    from huggingface_hub.repocard_data import EvalResult, ModelCardData  # 50 ms, which only a card costs

    names = list(dict.fromkeys(name for _, model in _models(inputs) for name in _hub_names(model, cards)))
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
        language=_languages(inputs, cards) or None,
        model_name=title if results else None,
        eval_results=results or None,
        **licence,
    )
    return data.to_yaml()


def _hub_names(model: ModelInput, cards: Cards) -> list[str]:
    """The model's name on the hub; for one that lies elsewhere, what its own card names as its base there. A hub knows no other names."""
    own = _HUB_ID.fullmatch(model.source)
    if own and _is_from_hub(own["id"], model):
        return [own["id"]]
    named = cards[model.name].head.get("base_model")
    return [str(name) for name in (named if isinstance(named, list) else [named])[:_MOST] if _HUB_ID.fullmatch(str(name))]


def _is_from_hub(name: str, model: ModelInput) -> bool:
    """``experts/math`` looks like a hub's name, and may be a folder's, or a link's to one. What comes from the hub lies in its cache."""
    return f"models--{name.replace('/', '--')}" in model.path.parts


def _languages(inputs: MergeInputs, cards: Cards) -> list[str]:
    found: list[str] = []
    for _, model in _models(inputs):
        named = cards[model.name].head.get("language")
        # YAML 1.1 takes Norwegian's ``no`` for a truth value.
        codes = ["no" if one is False else one for one in (named if isinstance(named, list) else [named])[:_MOST]]
        found += [code for code in codes if isinstance(code, str) and _LANGUAGE.fullmatch(code)]
    return list(dict.fromkeys(found))
