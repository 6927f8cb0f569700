"""compressed-tensors' packed integers, against numbers computed here bit by bit (the package itself gives the same)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ota_core.errors import CheckpointError
from tests.ota_core.files.test_quantised import _folder, _whole

R = np.random.default_rng(3)


def pack(codes: Any, bits: int) -> torch.Tensor:
    """(…, R, C) signed codes, each row's bits one after another into words of 32, the lowest first."""
    *leads, columns = codes.shape
    words = np.zeros((*leads, -(-columns * bits // 32)), np.uint64)
    for j in range(columns):
        words[..., j * bits // 32] |= (codes[..., j] + 2 ** (bits - 1)).astype(np.uint64) << np.uint64(j * bits % 32)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def settings(bits: int, group: int | None) -> dict[str, Any]:
    strategy = "group" if group else "channel"
    weights = {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": group}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {"weights": weights}}}


def codes_of(bits: int, *shape: int) -> Any:
    return R.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("group", [16, None], ids=["groups", "rows"])
@pytest.mark.parametrize(
    ("bits", "shape"), [(4, (10, 64)), (4, (9, 52)), (8, (5, 32)), (2, (18, 48)), (4, (3, 10, 64)), (8, (2, 6, 48))]
)
def test_w4a16_and_its_like(tmp_path: Path, bits: int, shape: tuple[int, ...], group: int | None, zeros: bool) -> None:
    """vllm-project/vllm#28791: W4A16 models are what their publishers have left. The last group may be a short one."""
    count = -(-shape[-1] // group) if group else 1
    codes, scales = codes_of(bits, *shape), torch.from_numpy(R.random((*shape[:-1], count), np.float32)).bfloat16()
    zero = codes_of(bits, *shape[:-1], count) if zeros else np.zeros((*shape[:-1], count), np.int64)
    tensors = {"a.weight_packed": pack(codes, bits), "a.weight_scale": scales, "a.weight_shape": torch.tensor(shape)}
    if zeros:  # down the columns
        tensors["a.weight_zero_point"] = pack(zero.swapaxes(-1, -2), bits).transpose(-1, -2)
    folder = _folder(tmp_path / "m", tensors, settings(bits, group), dtype="float32")
    wide = [np.repeat(one, group or shape[-1], axis=-1)[..., : shape[-1]] for one in (zero, scales.float().numpy())]
    want = (codes - wide[0]).astype(np.float32) * wide[1]
    for step in (1, 4, 100):
        np.testing.assert_array_equal(_whole(folder, "a.weight", step).numpy(), want)


def test_columns_that_were_quantised_in_another_order(tmp_path: Path) -> None:
    """Activation ordering: ``weight_g_idx`` says of each column which group's scale it has; −1 throughout means none."""
    codes, scales = codes_of(4, 6, 32), torch.rand(6, 4)
    order = torch.from_numpy(R.permutation(np.repeat(np.arange(4), 8)).astype(np.int32))
    tensors = {"a.weight_packed": pack(codes, 4), "a.weight_scale": scales, "a.weight_shape": torch.tensor([6, 32])}
    for given, columns in ((order, order.long()), (torch.full((32,), -1, dtype=torch.int32), torch.arange(32) // 8)):
        folder = _folder(tmp_path / "m", tensors | {"a.weight_g_idx": given}, settings(4, 8), dtype="float32")
        np.testing.assert_array_equal(
            _whole(folder, "a.weight", 4).numpy(), codes.astype(np.float32) * scales[:, columns].numpy()
        )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"a.weight_scale": None}, "has no 'a.weight_scale' beside it"),
        ({"a.weight_shape": torch.tensor([7, 32])}, r"says that its weight has \[7, 32\]"),
        ({"a.weight_zero_point": torch.zeros(2, 4, dtype=torch.int32)}, "its packed zero points"),
        ({"a.weight_g_idx": torch.zeros(31, dtype=torch.int32)}, "a.weight_g_idx"),
        ({"a.weight_scale": torch.ones(6, 3)}, "its scales 'a.weight_scale' have"),
    ],
)
def test_parts_that_do_not_fit_are_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    tensors = {
        "a.weight_packed": pack(codes_of(4, 6, 32), 4),
        "a.weight_scale": torch.ones(6, 4),
        "a.weight_shape": torch.tensor([6, 32]),
    }
    held = {name: one for name, one in (tensors | change).items() if one is not None}
    with pytest.raises(CheckpointError, match=says):
        _whole(_folder(tmp_path / "m", held, settings(4, 8)), "a.weight")


def test_widths_that_lie_across_words_are_refused_with_the_command(tmp_path: Path) -> None:
    tensors = {"a.weight_packed": torch.zeros(6, 3, dtype=torch.int32), "a.weight_scale": torch.ones(6, 1)}
    folder = _folder(tmp_path / "m", tensors | {"a.weight_shape": torch.tensor([6, 32])}, settings(3, None))
    with pytest.raises(
        CheckpointError, match=r"codes of 1, 2, 4, 8 bits are read, and the configuration says 3.*CompressedTensorsDequantizer"
    ):
        _whole(folder, "a.weight")
