"""All analyses of a recipe, one after the other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from ota_core.analysis.compressions import compressions
from ota_core.analysis.localisation import localisation
from ota_core.analysis.overlap import curvature_overlap
from ota_core.analysis.subject import AnalysisOptions, open_subject
from ota_core.analysis.table import Row
from ota_core.analysis.task_vectors import task_vectors
from ota_core.compute.stream import Limits
from ota_core.plan.inputs import MergeInputs
from ota_core.recipe.recipe import MergeRecipe


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What an analysis found."""

    rows: list[Row]
    settings: dict[str, Any]
    """How it was made: experts, masks, densities. JSON-able."""
    left_out: list[str]
    """What it does not say, and why."""
    notes: list[str]
    """What one must know to read it."""


def analyse(
    recipe: MergeRecipe,
    inputs: MergeInputs,
    options: AnalysisOptions | None = None,
    *,
    scratch: Path | None = None,
    **limits: Unpack[Limits],
) -> Analysis:
    """Analyse the experts of a recipe as its merge would see them.

    The masks are those of the merge: its density or threshold, scope, metric, compression. An expert that the merge does not mask gets the
    mask of FFG at ``options.density``, and ``notes`` says so. Without that option a compression is judged by masks at the density of its
    expert's own mask, and the overlap between experts at the mean of these densities. Second moments beside the experts of a merge that
    needs none are used, too. scratch: folder for what is kept on the disk meanwhile (a quarter of an expert's v with log8). Raises
    OtaError.
    """
    options = options or AnalysisOptions()
    with open_subject(recipe, inputs, options, scratch=scratch, **limits) as subject:
        # Localisation first: it finds what share a threshold keeps, at which the others compare.
        rows = [*localisation(subject), *curvature_overlap(subject), *task_vectors(subject), *compressions(subject)]
        masks = subject.plan.recipe
        settings = {
            "merge_method": recipe.merge_method,
            "experts": [expert.name for expert in subject.plan.experts],
            "with_curvature": [expert.name for expert in subject.curved],
            "masks": {
                expert.name: {
                    "of": "the merge" if recipe.ffg(expert.index) else "the analysis",
                    "density": masks.setting("density", expert.index),
                    "precond_threshold": masks.setting("precond_threshold", expert.index),
                }
                for expert in subject.plan.experts
            },
            "density": subject.common_density,
            **{key: masks.setting(key) for key in ("scope", "metric", "mask_curvature", "compression", "bias_correction")},
            "compressions": list(subject.compressions),
        }
        return Analysis(rows=rows, settings=settings, left_out=subject.left_out, notes=subject.notes)
