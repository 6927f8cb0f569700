"""Merges of models in S3 without downloading them, against a real server: the same bytes, by ranges, with next to no disk."""

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ota_core.compute.stream import Stream
from ota_core.engine import engine
from ota_core.errors import OtaError, StorageError
from ota_core.moments import open_moments
from ota_core.moments.compression import compress, save_compressed
from ota_core.recipe.recipe import MergeRecipe
from tasks.merging.architecture import parameter_layout
from tasks.merging.inputs import assemble, fetch_all
from tasks.storage import models as storage
from tasks.storage import s3
from tasks.storage.layout import write_expert_json
from tasks.storage.models import upload_folder
from tasks.storage.streaming import outline as outlines
from tasks.storage.streaming.outline import outline
from tasks.storage.streaming.streams import Streams
from tests.ota_core.engine.test_output import llama_experts
from tests.ota_core.files.tiny_gguf import tiny, write_gguf
from tests.s3_requests import Requests
from tests.servers import S3Test
from tests.tiny_models import perturb, vocabulary, write_tiny_llama

MIB = 2**20
MEMORY = 64 * MIB  # chunks of 512 KiB


def disk(folder: Path) -> int:
    """Bytes that a folder really takes on the disk."""
    found = {path.stat().st_ino: path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file()}
    return sum(found.values())


def write_optimizer(folder: Path, *, zipped: bool = True) -> Path:
    """Turn an expert's exp_avg_sq.safetensors into the optimizer.pt that the Trainer would have left: numbered, with exp_avg between."""
    v = load_file(folder / "exp_avg_sq.safetensors")
    (folder / "exp_avg_sq.safetensors").unlink()
    layout = parameter_layout(folder)
    groups = [[n for n in layout.shapes if n in layout.decayed], [n for n in layout.shapes if n not in layout.decayed]]
    names = [name for group in groups for name in group]
    state = {i: {"step": torch.tensor(100.0), "exp_avg": -v[n], "exp_avg_sq": v[n]} for i, n in enumerate(names)}
    options = {"betas": (0.9, 0.999), "lr": 1e-3}
    numbers = [list(range(len(groups[0]))), list(range(len(groups[0]), len(names)))]
    saved = {"state": state, "param_groups": [{"params": n, **options} for n in numbers]}
    torch.save(saved, folder / "optimizer.pt", _use_new_zipfile_serialization=zipped)
    return folder / "optimizer.pt"


def remote(recipe: dict[str, Any], bucket: str, *, manifest: bool = False) -> dict[str, Any]:
    """Upload every model of a recipe; the same recipe with addresses in S3."""

    def move(source: str) -> str:
        if manifest:
            write_expert_json(Path(source), capability=Path(source).name, base_model="base", trained_at="2026-11-20")
        upload_folder(Path(source), f"{bucket}/{Path(source).name}", last="expert.json" if manifest else None)
        return f"{bucket}/{Path(source).name}"

    models = [{**entry, "model": move(entry["model"])} for entry in recipe["models"]]
    return {**recipe, "base_model": move(recipe["base_model"]), "models": models}


def merge(recipe: dict[str, Any], out: Path, cache: Path, *, stream: bool) -> tuple[engine.MergeReport, list[str]]:
    parsed = MergeRecipe.model_validate(recipe)
    with Streams(cache=cache, memory=MEMORY) as streams:
        given = streams if stream else None
        fetched = fetch_all(parsed, cache=cache, recipe_dir=None, streams=given)
        inputs = assemble(parsed, fetched, cache=cache, recipe_dir=None, streams=given)
        report = engine.merge(parsed, out, inputs=inputs, memory=MEMORY)
    return report, streams.notes


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name not in {"record.json", "README.md"}}


