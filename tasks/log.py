"""Logging: what MLflow is told of a finished merge, its page and model card, and the tasks that tell it."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from ota_core.artifact import ArtifactRef
from ota_core.engine.model_card import model_card
from ota_core.errors import StorageError
from ota_core.plan.inputs import MergeInputs
from tasks.artifacts.store import store_of
from tasks.artifacts.system_metrics import SystemPoint, points_of
from tasks.evaluation.answers import documents_table
from tasks.evaluation.comparison import comparison, experts_of, own_capability, tier_rows
from tasks.evaluation.gate import GateDecision
from tasks.evaluation.kept import read_all, read_documents
from tasks.evaluation.scores import ModelScores, negative_transfer, retention, rows_of
from tasks.evaluation.smoke import Smoke
from tasks.evaluation.subject import Subject
from tasks.evaluation.suites import Suite
from tasks.merging.labels import merge_label, merge_name
from tasks.merging.sources import Planned
from tasks.orchestration.shown import show_mlflow, show_scores, show_table
from tasks.pages.outcome import MergeOutcome
from tasks.pages.report_page import (
    MergePage,
    ReportKind,
    keep_decision,
    keeping_scores,
    kept_decision,
    page_of,
    put_beside_the_model,
    with_report,
)
from tasks.pages.scores import of_card, tiers
from tasks.registry import promotion
from tasks.settings import Places
from tasks.storage.models import Fetched
from tasks.tracking.merge import ChildRun, InputRef, LoggedRun, MergeRun, suite_data
from tasks.tracking.outbox import BenchmarkRun, tell
from tasks.tracking.params import comparable_params
from tasks.tracking.patience import ASKING_SECONDS, within
from tasks.tracking.run import (
    DOCUMENTS_HTML,
    DOCUMENTS_JSON,
    SCORES_PNG,
    TAG_COMMIT,
    TAG_DOCUMENTS,
    TAG_FLOW_RUN,
    TAG_SMOKE,
    Benchmarked,
    uncertainty,
)

if TYPE_CHECKING:  # a flow without a benchmark does not wait for it
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A merge whose stages have run."""

    plan: Planned
    fetched: list[Fetched]
    """Base first."""
    subjects: dict[str, Subject]
    """``base``, ``expert/<name>`` and ``merged``."""
    merged: ArtifactRef
    stages: dict[str, list[ArtifactRef]]
    """Stage to what it left."""
    smoke: Smoke | None
    """How the merge stood in the smoke test; None without a benchmark. One that failed is not benchmarked."""
    scores: dict[str, ArtifactRef]
    """As ``subjects``; empty without a benchmark."""
    documents: bool
    """Whether what was asked and answered may be shown; the suite says so."""
    data_dir: str | None
    """Where the suite's documents lie."""
    where: Places
    preflight: ArtifactRef | None = None
    """What was measured before the merge."""

    @cached_property
    def found(self) -> dict[str, ModelScores]:
        """The scores that the artifacts hold."""
        return read_all(self.where, self.scores)

    @cached_property
    def answered(self) -> pd.DataFrame | None:
        """Document by document what base, best expert and merge answered; None where there is nothing to show."""
        if not self.found or not self.documents or not self.found["merged"].samples:
            return None
        answers = {key: read_documents(self.where, ref) for key, ref in self.scores.items()}
        return documents_table(self.found, self.subjects, answers)


def _soon(_: Any, run: Any, __: Any) -> bool:
    """A server that refuses at once may be back in a moment; one that has stalled for so long already is not waited for again."""
    return run.start_time is None or (datetime.now(UTC) - run.start_time).total_seconds() < RETRY_SECONDS


RETRY_SECONDS = 30
LOGGING: dict[str, Any] = {"retries": 2, "retry_delay_seconds": 10, "retry_condition_fn": _soon}


@task(name="log", task_run_name="log {run.name}", **LOGGING)
def log(run: MergeRun, where: Places, tracking_uri: str | None) -> LoggedRun:
    """Log the merge to MLflow, and what earlier runs could not. Finds the run that an earlier try or an equal merge logged: it can be repeated."""
    return tell(run, home=where.home, root=where.tracking, tracking_uri=tracking_uri)


@task(name="log", task_run_name="log {subject.name}", **LOGGING)
def log_scores(
    subject: Subject, fingerprint: str, scores: ModelScores, where: Places, tracking_uri: str | None, data_digest: str | None = None,
    data_dir: str | None = None,
) -> LoggedRun:  # fmt: skip
    """Log the scores of one model to MLflow; finds the run of an earlier try."""
    run = BenchmarkRun(
        name=subject.name, source=subject.location or "", digest=subject.digest, fingerprint=fingerprint, scores=scores,
        data=suite_data(scores, data_digest, data_dir),
    )  # fmt: skip
    return tell(run, home=where.home, root=where.tracking, tracking_uri=tracking_uri)


