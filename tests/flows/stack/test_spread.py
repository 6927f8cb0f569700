"""A merge in parts: the bytes of one process, parts found again, each reading no more than its tensors."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient
from prefect.states import Completed
from pydantic import TypeAdapter

import flows.part
from ota_core.artifact import RECORD, read_record
from ota_core.engine import engine, shards
from ota_core.errors import OtaError, StorageError
from ota_core.recipe.recipe import MergeRecipe
from tasks.compress import compress_jobs
from tasks.job import Job
from tasks.merge import MergeJob, merge_job, shards_of, survey_jobs
from tasks.merging.inputs import assemble, fetch_all
from tasks.merging.sources import planned
from tasks.orchestration import executors
from tasks.orchestration.runners import Runner, runner_of
from tasks.settings import Places, places
from tasks.storage.models import digest_folder, upload_folder
from tasks.storage.s3 import list_objects
from tests.checkpoints import ota_recipe, random_base, random_experts
from tests.flows.merge_fixture import World, s3_client

REPOSITORY = Path(__file__).parents[3]
SIZE = "5KB"
"""Of the tiny model's weight files: several, most of one tensor."""


def sharded(world: World, recipe: MergeRecipe, **options: Any) -> Any:
    """The outcome of the flow in parts, without a benchmark."""
    return world.run(recipe, suite=None, shard_size=SIZE, **options).outcome


def alone(world: World, recipe: MergeRecipe, out: Path) -> Path:
    """The same merge in this process."""
    cache = out.with_name("cache")
    inputs = assemble(recipe, fetch_all(recipe, cache=cache, recipe_dir=None), cache=cache, recipe_dir=None)
    engine.merge(recipe, out, inputs=inputs, shard_size=5_000)
    return out


def assert_same(folder: Path, expected: Path) -> None:
    """Every file's bytes, and what the records say but for where and when."""
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    assert sum(name.endswith(".safetensors") for name in names) > 3 and "model.safetensors.index.json" in names
    for name in names:
        assert name == RECORD or (folder / name).read_bytes() == (expected / name).read_bytes(), name
    ours, theirs = read_record(folder), read_record(expected)
    # What compression lost stands in the records of the compressed second moments where these are artifacts of their own.
    results = {key: value for key, value in theirs.results.items() if key != "compression"}
    assert ours.model_copy(update={"provenance": {}}) == theirs.model_copy(update={"provenance": {}, "results": results})


def kinds_left(home: Path) -> set[str]:
    """Kinds of which the store holds an artifact."""
    return {path.parent.name for path in (home / "artifacts").glob("*/*")}


