"""A merge in parts on several machines, each of which reads a part of every file: a flipped byte in anybody's part ends it, and nothing is published."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from ota_core.errors import StorageError
from ota_core.recipe.recipe import MergeRecipe
from tasks.artifacts.store import store_of
from tasks.job import Job
from tasks.merge import MergeJob, merge_job, shard_jobs, shards_of, sums_jobs
from tasks.merging.inputs import fetch_all
from tasks.merging.sources import planned
from tasks.settings import Places, places
from tests.ota_core.engine.test_output import llama_experts
from tests.s3_requests import Requests
from tests.servers import S3Test
from tests.tasks.storage.s3_proxy import Proxy
from tests.tasks.storage.streaming.test_streaming import remote
from tests.tasks.storage.streaming.test_verify import flip

JOB: TypeAdapter[Any] = TypeAdapter(Job)
METHOD = {"merge_method": "task_arithmetic", "parameters": {}}


def at(tmp_path: Path, uri: str, name: str) -> Places:
    """A machine with a cache of its own, over the one root of artifacts."""
    return places(tmp_path / name, f"{uri}/artifacts")


def to_share(tmp_path: Path, uri: str, *, manifest: bool) -> MergeJob:
    """A merge of models in S3, as other machines are told of it."""
    recipe = MergeRecipe.model_validate(remote(llama_experts(tmp_path, hidden=256, layers=3) | METHOD, uri, manifest=manifest))
    where = at(tmp_path, uri, "sender")
    plan = planned(recipe, fetch_all(recipe, cache=where.cache, recipe_dir=None), where, memory="256MiB")
    return merge_job(plan.abroad(), shard_size=1_500_000)


def run_on(where: Places, job: Any) -> Any:
    """What a job leaves, sent as JSON to a machine."""
    return JOB.validate_json(job.abroad().model_dump_json(by_alias=True)).run(where, "cpu")


def with_sums(merge: MergeJob, sums: list[Any]) -> MergeJob:
    return merge.model_copy(update={"sources": merge.sources.model_copy(update={"sums": tuple(sums)})})


@pytest.mark.parametrize("manifest", [True, False])
def test_a_flipped_byte_in_one_machines_part(tmp_path: Path, proxy: Proxy, s3_server: S3Test, manifest: bool) -> None:
    merge = to_share(tmp_path, s3_server.uri, manifest=manifest)
    checks = sums_jobs(merge)
    assert [job.name for job in checks] == ["check base", "check expert0", "check expert1"]
    merge = with_sums(merge, [run_on(at(tmp_path, s3_server.uri, "one"), job) for job in checks])
    files, _ = shards_of(merge, at(tmp_path, s3_server.uri, "two"))
    assert len(files) > 2
    parts = shard_jobs(merge, files, None)
    for i, part in enumerate(parts):
        there = at(tmp_path, s3_server.uri, f"machine-{i}")
        proxy.change = flip("expert1/model.safetensors")
        with pytest.raises(StorageError, match=r"expert1/model\.safetensors: the bytes .* were others"):
            run_on(there, part)
        assert part.find(there) is None, "nothing of it is published"
        proxy.change = lambda answer: None
        assert run_on(there, part) == part.find(there)


@pytest.mark.parametrize("name", ["base", "expert1"])
def test_a_byte_that_is_flipped_where_it_lies(tmp_path: Path, proxy: Proxy, s3_server: S3Test, name: str) -> None:
    merge = to_share(tmp_path, s3_server.uri, manifest=True)
    proxy.change = flip(f"{name}/model.safetensors")
    one = at(tmp_path, s3_server.uri, "one")
    (job,) = [job for job in sums_jobs(merge) if job.name == f"check {name}"]
    with pytest.raises(StorageError, match=rf"{name}/model\.safetensors( is damaged: its manifest|: the bytes .* were others)"):
        run_on(one, job)
    assert job.find(one) is None


def test_each_file_is_read_whole_once_and_never_again(tmp_path: Path, s3_server: S3Test, gets: Requests) -> None:
    """By one of the machines; another that knows it already reads nothing."""
    merge = to_share(tmp_path, s3_server.uri, manifest=True)
    size = (tmp_path / "expert1" / "model.safetensors").stat().st_size
    one, job = at(tmp_path, s3_server.uri, "one"), sums_jobs(merge)[2]
    gets.clear()
    ref = run_on(one, job)
    assert size <= gets.bytes("expert1/model.safetensors") < 1.2 * size + 200_000
    assert gets.bytes("exp_avg_sq.safetensors") <= 65_536, "the header alone: task arithmetic reads no second moments"
    store_of(one).delete(ref)
    gets.clear()
    run_on(one, job)
    assert gets.bytes("expert1/model.safetensors") == 0


def test_what_is_read_from_a_copy_needs_no_check(tmp_path: Path, s3_server: S3Test) -> None:
    merge = to_share(tmp_path, s3_server.uri, manifest=True)
    recipe, where = merge.recipe, at(tmp_path, s3_server.uri, "sender")
    here = merge_job(planned(recipe, fetch_all(recipe, cache=where.cache, recipe_dir=None), where, memory="256MiB"))
    assert sums_jobs(here) == []