def poison(cache: Path) -> int:
    """Overwrite every hole of every outline with 0xFF, a NaN in every float type; returns how many bytes."""
    total = 0
    for manifest in cache.glob("outlines/*/outline.json"):
        for name, entry in json.loads(manifest.read_text())["files"].items():
            path, position = manifest.parent / "files" / name, 0
            with open(path, "r+b") as stream:
                for start, stop in [*entry["extents"], (entry["size"], entry["size"])]:
                    stream.seek(position)
                    stream.write(b"\xff" * (start - position))
                    total += max(0, start - position)
                    position = stop
    return total


CASES: dict[str, dict[str, Any]] = {
    "ota": {"parameters": {"density": 0.3}, "dtype": "bfloat16"},
    "ota rank1, bias correction": {"parameters": {"density": 0.3, "compression": "rank1", "bias_correction": True}},
    "ties": {"merge_method": "ties", "parameters": {"density": 0.4}},
}


@pytest.mark.parametrize(
    ("case", "optimizer"), [("ota", True), ("ota rank1, bias correction", True), ("ota", False), ("ties", True)]
)
def test_streamed_and_local_merges_are_the_same_bytes(
    tmp_path: Path, s3_server: S3Test, gets: Requests, case: str, optimizer: bool
) -> None:
    """hidden 256: tensors of 128 to 512 KiB. Holes of the outlines are poisoned: no byte of them may ever be used."""
    recipe = llama_experts(tmp_path, hidden=256, layers=3, max_shard_size="3MB") | CASES[case]
    assert len(list((tmp_path / "base").glob("model-*.safetensors"))) > 1
    if optimizer:
        for i in range(2):
            write_optimizer(tmp_path / f"expert{i}")
    merge(recipe, tmp_path / "local", tmp_path / "cache-local", stream=False)
    inputs = sum(path.stat().st_size for name in ("base", "expert0", "expert1") for path in (tmp_path / name).iterdir())
    cache = tmp_path / "cache"
    there = remote(recipe, s3_server.uri)
    _, notes = merge(there, tmp_path / "streamed", cache, stream=True)
    assert weights(tmp_path / "streamed") == weights(tmp_path / "local")
    assert notes == []
    assert inputs > 15 * MIB and disk(cache) < 0.1 * inputs
    assert all(one.range and one.condition for one in gets), "every GET is of a range, of the listed version"
    if optimizer and case == "ties":
        assert gets.bytes("optimizer.pt") < 0.02 * inputs, "nothing but the outline"
    assert poison(cache) > 0.9 * inputs
    merge(there, tmp_path / "again", cache, stream=True)
    assert weights(tmp_path / "again") == weights(tmp_path / "local")


def test_of_an_optimizer_state_only_v_is_fetched(tmp_path: Path, s3_server: S3Test, gets: Requests) -> None:
    recipe = llama_experts(tmp_path, hidden=256, layers=3) | {"merge_method": "fisher", "parameters": {}}
    for i in range(2):
        write_optimizer(tmp_path / f"expert{i}")
    there = remote(recipe, s3_server.uri)
    merge(there, tmp_path / "out", tmp_path / "cache", stream=True)
    v = (tmp_path / "expert0" / "optimizer.pt").stat().st_size // 2
    assert 2 * v < gets.different_bytes("optimizer.pt") < 2 * 1.15 * v


