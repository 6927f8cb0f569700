"""Adapters from merged models: with ranks enough the model itself comes back, by our reader and by PEFT's; with fewer, the stated error."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ota_core.errors import OtaError
from ota_core.extract.extract import ExtractOptions, ExtractReport, extract_into
from ota_core.extract.factors import distance, factors_of
from ota_core.files.checkpoint import Checkpoint
from ota_core.plan.inputs import ModelInput
from tests.ota_core.files.tiny_adapters import tiny_base, write_adapter

MEMORY = 2**28


def extracted(folder: Path, merged: Path, base: Path, *, memory: int = MEMORY, **options: Any) -> ExtractReport:
    folder.mkdir()
    with closing(Checkpoint(merged)) as one, closing(Checkpoint(base)) as other:
        return extract_into(folder, one, other, ExtractOptions(**options), memory=memory)


def tensors_of(adapter: Path, base: Path) -> dict[str, Any]:
    with closing(ModelInput(name="m", path=adapter, under=ModelInput(name="b", path=base)).opened()) as model:
        return {
            name: model.read_rows(name, 0, np.prod(model.info(name).shape[:-1] or model.info(name).shape, dtype=int))
            .to_float32()
            .reshape(model.info(name).shape)
            for name in model.names()
        }


def peft_merged(adapter: Path, base: Path) -> dict[str, Any]:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
    ).merge_and_unload()
    return {name: one.detach().numpy() for name, one in model.state_dict().items()}


@pytest.mark.parametrize(
    "kind, config, options",
    [
        ("llama", {"target_modules": ["q_proj", "down_proj", "lm_head"]}, {}),
        ("llama", {"modules_to_save": ["embed_tokens", "input_layernorm"], "use_dora": True}, {"whole": ("embeddings", "norms"), "rank": 16}),
        ("llama", {"rank_pattern": {"layers.0.self_attn.q_proj": 2}}, {"max_error": 1e-5}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, {}),
        ("qwen2", {"bias": "all"}, {"whole": ("biases",), "exact": True}),
    ],
)  # fmt: skip
def test_with_ranks_enough_the_merged_model_comes_back(
    tmp_path: Path, kind: str, config: dict[str, Any], options: dict[str, Any]
) -> None:
    base = tiny_base(tmp_path / "base", kind)
    write_adapter(tmp_path / "trained", base, merged=tmp_path / "merged", **config)
    report = extracted(tmp_path / "out", tmp_path / "merged", base, **{"rank": 8, **options})
    expected = {name: one.numpy() for name, one in load_file(tmp_path / "merged" / "model.safetensors").items()}
    assert report.error < 1e-5 and all(one.error < 1e-4 for one in report.tensors)
    if "max_error" in options:
        ranks = {one.name: one.rank for one in report.tensors}
        assert ranks == {"model.layers.0.self_attn.q_proj.weight": 2, "model.layers.1.self_attn.q_proj.weight": 4}
    ours, theirs = tensors_of(tmp_path / "out", base), peft_merged(tmp_path / "out", base)
    for name, tensor in expected.items():
        np.testing.assert_allclose(ours[name], tensor, atol=3e-6, err_msg=name)
        np.testing.assert_allclose(theirs[name], tensor, atol=3e-6, err_msg=name)


def perturbed(tmp_path: Path) -> tuple[Path, Path]:
    """A base, and a model that differs from it everywhere, by full ranks."""
    base = tiny_base(tmp_path / "base", "llama", hidden=32)
    tensors = load_file(base / "model.safetensors")
    rng = torch.Generator().manual_seed(3)
    merged = tiny_base(tmp_path / "merged", "llama", hidden=32)
    save_file(
        {name: one + 0.05 * torch.randn(one.shape, generator=rng) for name, one in tensors.items()},
        merged / "model.safetensors",
        {"format": "pt"},
    )
    return base, merged


def test_the_stated_errors_are_those_of_the_model_that_comes_back(tmp_path: Path) -> None:
    base, merged = perturbed(tmp_path)
    report = extracted(tmp_path / "out", merged, base, rank=5, dtype="bfloat16")
    ours = tensors_of(tmp_path / "out", base)
    start, expected = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    squares = np.zeros(2)
    for one in report.tensors:
        edit = expected[one.name].double().numpy() - start[one.name].double().numpy()
        left = expected[one.name].double().numpy() - ours[one.name]
        seen = np.linalg.norm(left) / np.linalg.norm(edit)
        assert one.error == pytest.approx(seen, rel=1e-3) and one.norm == pytest.approx(np.linalg.norm(edit), rel=1e-5)
        squares += np.linalg.norm(left) ** 2, np.linalg.norm(edit) ** 2
        best = np.linalg.svd(edit, compute_uv=False) if edit.ndim == 2 else np.zeros(1)
        if one.how == "factors":
            assert one.error == pytest.approx(np.sqrt((best[5:] ** 2).sum() / (best**2).sum()), rel=0.01)
        else:
            assert one.error == 1 and "--whole" in one.why
    assert {one.name for one in report.tensors if one.how == "left out"} >= {"model.embed_tokens.weight", "model.norm.weight"}
    assert report.error == pytest.approx(np.sqrt(squares[0] / squares[1]), rel=1e-3)
    assert [one.error for one in report.tensors] == sorted((one.error for one in report.tensors), reverse=True)
    assert "| model.norm.weight | left out |" in (tmp_path / "out" / "README.md").read_text()


def test_blocks_and_the_randomised_iteration_change_little(tmp_path: Path) -> None:
    base, merged = perturbed(tmp_path)
    small, exact = (
        extracted(tmp_path / "s", merged, base, rank=5, memory=4096),
        extracted(tmp_path / "e", merged, base, rank=5, exact=True),
    )
    assert small.error == pytest.approx(exact.error, rel=1e-3)
    with pytest.raises(OtaError, match=r"--exact: .* --memory allows"):
        extracted(tmp_path / "x", merged, base, exact=True, memory=1000)


def test_a_wide_spectrum_by_iteration_is_near_the_best() -> None:
    rng = torch.Generator().manual_seed(1)
    u, _ = torch.linalg.qr(torch.randn(300, 200, generator=rng))
    v, _ = torch.linalg.qr(torch.randn(200, 200, generator=rng))
    values = 1 / torch.arange(1, 201) ** 0.5
    delta = (u * values) @ v.T
    blocks = lambda: ((a, delta[a : a + 70]) for a in range(0, 300, 70))  # noqa: E731
    found = factors_of(blocks, (300, 200), 16, exact=False)
    assert found is not None and not found.exact
    best = float((values[16:] ** 2).sum().sqrt())
    assert best <= distance(blocks, found.b, found.a) * 1.0001 < 1.02 * best
    assert factors_of(lambda: iter([(0, torch.zeros(300, 200))]), (300, 200), 16, exact=False) is None


def test_models_that_do_not_fit_or_do_not_differ_are_refused(tmp_path: Path) -> None:
    base, merged = perturbed(tmp_path)
    other = tiny_base(tmp_path / "other", "llama", hidden=16)
    with pytest.raises(OtaError, match=r"has the shape \[.*\] in .*merged, \[.*\] in .*other"):
        extracted(tmp_path / "a", merged, other)
    with pytest.raises(OtaError, match="they are the same model"):
        extracted(tmp_path / "b", base, base)
    with pytest.raises(OtaError, match="--rank: got 0"):
        ExtractOptions(rank=0).check()
    config = json.loads((base / "config.json").read_text())
    assert config["model_type"] == "llama"
