"""Second moments harvested into a folder of their own, from and to everywhere, and used by merges of the weights that they belong to."""

import json
import re
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ota_core.capture import save_second_moments
from ota_core.compute.blocks import matrix_shape
from ota_core.errors import CheckpointError, MomentsError, OtaError, StorageError
from ota_core.files.checkpoint import Checkpoint
from ota_core.files.safetensors_io import SafetensorsFile
from ota_core.moments import open_moments
from ota_core.moments.belongs import check_belongs, weights_digest
from ota_core.moments.compression import label_of, open_compressed
from tasks.experts.harvest import Harvested, harvest
from tasks.merging.inputs import assemble, fetch_all
from tasks.storage import models as storage
from tasks.storage.streaming.streams import Streams
from tests.checkpoints import random_base, random_expert, read_tensors, run_merge, write_checkpoint, write_expert
from tests.ota_core.capture.training import model_of, train
from tests.servers import S3Test

BASE = random_base()
EXPERT = random_expert(BASE, 1, step=7, beta2=0.95)
NAMES = set(BASE)


@pytest.fixture
def expert(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "base", BASE)
    folder = write_expert(tmp_path / "expert", EXPERT, shards=3)
    said = {"capability": "math", "base_model": "org/base", "trained_at": "2026-11-20", "optimizer": "AdamW"}
    (folder / "expert.json").write_text(json.dumps(said))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ndatasets: [org/sums, org/more]\n---\n# An expert\n")
    return folder


def run(source: Path | str, out: Path | str, *, home: Path | None = None, **options: Any) -> Harvested:
    return harvest(str(source), str(out), cache=home or Path(source).parent / "cache", **options)


def without_moments(expert: Path, name: str = "plain") -> Path:
    """The same weights without what training left beside them."""
    folder = expert.parent / name
    shutil.copytree(expert, folder)
    for file in folder.glob("exp_avg_sq*"):
        file.unlink()
    return folder


def merge(tmp_path: Path, expert: Path | str, moments: Path | str | None, out: str, **options: Any) -> dict[str, Any]:
    """Merged tensors, through the same door as ``ota merge``; ``options`` of ``assemble`` and ``fetch_all``."""
    from ota_core.recipe.recipe import MergeRecipe

    entry: dict[str, Any] = {"model": str(expert), "parameters": {"preconditioner_path": str(moments)} if moments else {}}
    raw = {
        "merge_method": "ota",
        "base_model": str(tmp_path / "base"),
        "models": [entry],
        "parameters": {"density": 0.4, "compression": "rank1"},
    }
    recipe = MergeRecipe.model_validate(raw)
    where = {"cache": tmp_path / "cache", "recipe_dir": None, **options}
    inputs = assemble(recipe, fetch_all(recipe, **where), **where)
    run_merge(raw, tmp_path / out, inputs=inputs)
    return read_tensors(tmp_path / out)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys() == NAMES and all(np.array_equal(one[name], other[name]) for name in one)


def test_a_folder_and_what_a_merge_makes_of_it(tmp_path: Path, expert: Path) -> None:
    made = run(expert, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "exp_avg_sq.safetensors"]
    moments = open_compressed(tmp_path / "out" / "exp_avg_sq.safetensors")
    assert label_of(moments) == made.label == "rank1" and moments.shapes().keys() == NAMES
    assert moments.step("model.norm.weight") == 7 and moments.beta2 == 0.95 and made.sqrt_error and 0 < made.sqrt_error < 1
    with SafetensorsFile(tmp_path / "out" / "exp_avg_sq.safetensors") as file:
        said = file.metadata
    assert said["weights"] == made.weights and re.fullmatch(r"sample:[0-9a-f]{32}", made.weights)
    known = {
        "optimizer": "AdamW",
        "base_model": "org/base",
        "data": "org/sums, org/more",
        "step": "7",
        "beta2": "0.95",
        "capability": "math",
    }
    assert {key: said[key] for key in known} == known == {key: made.facts[key] for key in known}
    plain = without_moments(expert)
    wanted = merge(tmp_path, expert, None, "a")
    assert_same(merge(tmp_path, plain, tmp_path / "out", "b"), wanted)
    assert_same(merge(tmp_path, plain, tmp_path / "out" / "exp_avg_sq.safetensors", "c"), wanted)
    shutil.copy(tmp_path / "out" / "exp_avg_sq.safetensors", plain)
    assert_same(merge(tmp_path, plain, None, "d"), wanted)


