"""A study: every cell of a grid merged and benchmarked, cell by cell cached, and one table of all."""

import os
from typing import Any

from prefect import flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from flows.blocks import use_blocks
from flows.deployed import cancel_children
from flows.merge import MergeOutcome, merge_flow
from flows.pages import show_scores
from flows.run_log import hide_tracebacks_of_user_errors
from flows.single import comparison_table
from ota_core.errors import OtaError, raise_all
from tasks.settings import Device, places
from tasks.study import StudyConfig, load_study

hide_tracebacks_of_user_errors()


def _run_name() -> str:
    study = flow_run.parameters["study"]
    name = study if isinstance(study, str) else StudyConfig.model_validate(study).name
    return f"study {os.path.basename(name).removesuffix('.yaml')}"


@flow(
    name="study", flow_run_name=_run_name, persist_result=False, on_cancellation=[cancel_children], on_crashed=[cancel_children]
)  # fmt: skip
def study_flow(
    study: StudyConfig | str = "deployments/studies/demo.yaml", device: Device = "auto", memory: str = "2GiB"
) -> dict[str, MergeOutcome]:
    """Merge and benchmark every cell of a grid, and compare all. A cell that fails does not stop the others; the run then fails at its end.

    Args:
        study: The study, or where its YAML lies (s3://… or a file).
        device: What to compute on; auto: cuda where there is one.
        memory: Budget of each merge.
    """
    use_blocks()
    config, folder = load_study(study) if isinstance(study, str) else (study, None)
    outcomes: dict[str, MergeOutcome] = {}
    problems = []
    for cell, recipe in ((one.label, one.recipes[0]) for one in config.cells()):
        state: Any = merge_flow(
            recipe, suite=config.suite, data_dir=config.data_dir, limit=config.limit, device=device, memory=memory,
            recipe_dir=folder, return_state=True,
        )  # fmt: skip
        if state.is_completed():
            outcomes[cell] = state.result()
        else:
            problems.append(f"{cell}: {state.message}")
    if outcomes:
        show_scores(comparison_table(outcomes, places()), title=f"Study {config.name}")
    get_run_logger().info("%d cells merged and benchmarked", len(outcomes))
    raise_all(problems, OtaError)
    return outcomes