@pytest.fixture
def part_counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts what parts do in this process."""
    calls: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        whole: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return whole(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for name in ("survey", "merge_shard", "finish"):
        count(shards, name)
    count(engine, "compress_moments")
    return calls


def test_threads_give_the_bytes_of_one_process_and_a_second_run_computes_nothing(
    world: World, part_counts: Counter[str], tmp_path: Path
) -> None:
    here = world.at(tmp_path / "home")
    recipe = world.recipe(density=0.4, compression="rank1", normalise="global")
    outcome = sharded(here, recipe)
    expected = alone(world, recipe, tmp_path / "alone")
    assert_same(Path(outcome.path), expected)
    files = len(list(expected.glob("*.safetensors")))
    assert part_counts["merge_shard"] == files and part_counts["survey"] in {files, 2 * files}
    assert kinds_left(here.home) == {"moments", "merged"}, "surveys, thresholds and shards are not kept"
    densities = read_record(expected).results["densities"]
    assert outcome.densities == {name: found["density"] for name, found in densities.items()}
    assert outcome.digest == digest_folder(expected, cache=tmp_path / "cache")[0], "told by the parts, without reading the model"

    part_counts.clear()
    assert sharded(here, recipe) == outcome and part_counts == {}


def test_lambda_and_row_spaces_are_the_same_in_parts(world: World, tmp_path: Path) -> None:
    here = world.at(tmp_path / "home")
    recipe = world.recipe(density=0.4, compression="rank1", refine="rowspace")
    outcome = sharded(here, recipe)
    expected = alone(world, recipe, tmp_path / "alone")
    assert_same(Path(outcome.path), expected)
    assert kinds_left(here.home) == {"moments", "merged"}
    found = read_record(expected).results["lambda"]
    run = MlflowClient(world.tracking_uri).get_run(outcome.logged.run_id)
    assert float(run.data.params["lambda"]) == found["value"] != 1 and run.data.params["lambda_rule"] == "auto"


@pytest.mark.parametrize(
    ("own", "elsewhere"),
    [("", {"compress", "check", "survey", "merge"}), ("ota-cpu", {"merge"}), ("ota-gpu", {"compress", "check", "survey"})],
)
def test_a_flow_never_waits_for_runs_of_its_own_pool(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, elsewhere: set[str]
) -> None:
    """Its run holds one of the pool's workers; runs that wait there for parts could hold them all."""
    sent: Counter[str] = Counter()

    begun: set[str] = set()

    def send(deployment: str, **options: Any) -> Any:
        """As a server does it: the same key is the same run."""
        (job,) = [TypeAdapter(Job).validate_python(one) for one in options["parameters"]["jobs"]]
        if options["key"] not in begun:
            begun.add(options["key"])
            sent[job.name.split()[0]] += 1
            job.run(places(tmp_path / "other", str(tmp_path / "home" / "artifacts")), "cpu")
        return SimpleNamespace(state=Completed())

    monkeypatch.setattr(executors, "run_deployed", send)
    monkeypatch.setattr(flows.part, "pool_of", lambda name: name.replace("part/", "ota-"))
    monkeypatch.setenv("OTA_WORK_POOL", own)
    monkeypatch.setenv("OTA_ALLOWED_ROOTS", f"{tmp_path.parent},{world.tracking_uri}")
    recipe = world.recipe(density=0.4, compression="rank1", normalise="global")
    outcome = sharded(world.at(tmp_path / "home"), recipe, runner=Runner(kind="workers"))
    for file in alone(world, recipe, tmp_path / "alone").glob("*.safetensors"):
        assert (Path(outcome.path) / file.name).read_bytes() == file.read_bytes()
    assert set(sent) - {"recount"} == elsewhere and ("recount" not in sent or "survey" in elsewhere)


@pytest.mark.parametrize(
    ("method", "parameters"), [("ties", {"density": 0.4}), ("linear", {}), ("ota", {"density": 0.4, "scope": "per_tensor"})]
)
def test_what_needs_no_survey_has_none(
    world: World, part_counts: Counter[str], tmp_path: Path, method: str, parameters: dict[str, Any]
) -> None:
    recipe = world.recipe(method, **parameters)
    outcome = sharded(world.at(tmp_path / "home"), recipe)
    assert part_counts["survey"] == 0
    assert_same(Path(outcome.path), alone(world, recipe, tmp_path / "alone"))


def test_masks_of_an_earlier_run_save_the_surveys(world: World, part_counts: Counter[str], tmp_path: Path) -> None:
    here = world.at(tmp_path / "home")
    recipe = world.recipe(density=0.3, compression="rank1")
    one_file = here.run(recipe, suite=None).outcome
    assert part_counts["merge_shard"] == 0
    outcome = sharded(here, recipe)
    assert part_counts["survey"] == 0 and outcome.densities == one_file.densities
    assert_same(Path(outcome.path), alone(world, recipe, tmp_path / "alone"))


