"""Bytes that were damaged on their way, or where they lie, never become a model: against a real server, through a proxy that flips some."""

import hashlib
from pathlib import Path
from random import Random
from typing import Any

import pytest

from ota_core.errors import StorageError
from tasks.storage import s3
from tasks.storage.streaming import verify
from tests.ota_core.engine.test_output import llama_experts
from tests.s3_requests import Requests
from tests.servers import S3Test
from tests.tasks.storage.s3_proxy import Answer, Proxy
from tests.tasks.storage.streaming.test_streaming import MEMORY, MIB, merge, remote, weights, write_optimizer


def flip(name: str, times: int = 10**6, *, behind: int = 100_000) -> Any:
    """Damages one byte of a large answer to a GET of objects of this name, some bytes behind its begin."""
    left = [times]

    def damage(answer: Answer) -> None:
        if answer.method == "GET" and answer.path.endswith(name) and len(answer.body) > behind and left[0]:
            left[0] -= 1
            answer.body = answer.body[:behind] + bytes([answer.body[behind] ^ 1]) + answer.body[behind + 1 :]

    return damage


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("name", ["base/model.safetensors", "expert1/model.safetensors", "expert0/exp_avg_sq.safetensors"])
def test_a_flipped_byte_ends_the_merge(tmp_path: Path, proxy: Proxy, s3_server: S3Test, name: str, manifest: bool) -> None:
    recipe = remote(llama_experts(tmp_path, hidden=256, layers=2), s3_server.uri, manifest=manifest)
    (tmp_path / "out").mkdir()
    proxy.change = flip(name, times=1)
    # Bytes that are read twice are compared before the whole is.
    with pytest.raises(
        StorageError, match=rf"{name}( is damaged: .*(expert.json, by SHA-256|stored with)|: the bytes .* were others)"
    ):
        merge(recipe, tmp_path / "new", tmp_path / "cache", stream=True)
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".new*"))
    _, notes = merge(recipe, tmp_path / "new", tmp_path / "cache", stream=True)
    assert notes == []


def test_a_flipped_byte_of_an_optimizer_state(tmp_path: Path, proxy: Proxy, s3_server: S3Test) -> None:
    """Of which only half is read: each tensor has a CRC-32 of its own."""
    recipe = llama_experts(tmp_path, hidden=256, layers=2)
    for i in range(2):
        write_optimizer(tmp_path / f"expert{i}")
    there = remote(recipe, s3_server.uri)
    proxy.change = flip("expert1/optimizer.pt", times=1, behind=70_000)
    with pytest.raises(
        StorageError, match=r"optimizer\.pt( is damaged: the CRC-32 in the file itself says|: the bytes .* were others)"
    ):
        merge(there, tmp_path / "out", tmp_path / "cache", stream=True)
    assert not (tmp_path / "out").exists()
    _, notes = merge(there, tmp_path / "out", tmp_path / "cache", stream=True)
    assert notes == []


@pytest.mark.parametrize("parts", [False, True])
def test_what_only_s3_knows(tmp_path: Path, proxy: Proxy, s3_server: S3Test, parts: bool) -> None:
    """Objects that another tool uploaded, without a SHA-256: the ETag is the MD5 of the object, or of its parts."""
    recipe = llama_experts(tmp_path, hidden=384, layers=4, count=1)
    there = remote(recipe, s3_server.uri)
    model = (tmp_path / "expert0" / "model.safetensors").read_bytes()
    assert len(model) > 5 * MIB
    client, place = s3.new_client(), {"Bucket": s3_server.bucket, "Key": "expert0/model.safetensors"}
    if parts:
        upload = client.create_multipart_upload(**place)["UploadId"]
        pieces = [model[start : start + 5 * MIB] for start in range(0, len(model), 5 * MIB)]
        done = [
            {"PartNumber": i, "ETag": client.upload_part(**place, UploadId=upload, PartNumber=i, Body=piece)["ETag"]}
            for i, piece in enumerate(pieces, 1)
        ]
        client.complete_multipart_upload(**place, UploadId=upload, MultipartUpload={"Parts": done})
    else:
        client.put_object(**place, Body=model)
    (one,) = [one for one in s3.list_objects(f"{s3_server.uri}/expert0") if one.uri.endswith("model.safetensors")]
    if parts and s3.part_size(one, s3.head(one.uri) or {}, client) is None:
        pytest.skip("this server does not tell the size of parts")
    proxy.change = flip("expert0/model.safetensors", times=1)
    with pytest.raises(StorageError, match=r"is damaged: its ETag, by|were others when"):
        merge(there, tmp_path / "out", tmp_path / "cache", stream=True)
    _, notes = merge(there, tmp_path / "out", tmp_path / "cache", stream=True)
    assert notes == []


def test_configuration_and_tokenizer_are_checked_as_well(tmp_path: Path, proxy: Proxy, s3_server: S3Test) -> None:
    recipe = remote(llama_experts(tmp_path, count=1), s3_server.uri)
    proxy.change = flip("base/config.json", behind=20)
    with pytest.raises(StorageError, match=r"base/config\.json is damaged or was replaced: it was stored with sha256"):
        merge(recipe, tmp_path / "out", tmp_path / "cache", stream=True)
    proxy.change = lambda answer: None
    merge(recipe, tmp_path / "out", tmp_path / "cache", stream=True)


