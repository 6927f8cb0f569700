"""Quantised weights whose configuration, description or parts are anybody's: they are read whole, or refused in few words."""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ota_core.errors import CheckpointError
from ota_core.files.checkpoint import Checkpoint
from tests.flows.cli.test_fuzzed_inputs import TEXTS, VALUES, Change, changed, changes
from tests.ota_core.files.test_quantised import _folder
from tests.ota_core.files.test_quantised_packed import pack
from tests.ota_core.files.test_quantised_packed import settings as packed_settings

Tensors = dict[str, torch.Tensor]
STATE = "a.weight.quant_state.bitsandbytes__nf4"
FACTS = {
    "quant_type": "nf4",
    "shape": [3, 10],
    "dtype": "float32",
    "blocksize": 8,
    "nested_blocksize": 2,
    "nested_offset": 0.25,
}


def text(value: bytes) -> torch.Tensor:
    return torch.tensor(list(value), dtype=torch.uint8)


def models() -> dict[str, tuple[Tensors, dict[str, Any]]]:
    """A model of each format: its tensors, and what its configuration says of them."""
    g = torch.Generator().manual_seed(7)
    codes = torch.randint(-8, 8, (6, 32), generator=g)
    eights = torch.randint(-128, 128, (8, 16), generator=g).to(torch.int8)
    groups = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"group_size": 8, "num_bits": 8}}}}
    return {
        "fp8": (
            {"a.weight": torch.randn(8, 12, generator=g).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.rand(2, 3, generator=g)},
            {"quant_method": "fp8", "weight_block_size": [4, 4], "modules_to_not_convert": ["lm_head"], "activation_scheme": "dynamic"},
        ),
        "int8": (
            {"a.weight": eights, "a.weight_scale": torch.rand(8, 2), "a.weight_zero_point": torch.zeros(8, 2, dtype=torch.int8)},
            groups | {"format": "int-quantized", "ignore": ["lm_head"]},
        ),
        "int4": (
            {
                "a.weight_packed": pack(codes.numpy(), 4), "a.weight_scale": torch.rand(6, 4), "a.weight_shape": torch.tensor([6, 32]),
                "a.weight_zero_point": torch.zeros(1, 4, dtype=torch.int32), "a.weight_g_idx": torch.arange(32, dtype=torch.int32) // 8,
            },
            packed_settings(4, 8),
        ),
        "nf4": (
            {
                "a.weight": torch.arange(15, dtype=torch.uint8).reshape(-1, 1), "a.weight.absmax": torch.arange(4, dtype=torch.uint8),
                "a.weight.quant_map": torch.linspace(-1, 1, 16), "a.weight.nested_absmax": torch.rand(2), STATE: text(json.dumps(FACTS).encode()),
                "a.weight.nested_quant_map": torch.linspace(0, 1, 256),
            },
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        ),
        "mxfp4": (
            {"a_blocks": torch.arange(192, dtype=torch.uint8).reshape(2, 3, 2, 16), "a_scales": torch.full((2, 3, 2), 127, dtype=torch.uint8)},
            {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        ),
        "nvfp4": (
            {
                "a.weight": torch.arange(64, dtype=torch.uint8).reshape(4, 16), "a.weight_scale": torch.ones(4, 2).to(torch.float8_e4m3fn),
                "a.weight_scale_2": torch.tensor(0.5),
            },
            {"quant_method": "modelopt", "quant_algo": "NVFP4", "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 16}}}},
        ),
    }  # fmt: skip


MODELS = models()
PARTS: list[Callable[[torch.Tensor], torch.Tensor | None]] = [
    lambda _: None, lambda one: one.reshape(-1), lambda one: one.reshape(1, *one.shape), lambda one: one.reshape(-1)[:1], lambda one: one.reshape(-1)[:0],
    lambda one: one[:1], lambda one: one[:-1], lambda one: one.float().sum().to(one.dtype), lambda one: torch.cat([one, one]), lambda one: one.float(), lambda one: one.double(),
    lambda one: one.view(torch.uint8), lambda one: one.to(torch.int64), lambda one: one.to(torch.int32), lambda one: one.to(torch.int8), lambda one: one.bool(),
    lambda one: one.to(torch.int32) + 10**6, lambda one: one.to(torch.int64) - 10**12, lambda one: one.reshape(*one.shape, 1), lambda one: one.float().bfloat16(),
    lambda one: one.to(torch.float8_e5m2) if one.dtype == torch.float32 else one.reshape(-1, 1, 1),
]  # fmt: skip


def check(folder: Path, tensors: Tensors, given: dict[str, Any]) -> None:
    """All tensors have the numbers that their shapes say, and every block of them is the same; or one error below 4 kB says what is wrong."""
    for old in folder.glob("*"):
        old.unlink()
    try:
        with closing(Checkpoint(_folder(folder, tensors, None, **given))) as opened:
            for name in opened.names():
                shape = opened.info(name).shape
                rows = int(np.prod(shape[:-1])) if len(shape) > 1 else shape[0] if shape else 1
                whole = opened.read_rows(name, 0, rows).to_float32()
                assert whole.size == np.prod(shape)
                for row in range(rows):
                    np.testing.assert_array_equal(opened.read_rows(name, row, row + 1).to_float32(), whole[row : row + 1])
    except CheckpointError as error:
        assert 0 < len(str(error)) < 4096, error


relaxed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
quick = settings(max_examples=80, derandomize=True, deadline=None, database=None, suppress_health_check=relaxed)
thorough = settings(max_examples=3000, deadline=None, suppress_health_check=relaxed)


def configuration(folder: Path, kind: str, change: Change) -> None:
    tensors, said = MODELS[kind]
    content = changed(json.dumps(said).encode(), change, is_card=False)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = content.decode("latin-1")
    check(folder, tensors, {"quantization_config": found})


def description(folder: Path, change: Change) -> None:
    tensors, said = MODELS["nf4"]
    content = changed(json.dumps(FACTS).encode(), change, is_card=False)
    check(folder, tensors | {STATE: text(content)}, {"quantization_config": said})


def parts(folder: Path, kind: str, which: list[tuple[int, int]]) -> None:
    tensors, said = MODELS[kind]
    tensors = dict(tensors)
    for place, number in which:
        name = sorted(MODELS[kind][0])[place % len(MODELS[kind][0])]
        if name in tensors and name != STATE:
            new = PARTS[number](torch.atleast_1d(tensors[name]))
            tensors |= {name: new} if new is not None else {}
            if new is None:
                del tensors[name]
    if tensors:
        check(folder, tensors, {"quantization_config": said})


kinds = st.sampled_from(sorted(MODELS))
some = st.lists(st.tuples(st.integers(0, 5), st.integers(0, len(PARTS) - 1)), min_size=1, max_size=3)


@quick
@given(kinds, changes)
@example("int8", ("put", (4, [5])))
def test_configurations(tmp_path: Path, kind: str, change: Change) -> None:
    configuration(tmp_path, kind, change)


@quick
@given(changes)
def test_descriptions_of_bitsandbytes(tmp_path: Path, change: Change) -> None:
    description(tmp_path, change)


@quick
@given(kinds, some)
def test_parts(tmp_path: Path, kind: str, which: list[tuple[int, int]]) -> None:
    parts(tmp_path, kind, which)


@pytest.mark.slow
@thorough
@given(kinds, changes)
def test_many_configurations(tmp_path: Path, kind: str, change: Change) -> None:
    configuration(tmp_path, kind, change)


@pytest.mark.slow
@thorough
@given(changes)
def test_many_descriptions_of_bitsandbytes(tmp_path: Path, change: Change) -> None:
    description(tmp_path, change)


@pytest.mark.slow
@thorough
@given(kinds, some)
def test_many_parts(tmp_path: Path, kind: str, which: list[tuple[int, int]]) -> None:
    parts(tmp_path, kind, which)


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_every_value_in_every_place(tmp_path: Path, kind: str) -> None:
    """Of the configuration, one after another, and for bitsandbytes of its description."""
    for value in VALUES:
        for place in range(12):
            configuration(tmp_path, kind, ("put", (place, value)))
            if kind == "nf4":
                description(tmp_path, ("put", (place, value)))
    for content in TEXTS:
        if kind == "nf4":
            description(tmp_path, ("text", content))