def test_a_run_that_is_killed_leaves_its_finished_shards(world: World, part_counts: Counter[str], tmp_path: Path) -> None:
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME

    home = tmp_path / "home"
    recipe = world.recipe(density=0.25, compression="rank1")
    script = f"""
        import json, os, signal, sys
        from pathlib import Path
        from flows.merge import merge_flow
        from ota_core.recipe.recipe import MergeRecipe
        from ota_core.engine import shards

        merged, whole = [], shards.merge_shard

        def killed(job, shard, folder, facts):
            found = whole(job, shard, folder, facts)
            merged.append(shard)
            if len(merged) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        shards.merge_shard = killed
        recipe = MergeRecipe.model_validate(json.loads(sys.argv[1]))
        merge_flow(recipe, suite=None, home=Path(sys.argv[2]), tracking_uri={world.tracking_uri!r}, device="cpu", shard_size={SIZE!r})
    """
    environment = {
        **os.environ,
        "PREFECT_API_URL": PREFECT_API_URL.value(),
        "PREFECT_HOME": str(PREFECT_HOME.value()),
        "PYTHONPATH": str(REPOSITORY),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), recipe.model_dump_json(by_alias=True), str(home)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((home / "artifacts" / "shards").glob("[!.]*"))) == 2
    here = world.at(home)
    outcome = sharded(here, recipe)
    expected = alone(world, recipe, tmp_path / "alone")
    assert part_counts == {"merge_shard": len(list(expected.glob("*.safetensors"))) - 2, "finish": 1}
    assert_same(Path(outcome.path), expected)
    assert kinds_left(home) == {"moments", "merged"}
    assert not list((home / "artifacts").glob("*/.*")), "nothing half-written is left"