def test_the_card(tmp_path: Path, expert: Path) -> None:
    from huggingface_hub import ModelCard

    made = run(expert, tmp_path / "out", data=["two sets"])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "apache-2.0" and card.data.tags == ["second-moments", "ota-merging"]
    for text in (
        f"| digest of the weights | {made.weights} |", "| trained from | org/base |", "| data | two sets |", "| optimizer | AdamW |",
        "| steps behind v | 7 |", "| β₂ | 0.95 |", "| licence | apache-2.0 |", "preconditioner_path: out", "compression: rank1",
    ):  # fmt: skip
        assert text in card.text, text
    run(expert, tmp_path / "other", licence="mit", method="rank_k", rank=2)
    card = ModelCard.load(tmp_path / "other" / "README.md")
    assert card.data.license == "mit" and "compression: rank_k\n  rank: 2\n" in card.text


def test_weights_of_another_training_are_refused(tmp_path: Path, expert: Path) -> None:
    made = run(expert, tmp_path / "out")
    later = random_expert(BASE, 1)
    name = "model.layers.1.mlp.up_proj.weight"
    later.weights[name] = later.weights[name] + np.float32(1e-3)
    other = write_checkpoint(tmp_path / "later", later.weights, shards=2)
    with pytest.raises(MomentsError) as caught:
        merge(tmp_path, other, tmp_path / "out", "a")
    text = str(caught.value)
    with closing(Checkpoint(other)) as held:
        seen = weights_digest(held, NAMES)
    assert (
        f"made for those with the digest {made.weights}, and {other} holds weights with the digest {seen}" in text
        and seen != made.weights
    )
    assert "harvest again with --weights" in text and not (tmp_path / "a").exists()
    run(expert, tmp_path / "again", weights=str(other))
    merge(tmp_path, other, tmp_path / "again", "b")


def test_the_digest_follows_the_weights_and_not_their_files(tmp_path: Path) -> None:
    def digest(name: str, tensors: Any, trained: set[str] = NAMES, **options: Any) -> str:
        with closing(Checkpoint(write_checkpoint(tmp_path / name, tensors, **options))) as held:
            return weights_digest(held, trained)

    first = digest("a", EXPERT.weights)
    assert digest("b", EXPERT.weights, shards=4) == first
    assert digest("c", EXPERT.weights, dtype=torch.bfloat16) != first
    renamed = {name.replace("norm", "ln"): x for name, x in EXPERT.weights.items()}
    assert digest("d", renamed) != first
    frozen = dict(EXPERT.weights)
    one = {"model.layers.0.self_attn.q_proj.weight"}
    frozen["model.embed_tokens.weight"] = frozen["model.embed_tokens.weight"] + 1
    assert digest("e", frozen) != first and digest("f", frozen, one) == digest("g", EXPERT.weights, one)


def test_a_file_that_names_no_weights_is_taken_as_before(tmp_path: Path, expert: Path) -> None:
    check_belongs(expert / "exp_avg_sq.safetensors", tmp_path / "nowhere")
    check_belongs(expert, tmp_path / "nowhere")


@pytest.mark.parametrize("method", ["none", "log8", "rank1"])
def test_every_method_says_which_weights(tmp_path: Path, expert: Path, method: str) -> None:
    made = run(expert, tmp_path / "out", method=method)
    check_belongs(tmp_path / "out" / "exp_avg_sq.safetensors", expert)
    moments = open_moments(tmp_path / "out")
    assert label_of(moments) == made.label == method
    if method == "none":
        for name, v in EXPERT.v.items():
            assert np.array_equal(moments.read(name, 0, matrix_shape(v.shape)[0]).reshape(v.shape), v)


