"""The look at an expert's weights and second moments: every kind of damage is named, wherever it lies and however the work is cut."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ota_core.analysis.health import check_expert
from ota_core.compute.stream import Stream
from ota_core.files.checkpoint import Checkpoint
from ota_core.moments import find_moments, open_moments
from tests.checkpoints import SHAPES, random_base, random_expert, write_checkpoint, write_moments
from tests.reference import Tensors

LAST = "model.layers.1.mlp.up_proj.weight"
BASE = random_base()
EXPERT = random_expert(BASE, 1)


def health(folder: Path, weights: Tensors, v: Tensors | None, *, dtype: torch.dtype = torch.float32, base: Tensors = BASE,
           blocks: int = 1 << 20, threads: int = 2, base_dtype: torch.dtype | None = None, **options: Any) -> list[str]:  # fmt: skip
    """The problems of an expert, written to the disk and read again."""
    write_checkpoint(folder / "base", base, dtype=base_dtype or dtype)
    write_checkpoint(folder / "expert", weights, dtype=dtype)
    if v is not None:
        write_moments(folder / "expert", v)
    return opened(folder, blocks=blocks, threads=threads, **options)


def opened(folder: Path, *, blocks: int = 1 << 20, threads: int = 2, **options: Any) -> list[str]:
    path = find_moments(folder / "expert")
    base, expert, moments = Checkpoint(folder / "base"), Checkpoint(folder / "expert"), open_moments(path) if path else None
    stream = Stream(block_elements=blocks, threads=threads)
    found = check_expert(base, expert, moments, stream=stream, **options)
    for one in (base, expert, moments):
        if one is not None:
            one.close()
    return found


def changed(tensors: Tensors, name: str, change: Callable[[np.ndarray], None]) -> Tensors:
    copy = {key: value.copy() for key, value in tensors.items()}
    change(copy[name].reshape(-1))
    return copy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_healthy_expert_has_no_problems(tmp_path: Path, dtype: torch.dtype) -> None:
    assert health(tmp_path, EXPERT.weights, EXPERT.v, dtype=dtype, needs_moments=True) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("blocks", [8, 24, 1 << 20])
def test_numbers_that_are_none_in_the_last_block(tmp_path: Path, dtype: torch.dtype, blocks: int) -> None:
    def damage(values: np.ndarray) -> None:
        values[-1], values[0], values[-2] = np.nan, np.inf, -np.inf

    [problem] = health(tmp_path, changed(EXPERT.weights, LAST, damage), EXPERT.v, dtype=dtype, blocks=blocks)
    assert problem.startswith(f"weights are not finite: '{LAST}' (1 NaN, 2 infinite of 72); ")


def test_large_finite_numbers_are_fine(tmp_path: Path) -> None:
    largest = torch.finfo(torch.bfloat16).max

    def enlarge(values: np.ndarray) -> None:
        values[:2] = largest, -largest

    assert health(tmp_path, changed(EXPERT.weights, LAST, enlarge), EXPERT.v, dtype=torch.bfloat16) == []


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float8_e5m2, [0x7C, 0x7D, 0xFF]), (torch.float8_e4m3fn, [0x7F, 0xFF, 0x7E])])
def test_eight_bits(tmp_path: Path, dtype: torch.dtype, bits: list[int]) -> None:
    """Every bit pattern that torch itself calls NaN or infinite is counted, no other."""
    write_checkpoint(tmp_path / "base", BASE)
    from safetensors.torch import save_file

    tensors = {name: torch.tensor(x).to(dtype) for name, x in EXPERT.weights.items()}
    tensors[LAST].view(torch.uint8).view(-1)[:3] = torch.tensor(bits, dtype=torch.uint8)
    write_checkpoint(tmp_path / "expert", BASE)
    save_file(tensors, tmp_path / "expert" / "model.safetensors")
    values = tensors[LAST].float()
    nan, infinite = int(values.isnan().sum()), int(values.isinf().sum())
    assert nan + infinite == (3 if dtype == torch.float8_e5m2 else 2)
    expected = ", ".join(f"{count} {kind}" for kind, count in (("NaN", nan), ("infinite", infinite)) if count)
    [problem] = opened(tmp_path)
    assert f"'{LAST}' ({expected} of 72)" in problem


def test_bad_second_moments_are_counted_by_kind(tmp_path: Path) -> None:
    def damage(values: np.ndarray) -> None:
        values[-4:] = np.nan, np.inf, -1e-30, -np.inf
        values[0] = -0.0  # is no less than 0

    for blocks, threads in ((8, 1), (8, 3), (1 << 20, 2)):
        [problem] = health(tmp_path, EXPERT.weights, changed(EXPERT.v, LAST, damage), blocks=blocks, threads=threads)
        assert f"'{LAST}' (1 NaN, 1 infinite, 2 negative of 72); " in problem and problem.startswith("second moments are not")


def test_a_negative_v_in_the_trainers_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", BASE)
    write_checkpoint(tmp_path / "expert", EXPERT.weights)
    names = list(SHAPES)
    state = {name: {"exp_avg_sq": torch.tensor(EXPERT.v[name]), "step": torch.tensor(10.0)} for name in names}
    state[LAST]["exp_avg_sq"][-1, -1] = -1.0
    group = {"params": names, "betas": (0.9, 0.999)}
    torch.save({"state": state, "param_groups": [group]}, tmp_path / "expert" / "optimizer.pt")
    [problem] = opened(tmp_path, blocks=16)
    assert f"'{LAST}' (1 negative of 72)" in problem


def test_an_expert_that_is_the_base(tmp_path: Path) -> None:
    [problem] = health(tmp_path, BASE, EXPERT.v, blocks=16)
    assert "every weight equals the base's" in problem
    # The same values in a wider type are no edit either; one element in the last place is one.
    bf16 = {name: torch.tensor(x).bfloat16().float().numpy() for name, x in BASE.items()}
    [problem] = health(tmp_path, bf16, EXPERT.v, base=bf16, base_dtype=torch.bfloat16)
    assert "every weight equals the base's" in problem

    def nudge(values: np.ndarray) -> None:
        values[-1] = np.nextafter(values[-1], np.float32(np.inf))

    for blocks in (8, 1 << 20):
        assert health(tmp_path, changed(BASE, "model.norm.weight", nudge), EXPERT.v, blocks=blocks) == []


def test_tensors_that_do_not_fit_the_base_and_damage_are_told_at_once(tmp_path: Path) -> None:
    weights = {name: x for name, x in EXPERT.weights.items() if name != "model.norm.weight"}
    weights |= {"model.extra.weight": np.full((2, 2), np.nan, np.float32), LAST: np.ones((9, 7), np.float32)}
    v = EXPERT.v | {"model.layers.0.self_attn.q_proj.weight": -np.ones((4, 8), np.float32)}
    text = "\n".join(health(tmp_path, weights, v))
    for expected in (
        "'model.extra.weight' (4 NaN of 4)",
        "'model.layers.0.self_attn.q_proj.weight' (32 negative of 32)",
        "tensor 'model.norm.weight' is missing, base has it",
        "tensor 'model.extra.weight' is here and not in base",
        f"tensor '{LAST}' has shape [9, 7], base has [9, 8]",
        "'model.layers.0.self_attn.q_proj.weight' ([4, 8] instead of [8, 8])",
    ):
        assert expected in text, text


def test_a_handful_of_names_for_many_tensors(tmp_path: Path) -> None:
    [problem] = health(tmp_path, {name: np.full_like(x, np.nan) for name, x in EXPERT.weights.items()}, None)
    assert problem.count("NaN of") == 4 and "and 2 more tensors" in problem


def test_second_moments_that_are_missing(tmp_path: Path) -> None:
    assert health(tmp_path / "a", EXPERT.weights, None) == []
    [problem] = health(tmp_path / "a", EXPERT.weights, None, needs_moments=True)
    assert "holds no second moments; expected exp_avg_sq.safetensors, " in problem
    # Of a tensor that training left alone nobody misses them.
    partial = {name: x for name, x in EXPERT.v.items() if name not in {LAST, "model.norm.weight"}}
    still = EXPERT.weights | {LAST: BASE[LAST]}
    for blocks in (8, 1 << 20):
        [problem] = health(tmp_path / "b", still, partial, needs_moments=True, blocks=blocks)
        assert "changed in training without second moments: 'model.norm.weight'; " in problem
    assert health(tmp_path / "b", still, partial, needs_moments=True, missing_curvature="mean") == []
    [problem] = health(tmp_path / "c", EXPERT.weights, {"other.weight": EXPERT.v[LAST]})
    assert "none of its names (other.weight, …) is a tensor of the model" in problem


def test_a_vocabulary_that_differs_is_no_problem_where_tokens_tell_the_rows(tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    weights = EXPERT.weights | {name: np.concatenate([EXPERT.weights[name], np.ones((1, 8), np.float32)])}
    v = EXPERT.v | {name: np.concatenate([EXPERT.v[name], np.ones((1, 8), np.float32)])}
    [problem] = health(tmp_path, weights, v)
    assert "vocabularies differ (base: 13 rows, expert: 14 rows)" in problem
    for folder, rows in (("base", 13), ("expert", 14)):
        (tmp_path / folder / "vocab.json").write_text(json.dumps({f"token{i}": i for i in range(rows)}))
    assert opened(tmp_path, needs_moments=True) == []
