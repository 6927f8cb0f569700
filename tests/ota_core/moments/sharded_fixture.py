"""Checkpoints in many files, made by the real trainers (``tests/fixtures/trainers``), copied to where a test may damage them."""

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ota_core.compute.blocks import matrix_shape
from ota_core.moments import Moments, ParameterLayout

FIXTURES = Path(__file__).parents[2] / "fixtures" / "trainers"
LAYER = "model.layers.0"
SHAPES = {
    "model.embed_tokens.weight": (37, 15),
    f"{LAYER}.self_attn.q_proj.weight": (12, 15),
    f"{LAYER}.self_attn.k_proj.weight": (4, 15),
    f"{LAYER}.self_attn.v_proj.weight": (4, 15),
    f"{LAYER}.self_attn.o_proj.weight": (15, 12),
    f"{LAYER}.mlp.gate_proj.weight": (23, 15),
    f"{LAYER}.mlp.up_proj.weight": (23, 15),
    f"{LAYER}.mlp.down_proj.weight": (15, 23),
    f"{LAYER}.input_layernorm.weight": (15,),
    f"{LAYER}.post_attention_layernorm.weight": (15,),
    "model.norm.weight": (15,),
    "lm_head.weight": (37, 15),
}
LAYOUT = ParameterLayout(shapes=SHAPES, decayed=frozenset(name for name in SHAPES if "norm" not in name))


def copied(name: str, tmp_path: Path) -> Path:
    """A case such as ``deepspeed/zero3``, without what the live optimizer held: it would be taken for weights."""
    out = tmp_path / "checkpoint"
    shutil.copytree(FIXTURES / name, out, ignore=shutil.ignore_patterns("expected.safetensors", "weights.safetensors"))
    return out


def expected(name: str, file: str = "expected.safetensors") -> dict[str, torch.Tensor]:
    """v, or the weights, of the live run by name."""
    return load_file(FIXTURES / name / file)


def assert_same(moments: Moments, v: dict[str, torch.Tensor]) -> None:
    """Every v equals the live one bit by bit, read whole, by rows, and across the borders of parts."""
    assert {name: tuple(shape) for name, shape in moments.shapes().items()} == {name: tuple(own.shape) for name, own in v.items()}
    for name, own in v.items():
        rows, cols = matrix_shape(own.shape)
        want = own.float().reshape(rows, cols).numpy()
        for step in (rows, 1, 5):
            read = [moments.read(name, start, min(start + step, rows)) for start in range(0, rows, step)]
            moments.prefetch(name, 0, step)
            assert all(block.dtype == np.float32 for block in read)
            assert np.array_equal(np.concatenate(read), want), f"{name} in blocks of {step}"
    moments.drop_pages()