def test_pickled_weights_compressed_moments_and_other_vocabularies(tmp_path: Path, s3_server: S3Test, gets: Requests) -> None:
    base = write_tiny_llama(tmp_path / "base", hidden=256, vocab=vocabulary(160))
    tokens = vocabulary(160)
    other = write_tiny_llama(tmp_path / "other", hidden=256, vocab=[*tokens[:4], *tokens[150:], *tokens[4:150]], seed=3)
    binary = perturb(base, tmp_path / "binary", seed=1)
    from tests.ota_core.engine.test_output import add_moments

    for folder in (other, binary):
        add_moments(folder)
    with_state = open_moments(binary / "exp_avg_sq.safetensors")
    (tmp_path / "v").mkdir()
    save_compressed(compress(with_state, stream=Stream())[0], tmp_path / "v" / "v.safetensors")
    (binary / "exp_avg_sq.safetensors").unlink()
    torch.save(load_file(binary / "model.safetensors"), binary / "pytorch_model.bin")
    (binary / "model.safetensors").unlink()
    upload_folder(tmp_path / "v", f"{s3_server.uri}/v")
    recipe = {
        "merge_method": "ota", "base_model": str(base), "parameters": {"density": 0.3, "compression": "rank1"},
        "models": [
            {"model": str(binary), "parameters": {"preconditioner_path": f"{s3_server.uri}/v/v.safetensors"}}, {"model": str(other)},
        ],
    }  # fmt: skip
    merge(recipe, tmp_path / "local", tmp_path / "cache-local", stream=False)
    there = remote(recipe, s3_server.uri)
    gets.clear()
    streamed, notes = merge(there, tmp_path / "streamed", tmp_path / "cache", stream=True)
    assert weights(tmp_path / "streamed") == weights(tmp_path / "local")
    assert notes == [] and any("vocabularies differ" in note for note in streamed.notes)
    assert all(one.range for one in gets)
    poison(tmp_path / "cache")
    merge(there, tmp_path / "again", tmp_path / "cache", stream=True)
    assert weights(tmp_path / "again") == weights(tmp_path / "local")


@pytest.mark.parametrize("what", ["optimizer", "weights"])
def test_what_cannot_be_streamed_is_downloaded_and_said(tmp_path: Path, s3_server: S3Test, what: str) -> None:
    recipe = llama_experts(tmp_path, hidden=128, count=1)
    expert = tmp_path / "expert0"
    if what == "optimizer":
        file = write_optimizer(expert, zipped=False)
    else:
        file = expert / "pytorch_model.bin"
        torch.save(load_file(expert / "model.safetensors"), file, _use_new_zipfile_serialization=False)
        (expert / "model.safetensors").unlink()
    merge(recipe, tmp_path / "local", tmp_path / "cache-local", stream=False)
    there = remote(recipe, s3_server.uri)
    for out in ("one", "two"):
        _, notes = merge(there, tmp_path / out, tmp_path / "cache", stream=True)
        assert weights(tmp_path / out) == weights(tmp_path / "local")
        (note,) = notes
        assert note.startswith(f"{s3_server.uri}/expert0/{file.name} cannot be read by ranges") and "downloaded" in note
    assert disk(tmp_path / "cache") < 1.5 * file.stat().st_size + MIB


@pytest.mark.parametrize("stream", [True, False])
def test_a_gguf_model_in_s3_is_downloaded(tmp_path: Path, s3_server: S3Test, stream: bool) -> None:
    """The only one below a prefix, or one of several by the name of a file; of a model in parts, all parts."""
    tiny("llama").save_pretrained(tmp_path / "start")
    (tmp_path / "files").mkdir()
    write_gguf(tmp_path / "files" / "a.gguf", tmp_path / "start", "llama", "F16", split=7)
    write_gguf(tmp_path / "files" / "b.gguf", tmp_path / "start", "llama", "Q8_0")
    parts = sorted(path.name for path in (tmp_path / "files").glob("a-*"))
    for path in (tmp_path / "files").iterdir():
        s3.write_bytes(f"{s3_server.uri}/many/{path.name}", path.read_bytes())
        if path.name == "b.gguf":
            s3.write_bytes(f"{s3_server.uri}/one/{path.name}", path.read_bytes())
    there = {"merge_method": "linear", "models": [{"model": f"{s3_server.uri}/many"}]}
    with pytest.raises(
        StorageError,
        match=rf"holds 2 GGUF models \({parts[0]}, b.gguf\); name the one that is meant, {s3_server.uri}/many/{parts[0]}",
    ):
        merge(there, tmp_path / "none", tmp_path / "cache", stream=stream)
    exact = load_file(tmp_path / "start" / "model.safetensors")
    for where, atol in ((f"many/{parts[1]}", 1e-3), ("many/b.gguf", 0.02), ("one", 0.02)):
        out = tmp_path / where.replace("/", "-")
        _, notes = merge(there | {"models": [{"model": f"{s3_server.uri}/{where}"}]}, out, tmp_path / "cache", stream=stream)
        assert not stream or all("it is a GGUF file, whose reader takes it whole: downloaded" in note for note in notes)
        for name, tensor in load_file(out / "model.safetensors").items():
            torch.testing.assert_close(tensor.float(), exact[name], rtol=0, atol=atol)


