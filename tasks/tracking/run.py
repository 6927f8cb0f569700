"""One merge as it is logged: frozen values that survive JSON, and the files that go with them. MLflow is not needed here."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from ota_core.artifact import RECORD, fingerprint
from ota_core.errors import OtaError
from tasks.artifacts.system_metrics import SystemPoint
from tasks.evaluation.scores import ModelScores, mean_error
from tasks.evaluation.suites import Suite
from tasks.evaluation.tiers import deciding
from tasks.tracking.names import REGISTERED_MODEL
from tasks.tracking.store import Store, page_url

TAG_FINGERPRINT = "recipe_fingerprint"
TAG_FLOW_RUN = "prefect_flow_run_id"
TAG_COMMIT = "git_commit"
TAG_LOGGED = "last_logged"
"""The day (UTC) on which a merge was last logged, also where the run was complete before: ``ota gc`` keeps what that run names."""

REFERENCE = "model"
"""The folder among a run's artifacts that holds the reference to the weights."""
SCORES_CSV = "tables/scores.csv"
SCORES_JSON = "tables/scores.json"
SCORES_PNG = "plots/scores.png"
REPORT = "report.html"
GATE_JSON = "gate.json"
"""The gate's decision, among the artifacts of a candidate's run and beside its model."""
ANALYSIS_CSV = "tables/analysis.csv"
SAMPLES = "tables/samples.json.gz"
"""Every document's score of every benchmarked model, for paired comparisons: a ``Benchmarked`` as JSON."""
TAG_SUITE = "suite"
TAG_SUITE_KEY = "suite_key"
"""Equal for runs whose scores compare: the same tasks, settings, limit, lm-eval and data."""
TAG_LIMIT = "limit"
TAG_ANALYSIS = "analysis"
"""Of a run whose report was to hold the analysis of the experts: that it does, or why not."""
TAG_DOCUMENTS = "documents"
"""What the table of documents holds and what not, in words."""
DOCUMENTS_JSON = "tables/documents.json"
DOCUMENTS_HTML = "documents.html"
TAG_SMOKE = "smoke"
"""How the merge stood in the smoke test, in words."""
TAG_DATA = "data_digest"
TAG_CAPABILITIES = "capabilities"
"""JSON list, in the suite's order. A run that was scored on two suites keeps metrics of both; these are of the last."""

_NO_QUOTES = r"^[^'`\s]+$"  # tags that runs are searched by


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")


class InputRef(_Frozen):
    """Something that the merge was made of."""

    name: str = Field(min_length=1)
    source: str
    """Resolved: ``s3://…``, a folder, or a Hugging Face id with its revision."""
    digest: str
    role: Literal["base", "expert", "data"]
    profile: dict[str, str | int] = {}
    """What else is known of it, for data: the suite's digest, how many documents were scored, lm-eval's version."""


