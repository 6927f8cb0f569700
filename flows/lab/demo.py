"""The demo: train a base and five experts, put them into S3, merge them in six ways, compare.

Everything is real: the Hugging Face Trainer, an S3 server on loopback, the same merge flow that a user runs. What is trained is kept.
"""

import json
import os
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.logging import get_run_logger
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.merge import merge_flow
from ota_core.artifact import ArtifactRef
from ota_core.recipe.recipe import load_recipe, parse_recipe
from ota_core.recipe.yaml_text import parse_yaml
from tasks.artifacts.store import store_of
from tasks.local.demo import steps
from tasks.local.demo.progress import training_bars
from tasks.local.demo.questions import CAPABILITIES
from tasks.local.demo.steps import BUCKET, base_uri, expert_uri, link_models
from tasks.local.demo.train import DemoSettings
from tasks.local.s3_server import running_server
from tasks.pages.outcome import MergeOutcome, comparison_table
from tasks.settings import Places, places

RECIPES = Path(__file__).resolve().parents[2] / "deployments" / "recipes"
MERGES = {
    "OTA + FFG, row spaces": "demo-rowspace.yaml",
    "OTA + FFG, λ auto": "demo-auto.yaml",
    "OTA + FFG": "demo-ota.yaml",
    "linear": "demo-linear.yaml",
    "TIES": "demo-ties.yaml",
    "DARE-TIES": "demo-dare-ties.yaml",
}
# Difficulty of the tasks and settings of the training were chosen on seed 0; what is shown comes from another one.
SEED = 1
SIDE_BY_SIDE: TaskRunner[Any] = ThreadPoolTaskRunner(max_workers=os.cpu_count() or 1)


def train_and_upload(where: Places, settings: DemoSettings, seed: int) -> tuple[ArtifactRef, dict[str, ArtifactRef]]:
    """In a flow: the data, and base and experts by name, trained unless they are there and uploaded."""
    data = steps.make_data(where, settings, seed)
    with training_bars():
        base = steps.train(where, settings, seed, data, None, "base")
        futures = {name: steps.train.submit(where, settings, seed, data, base, name) for name in CAPABILITIES}
        models = {"base": base} | {name: future.result() for name, future in futures.items()}
    for name, model in models.items():
        steps.upload(where, model, name, seed)
    return data, models


@flow(name="demo", flow_run_name="demo", task_runner=SIDE_BY_SIDE, persist_result=False)
def demo_flow(where: Places, seed: int = SEED, settings: DemoSettings | None = None) -> dict[str, MergeOutcome]:
    """Train, upload, merge in six ways. The S3 server must be running, its address in the environment."""
    data, models = train_and_upload(where, settings or DemoSettings(), seed)
    link_models(where, models)
    data_dir = store_of(where).local_path(data) / "data"
    outcomes = {}
    for name, file in MERGES.items():
        recipe = load_recipe(RECIPES / file)
        if seed != SEED:
            text = recipe.to_yaml().replace(f"/seed{SEED}", f"/seed{seed}")
            recipe = parse_recipe(parse_yaml(text, file), file)
        outcomes[name] = merge_flow(recipe, suite="demo", data_dir=str(data_dir), device="cpu", home=where.home, smoke=False)
    get_run_logger().info("%d merges of %d experts done", len(outcomes), len(CAPABILITIES))
    return outcomes


@flow(name="demo experts", flow_run_name="demo experts", task_runner=SIDE_BY_SIDE, persist_result=False)
def experts_flow(where: Places, seed: int = SEED, settings: DemoSettings | None = None) -> list[str]:
    """What the local stack begins with: data, base and experts in the S3 server of the environment; returns their addresses."""
    data, models = train_and_upload(where, settings or DemoSettings(), seed)
    if settings is None and seed == SEED:  # a study's further seeds leave the names alone
        link_models(where, models)
    return [steps.upload_data(where, data, seed), base_uri(seed), *(expert_uri(name, seed) for name in CAPABILITIES)]


def run_demo(*, home: Path | None, seed: int) -> list[Any]:
    """The whole demo, with an S3 server of its own; what to print at the end."""
    from tasks.pages.markdown import captioned
    from tasks.pages.scores import losses, narrow, scores
    from tasks.pages.terminal import table as drawn
    from tasks.tracking.merge import open_hint

    where = places(home)
    with running_server(where.home / "demo" / "s3", buckets=(BUCKET,)):
        outcomes = demo_flow(where, seed)
    table = comparison_table(outcomes, where)
    results = where.home / "demo" / f"results-seed{seed}"
    results.with_suffix(".md").write_text(captioned(scores(table), *losses(table)), encoding="utf-8")
    results.with_suffix(".json").write_text(
        json.dumps(table.reset_index().to_dict("records"), indent=1, default=str), encoding="utf-8"
    )
    first = next(iter(outcomes.values()))
    return [
        drawn(narrow(table, "Accuracy on held-out tests")),
        f"table: {results.with_suffix('.md')}",
        f"merged models: {', '.join(outcome.path for outcome in outcomes.values())}",
        open_hint(root=where.tracking, experiment=first.logged.experiment_id),
    ]