def finish(
    done: Merged, report: ReportKind, analysis: ArtifactRef | None, unanalysed: str, registered_model: str | None, tracking_uri: str | None
) -> MergeOutcome:  # fmt: skip
    """In a flow: the merge's page and card beside the model, its run in MLflow, its scores and links in the Prefect UI. Raises OtaError."""
    where, result, plain, page = done.where, done.subjects["merged"], merge_run(done, registered_model), None
    path = str(result.path or done.merged.uri)
    if report != "none":
        page = page_of(plain, done.merged, done.found, done.subjects, analysis, unanalysed, done.smoke, done.answered)
    # Everything that needs no server comes first: where one is away, the model lies there with its page and its card.
    run = _beside_the_model(plain, page, done, kept_decision(done.merged) if page else None)
    get_run_logger().info("merged model: %s", path)
    if done.smoke and not done.smoke.passed:
        get_run_logger().error("%s is not benchmarked. %s", run.name, done.smoke.said)
    if done.found:
        show_scores(comparison(done.found, done.subjects), title=run.name)
        if done.found["merged"].tiers:
            show_table(tiers(tier_rows(done.found, done.subjects)), "tiers")
    if page is not None and kept_decision(done.merged) is None and (decision := _logged_decision(run, where, tracking_uri)):
        keep_decision(done.merged, decision, where)
        run = _beside_the_model(plain, page, done, decision)
    logged = log(run, where, tracking_uri)
    if logged.run_id:
        get_run_logger().info("MLflow run %s", logged.url or logged.run_id)
    show_mlflow(run.name, logged.url)
    return MergeOutcome(
        name=merge_label(done.plan.recipe), merged=done.merged, path=path, digest=result.digest, scores=done.scores,
        capabilities={expert.name: expert.capability for expert in done.plan.inputs.experts if expert.capability},
        densities={key.removeprefix("density/"): value for key, value in run.metrics.items() if key.startswith("density/")},
        logged=logged, page=page, smoke=done.smoke,
    )  # fmt: skip


def _beside_the_model(run: MergeRun, page: MergePage | None, done: Merged, decision: GateDecision | None) -> MergeRun:
    """Put the model's card and page beside it; returns the run with them.

    What a gate decided of this merge before stays in the page: a champion is merged again by every night that finds it standing.
    """
    if page is not None:
        run = with_report(run, page, done.where, decision)
        if done.answered is not None:
            from tasks.pages.documents import documents_html

            run = run.model_copy(update={"tables": run.tables | {DOCUMENTS_HTML: documents_html(run.name, done.answered)}})
    run = keeping_scores(run, done.merged)
    put_beside_the_model(run, done.merged, done.where)
    return run


def _logged_decision(run: MergeRun, where: Places, tracking_uri: str | None) -> GateDecision | None:
    """What a gate decided of this merge before its decisions lay beside the model. One that cannot be read is a warning: the page goes without."""
    try:
        return within(
            ASKING_SECONDS,
            "reading the gate's decision",
            lambda: promotion.logged_decision(run.fingerprint, run.model_digest, tracking_uri=tracking_uri, root=where.tracking),
        )
    except StorageError as error:
        get_run_logger().warning("the page goes without an earlier decision of the gate: %s", error)
        return None


def merge_run(done: Merged, registered_model: str | None) -> MergeRun:
    """Everything that MLflow is told of a merge (names: docs/prefect-mlflow.md)."""
    from tasks.experiments.preflight.features import metrics as preflight_metrics
    from tasks.pages.analysis import read_analysis
    from tasks.pages.documents import documents_json, documents_note
    from tasks.pages.pictures.picture import png
    from tasks.pages.pictures.scores import pictures_of_scores

    recipe, inputs, where = done.plan.recipe, done.plan.inputs, done.where
    subjects, merged, scores, found = done.subjects, done.merged, done.scores, done.found
    refs = done.stages | {"merge": [merged]}
    store = store_of(where)
    record = store.read_record(merged)
    metrics = _stage_metrics(store, refs, record)
    metrics |= score_metrics(found, subjects)
    if done.preflight is not None:
        metrics |= preflight_metrics(read_analysis(where, done.preflight))
    tags = {"recipe_fingerprint": merged.fingerprint, **_context()}
    if done.smoke:
        metrics["smoke/passed"], tags[TAG_SMOKE] = float(done.smoke.passed), " ".join([done.smoke.said, *done.smoke.notes])
    if done.answered is not None:
        tags[TAG_DOCUMENTS] = documents_note(done.answered)
    params: dict[str, str | int | float | bool] = {
        "merge_method": recipe.merge_method,
        "base_model": recipe.base_model or "none",
        "experts": ",".join(expert.name for expert in inputs.experts),
    }
    for key, value in recipe.effective()["parameters"].items():
        if value is not None:
            params[key] = value
    effective = recipe.effective()["experts"]
    for key in dict.fromkeys(key for own in effective for key in own):
        values = [own.get(key) for own in effective]
        if any(value is not None for value in values):
            params[key] = values[0] if all(value == values[0] for value in values) else ",".join(str(value) for value in values)
    realised = {k.removeprefix("density/"): v for k, v in metrics.items() if k.startswith("density/")}
    params |= comparable_params(recipe, realised, record.results.get("lambda", {}).get("value"))
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
        inputs=_lineage(inputs, done.fetched) + _benchmark_data(measured, done.data_dir),
        benchmarked=measured,
        system=_machine(store, [*(ref for some in refs.values() for ref in some), *scores.values()]),
        children=[
            ChildRun(
                name=subject.name,
                role=subject.role,
                capability=own_capability(subject, found[key]),
                digest=subject.digest,
                metrics=_scores(found[key]),
            )
            for key, subject in subjects.items()
            if key in found
        ],
        table=rows,
        tables={} if done.answered is None else {DOCUMENTS_JSON: documents_json(done.answered)},
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
    """What the models were scored on."""
    return [] if measured is None else [suite_data(measured.merged, measured.data_digest, data)]


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
