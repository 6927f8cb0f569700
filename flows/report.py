"""What a finished merge tells MLflow and the reader: its name, parameters, metrics and table of scores."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect.context import FlowRunContext
from prefect.runtime import flow_run

from ota_core.artifact import ArtifactRef
from ota_core.merge.model_card import model_card
from ota_core.plan.inputs import MergeInputs
from ota_core.recipe.recipe import MergeRecipe
from tasks import stages
from tasks.artifacts.system_metrics import SystemPoint, points_of
from tasks.evaluation.scores import ModelScores, negative_transfer, retention, rows_of, scores_table
from tasks.evaluation.suites import Suite
from tasks.experiments.study.cells import settings_of, spell, unusual
from tasks.pages.scores import of_card
from tasks.settings import Places
from tasks.stages import Subject
from tasks.storage.models import Fetched
from tasks.tracking.merge import ChildRun, InputRef, MergeRun
from tasks.tracking.params import comparable_params
from tasks.tracking.run import SCORES_PNG, TAG_COMMIT, TAG_FLOW_RUN, Benchmarked, uncertainty

if TYPE_CHECKING:  # a flow without a benchmark does not wait for it
    import pandas as pd


_NAME = 200
"""Characters."""
_FIRST = ("density", "precond_threshold", "compression", "metric", "power", "masked_merge", "lambda", "t", "weight")
_SHORT = {"density": "rho", "precond_threshold": "tau"}


def merge_name(recipe: MergeRecipe) -> str:
    """A short name that says what is merged, for example ``ota math+code rho=0.40``."""
    experts = "+".join(entry.name or entry.capability or short_name(entry.model) for entry in recipe.models)
    method, *settings = merge_label(recipe).split(" ")
    # MLflow knows the experts besides; what sets this merge apart from others of them is in the settings.
    room = max(_NAME - len(" ".join([method, *settings])) - 1, _NAME // 4)
    return " ".join([method, experts[:room], *settings])[:_NAME].replace("'", "").replace("`", "")


def merge_label(recipe: MergeRecipe) -> str:
    """How it is merged, for tables and charts that name the experts anyway: ``ota rho=0.40``.

    Every setting that is not the method's default, so that two merges of the same experts do not read alike. What varies most
    comes first: that is left where a name is cut.
    """
    settings = settings_of(recipe)
    said = unusual(recipe.merge_method, settings)
    keys = [*(key for key in _FIRST if key in said), *(key for key in said if key not in {*_FIRST, "rank"})]
    return " ".join([recipe.merge_method, *(_said(key, said[key], settings.get("rank")) for key in keys)])


def _said(key: str, value: Any, rank: int | None) -> str:
    """One setting in a label; of several experts' values that differ all, in the experts' order."""
    if key == "compression":
        return f"{value}={rank}" if rank else str(value)
    spelling = _decimals if key == "density" else spell
    values = value if isinstance(value, tuple) else (value,)
    return f"{_SHORT.get(key, key)}={'/'.join('-' if one is None else spelling(one) for one in values)}"


def _decimals(value: float) -> str:
    """At least two decimals, so that names line up: 0.40, 0.005."""
    return f"{value:.2f}" if round(value, 2) == value else spell(value)


def short_name(model: str) -> str:
    """The part of a path that names the expert: the capability in the S3 layout …/<capability>/<expert>."""
    parts = [part for part in model.split("@")[0].split("/") if part and part != "s3:"]
    last = parts[-1] if parts else model
    return parts[-2] if len(parts) > 1 and last[:1].isdigit() else last


def merge_run(
    recipe: MergeRecipe,
    inputs: MergeInputs,
    fetched: list[Fetched],
    subjects: dict[str, Subject],
    merged: ArtifactRef,
    scores: dict[str, ArtifactRef],
    found: dict[str, ModelScores],
    refs: dict[str, list[ArtifactRef]],
    where: Places,
    registered_model: str | None,
    data: str | None = None,
) -> MergeRun:
    """Everything that MLflow is told of a merge (names: design.md). ``found``: what the
    artifacts ``scores`` hold; ``data``: where the suite's documents lie."""
    from tasks.pages.pictures.picture import png
    from tasks.pages.pictures.scores import pictures_of_scores

    store = stages.store_of(where)
    record = store.read_record(merged)
    metrics = _stage_metrics(store, refs, record)
    metrics |= score_metrics(found, subjects)
    tags = {"recipe_fingerprint": merged.fingerprint, **_context()}
    params: dict[str, str | int | float | bool] = {
        "merge_method": recipe.merge_method,
        "base_model": recipe.base_model or "none",
        "experts": ",".join(expert.name for expert in inputs.experts),
    }
    for key, value in recipe.effective()["parameters"].items():
        if value is not None:
            params[key] = value
    for key in recipe.effective()["experts"][0]:
        values = [recipe.setting(key, i) for i in range(len(recipe.models))]
        if any(value is not None for value in values):
            params[key] = values[0] if len(set(values)) == 1 else ",".join(str(value) for value in values)
    params |= comparable_params(recipe, {k.removeprefix("density/"): v for k, v in metrics.items() if k.startswith("density/")})
    rows = rows_of(comparison(found, subjects)) if found else []
    measured = _benchmarked(store, scores, found)
    return MergeRun(
        name=merge_name(recipe),
        method=recipe.merge_method,
        params=params,
        tags=tags,
        metrics=metrics,
        recipe_yaml=recipe.to_yaml(),
        record=record.model_dump(mode="json"),
        model_uri=merged.uri,
        model_digest=subjects["merged"].digest,
        registered_model=registered_model,
        model_card=model_card(
            recipe, inputs, record.results, merged.fingerprint, **(of_card(rows, found["merged"]) if found else {})
        ),
        inputs=_lineage(inputs, fetched) + _benchmark_data(measured, data),
        benchmarked=measured,
        system=_machine(store, [*(ref for some in refs.values() for ref in some), *scores.values()]),
        children=[
            ChildRun(
                name=subject.name,
                role=subject.role,
                capability=own_capability(subject, found[key]),
                digest=subject.digest,
                metrics=_scores(found[key]),
            )  # type: ignore[arg-type]
            for key, subject in subjects.items()
            if key in found
        ],
        table=rows,
        pictures={SCORES_PNG: png(pictures_of_scores(rows)["scores"].chart)} if found and found["merged"].measured else {},
    )


