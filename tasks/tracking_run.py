"""One merge as it is logged: frozen values that survive JSON, and the files that go with them. MLflow is not needed here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from ota_core.artifact import RECORD

TAG_FINGERPRINT = "recipe_fingerprint"
TAG_FLOW_RUN = "prefect_flow_run_id"
TAG_COMMIT = "git_commit"

REGISTERED_MODEL = "ota-merged"
REFERENCE = "model"
"""The folder among a run's artifacts that holds the reference to the weights."""
SCORES_CSV = "tables/scores.csv"
SCORES_JSON = "tables/scores.json"
SCORES_PNG = "plots/scores.png"

_NO_QUOTES = r"^[^'`\s]+$"  # tags that runs are searched by


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class InputRef(_Frozen):
    """Something that the merge was made of."""

    name: str = Field(min_length=1)
    source: str
    """Resolved: ``s3://…``, a folder, or a Hugging Face id with its revision."""
    digest: str
    role: Literal["base", "expert", "data"]


class ChildRun(_Frozen):
    """One benchmarked model."""

    name: str = Field(min_length=1, pattern=r"^[^'`]+$")
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


def write_artifacts(folder: Path, run: MergeRun) -> None:
    """The files that are logged with a merge: recipe, record, model card, table and chart of scores, reference to the weights.

    Raises OtaError for a table that cannot be drawn.
    """
    import pandas as pd

    from tasks.plots import score_chart

    reference = {"uri": run.model_uri, "digest": run.model_digest, TAG_FINGERPRINT: run.fingerprint}
    files = {
        "recipe.yaml": run.recipe_yaml,
        RECORD: json.dumps(run.record, indent=2) + "\n",
        f"{REFERENCE}/reference.json": json.dumps(reference, indent=2) + "\n",
    }
    if run.model_card is not None:
        files["README.md"] = run.model_card
    if run.table:
        table = pd.DataFrame(run.table)
        files[SCORES_CSV] = table.to_csv(index=False)
        # Not MLflow's log_table: it appends to what an earlier call has logged.
        files[SCORES_JSON] = table.to_json(orient="split", index=False)
        (folder / SCORES_PNG).parent.mkdir(parents=True)
        score_chart(table, title=f"{run.name}: scores by capability").savefig(folder / SCORES_PNG)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