def test_what_a_training_captured_as_rank1_is_published_as_it_is(tmp_path: Path) -> None:
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer)
    model.save_pretrained(tmp_path / "checkpoint")
    path = save_second_moments(model, optimizer, tmp_path / "checkpoint", method="rank1")
    made = run(tmp_path / "checkpoint", tmp_path / "out")
    assert made.sqrt_error is None and made.facts["optimizer"] == "AdamW" and made.facts["step"] == "3"
    kept, found = open_compressed(path), open_compressed(tmp_path / "out" / "exp_avg_sq.safetensors")
    assert kept.header == found.header
    for name, values in kept.tensors().items():  # type: ignore[attr-defined]
        assert np.array_equal(found.tensors()[name], values)  # type: ignore[attr-defined]
    with pytest.raises(OtaError, match=r"is compressed with rank1 already, and log8 was asked for"):
        run(tmp_path / "checkpoint", tmp_path / "more", method="log8")
    assert not (tmp_path / "more").exists()


def test_numbered_states_of_a_trainer_and_weights_elsewhere(tmp_path: Path) -> None:
    """The Trainer's optimizer.pt in a folder without weights: they lie in another one."""
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer)
    model.save_pretrained(tmp_path / "weights")
    (tmp_path / "state").mkdir()
    torch.save(optimizer.state_dict(), tmp_path / "state" / "optimizer.pt")
    with pytest.raises(OtaError):
        run(tmp_path / "state", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(tmp_path / "state", tmp_path / "out", weights=str(tmp_path / "weights"), method="none")
    moments = open_moments(tmp_path / "out")
    for name, parameter in model.named_parameters():
        v = optimizer.state[parameter]["exp_avg_sq"]
        rows = v.shape[0]
        assert torch.equal(torch.from_numpy(moments.read(name, 0, rows).copy()).reshape(v.shape), v)
    run(tmp_path / "state" / "optimizer.pt", tmp_path / "file", weights=str(tmp_path / "weights"))
    check_belongs(tmp_path / "file" / "exp_avg_sq.safetensors", tmp_path / "weights")


def test_from_s3_to_s3_and_into_a_merge(tmp_path: Path, expert: Path, s3_server: S3Test) -> None:
    plain = without_moments(expert)
    storage.upload_folder(expert, f"{s3_server.uri}/expert")
    storage.upload_folder(plain, f"{s3_server.uri}/plain")
    out = f"{s3_server.uri}/moments/math-1.5"
    made = run(f"{s3_server.uri}/expert", out, home=tmp_path / "home")
    assert sorted(one.uri for one in storage.list_objects(out)) == [f"{out}/README.md", f"{out}/exp_avg_sq.safetensors"]
    assert made.uri == out and made.weights == run(expert, tmp_path / "local").weights
    with pytest.raises(StorageError, match=r"holds 2 objects already.+--overwrite"):
        run(expert, out)
    run(expert, out, overwrite=True)
    wanted = merge(tmp_path, expert, None, "a")
    assert_same(merge(tmp_path, f"{s3_server.uri}/plain", out, "b"), wanted)
    with Streams(cache=tmp_path / "cache", memory=2**30) as streams:
        assert_same(merge(tmp_path, f"{s3_server.uri}/plain", out, "c", streams=streams), wanted)
        assert_same(merge(tmp_path, f"{s3_server.uri}/plain", f"{out}/exp_avg_sq.safetensors", "d", streams=streams), wanted)
        other = write_checkpoint(tmp_path / "other", random_expert(BASE, 2).weights)
        storage.upload_folder(other, f"{s3_server.uri}/other")
        with pytest.raises(MomentsError, match="belongs to other weights"):
            merge(tmp_path, f"{s3_server.uri}/other", out, "e", streams=streams)
        with pytest.raises(MomentsError, match="holds no second moments"):
            merge(tmp_path, f"{s3_server.uri}/plain", f"{s3_server.uri}/plain", "f", streams=streams)


def test_nothing_is_written_where_something_is_wrong(tmp_path: Path, expert: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes").write_text("mine")
    with pytest.raises(OtaError, match="exists already"):
        run(expert, tmp_path / "there")
    with pytest.raises(MomentsError, match="holds no second moments"):
        run(without_moments(expert), tmp_path / "out")
    with pytest.raises(OtaError, match="compression method 'rank2' is not known"):
        run(expert, tmp_path / "out", method="rank2")
    with pytest.raises(CheckpointError, match="holds no weights"):
        run(expert, tmp_path / "out", weights=str(tmp_path / "there"))
    assert not (tmp_path / "out").exists() and not [*tmp_path.glob(".*")]