def _stage_metrics(store: Any, refs: dict[str, list[ArtifactRef]], merged: Any) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for stage, artifacts in refs.items():
        records = [store.read_record(ref) for ref in artifacts]
        metrics[f"seconds/{stage}"] = sum(record.provenance.get("seconds", 0.0) for record in records)
        if stage == "compress":
            parameters = sum(record.results["parameters"] for record in records)
            stored = sum(record.results["bytes_per_param"] * record.results["parameters"] for record in records)
            metrics["moments/bytes_per_param"] = stored / max(parameters, 1)
            metrics["moments/sqrt_error"] = max(record.results["sqrt_error"] for record in records)
    for name, report in merged.results.get("densities", {}).items():
        metrics[f"density/{name}"] = report["density"]
    if "peak_memory_gib" in merged.provenance:
        metrics["peak_memory_gib"] = merged.provenance["peak_memory_gib"]
    return metrics


def _scores(scores: ModelScores) -> dict[str, float]:
    """Scores and held-out losses of one model, measured ones only, and how sure the scores are."""
    return scores.metrics() | uncertainty(scores)


def score_metrics(found: dict[str, ModelScores], subjects: dict[str, Subject]) -> dict[str, float]:
    """The merge's own scores, and what they mean beside its base and experts."""
    if not found:
        return {}
    metrics = _scores(found["merged"]) | {
        f"retention/{name}": value for name, value in retention(found["merged"], experts_of(found, subjects)).items()
    }
    if "base" in found:
        metrics["negative_transfer"] = float(len(negative_transfer(found["merged"], found["base"])))
    metrics["seconds/benchmark"] = sum(scores.seconds for scores in found.values())
    return metrics