def test_checking_costs_once_at_most_another_read(
    tmp_path: Path, s3_server: S3Test, gets: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors are read in another order than they lie in: what could not wait is read again, the first time. Then digests of blocks are known."""
    recipe = llama_experts(tmp_path, hidden=256, layers=3) | {"merge_method": "task_arithmetic", "parameters": {}}
    there = remote(recipe, s3_server.uri, manifest=True)
    spent = []
    for name in ("unchecked", "first", "second"):
        gets.clear()
        with monkeypatch.context() as patch:
            if name == "unchecked":
                patch.setattr(verify.Verifier, "passed", lambda *_: None)
                patch.setattr(verify.Verifier, "finish", lambda *_: None)
            merge(there, tmp_path / name, tmp_path / "cache", stream=True)
        spent.append(gets.bytes("model.safetensors"))
    print(f"{spent[0]:,} bytes without checking, {spent[1]:,} with it, {spent[2]:,} the second time")
    assert spent[1] < 2.1 * spent[0] and spent[2] < 1.05 * spent[0]


def test_what_was_right_once_is_compared_with_that(tmp_path: Path, proxy: Proxy, s3_server: S3Test) -> None:
    recipe = remote(llama_experts(tmp_path, hidden=256, layers=2), s3_server.uri, manifest=True)
    merge(recipe, tmp_path / "one", tmp_path / "cache", stream=True)
    assert list((tmp_path / "cache").glob("outlines/*/sums/*"))
    proxy.change = flip("expert1/model.safetensors")
    with pytest.raises(StorageError, match=r"expert1/model\.safetensors: the bytes .* were others"):
        merge(recipe, tmp_path / "two", tmp_path / "cache", stream=True)
    assert not (tmp_path / "two").exists()


def checked(
    content: bytes, uri: str, order: list[int], chunk: int, room: int, *, sha256: str
) -> tuple[verify.Verifier, s3.S3Object]:
    one = next(one for one in s3.list_objects(uri) if one.uri.endswith("/big"))
    made = verify.Verifier(
        one, s3.client(patient=True), outline=Path("/nowhere"), extents=(), cuts=(), sums=(), chunk=chunk, room=verify.Room(room), sha256=sha256
    )  # fmt: skip
    for place in order:
        made.passed(place * chunk, memoryview(content[place * chunk : (place + 1) * chunk]))
    return made, one


@pytest.mark.parametrize("room", [0, 100_000, 10**9])
@pytest.mark.parametrize("order", ["forward", "backward", "any"])
def test_any_order_and_any_room(s3_server: S3Test, room: int, order: str) -> None:
    """What does not fit waits for nothing: it is asked for again at the end."""
    content = Random(1).randbytes(MIB)
    s3.client().put_object(Bucket=s3_server.bucket, Key="big", Body=content)
    chunk = 64 * 1024
    places = list(range(16))
    if order != "forward":
        places = places[::-1] if order == "backward" else Random(2).sample(places, 16)
    sha256 = hashlib.sha256(content).hexdigest()
    made, _ = checked(content, s3_server.uri, places, chunk, room, sha256=sha256)
    assert made.finish() is None
    with pytest.raises(StorageError, match=f"says {'0' * 64} of its content, what was read has {sha256}"):
        checked(content, s3_server.uri, places, chunk, room, sha256="0" * 64)[0].finish()
    other = content[:500_000] + b"?" + content[500_001:]
    with pytest.raises(StorageError, match=r"is damaged|were others"):
        checked(other, s3_server.uri, places, chunk, room, sha256=sha256)[0].finish()


def test_a_chunk_that_is_another_one_the_second_time(s3_server: S3Test) -> None:
    content = Random(1).randbytes(MIB)
    s3.client().put_object(Bucket=s3_server.bucket, Key="big", Body=content)
    made, _ = checked(content, s3_server.uri, list(range(16)), 65536, 10**9, sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(StorageError, match=r"big: the bytes from 65,536 on were others"):
        made.passed(65536, memoryview(bytes(65536)))


def test_a_file_of_which_little_was_read_is_not_brought_whole(s3_server: S3Test, gets: Requests) -> None:
    content = Random(1).randbytes(MIB)
    s3.client().put_object(Bucket=s3_server.bucket, Key="big", Body=content)
    made, _ = checked(content, s3_server.uri, [3, 4], 65536, 10**9, sha256="0" * 64)
    note = made.finish()
    assert note is not None and "131,072 bytes were read and could not be checked" in note and "only a part" in note
    assert not gets


def test_parts_fold_to_the_etag_of_s3() -> None:
    content = Random(3).randbytes(100_000)
    sums = b"".join(hashlib.md5(content[i : i + 7000]).digest() for i in range(0, len(content), 7000))
    folded = verify.PartsMd5(7000)
    for start in range(0, len(content), 3333):
        folded.update(content[start : start + 3333])
    assert folded.hexdigest() == f"{hashlib.md5(sums).hexdigest()}-15"


def test_an_overwritten_output_stays_where_the_new_one_is_damaged(tmp_path: Path, proxy: Proxy, s3_server: S3Test) -> None:
    from ota_core.engine import engine
    from ota_core.recipe.recipe import MergeRecipe
    from tasks.merging.inputs import assemble, fetch_all
    from tasks.storage.streaming.streams import Streams

    recipe = remote(llama_experts(tmp_path, hidden=256), s3_server.uri, manifest=True)
    merge(recipe, tmp_path / "out", tmp_path / "cache", stream=True)
    before = weights(tmp_path / "out")
    proxy.change = flip("expert0/model.safetensors")
    parsed = MergeRecipe.model_validate(recipe)
    with (
        Streams(cache=tmp_path / "cache", memory=MEMORY) as streams,
        pytest.raises(StorageError, match=r"is damaged(: its manifest)?"),
    ):
        fetched = fetch_all(parsed, cache=tmp_path / "cache", recipe_dir=None, streams=streams)
        inputs = assemble(parsed, fetched, cache=tmp_path / "cache", recipe_dir=None, streams=streams)
        engine.merge(parsed, tmp_path / "out", inputs=inputs, memory=MEMORY, overwrite=True)
    assert weights(tmp_path / "out") == before
