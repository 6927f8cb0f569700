"""The tables of an analysis: one number a row in a pandas DataFrame, as Parquet, CSV and JSON; and the analysis as a cached stage."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import ValidationError

from ota_core import analysis as core
from ota_core.analysis import Analysis, AnalysisOptions, Row
from ota_core.analysis.subject import mask_recipe, with_second_moments
from ota_core.artifact import ArtifactRef, fingerprint
from ota_core.compute.stream import Progress
from ota_core.errors import ArtifactError, OtaError
from ota_core.moments.compression import METHODS
from ota_core.plan.inputs import MergeInputs, optimizer_facts
from ota_core.recipe.recipe import MergeRecipe
from tasks.artifacts.store import BuildResult
from tasks.settings import Places
from tasks.stages import Step, expert_digests, store_of

PARQUET, CSV, SETTINGS = "analysis.parquet", "analysis.csv", "analysis.json"
PICTURES = "pictures.html"
"""What ``ota analyse`` writes beside the tables."""
TYPES = {
    "analysis": "string", "expert": "string", "other": "string", "layer": "Int64", "role": "string", "variant": "string",
    "measure": "string", "at": "float64", "value": "float64", "unit": "string", "elements": "Int64",
}  # fmt: skip
"""The columns of the table, in their order, with their pandas types. ``ota_core.analysis.Row`` says what each holds."""


def frame(rows: Iterable[Row]) -> pd.DataFrame:
    """The tidy table: the columns of ``Row``, null where a row has none."""
    return pd.DataFrame.from_records(list(rows), columns=list(TYPES)).astype(TYPES)


def write_tables(folder: Path, analysis: Analysis) -> pd.DataFrame:
    """``analysis.parquet``, ``analysis.csv`` and ``analysis.json`` (settings, what was left out, notes) in an existing folder."""
    table = frame(analysis.rows)
    table.to_parquet(folder / PARQUET, index=False)
    table.to_csv(folder / CSV, index=False)
    (folder / SETTINGS).write_text(json.dumps(_said(analysis), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return table


def _said(analysis: Analysis) -> dict[str, Any]:
    return {"settings": analysis.settings, "left_out": analysis.left_out, "notes": analysis.notes}


def read_tables(folder: Path) -> pd.DataFrame:
    """The table that ``write_tables`` left. Raises ArtifactError when the folder holds none, or one with other columns."""
    path = folder / PARQUET
    if not path.is_file():
        raise ArtifactError(f"{folder} holds no {PARQUET}; make it with ota analyse")
    table = pd.read_parquet(path)
    if list(table.columns) != list(TYPES):
        raise ArtifactError(
            f"{path} has the columns {', '.join(table.columns)}; expected {', '.join(TYPES)}: make it again with this version"
        )
    return table.astype(TYPES)


def read_settings(folder: Path) -> dict[str, Any]:
    """``settings``, ``left_out`` and ``notes`` of the analysis in a folder."""
    found: dict[str, Any] = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    return found


def analysis_options(
    *, density: float | None = None, compressions: str | Iterable[str] = METHODS, **more: Any
) -> AnalysisOptions:
    """Options from what a person writes; ``compressions``: names, or one text with commas between them. Raises OtaError."""
    named = compressions.split(",") if isinstance(compressions, str) else compressions
    names = [name.strip() for name in named if name.strip() not in {"", "-"}]
    unknown = sorted(set(names) - set(METHODS))
    if unknown:
        raise OtaError(f"compressions: got '{', '.join(unknown)}', expected some of {', '.join(METHODS)}")
    try:
        return AnalysisOptions(density=density, compressions=tuple(m for m in METHODS if m in names), **more)
    except ValidationError as error:
        first = error.errors()[0]
        raise OtaError(f"{first['loc'][0]}: got {first['input']!r}; {first['msg'][0].lower()}{first['msg'][1:]}") from None


def analyse_models(recipe: MergeRecipe, inputs: MergeInputs, options: AnalysisOptions, **how: Any) -> Analysis:
    """``ota_core.analysis.analyse``; ``how``: memory, threads, progress, …"""
    return core.analyse(recipe, inputs, options, **how)


def analysis_step(recipe: MergeRecipe, inputs: MergeInputs, options: AnalysisOptions | None = None) -> Step:
    """The analysis of a recipe's experts: the same for all recipes of one method whose masks are the same, however it combines them.

    inputs: with raw second moments or, as the later stages of a merge have them, with compressed ones and masks.
    """
    options = options or AnalysisOptions()
    known, _ = with_second_moments(inputs, options)
    masks = mask_recipe(recipe, options)
    names = [expert.name for expert in known.experts]
    tokenizer = recipe.tokenizer_source.removeprefix("model:")
    keys = ("scope", "metric", "mask_curvature", "compression", "rank", "bias_correction", "missing_curvature")
    config = {
        "method": recipe.merge_method,  # the settings in the result name it
        "masks": {key: masks.setting(key) for key in keys},
        "experts": [
            {
                "name": expert.name,
                "ffg": recipe.ffg(i),
                "curvature": expert.moments is not None,
                "optimizer": optimizer_facts(expert.path),
                **{key: masks.setting(key, i) for key in ("density", "precond_threshold")},
            }
            for i, expert in enumerate(known.experts)
        ],
        "tokenizer_source": names.index(tokenizer) if tokenizer in names else tokenizer,
        "options": options.model_dump(mode="json"),
    }
    digests = {"base": (known.base.digest if known.base else None) or "none"}
    for i, expert in enumerate(known.experts):
        digests[f"expert{i}"] = expert.digest or "unknown"
        if expert.moments is not None:
            digests[f"moments{i}"] = expert_digests(expert)["moments"]
    return Step(kind="analysis", fingerprint=fingerprint("analysis", config, digests), config=config, inputs=digests)


def analyse(
    places: Places,
    step: Step,
    recipe: MergeRecipe,
    inputs: MergeInputs,
    *,
    memory: str = "2GiB",
    progress: Progress | None = None,
) -> ArtifactRef:
    """The analysis as an artifact: its tables, or those found in the store. Raises OtaError."""

    def build(folder: Path) -> BuildResult:
        options = AnalysisOptions.model_validate(step.config["options"])
        found = analyse_models(recipe, inputs, options, memory=memory, scratch=folder, progress=progress)
        write_tables(folder, found)
        return BuildResult(results=_said(found))

    return store_of(places).produce("analysis", step.fingerprint, config=step.config, inputs=step.inputs, build=build)


def read_analysis(where: Places, ref: ArtifactRef) -> pd.DataFrame:
    """The table that an artifact of kind ``analysis`` holds."""
    return read_tables(store_of(where).local_path(ref))


def densest_cells(table: pd.DataFrame, count: int = 8) -> pd.DataFrame:
    """Where FFG keeps the largest share of a cell, all experts together; norms are too small to count. Most first.

    Columns: layer, role, ``size`` (share of the model's elements), and of each variant ``<variant> density``, the kept share of the cell.
    """
    cells = table[(table.analysis == "localisation") & ~table.role.isin(["all", "norm"])]
    variants = [v for v in ("curvature", "magnitude") if (cells.variant == v).any()]
    if not variants:
        return pd.DataFrame()
    cells = cells.assign(kept=cells.value * cells.elements.astype(float), elements=cells.elements.astype(float))
    found = (
        cells.groupby(["layer", "role", "variant"], dropna=False)[["kept", "elements"]].sum().unstack("variant", fill_value=0.0)
    )
    result = pd.DataFrame({"size": found["elements", variants[0]] / found["elements", variants[0]].sum()})
    for variant in variants:
        result[f"{variant} density"] = found["kept", variant] / found["elements", variant]
    return result.sort_values(f"{variants[0]} density", ascending=False).head(count).reset_index()


def whole_model(table: pd.DataFrame, analysis: str, measure: str) -> pd.DataFrame:
    """The rows of a measure over the whole model."""
    return table[(table.analysis == analysis) & (table.measure == measure) & (table.role == "all") & table.layer.isna()]