def test_a_complete_download_is_used_instead_of_the_network(tmp_path: Path, s3_server: S3Test, gets: Requests) -> None:
    recipe = remote(llama_experts(tmp_path, hidden=128), s3_server.uri)
    merge(recipe, tmp_path / "fetched", tmp_path / "cache", stream=False)
    gets.clear()
    merge(recipe, tmp_path / "streamed", tmp_path / "cache", stream=True)
    assert weights(tmp_path / "streamed") == weights(tmp_path / "fetched")
    sizes = sum(path.stat().st_size for path in tmp_path.glob("*/*.safetensors"))
    assert gets.bytes() < 0.2 * sizes, "headers alone"


def test_a_streamed_input_is_known_by_its_listing_not_by_its_address(tmp_path: Path, s3_server: S3Test) -> None:
    recipe = llama_experts(tmp_path, count=1)
    upload_folder(tmp_path / "expert0", f"{s3_server.uri}/a/one")
    upload_folder(tmp_path / "expert0", f"{s3_server.uri}/b/two")
    merge(recipe, tmp_path / "local", tmp_path / "cache-local", stream=False)
    listed = remote(recipe, f"{s3_server.uri}/with-manifest", manifest=True)
    with Streams(cache=tmp_path / "cache", memory=MEMORY) as streams:
        one, two = (streams.model(f"{s3_server.uri}/{name}").digest for name in ("a/one", "b/two"))
        by_manifest = streams.model(listed["models"][0]["model"]).digest
    assert one == two and one.startswith("etag-listing:")
    assert by_manifest.startswith("sha256-listing:")


def test_a_manifest_that_contradicts_the_stored_sha256_is_refused(tmp_path: Path, s3_server: S3Test) -> None:
    recipe = llama_experts(tmp_path, count=1)
    there = remote(recipe, s3_server.uri, manifest=True)
    manifest = tmp_path / "expert0" / "expert.json"
    content = json.loads(manifest.read_text())
    content["files"]["model.safetensors"]["sha256"] = "0" * 64
    s3.write_bytes(f"{s3_server.uri}/expert0/expert.json", json.dumps(content).encode())
    with pytest.raises(
        StorageError, match=r"model\.safetensors is damaged or was replaced: its manifest expert.json says sha256 0000"
    ):
        merge(there, tmp_path / "out", tmp_path / "cache", stream=True)


def test_an_object_that_is_replaced_meanwhile_ends_the_merge(tmp_path: Path, s3_server: S3Test, gets: Requests) -> None:
    recipe = remote(llama_experts(tmp_path, hidden=256, layers=3), s3_server.uri)
    model = tmp_path / "expert1" / "model.safetensors"
    done = threading.Event()

    def replace(_: int) -> None:
        reads = [one for one in gets if one.key.endswith("expert1/model.safetensors") and not one.range.startswith("bytes=0-")]
        if len(reads) > 2 and not done.is_set():
            done.set()
            content = bytearray(model.read_bytes())
            content[-1] ^= 1
            s3.new_client().put_object(Bucket=s3_server.bucket, Key="expert1/model.safetensors", Body=bytes(content))

    gets.before = replace
    with pytest.raises(StorageError, match=r"cannot read s3://.*expert1/model\.safetensors.*replaced meanwhile.*run again"):
        merge(recipe, tmp_path / "out", tmp_path / "cache", stream=True)
    assert done.is_set() and not (tmp_path / "out").exists()
    gets.before = lambda count: None
    merge(recipe, tmp_path / "out", tmp_path / "cache", stream=True)  # another run takes the new one


