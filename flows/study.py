"""A study: every cell of a grid merged and scored on every replicate, cell by cell cached; its tables and figures as a folder.

Base and experts are scored first. A cell whose merge, scores and MLflow run are there is read, without a flow run: a study that is
repeated takes seconds, one that grows computes what is new.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from flows.merge import merge_flow
from ota_core.errors import OtaError, StorageError, raise_all
from ota_core.frozen import Frozen
from ota_core.recipe.recipe import MergeRecipe
from tasks.evaluation.in_memory import few_threads
from tasks.evaluation.kept import read_all
from tasks.evaluation.scores import ModelScores
from tasks.experiments.study.cells import Cell
from tasks.experiments.study.found import Models
from tasks.experiments.study.learn import learn_cell
from tasks.experiments.study.log import logged_merges, study_run
from tasks.experiments.study.losses import ranked
from tasks.experiments.study.report import RESULTS, write_results, write_study
from tasks.experiments.study.scores import CellResult, StudyResults
from tasks.experiments.study.study import StudyConfig, load_study
from tasks.experiments.study.tune import check_splits, tune_cell
from tasks.job import score_all
from tasks.orchestration.deployed import cancel_children
from tasks.orchestration.executors import Executor, executor_of, gpu_deployment
from tasks.orchestration.run_log import for_users
from tasks.orchestration.runners import several_at_once
from tasks.orchestration.shown import show_markdown, show_mlflow
from tasks.settings import Address, Device, Places, places
from tasks.tracking.outbox import FOLDER, keeping, tell
from tasks.tracking.patience import ASKING_SECONDS, within
from tasks.tracking.run import LoggedRun
from tasks.tracking.store import resolve_store


class StudyOutcome(Frozen):
    """What a study led to."""

    folder: Path
    """results.md, study.html, tables, figures."""
    cells: dict[str, int]
    """Label to the number of replicates that were merged and scored."""
    computed: int
    """Merges that were not there yet."""
    results: str
    """results.md."""
    logged: LoggedRun


def _run_name() -> str:
    study = flow_run.parameters["study"]
    name = study if isinstance(study, str) else StudyConfig.model_validate(study).name
    return f"study {os.path.basename(name).removesuffix('.yaml')}"


@for_users
@flow(
    name="study", flow_run_name=_run_name, task_runner=several_at_once(), persist_result=False,
    on_cancellation=[cancel_children], on_crashed=[cancel_children],
)  # fmt: skip
def study_flow(
    study: StudyConfig | str = "deployments/studies/demo.yaml",
    device: Device = "auto",
    memory: str = "2GiB",
    write: Path | None = None,
    recipe_dir: Path | None = None,
    home: Path | None = None,
    tracking_uri: Address | None = None,
    command: str | None = None,
) -> StudyOutcome:
    """Merge and benchmark every cell of a grid on every replicate, and write the tables and figures of all.

    A cell that fails does not stop the others; the run then fails at its end.

    Args:
        study: The study, or where its YAML lies (s3://… or a file).
        device: What to compute on; auto: cuda where there is one.
        memory: Budget of each merge.
        write: Markdown file for the results, its figures in a folder beside it; the home folder's studies/NAME has them in any case.
        recipe_dir: Folder that relative paths of a study start from that is given as such.
        home: Folder for artifacts, caches, studies and the embedded MLflow; OTA_HOME or ~/.ota by default.
        tracking_uri: MLflow server; MLFLOW_TRACKING_URI or the embedded database by default.
        command: What the results say that makes them again.
    """
    config, folder = load_study(study) if isinstance(study, str) else (study, None)
    recipe_dir, where = recipe_dir or folder, places(home)
    command = command or f"ota study {study if isinstance(study, str) else config.name}"
    store = resolve_store(tracking_uri=tracking_uri, root=where.tracking)
    run = _Run(config, where, recipe_dir, device, memory, home, tracking_uri, executor_of(gpu_deployment(), device))
    with keeping() as kept:  # a server that is away ends no merge, and so no study
        try:
            logged_already = within(ASKING_SECONDS, "looking up merges that are logged", lambda: logged_merges(store))
        except StorageError as error:
            kept.away, logged_already = error, set()
            get_run_logger().warning("%s. The study goes on; what is to be logged is kept in %s", error, where.home / FOLDER)
        results = run.all_cells(logged_already)
    problems = list(results.failed)
    if not results.results:
        raise_all(problems, OtaError)
    out = where.home / "studies" / config.name
    tables = write_study(results, out, command=command)
    if write is not None:
        write_results(out, results, tables, write, command=command)
    text = (out / RESULTS).read_text(encoding="utf-8")
    show_markdown("study", text, f"Study {config.name}")
    get_run_logger().info("%d cells, %d merges of them new: %s", len(results.cells), run.computed, out)
    told = study_run(
        config.name, out, config=config.model_dump_json(by_alias=True, exclude_defaults=True, indent=2) + "\n", tags=_tags(config),
        metrics=_metrics(results), merges={one.merge: one.label for one in results.results},
    )  # fmt: skip
    logged = tell(told, home=where.home, root=where.tracking, tracking_uri=tracking_uri)
    show_mlflow(f"study {config.name}", logged.url)
    raise_all(problems, OtaError)
    counts = {cell.label: len(results.of(cell)) for cell in results.cells}
    return StudyOutcome(folder=out, cells=counts, computed=run.computed, results=text, logged=logged)


@dataclass
class _Run:
    """One run of a study: what all of its cells share."""

    config: StudyConfig
    where: Places
    recipe_dir: Path | None
    device: Device
    memory: str
    home: Path | None
    tracking_uri: str | None
    executor: Executor
    computed: int = 0

    def all_cells(self, logged: set[str]) -> StudyResults:
        """Everything merged and scored, replicate by replicate; failed cells are named in the results. ``logged``: merges with complete runs."""
        config, cells = self.config, self.config.cells()
        base: dict[str, ModelScores] = {}
        alone: dict[str, dict[str, ModelScores]] = {}
        own: dict[str, str | None] = {}
        found: list[CellResult] = []
        failed: dict[str, str] = {}
        # All before the first cell: what cannot be had for the last replicate must not be found out after hours.
        everyone = [Models(one, config.limit, self.where, self.recipe_dir) for one in config.all_replicates()]
        for models in everyone:
            check_splits(models)
        for number, models in enumerate(everyone):
            replicate, subjects = models.replicate, models.subjects
            assert models.inputs.base is not None
            with few_threads(models.inputs.base.path):
                scores = read_all(self.where, score_all(subjects, models.benchmark, self.where, self.executor))
                base[replicate.name] = scores["base"]
                names = dict(zip((s.name for s in subjects.values() if s.role == "expert"), config.experts(), strict=True))
                alone[replicate.name] = {names[s.name]: scores[key] for key, s in subjects.items() if s.role == "expert"}
                own |= {names[s.name]: s.capability for s in subjects.values() if s.role == "expert"}
                for cell in cells:
                    try:
                        found.append(self._cell(cell, cell.recipes[number], models, logged))
                    except OtaError as error:
                        where = f" ({replicate.name})" if replicate.name else ""
                        failed.setdefault(cell.label, f"{cell.label}{where}: {error}")
        good = tuple(cell for cell in cells if cell.label not in failed)
        labels = {cell.label for cell in good}
        return StudyResults(
            name=config.name, suite=next(iter(base.values())).suite, experts=own, replicates=tuple(base), base=base, alone=alone, cells=good,
            results=tuple(one for one in found if one.label in labels), failed=tuple(failed.values()),
        )  # fmt: skip

    def _cell(self, cell: Cell, recipe: MergeRecipe, models: Models, logged: set[str]) -> CellResult:
        """One cell on one replicate, tuned or with learned scales if it is to be: read where it is there, else merged. Raises OtaError."""
        values: dict[str, float] = {}
        if cell.tune:
            recipe, values = tune_cell(cell, recipe, models, self.executor, self.memory)
        elif cell.learn:
            recipe, values = learn_cell(cell, recipe, models, self.memory, self.device)
        known = models.find(recipe)
        if known is None or known[0] not in logged:
            state: Any = merge_flow(
                recipe, suite=models.replicate.suite, data_dir=models.replicate.data_dir, limit=self.config.limit, device=self.device,
                chat_template=models.benchmark.chat_template,
                memory=self.memory, recipe_dir=self.recipe_dir, home=self.home, tracking_uri=self.tracking_uri, registered_model=None,
                report="none", smoke=False, return_state=True,
            )  # fmt: skip
            if not state.is_completed():
                raise OtaError(str(state.message))
            self.computed += 1
        return models.result(cell.label, recipe, values)


def _tags(config: StudyConfig) -> dict[str, str]:
    return {
        "suite": config.suite, "experts": ",".join(config.experts()), "cells": str(len(config.cells())),
        "replicates": ",".join(one.name for one in config.all_replicates()) or "1", "base_model": config.base_model,
    }  # fmt: skip


def _metrics(results: StudyResults) -> dict[str, float]:
    """``score/avg/<cell>`` and ``loss/avg/<cell>`` of each merge of all experts, mean over the replicates.

    Of the merges that the table of losses compares with the best one, ``loss/difference/<cell>`` and ``loss/difference_stderr/<cell>``.
    """
    every = [cell for cell in results.cells if len(cell.experts) == len(results.experts)]
    values = {f"score/avg/{cell.label}": results.average(results.models(cell)).mean for cell in every}
    if results.lossy:
        values |= {f"loss/avg/{cell.label}": results.loss(results.models(cell), *results.lossy).mean for cell in every}
    by_loss = ranked(results)
    for cell in by_loss[1:]:
        found = results.loss_difference(cell, by_loss[0], results.lossy)
        values |= {f"loss/difference/{cell.label}": found.mean, f"loss/difference_stderr/{cell.label}": found.error}
    return {name: value for name, value in values.items() if value == value}