class Benchmarked(_Frozen):
    """What the models of a merge scored, document by document, and on what."""

    suite: Suite
    data_digest: str | None
    """Of the folder with the documents; None for a suite that reads public ones, which lm-eval's version names."""
    models: dict[str, ModelScores] = Field(min_length=1)
    """``base``, ``expert/<name>`` and ``merged``."""

    @property
    def merged(self) -> ModelScores:
        return self.models["merged"]

    def key(self) -> str:
        """What two merges must share for their scores to compare, 12 hex digits."""
        return fingerprint("scores", {"suite": self.merged.suite_digest, "limit": self.merged.limit},
                           {"data": self.data_digest or "none"})[:12]  # fmt: skip

    def tags(self) -> dict[str, str]:
        """What a run says of its benchmark."""
        tags = {
            TAG_SUITE: self.merged.suite,
            TAG_SUITE_KEY: self.key(),
            TAG_LIMIT: str(self.merged.limit or "none"),
            TAG_CAPABILITIES: json.dumps(list(self.merged.capabilities)),
        }
        return tags | self.merged.asked() | ({TAG_DATA: self.data_digest} if self.data_digest else {})

    def to_bytes(self) -> bytes:
        """JSON in gzip; the same scores give the same bytes."""
        return gzip.compress(self.model_dump_json().encode(), mtime=0)

    @classmethod
    def from_bytes(cls, content: bytes) -> Benchmarked:
        """What ``to_bytes`` gave. Raises OtaError for anything else."""
        try:
            return cls.model_validate_json(gzip.decompress(content))
        except (OSError, EOFError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise OtaError(
                f"this is no table of document scores as this version logs them ({first}); log the merge again"
            ) from None


def uncertainty(scores: ModelScores) -> dict[str, float]:
    """Metrics that tell how sure the scores are: ``score_stderr/<capability>`` where lm-eval gives one, ``documents/<capability>``.

    ``score_stderr/avg`` is there when every capability that the average is over has its own: the capabilities' documents are independent.
    """
    measured = {name: one for name, one in scores.capabilities.items() if one.score is not None}
    errors = {name: one.stderr for name, one in measured.items() if one.stderr is not None}
    metrics = {f"score_stderr/{name}": error for name, error in errors.items()}
    average = mean_error([measured[name].stderr for name in deciding(scores.capabilities, scores.tiers) if name in measured])
    metrics |= {"score_stderr/avg": average} if average is not None else {}
    return metrics | {f"documents/{name}": float(one.n_samples) for name, one in measured.items()}


class ChildRun(_Frozen):
    """One benchmarked model."""

    name: str = Field(min_length=1)
    role: Literal["base", "expert", "merge"]
    capability: str | None = None
    """An expert's own capability."""
    metrics: dict[str, FiniteFloat] = {}
    digest: str


class MergeRun(_Frozen):
    """One merge, as logged. JSON in and out. What was not measured is left out of ``metrics``: NaN and infinity are refused."""

    name: str = Field(min_length=1)
    method: str
    params: dict[str, str | int | float | bool] = {}
    tags: dict[str, str] = {}
    """Must hold ``recipe_fingerprint``; ``prefect_flow_run_id`` and ``git_commit`` where they are known."""
    metrics: dict[str, FiniteFloat] = {}
    recipe_yaml: str
    record: dict[str, Any]
    model_uri: str = Field(min_length=1)
    """Where the merged weights lie: ``s3://…`` or a folder."""
    model_digest: str = Field(pattern=_NO_QUOTES)
    registered_model: str | None = REGISTERED_MODEL
    """The registered model that gains a version; None for a merge that nobody means to serve, such as a study's."""
    model_card: str | None = None
    inputs: list[InputRef] = []
    children: list[ChildRun] = []
    benchmarked: Benchmarked | None = None
    system: list[SystemPoint] = []
    """What the machines were doing while the stages of this merge ran."""
    report_html: str | None = None
    """The page that shows the merge, self-contained."""
    tables: dict[str, str] = {}
    """Further tables: name among the artifacts to its text."""
    pictures: dict[str, bytes] = {}
    """Name among the artifacts to its PNG."""
    table: list[dict[str, str | float | None]] = []
    """Rows of the table of scores: ``model``, ``role``, optionally ``capability``; per capability its score in 0…1 (null: not
    measured) and optionally ``<capability>_stderr``; further columns such as ``average`` and ``retention``."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        fingerprint = self.tags.get(TAG_FINGERPRINT, "")
        if not fingerprint or set(fingerprint) & set("'`\n"):
            raise ValueError(f"tags must hold {TAG_FINGERPRINT!r}, the recipe's fingerprint without quotes; seen {fingerprint!r}")
        keys = [(c.role, c.name) for c in self.children]
        if len(set(keys)) < len(keys):
            raise ValueError(f"two child runs have one role and name: {sorted({k for k in keys if keys.count(k) > 1})}")
        return self

    @property
    def fingerprint(self) -> str:
        return self.tags[TAG_FINGERPRINT]


class LoggedRun(_Frozen):
    """Where a merge was logged."""

    run_id: str
    experiment_id: str
    url: str | None
    """The run's page; None for an embedded database, which nobody serves yet."""
    model_version: str | None


def logged_run(store: Store, experiment: str, run_id: str, model_version: str | None = None) -> LoggedRun:
    """Where a run of this store was logged, with its page where somebody serves it."""
    url = page_url(store.shown, experiment, run_id) if store.is_server else None
    return LoggedRun(run_id=run_id, experiment_id=experiment, url=url, model_version=model_version)


def write_artifacts(folder: Path, run: MergeRun) -> None:
    """The files that are logged with a merge: recipe, record, model card, table and pictures of scores, reference to the weights."""
    import pandas as pd

    reference = {"uri": run.model_uri, "digest": run.model_digest, TAG_FINGERPRINT: run.fingerprint}
    files = {
        "recipe.yaml": run.recipe_yaml,
        RECORD: json.dumps(run.record, indent=2) + "\n",
        f"{REFERENCE}/reference.json": json.dumps(reference, indent=2) + "\n",
    }
    files |= run.tables
    if run.model_card is not None:
        files["README.md"] = run.model_card
    if run.report_html is not None:
        files[REPORT] = run.report_html
    if run.benchmarked is not None:
        (folder / SAMPLES).parent.mkdir(parents=True)
        (folder / SAMPLES).write_bytes(run.benchmarked.to_bytes())
    if run.table:
        table = pd.DataFrame(run.table)
        files[SCORES_CSV] = table.to_csv(index=False)
        # Not MLflow's log_table: it appends to what an earlier call has logged.
        files[SCORES_JSON] = table.to_json(orient="split", index=False)
    for name, content in ({name: text.encode() for name, text in files.items()} | run.pictures).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