def test_outlines_are_made_once_and_damaged_ones_again(tmp_path: Path, s3_server: S3Test, gets: Requests) -> None:
    llama_experts(tmp_path, hidden=128, count=1)
    write_optimizer(tmp_path / "expert0")
    upload_folder(tmp_path / "expert0", f"{s3_server.uri}/e")
    objects = {one.uri.rsplit("/", 1)[-1]: one for one in s3.list_objects(f"{s3_server.uri}/e")}
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(4) as pool:
        (folder, known), *others = pool.map(lambda _: outline(objects, cache=cache), range(4))
    assert all(other == (folder, known) for other in others)
    made = len(gets)
    assert outline(objects, cache=cache) == (folder, known) and len(gets) == made
    for file in known.files.values():
        assert file.readable and file.extents[0][0] == 0
    for name in objects:
        assert (folder / name).stat().st_size == objects[name].size
        first, last = known.files[name].extents[0][0], known.files[name].extents[-1][1] - 1
        for place in (first, last):
            with open(folder / name, "r+b") as stream:
                stream.seek(place)
                stream.write(b"?" if stream.read(1) != b"?" else b"!")
                stream.seek(place)
            before = len(gets)
            outline(objects, cache=cache)
            assert (folder / name).read_bytes()[place] == (tmp_path / "expert0" / name).read_bytes()[place]
            if known.files[name].extents:
                assert len(gets) >= before


def test_an_outline_that_breaks_off_is_not_used(tmp_path: Path, s3_server: S3Test, monkeypatch: pytest.MonkeyPatch) -> None:
    llama_experts(tmp_path, count=1)
    upload_folder(tmp_path / "expert0", f"{s3_server.uri}/e")
    objects = {one.uri.rsplit("/", 1)[-1]: one for one in s3.list_objects(f"{s3_server.uri}/e")}
    real = outlines.read_exactly

    def fail(client: Any, one: s3.S3Object, start: int, stop: int) -> memoryview:
        if one.uri.endswith("model.safetensors"):
            raise StorageError("no answer")
        return real(client, one, start, stop)

    with monkeypatch.context() as patch:
        patch.setattr(outlines, "read_exactly", fail)
        with pytest.raises(StorageError, match="no answer"):
            outline(objects, cache=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache" / "outlines").iterdir() if path.is_dir()]
    folder, _ = outline(objects, cache=tmp_path / "cache")
    # What a killed process left under another name is removed by the next who makes the outline.
    stale = folder.parent.parent / f".{folder.parent.name}.abcd.tmp"
    shutil.copytree(folder.parent, stale)
    os.remove(folder.parent / "outline.json")
    assert outline(objects, cache=tmp_path / "cache")[0] == folder
    assert not stale.exists()


def test_problems_of_streamed_inputs_come_together(tmp_path: Path, s3_server: S3Test) -> None:
    recipe = remote(llama_experts(tmp_path), s3_server.uri)
    recipe["models"].append({"model": f"{s3_server.uri}/nowhere"})
    recipe["models"].append({"model": f"{s3_server.uri}/neither"})
    with pytest.raises(OtaError, match=r"(?s)2 problems found.*nowhere.*neither"):
        merge(recipe, tmp_path / "out", tmp_path / "cache", stream=True)


def test_a_hub_model_is_downloaded_and_said(tmp_path: Path, s3_server: S3Test, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = llama_experts(tmp_path, count=1)
    real = storage.fetch
    monkeypatch.setattr(
        storage, "fetch", lambda source, **options: real(recipe["base_model"] if source == "org/base" else source, **options)
    )
    _, notes = merge({**recipe, "base_model": "org/base"}, tmp_path / "out", tmp_path / "cache", stream=True)
    assert notes == [f"org/base is a Hugging Face id: downloaded to {tmp_path / 'base'}"]
