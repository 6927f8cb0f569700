"""A thousand experts below a prefix: listed at once, their manifests read side by side."""

import json
import time

import pytest

from tasks.experts.find import find_experts
from tasks.storage import s3
from tests.s3_requests import requests
from tests.servers import S3Test

COUNT = 1000


@pytest.fixture
def shelf(s3_server: S3Test) -> str:
    prefix = f"{s3_server.uri}/experts"
    sizes = {"config.json": 2, "model.safetensors": 10}

    def put(i: int) -> None:
        folder = f"{prefix}/capability{i % 10}/run-{i:04d}"
        for name, size in sizes.items():
            s3.write_bytes(f"{folder}/{name}", b"x" * size)
        manifest = {
            "capability": f"capability{i % 10}", "base_model": "base", "trained_at": f"2026-11-{1 + i % 28:02d}",
            "files": {name: {"size": size, "sha256": "0" * 64} for name, size in sizes.items()},
        }  # fmt: skip
        s3.write_bytes(f"{folder}/expert.json", json.dumps(manifest).encode())

    with s3.Threads(32) as pool:
        list(pool.map(put, range(COUNT)))
    return prefix


@pytest.mark.slow
def test_a_thousand_experts_are_listed_within_ten_seconds(shelf: str) -> None:
    with requests() as seen:
        began = time.process_time(), time.monotonic()
        found, problems = find_experts(shelf, base_model="base")
        spent = time.process_time() - began[0], time.monotonic() - began[1]
    assert len(found) == COUNT and not problems
    operations = [one.operation for one in seen]
    assert operations.count("ListObjectsV2") == 3, "3,000 objects, 1,000 a page"
    assert operations.count("GetObject") == COUNT and len(operations) == COUNT + 3
    print(f"{spent[1]:.1f} s, {spent[0]:.1f} s of this process's own")
    assert spent[1] < 10 or spent[0] < 5  # a machine that does other work, too