def test_artifacts_in_s3_are_assembled_there(
    world: World, part_counts: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.storage import download as storage_download
    from tasks.storage import models as storage

    downloaded: list[str] = []
    whole = storage_download.download

    def noted(objects: Any, **options: Any) -> Any:
        downloaded.extend(one.uri for one in objects)
        return whole(objects, **options)

    monkeypatch.setattr(storage, "download", noted)
    recipe, root = world.recipe(density=0.4, compression="rank1"), f"{world.uri}/spread-{tmp_path.name}"
    here = world.at(tmp_path / "home")
    sharded(here, recipe, artifacts=f"{root}/local-parent")  # the models are in this machine's cache from here on
    downloaded.clear()
    outcome = sharded(here, recipe, artifacts=root)
    merged = outcome.merged
    assert outcome.path == merged.uri == f"{root}/merged/{merged.fingerprint}"
    assert not [uri for uri in downloaded if uri.endswith(".safetensors") and "survey" not in uri]
    expected = alone(world, recipe, tmp_path / "alone")
    names = {one.uri.removeprefix(merged.uri + "/") for one in list_objects(merged.uri)}
    assert names == {path.name for path in expected.iterdir()}
    bucket, prefix = merged.uri.removeprefix("s3://").split("/", 1)
    for name in names - {RECORD}:
        answer = s3_client().get_object(Bucket=bucket, Key=f"{prefix}/{name}")
        assert answer["Body"].read() == (expected / name).read_bytes(), name
        assert "sha256" in answer["Metadata"]
    left = {one.uri.removeprefix(root + "/").split("/")[0] for one in list_objects(root)}
    assert left == {"moments", "merged", "local-parent"}
    part_counts.clear()
    assert sharded(here, recipe, artifacts=root) == outcome and part_counts == {}


def spread_merge(world: World, recipe: MergeRecipe, where: Places, *, shard_size: int = 5_000) -> MergeJob:
    """A merge in parts as the flow describes it, with its second moments compressed."""
    from tasks.storage.streaming.streams import Streams

    with Streams(cache=where.cache, memory=2**26) as streams:
        fetched = fetch_all(recipe, cache=where.cache, recipe_dir=None, streams=streams)
        plan = planned(recipe, fetched, where, memory="64MiB", streams=streams)
        plan = plan.with_artifacts([job.run(where) for job in compress_jobs(plan)])
        return merge_job(plan, shard_size)


def test_a_part_reads_the_ranges_of_its_tensors_alone(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has nothing reads, of each model in S3, what its shard holds and the headers."""
    from tasks.storage import s3

    size = 4 * 2**20  # of each of five tensors, float32
    base = random_base(shapes={f"model.layers.{i}.mlp.up_proj.weight": (1024, 1024) for i in range(5)})
    uri = f"{world.uri}/large-{tmp_path.name}"
    written = ota_recipe(tmp_path / "models", base, random_experts(base, 2), {"density": 0.4, "compression": "rank1"})
    for folder in (tmp_path / "models").iterdir():
        upload_folder(folder, f"{uri}/{folder.name}")
    written["base_model"] = f"{uri}/base"
    for i, entry in enumerate(written["models"]):
        entry["model"] = f"{uri}/expert{i}"
        entry["parameters"] = {}
    recipe = MergeRecipe.model_validate(written)
    root = f"{world.uri}/ranges-{tmp_path.name}"
    merge = spread_merge(world, recipe, places(tmp_path / "home", root), shard_size=size)
    files, surveyed = shards_of(merge, places(tmp_path / "home", root))
    assert len(files) == 5 and surveyed

    read: Counter[str] = Counter()
    whole = s3.read_range

    def noted(client: Any, one: Any, start: int, stop: int) -> Any:
        read[one.uri] += stop - start
        return whole(client, one, start, stop)

    monkeypatch.setattr(s3, "read_range", noted)
    part = survey_jobs(merge, files)[2]
    TypeAdapter(Job).validate_json(part.model_dump_json(by_alias=True)).run(places(tmp_path / "other", root), "cpu")
    weights = {uri: count for uri, count in read.items() if uri.endswith("model.safetensors")}
    assert len(weights) == 3
    for source, count in weights.items():
        assert size <= count < size * 1.5, (source, count)
    for source in set(read) - set(weights):
        assert read[source] < 100_000, "of the full second moments the header, of the compressed ones little"


def test_a_model_replaced_meanwhile_is_refused(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(density=0.4, compression="rank1", scope="per_tensor")
    merge = spread_merge(world, recipe, places(tmp_path / "home"))
    first, *others = merge.sources.experts
    sources = merge.sources.model_copy(update={"experts": (first.model_copy(update={"listing": "another"}), *others)})
    with pytest.raises(StorageError, match="is not what it was when the merge began"):
        shards_of(merge.model_copy(update={"sources": sources}), places(tmp_path / "home"))


def test_a_root_that_the_machine_does_not_see_is_named(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(density=0.4, compression="rank1", scope="per_tensor")
    merge = spread_merge(world, recipe, places(tmp_path / "home"))
    shutil.rmtree(tmp_path / "home" / "artifacts")
    with pytest.raises(OtaError, match=r"moments.safetensors is not on this machine.*--artifacts, must be s3"):
        shards_of(merge, places(tmp_path / "home"))


def test_a_part_survives_json(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(density=0.4, compression="rank1", **{"lambda": 1.5, "epsilon": 1e-26})
    merge = spread_merge(world, recipe, places(tmp_path / "home"))
    part = survey_jobs(merge, ["model.safetensors"], {0: 3, 1: 65_535})[0]
    assert part.name == "recount model.safetensors"
    assert TypeAdapter(Job).validate_python(json.loads(json.dumps(part.model_dump(mode="json", by_alias=True)))) == part


def test_runners_are_read_from_arguments_and_environment() -> None:
    assert runner_of(environment={}) == Runner()
    environment = {
        "OTA_RUNNER": "dask",
        "OTA_RUNNER_ADDRESS": "tcp://host:8786",
        "OTA_RUNNER_PARTS": "3",
        "OTA_PART_DEPLOYMENT": "part/x",
    }
    assert runner_of(environment=environment) == Runner(kind="dask", address="tcp://host:8786", parts=3, deployment="part/x")
    assert runner_of("workers", environment={"OTA_RUNNER": "dask"}).kind == "workers"
    for arguments, message in (
        ({"kind": "slurm"}, "got 'slurm', expected threads, dask, ray, workers"),
        ({"kind": "threads", "address": "tcp://x"}, "only dask and ray"),
        ({"parts": 0}, "at least 1"),
    ):
        with pytest.raises(OtaError, match=message):
            runner_of(environment={}, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "module"), [("dask", "prefect_dask"), ("ray", "prefect_ray")])
def test_a_runner_that_is_not_installed_says_which_extra(monkeypatch: pytest.MonkeyPatch, kind: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(OtaError, match=rf"pip install 'ota-merging\[{kind}\]'"):
        runner_of(kind, environment={}).task_runner()
