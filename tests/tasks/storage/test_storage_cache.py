"""Digests that are computed once, and which files make a model."""

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from ota_core.errors import StorageError
from tasks.storage import cache as storage_cache
from tasks.storage.cache import FileInfo, combined_digest, digest_file, link_folder
from tasks.storage.layout import is_model_file, model_files


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose content was really read."""
    read: list[Path] = []
    real = storage_cache.hash_file

    def hash_file(path: Path, **options: Any) -> dict[str, str]:
        read.append(path)
        return real(path, **options)

    monkeypatch.setattr(storage_cache, "hash_file", hash_file)
    return read


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_settled_file_is_read_once(tmp_path: Path, hashed: list[Path]) -> None:
    path, cache = tmp_path / "w.bin", tmp_path / "cache"
    path.write_bytes(b"weights")
    age(path, 60)
    expected = "xxh3:" + xxhash.xxh3_128_hexdigest(b"weights")
    assert [digest_file(path, cache=cache) for _ in range(3)] == [expected] * 3
    (tmp_path / "link").symlink_to(path)
    assert digest_file(tmp_path / "link", cache=cache) == expected
    assert len(hashed) == 1
    path.write_bytes(b"Weights")
    age(path, 30)
    assert digest_file(path, cache=cache) == "xxh3:" + xxhash.xxh3_128_hexdigest(b"Weights")


def test_file_just_written_is_not_remembered(tmp_path: Path) -> None:
    """Two writes within the resolution of the time stamp look alike."""
    path = tmp_path / "w.bin"
    path.write_bytes(b"1")
    first, stamp = digest_file(path, cache=tmp_path), path.stat()
    path.write_bytes(b"2")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert digest_file(path, cache=tmp_path) != first


def test_missing_file_and_spoilt_memory(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*gone\.bin \(No such file"):
        digest_file(tmp_path / "gone.bin", cache=tmp_path)
    (tmp_path / "digests.sqlite").write_bytes(b"no database" * 100)
    (tmp_path / "w.bin").write_bytes(b"1")
    with pytest.raises(StorageError, match=r"digests\.sqlite.*delete it"):
        digest_file(tmp_path / "w.bin", cache=tmp_path)


@given(st.dictionaries(st.text(min_size=1), st.builds(FileInfo, size=st.integers(0), digest=st.text()), max_size=5), st.randoms())
def test_combined_digest_knows_no_order_but_every_field(files: dict[str, FileInfo], shuffler: random.Random) -> None:
    names = list(files)
    shuffler.shuffle(names)
    assert combined_digest({name: files[name] for name in names}) == combined_digest(files)
    for name, info in files.items():
        for other in (info.model_copy(update={"size": info.size + 1}), info.model_copy(update={"digest": info.digest + "x"})):
            assert combined_digest({**files, name: other}) != combined_digest(files)


def test_copy_where_links_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = storage_cache.blob_path(tmp_path, "xxh3:abcd")
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"1")

    def no_links(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    folder = link_folder(tmp_path, tmp_path / "checkpoints" / "x", {"a.bin": FileInfo(size=1, digest="xxh3:abcd")})
    assert (folder / "a.bin").read_bytes() == b"1"
    assert (folder / "a.bin").stat().st_ino != blob.stat().st_ino


@pytest.mark.parametrize(
    "names",
    [
        "model.safetensors model-00001-of-00002.safetensors model.safetensors.index.json pytorch_model.bin config.json",
        "tokenizer.json tokenizer.model merges.txt vocab.json chat_template.jinja additional_chat_templates/x.jinja",
        "optimizer.pt optimizer.bin exp_avg_sq.safetensors exp_avg_sq-00001-of-00002.safetensors checkpoint-10/optimizer.pt",
        "optimizer_0/__0_0.distcp optimizer_0/.metadata global_step10/zero_pp_rank_0_optim_states.pt preconditioner/v.pt",
    ],
)
def test_files_of_a_model(names: str) -> None:
    assert [name for name in names.split() if not is_model_file(name)] == []


@pytest.mark.parametrize(
    "names",
    [
        "README.md .git/config .gitattributes .hidden.bin record.json expert.json trainer_state.json",
        "training_args.bin scheduler.pt rng_state.pth",
        "checkpoint-10/model.safetensors runs/events onnx/model.safetensors other/config.json",
    ],
)
def test_files_that_are_not_the_model(names: str) -> None:
    assert [name for name in names.split() if is_model_file(name)] == []


def test_pickles_beside_safetensors_are_left_out() -> None:
    both = ["model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "config.json"]
    assert model_files(both) == ["config.json", "model.safetensors"]
    assert model_files(both[1:]) == ["config.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]
