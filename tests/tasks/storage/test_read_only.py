"""Keys that may only read are enough for everything that only reads: a server that refuses every PUT, POST and DELETE is asked for none."""

from pathlib import Path

import pytest
import yaml

from tasks.storage.models import EXPERT_JSON, upload_folder, write_bytes
from tests.flows.cli.typed import ota
from tests.flows.merge_fixture import EXPERTS, RUN, upload, write_experts
from tests.ota_core.engine.test_output import llama_experts
from tests.servers import S3Test
from tests.tasks.storage.s3_proxy import Proxy
from tests.tasks.storage.streaming.test_streaming import remote


@pytest.mark.parametrize("fetch", [(), ("--fetch",)])
def test_merging_and_planning_only_read(tmp_path: Path, proxy: Proxy, s3_server: S3Test, fetch: tuple[str, ...]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(remote(llama_experts(tmp_path), s3_server.uri, manifest=True)))
    proxy.read_only = True
    proxy.seen.clear()
    home = ("--home", tmp_path / "home")
    ota("plan", recipe, *home)
    ota("merge", recipe, tmp_path / "out", *home, *fetch)
    ota("merge", recipe, tmp_path / "again", *home, *fetch)
    assert proxy.seen and {one.split()[0] for one in proxy.seen} <= {"GET", "HEAD"}
    assert (tmp_path / "out" / "record.json").is_file()


def test_listing_and_looking_only_read(tmp_path: Path, proxy: Proxy, s3_server: S3Test) -> None:
    upload(write_experts(tmp_path / "models"), s3_server.uri)
    proxy.read_only = True
    proxy.seen.clear()
    found = ota("experts", f"{s3_server.uri}/experts", "--base-model", "base").stdout
    assert all(name in found for name in EXPERTS)
    ota("inspect", f"{s3_server.uri}/experts/math/{RUN}", "--home", tmp_path / "home")
    assert proxy.seen and {one.split()[0] for one in proxy.seen} <= {"GET", "HEAD"}


def test_the_server_of_these_tests_does_refuse(tmp_path: Path, proxy: Proxy, s3_server: S3Test) -> None:
    """And what is to be written says that it may not."""
    from ota_core.errors import StorageError

    models = write_experts(tmp_path / "models")
    proxy.read_only = True
    with pytest.raises(StorageError, match="access denied"):
        write_bytes(f"{s3_server.uri}/x", b"y")
    with pytest.raises(StorageError, match=r"access denied|AccessDenied"):
        upload_folder(models / "math", f"{s3_server.uri}/m", last=EXPERT_JSON)