def own_capability(subject: Subject, scores: ModelScores) -> str | None:
    """The capability that is an expert's own: the one that the recipe or its manifest states, else the one that it is named after."""
    if subject.role != "expert":
        return None
    return subject.capability or (subject.name if subject.name in scores.capabilities else None)


def experts_of(found: Mapping[str, ModelScores], subjects: Mapping[str, Subject]) -> dict[str, tuple[str, ModelScores]]:
    """Expert's name to its own capability and its scores, as tables and ``retention`` take them; one without has its name there,
    which nobody measures."""
    return {
        s.name: (own_capability(s, found[key]) or s.name, found[key])
        for key, s in subjects.items()
        if s.role == "expert" and key in found
    }


def comparison(found: dict[str, ModelScores], subjects: dict[str, Subject]) -> pd.DataFrame:
    """The table of one merge: base, experts, merge."""
    return compare(found.get("base"), experts_of(found, subjects), {subjects["merged"].name: found["merged"]})


def compare(
    base: ModelScores | None, experts: Mapping[str, tuple[str, ModelScores]], merges: Mapping[str, ModelScores]
) -> pd.DataFrame:
    """``scores_table``, also for merges without a base: then there is no such row, and nothing is above or below it."""
    if base is not None:
        return scores_table(base, experts, merges)
    import pandas as pd

    stand_in = next(iter(merges.values()))  # a row that measured nothing would take every capability out of the average
    table = scores_table(stand_in, experts, merges)
    return table.drop(index="base").assign(negative_transfer=pd.NA, below_base="")


def _lineage(inputs: MergeInputs, fetched: list[Fetched]) -> list[InputRef]:
    names = [*(["base"] if inputs.base else []), *(expert.name for expert in inputs.experts)]
    return [
        InputRef(name=name, source=one.resolved, digest=one.digest, role="base" if inputs.base and i == 0 else "expert")
        for i, (name, one) in enumerate(zip(names, fetched, strict=True))
    ]


def _benchmarked(store: Any, scores: dict[str, ArtifactRef], found: dict[str, ModelScores]) -> Benchmarked | None:
    """The scores document by document, with the suite as their artifacts' records describe it."""
    if not found:
        return None
    record = store.read_record(scores["merged"])
    suite = {key: value for key, value in record.config.items() if key in Suite.model_fields}
    # Where the task files lay does not matter; that there were some, the suite has to say.
    suite |= {"include_path": "tasks"} if "tasks" in record.inputs else {}
    models = {key: found[key] for key in scores}
    return Benchmarked(suite=Suite.model_validate(suite), data_digest=record.inputs.get("data"), models=models)


def _benchmark_data(measured: Benchmarked | None, data: str | None) -> list[InputRef]:
    """What the models were scored on: the documents, or where lm-eval reads public ones, the suite that names them."""
    if measured is None:
        return []
    digest = measured.data_digest or measured.merged.suite_digest
    return [InputRef(name=f"suite {measured.merged.suite}", source=data or "lm-eval", digest=digest, role="data")]


def _machine(store: Any, refs: list[ArtifactRef]) -> list[SystemPoint]:
    """What the machines were doing while this run computed these artifacts; what it found in the store tells nothing of this run."""
    context = FlowRunContext.get()
    if context is None:
        return []
    since = context.start_time.timestamp()
    return [point for ref in refs for point in points_of(store.read_record(ref).provenance, since)]


def _context() -> dict[str, str]:
    """The Prefect run and the commit of this code, where they are known."""
    tags = {}
    if flow_run.id:
        tags[TAG_FLOW_RUN] = str(flow_run.id)
    commit = git_commit(Path(__file__).resolve())
    return tags | ({TAG_COMMIT: commit} if commit else {})


def git_commit(file: Path) -> str | None:
    """The commit checked out where a file of this code lies. None without git, and for an installed copy inside another repository."""
    if shutil.which("git") is None:
        return None

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(file.parent), *arguments], capture_output=True, text=True, check=False)

    if git("ls-files", "--error-unmatch", file.name).returncode != 0:
        return None
    commit = git("rev-parse", "HEAD")
    return commit.stdout.strip() if commit.returncode == 0 else None
