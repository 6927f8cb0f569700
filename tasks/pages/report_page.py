"""The report of a merge: one HTML page beside the model, and among its run's artifacts; written again when the gate has decided."""

import platform
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from prefect.runtime import flow_run
from pydantic import Field, ValidationError

from ota_core.artifact import CARD, ArtifactRef
from ota_core.engine.model_card import SCORES
from ota_core.frozen import Frozen
from tasks.artifacts.store import store_of
from tasks.evaluation.comparison import comparison
from tasks.evaluation.gate import GateDecision
from tasks.evaluation.scores import ModelScores, loss_rows
from tasks.evaluation.smoke import Smoke
from tasks.evaluation.subject import Subject
from tasks.settings import Places
from tasks.storage import models as storage
from tasks.tracking.merge import InputRef, MergeRun
from tasks.tracking.run import ANALYSIS_CSV, DOCUMENTS_HTML, GATE_JSON, REPORT, TAG_ANALYSIS

if TYPE_CHECKING:  # a flow without a benchmark does not wait for it
    import pandas as pd

ReportKind = Literal["full", "scores", "none"]
"""``full``: with the analysis of the experts. ``scores``: without. ``none``: no report."""


class MergePage(Frozen):
    """What a merge's page is made of, where the rest of it lies in the store of artifacts."""

    name: str
    method: str
    recipe_yaml: str
    inputs: tuple[InputRef, ...]
    merged: ArtifactRef
    digest: str
    scores: tuple[dict[str, str | float | None], ...]
    """As ``MergeRun.table``."""
    losses: tuple[dict[str, str | float | None], ...] = ()
    """As ``tasks.evaluation.scores.loss_rows`` gives them, where the suite measures any."""
    suite: str = ""
    limit: int | None = None
    documents: dict[str, int] = Field(default_factory=dict)
    """Capability to how many documents the merge was scored on."""
    analysis: ArtifactRef | None
    unanalysed: str = ""
    """Why there is no analysis, where one was wanted."""
    smoke: Smoke | None = None
    """How the merge stood in the smoke test; None without a benchmark."""
    flips: tuple[dict[str, str | float | None], ...] = ()
    """Rows of ``tasks.pages.documents.flips``; none where documents are not shown."""

    def html(self, where: Places, decision: GateDecision | None = None) -> str:
        """The page. It does not name the MLflow run: it is one of that run's own artifacts. Raises OtaError."""
        from tasks.pages.analysis import read_analysis, read_settings
        from tasks.pages.report import MergeReport, report_html

        store = store_of(where)
        record = store.read_record(self.merged)
        said: dict[str, Any] = read_settings(store.local_path(self.analysis)) if self.analysis else {"notes": [], "left_out": []}
        return report_html(
            MergeReport(
                name=self.name, method=self.method, recipe_yaml=self.recipe_yaml, record=record.model_dump(mode="json"),
                inputs=self.inputs, created=datetime.fromisoformat(record.provenance["produced_at"]), model_uri=self.merged.uri,
                model_digest=self.digest, scores=self.scores, losses=self.losses,
                suite=self.suite, limit=self.limit, documents=self.documents, unanalysed=self.unanalysed,
                analysis=read_analysis(where, self.analysis) if self.analysis else None,
                analysis_notes=(*said["notes"], *(f"Left out: {what}" for what in said["left_out"])), gate=decision,
                smoke=self.smoke, flips=self.flips, links=prefect_links(flow_run.ui_url),
                versions={name: version(name) for name in ("ota-merging", "torch", "lm_eval")} | {"python": platform.python_version()},
            )
        )  # fmt: skip


def prefect_links(url: str | None) -> dict[str, str]:
    """The way to the flow run; none where there is no UI, of which Prefect's address begins with ``None/``."""
    return {"the run in the Prefect UI": url} if url and url.startswith(("http://", "https://")) else {}


def page_of(
    run: MergeRun,
    merged: ArtifactRef,
    found: Mapping[str, ModelScores],
    subjects: dict[str, Subject],
    analysis: ArtifactRef | None,
    unanalysed: str = "",
    smoke: Smoke | None = None,
    answered: "pd.DataFrame | None" = None,
) -> MergePage:
    """The page of a merge, before any gate."""
    from tasks.pages.documents import flip_rows

    of_merge = found.get("merged")
    return MergePage(
        name=run.name, method=run.method, recipe_yaml=run.recipe_yaml, inputs=tuple(run.inputs), merged=merged, digest=run.model_digest,
        scores=tuple(run.table), losses=tuple(loss_rows(comparison(dict(found), subjects))) if found else (),
        suite=of_merge.suite if of_merge else "", limit=of_merge.limit if of_merge else None,
        documents=of_merge.documents if of_merge else {},
        analysis=analysis, unanalysed=unanalysed, smoke=smoke, flips=tuple(flip_rows(answered)) if answered is not None else (),
    )  # fmt: skip


def with_report(run: MergeRun, page: MergePage, where: Places, decision: GateDecision | None = None) -> MergeRun:
    """The run with the page, and the table that its pictures show, as artifacts to log. Raises OtaError."""
    from tasks.pages.analysis import CSV

    folder = store_of(where).local_path(page.analysis) if page.analysis else None
    tables = {ANALYSIS_CSV: (folder / CSV).read_text(encoding="utf-8")} if folder else {}
    tags = run.tags | ({TAG_ANALYSIS: "in the report"} if folder else {})
    tags |= {TAG_ANALYSIS: f"none: {page.unanalysed}"} if page.unanalysed else {}
    return run.model_copy(update={"report_html": page.html(where, decision), "tables": run.tables | tables, "tags": tags})


def keeping_scores(run: MergeRun, merged: ArtifactRef) -> MergeRun:
    """The run, but of a merge that is not benchmarked now the model card and the report that tell its scores, where they lie beside it."""
    card = None if run.table else storage.read_note(storage.join(merged.uri, CARD))
    if card is None or f"\n{SCORES}\n" not in card.decode():
        return run
    page = storage.read_note(storage.join(merged.uri, REPORT)) if run.report_html else None
    return run.model_copy(update={"model_card": card.decode()} | ({"report_html": page.decode()} if page else {}))


def put_beside_the_model(run: MergeRun, merged: ArtifactRef, where: Places) -> None:
    """The model card, now with the scores, the report, and the page of the documents that flipped."""
    notes = {CARD: run.model_card, REPORT: run.report_html, DOCUMENTS_HTML: run.tables.get(DOCUMENTS_HTML)}
    store_of(where).annotate(merged, {name: text for name, text in notes.items() if text})


def keep_decision(merged: ArtifactRef, decision: GateDecision, where: Places) -> None:
    """Lay the gate's decision beside the model, where a later page of it finds it without asking MLflow."""
    store_of(where).annotate(merged, {GATE_JSON: decision.model_dump_json(indent=2) + "\n"})


def kept_decision(merged: ArtifactRef) -> GateDecision | None:
    """The decision beside the model; None where no gate has seen it, or another version of this package wrote it. Raises StorageError."""
    text = storage.read_note(storage.join(merged.uri, GATE_JSON))
    try:
        return GateDecision.model_validate_json(text) if text else None
    except ValidationError:
        return None


def with_decision(page: MergePage, decision: GateDecision, where: Places) -> str:
    """The page with the gate's decision, which takes the place of the one beside the model. Raises OtaError."""
    html = page.html(where, decision)
    store_of(where).annotate(page.merged, {REPORT: html})
    return html
