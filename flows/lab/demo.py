"""The demo: train a base and five experts, put them into S3, merge them in four ways, compare.

Everything is real: the Hugging Face Trainer, an S3 server on loopback, the same merge flow that a user runs. What is trained is kept.
"""

import json
import os
from pathlib import Path
from typing import Any

from flows.single import comparison_table, prepare_prefect

prepare_prefect()

from prefect import flow, task  # noqa: E402 - after its settings
from prefect.logging import get_run_logger  # noqa: E402
from prefect.task_runners import ThreadPoolTaskRunner  # noqa: E402

from flows.merge import MergeOutcome, merge_flow  # noqa: E402
from ota_core.artifact import ArtifactRef, fingerprint  # noqa: E402
from ota_core.recipe.recipe import load_recipe, parse_recipe  # noqa: E402
from ota_core.recipe.yaml_text import parse_yaml  # noqa: E402
from tasks import stages  # noqa: E402
from tasks.artifacts.store import BuildResult  # noqa: E402
from tasks.local.demo.data import write_data  # noqa: E402
from tasks.local.demo.process import in_process  # noqa: E402
from tasks.local.demo.questions import CAPABILITIES  # noqa: E402
from tasks.local.demo.train import DemoSettings, train_base, train_expert, write_manifest  # noqa: E402
from tasks.local.s3_server import running_server  # noqa: E402
from tasks.settings import Places, places  # noqa: E402
from tasks.storage.cache import link_name  # noqa: E402
from tasks.storage.models import EXPERT_JSON, upload_folder  # noqa: E402

RECIPES = Path(__file__).resolve().parents[2] / "deployments" / "recipes"
MERGES = {
    "OTA + FFG": "demo-ota.yaml",
    "linear": "demo-linear.yaml",
    "TIES": "demo-ties.yaml",
    "DARE-TIES": "demo-dare-ties.yaml",
}
BUCKET = "ota-demo"
# Difficulty of the tasks and settings of the training were chosen on seed 0; what is shown comes from another one.
SEED = 1
MODEL = "model"


def base_uri(seed: int) -> str:
    """Where the base lies in S3."""
    return f"s3://{BUCKET}/models/seed{seed}"


def expert_uri(capability: str, seed: int) -> str:
    """Where an expert lies in S3."""
    return f"s3://{BUCKET}/experts/{capability}/seed{seed}"


@task(name="make data", task_run_name="make data")
def make_data(where: Places, settings: DemoSettings, seed: int) -> ArtifactRef:
    """Training, validation and test data of the five capabilities."""
    config = {"seed": seed, "version": settings.version, "data": settings.data.model_dump(mode="json")}

    def build(folder: Path) -> BuildResult:
        write_data(folder / "data", seed=seed, settings=settings.data)
        return BuildResult()

    return stages.store_of(where).produce("data", fingerprint("data", config, {}), config=config, inputs={}, build=build)


@task(name="train", task_run_name="train {capability}")
def train(
    where: Places, settings: DemoSettings, seed: int, data: ArtifactRef, base: ArtifactRef | None, capability: str
) -> ArtifactRef:
    """The base (capability ``base``) or one expert, with the optimizer state that the Trainer leaves; kept once it is trained."""
    store = stages.store_of(where)
    part = settings.base if base is None else settings.expert
    config = {"capability": capability, "seed": seed, "version": settings.version, "training": part.model_dump(mode="json")}
    config["model"] = settings.model.model_dump(mode="json")
    inputs = {"data": data.fingerprint} | ({"base": base.fingerprint} if base else {})

    def build(folder: Path) -> BuildResult:
        source = store.local_path(data) / "data"
        if base is None:
            trained = in_process(train_base, source, folder / MODEL, seed=seed, model=settings.model, training=part)
        else:
            base_folder = store.local_path(base) / MODEL
            trained = in_process(train_expert, capability, source, base_folder, folder / MODEL, seed=seed, training=part)
            write_manifest(folder / MODEL, trained, base_uri(seed))
        return BuildResult(provenance=trained.model_dump(mode="json"))

    return store.produce("checkpoint", fingerprint("checkpoint", config, inputs), config=config, inputs=inputs, build=build)


@task(name="upload", task_run_name="upload {capability}")
def upload(where: Places, model: ArtifactRef, capability: str, seed: int) -> str:
    """Put a trained model into S3, an expert's ``expert.json`` last."""
    folder = stages.store_of(where).local_path(model) / MODEL
    if capability == "base":
        upload_folder(folder, base_uri(seed))
        return base_uri(seed)
    upload_folder(folder, expert_uri(capability, seed), last=EXPERT_JSON)
    return expert_uri(capability, seed)


@task(name="upload", task_run_name="upload data")
def upload_data(where: Places, data: ArtifactRef, seed: int) -> str:
    """Put the data into S3, where benchmarks on other machines find them."""
    uri = f"s3://{BUCKET}/data/seed{seed}"
    upload_folder(stages.store_of(where).local_path(data) / "data", uri)
    return uri


def train_and_upload(where: Places, settings: DemoSettings, seed: int) -> tuple[ArtifactRef, dict[str, ArtifactRef]]:
    """In a flow: the data, and base and experts by name, trained unless they are there and uploaded."""
    data = make_data(where, settings, seed)
    base = train(where, settings, seed, data, None, "base")
    futures = {name: train.submit(where, settings, seed, data, base, name) for name in CAPABILITIES}
    models = {"base": base} | {name: future.result() for name, future in futures.items()}
    for name, model in models.items():
        upload(where, model, name, seed)
    return data, models


@flow(name="demo", flow_run_name="demo", task_runner=ThreadPoolTaskRunner(max_workers=os.cpu_count() or 1), persist_result=False)
def demo_flow(where: Places, seed: int = SEED, settings: DemoSettings | None = None) -> dict[str, MergeOutcome]:
    """Train, upload, merge in four ways. The S3 server must be running, its address in the environment."""
    data, models = train_and_upload(where, settings or DemoSettings(), seed)
    link_models(where, models)
    data_dir = stages.store_of(where).local_path(data) / "data"
    outcomes = {}
    for name, file in MERGES.items():
        recipe = load_recipe(RECIPES / file)
        if seed != SEED:
            text = recipe.to_yaml().replace(f"/seed{SEED}", f"/seed{seed}")
            recipe = parse_recipe(parse_yaml(text, file), file)
        outcomes[name] = merge_flow(recipe, suite="demo", data_dir=str(data_dir), device="cpu", home=where.home)
    get_run_logger().info("%d merges of %d experts done", len(outcomes), len(CAPABILITIES))
    return outcomes


@flow(
    name="demo experts",
    flow_run_name="demo experts",
    task_runner=ThreadPoolTaskRunner(max_workers=os.cpu_count() or 1),
    persist_result=False,
)
def experts_flow(where: Places, seed: int = SEED, settings: DemoSettings | None = None) -> list[str]:
    """What the local stack begins with: data, base and experts in the S3 server of the environment; returns their addresses."""
    data, models = train_and_upload(where, settings or DemoSettings(), seed)
    if settings is None and seed == SEED:  # a study's further seeds leave the names alone
        link_models(where, models)
    return [upload_data(where, data, seed), base_uri(seed), *(expert_uri(name, seed) for name in CAPABILITIES)]


def link_models(where: Places, models: dict[str, ArtifactRef]) -> None:
    """Names for the trained models on this machine, ``demo/models/<capability>``, for trying ``ota merge`` without S3."""
    folder = where.home / "demo" / "models"
    for name, model in models.items():
        link_name(folder / name, stages.store_of(where).local_path(model) / MODEL)


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
