"""Quantised weights are read as the numbers that transformers, bitsandbytes and compressed-tensors make of them; other kinds are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flows.cli.app import app
from ota_core.errors import CheckpointError
from ota_core.files.checkpoint import Checkpoint
from ota_core.files.quantised.codes import TABLES, as_rows
from ota_core.files.quantised.settings import without_quantisation
from ota_core.files.rows import BF16, F16

G = torch.Generator().manual_seed(7)


def _folder(path: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any] | None, **config: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path / "model.safetensors", {"format": "pt"}
    )
    given = {"quantization_config": settings} if settings is not None else {}
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16", **given, **config}))
    return path


def _whole(folder: Path, name: str, step: int = 7) -> torch.Tensor:
    """A tensor, read in blocks of a few rows that end in the midst of quantisation blocks."""
    checkpoint = Checkpoint(folder)
    shape = checkpoint.info(name).shape
    rows = int(np.prod(shape[:-1]))
    parts = [checkpoint.read_rows(name, start, min(start + step, rows)).tensor() for start in range(0, rows, step)]
    return torch.cat(parts).reshape(shape)


def _fp8(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=G).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("code", ["F8_E4M3", "F8_E5M2", "F8_E8M0"])
def test_the_tables_are_torchs_numbers(code: str) -> None:
    kind = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}[code]
    assert np.array_equal(TABLES[code], torch.arange(256, dtype=torch.uint8).view(kind).float().numpy(), equal_nan=True)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_numbers_are_rounded_as_torch_rounds(dtype: Any) -> None:
    bits = torch.randint(-(2**31), 2**31, (64, 64), generator=G, dtype=torch.int64).to(torch.int32)
    values = bits.view(torch.float32)
    want = values.to(getattr(torch, dtype.name))
    got = as_rows(values.numpy(), dtype).tensor()
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got[~got.isnan()], want[~want.isnan()])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_fp8_in_blocks_as_transformers_dequantises_it(tmp_path: Path, dtype: str) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight

    codes, scales, ragged = _fp8(256, 384), torch.rand(2, 3, generator=G), _fp8(200, 300)
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    tensors = {
        "a.weight": codes,
        "a.weight_scale_inv": scales,
        "b.weight": ragged,
        "b.weight_scale_inv": scales,
        "n.weight": torch.ones(3),
    }
    folder = _folder(tmp_path / "m", tensors, settings, dtype=dtype)
    assert Checkpoint(folder).names() == ["a.weight", "b.weight", "n.weight"]
    kind = getattr(torch, dtype)
    assert torch.equal(_whole(folder, "a.weight"), Fp8Dequantize(None)._dequantize_one(codes, scales, kind))
    want = _dequantize_fp8_weight(ragged, scales, [128, 128], torch.float32).to(kind)
    assert torch.equal(_whole(folder, "b.weight"), want)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (24, 1), (24,), (3, 4)], ids=str)
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv", "scale"])
def test_fp8_with_a_scale_for_the_tensor_each_row_or_each_block(tmp_path: Path, shape: tuple[int, ...], name: str) -> None:
    """unslothai/unsloth#4919: scales of the tensor (Mistral, modelopt), of rows (FBGEMM, compressed-tensors) and of blocks, dropped silently."""
    codes, scales = _fp8(24, 32), torch.rand(shape, generator=G) + 0.1
    extra = {"a.input_scale": torch.ones(()), "a.k_scale": torch.ones(1), "a.activation_scale": torch.ones(())}
    folder = _folder(tmp_path / "m", {"a.weight": codes, f"a.{name}": scales, **extra}, {"quant_method": "fp8"}, dtype="float32")
    spread = scales.reshape(24, 1) if shape == (24,) else scales
    if shape == (3, 4):
        spread = scales.repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert torch.equal(_whole(folder, "a.weight"), codes.float() * spread)
    assert Checkpoint(folder).names() == ["a.weight"]


@pytest.mark.parametrize("scales", [(3, 2, 1), (3, 1, 1), (3,), (1, 1, 1), ()], ids=str)
def test_fp8_of_stacked_experts(tmp_path: Path, scales: tuple[int, ...]) -> None:
    codes, scale = _fp8(3, 8, 16), torch.rand(scales, generator=G) + 0.1
    tensors = {"experts.up_proj": codes, "experts.up_proj_scale_inv": scale}
    folder = _folder(tmp_path / "m", tensors, {"quant_method": "fp8"}, dtype="float32")
    spread = scale.reshape(3, 1, 1) if scales == (3,) else scale.repeat_interleave(4, 1) if scales == (3, 2, 1) else scale
    assert torch.equal(_whole(folder, "experts.up_proj"), codes.float() * spread)


def test_scales_that_are_exponents_and_packed_fp4(tmp_path: Path) -> None:
    """MXFP8 and the FP4 experts of DeepSeek-V4 keep scales as E8M0, in a type of its own or as bytes."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes, packed = _fp8(4, 64), torch.randint(-128, 128, (4, 32), generator=G).to(torch.int8)
    scales = torch.randint(110, 140, (4, 2), generator=G).to(torch.uint8)
    tensors = {
        "a.weight": codes, "a.weight_scale_inv": scales, "b.weight": codes, "b.weight_scale_inv": scales.view(torch.float8_e8m0fnu),
        "c.weight": packed, "c.weight_scale_inv": scales.view(torch.float8_e8m0fnu),
    }  # fmt: skip
    folder = _folder(tmp_path / "m", tensors, {"quant_method": "fp8"}, dtype="float32")
    dequantise = Fp8Dequantize(None)._dequantize_one
    assert torch.equal(_whole(folder, "a.weight"), dequantise(codes, scales, torch.float32))
    assert torch.equal(_whole(folder, "b.weight"), dequantise(codes, scales, torch.float32))
    assert torch.equal(_whole(folder, "c.weight"), dequantise(packed, scales, torch.float32))


def test_mxfp4_of_gpt_oss_as_transformers_dequantises_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (3, 10, 2, 16), generator=G).to(torch.uint8)
    scales = torch.randint(100, 130, (3, 10, 2), generator=G).to(torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    folder = _folder(tmp_path / "m", {f"{name}_blocks": blocks, f"{name}_scales": scales}, {"quant_method": "mxfp4"})
    want = convert_moe_packed_tensors(blocks, scales)
    assert tuple(want.shape) == Checkpoint(folder).info(name).shape
    for step in (1, 7, 64, 1000):
        assert torch.equal(_whole(folder, name, step), want)


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_in_4_bits(tmp_path: Path, kind: str, double: bool) -> None:
    """unslothai/unsloth-zoo#326: models saved as bitsandbytes leaves them."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed: the extra 'trainers'")
    weight = torch.randn(24, 136, generator=G)
    codes, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=double, blocksize=64)
    parts = {f"a.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    folder = _folder(tmp_path / "m", {"a.weight": codes, **parts}, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    want = functional.dequantize_4bit(codes, state)
    assert Checkpoint(folder).names() == ["a.weight"] and Checkpoint(folder).info("a.weight").dtype.name == "float32"
    torch.testing.assert_close(_whole(folder, "a.weight"), want, rtol=1e-6, atol=1e-8)


def test_bitsandbytes_in_8_bits(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed: the extra 'trainers'")
    weight = torch.randn(24, 40, generator=G).half()
    codes, scales, _ = functional.int8_vectorwise_quant(weight)
    tensors = {"a.weight": codes, "a.SCB": scales, "a.weight_format": torch.zeros((), dtype=torch.uint8)}
    folder = _folder(tmp_path / "m", tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True}, dtype="float32")
    assert Checkpoint(folder).names() == ["a.weight"]
    torch.testing.assert_close(_whole(folder, "a.weight"), functional.int8_vectorwise_dequant(codes, scales), rtol=1e-6, atol=0)


def test_bitsandbytes_by_hand(tmp_path: Path) -> None:
    """The same arithmetic where the library is not installed: high half first, blocks over the ends of rows, double quantisation."""
    table, count, block = torch.linspace(-1, 1, 16), 3 * 10, 8
    codes = torch.randint(0, 16, (count,), generator=G)
    packed = (codes[0::2] * 16 + codes[1::2]).to(torch.uint8).reshape(-1, 1)
    absmax, nested = torch.randint(0, 256, (4,), generator=G).to(torch.uint8), torch.rand(2, generator=G)
    code = torch.linspace(0, 1, 256)
    state = {
        "quant_type": "nf4",
        "shape": [3, 10],
        "dtype": "float32",
        "blocksize": block,
        "nested_blocksize": 2,
        "nested_offset": 0.25,
    }
    tensors = {
        "a.weight": packed, "a.weight.absmax": absmax, "a.weight.quant_map": table, "a.weight.nested_absmax": nested,
        "a.weight.nested_quant_map": code,
        "a.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }  # fmt: skip
    folder = _folder(tmp_path / "m", tensors, None)  # recognised without a configuration, too
    scales = code[absmax.long()] * nested.repeat_interleave(2) + 0.25
    want = (table[codes] * scales.repeat_interleave(block)[:count]).reshape(3, 10)
    assert torch.equal(_whole(folder, "a.weight", 1), want)


@pytest.mark.parametrize("format_", ["float-quantized", "int-quantized"])
def test_compressed_tensors(tmp_path: Path, format_: str) -> None:
    codes = _fp8(8, 16) if format_ == "float-quantized" else torch.randint(-128, 128, (8, 16), generator=G).to(torch.int8)
    scales, zeros = torch.rand(8, 2, generator=G).bfloat16(), torch.randint(-9, 9, (8, 2), generator=G).to(torch.int8)
    tensors = {"a.weight": codes, "a.weight_scale": scales} | (
        {"a.weight_zero_point": zeros} if format_ == "int-quantized" else {}
    )
    settings = {
        "quant_method": "compressed-tensors",
        "format": format_,
        "config_groups": {"group_0": {"weights": {"group_size": 8}}},
    }
    folder = _folder(tmp_path / "m", tensors, settings, dtype="float32")
    zero = zeros.repeat_interleave(8, 1).float() if format_ == "int-quantized" else 0.0
    assert torch.equal(_whole(folder, "a.weight"), (codes.float() - zero) * scales.float().repeat_interleave(8, 1))


def test_modelopts_own_file_and_nvfp4(tmp_path: Path) -> None:
    """Model Optimizer writes hf_quant_config.json, and nothing into config.json."""
    packed, scales = torch.randint(0, 256, (4, 16), generator=G).to(torch.uint8), _fp8(4, 2).abs()
    factor = torch.tensor(0.125)
    tensors = {
        "a.weight": packed,
        "a.weight_scale": scales,
        "a.weight_scale_2": factor,
        "b.weight": _fp8(4, 4),
        "b.weight_scale": torch.tensor(2.0),
    }
    folder = _folder(tmp_path / "m", tensors, None, dtype="float32")
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "MIXED_PRECISION"}}))
    table = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(4, 32).long()
    assert torch.equal(_whole(folder, "a.weight"), table[codes] * (scales.float() * factor).repeat_interleave(16, 1))
    assert torch.equal(_whole(folder, "b.weight"), tensors["b.weight"].float() * 2)


@pytest.mark.parametrize(
    ("settings", "tensors", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, {"a.qweight": "I32", "a.scales": "F16"}, ["GPTQ, 4 bits", "gptqmodel"]),
        ({"quant_method": "awq", "bits": 4}, {"a.qweight": "I32", "a.scales": "F16"}, ["AWQ, 4 bits", "gptqmodel"]),
        (None, {"a.qweight": "I32", "a.g_idx": "I32", "a.scales": "F16"}, ["GPTQ", "gptqmodel"]),
        ({"quant_method": "hqq"}, {"a.W_q": "U8", "a.scale": "F16"}, ["HQQ", "as it was before quantisation"]),
        ({"quant_method": "quanto"}, {"a.weight._data": "I8"}, ["quanto"]),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, {"a.weight_packed": "I32"}, ["format marlin-24", "CompressedTensorsDequantizer"]),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, {"a.weight": "U8"}, ["quant_algo W4A16_AWQ"]),
        ({"quant_method": "fp8"}, {"a.weight": "F8"}, ["'a.weight' holds codes", "no scale lies beside it"]),
        ({"quant_method": "something-new"}, {"a.weight": "U8"}, ["something-new"]),
    ],
    ids=lambda value: None,
)  # fmt: skip
def test_other_kinds_are_refused_by_name(tmp_path: Path, settings: Any, tensors: dict[str, str], says: list[str]) -> None:
    kinds = {"I32": torch.int32, "U8": torch.uint8, "I8": torch.int8, "F16": torch.float16, "F8": torch.float8_e4m3fn}
    held = {name: torch.ones(4, 4).to(kinds[kind]) for name, kind in tensors.items()}
    folder = _folder(tmp_path / "m", held, settings)
    for command in (["inspect", str(folder)], ["plan", str(_recipe(tmp_path, folder))]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2 and "quantised" in result.output, result.output
        assert [part for part in says if part not in result.output] == []


def test_mlx(tmp_path: Path) -> None:
    """MLX packs its codes into 32 bits without a sign, and says so under a key of its own."""
    folder = _folder(tmp_path / "m", {"a.scales": torch.ones(4, 1), "a.biases": torch.ones(4, 1)}, None, quantization={"bits": 4})
    save_file(
        {**load_file(folder / "model.safetensors"), "a.weight": torch.ones(4, 2, dtype=torch.uint32)},
        folder / "model.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"MLX, 4 bits.*mlx_lm.convert"):
        Checkpoint(folder)


def test_a_stale_configuration_of_plain_weights_is_no_quantisation(tmp_path: Path) -> None:
    """LlamaFactory and unsloth users publish merged models whose config.json still speaks of 4 bits: the numbers are plain."""
    tensors = {"a.weight": torch.ones(4, 4), "a.positions": torch.arange(4)}
    for settings in ({"quant_method": "gptq", "bits": 4}, {"load_in_4bit": True, "quant_method": "bitsandbytes"}):
        assert Checkpoint(_folder(tmp_path / str(len(settings)), tensors, settings)).quantised is None


def test_scales_that_do_not_fit(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "m", {"a.weight": _fp8(4, 6), "a.weight_scale": torch.ones(3, 4)}, {"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match=r"'a.weight' has the shape \[4, 6\], its scales 'a.weight_scale' have \[3, 4\]"):
        Checkpoint(folder)


def test_weights_without_their_scales_do_not_travel(tmp_path: Path) -> None:
    """kekzl/imp#1450: one FP8 weight among others has lost its scale; it must not pass as numbers."""
    tensors = {"a.weight": _fp8(4, 4), "a.weight_scale_inv": torch.ones(1, 1), "mtp.weight": _fp8(4, 4)}
    with pytest.raises(CheckpointError, match=r"'mtp\.weight' holds codes, not numbers"):
        Checkpoint(_folder(tmp_path / "m", tensors, {"quant_method": "fp8"}))


def _recipe(root: Path, *folders: Path, base: Path | None = None, **keys: Any) -> Path:
    recipe = {"merge_method": "linear", "models": [{"model": str(folder)} for folder in folders], **keys}
    path = root / "recipe.yaml"
    path.write_text(json.dumps(recipe | ({"base_model": str(base)} if base else {})))
    return path


def test_merges_of_quantised_models(tmp_path: Path) -> None:
    """thinking-machines-lab/tinker-cookbook#478: the mean of the numbers, not of the codes; no output carries a quantization_config."""
    settings = {"quant_method": "fp8", "weight_block_size": [4, 4]}
    held = [{"a.weight": _fp8(6, 8), "a.weight_scale_inv": torch.rand(2, 2, generator=G)} for _ in range(3)]
    folders = [
        _folder(tmp_path / f"m{i}", one, settings, dtype="float32", text_config={"quantization_config": settings})
        for i, one in enumerate(held)
    ]
    plain = _folder(tmp_path / "plain", {"a.weight": torch.randn(6, 8, generator=G)}, None)
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["merge", str(_recipe(tmp_path, *folders[1:], base=folders[0])), str(out)])
    assert result.exit_code == 0 and "1 tensor in FP8: dequantised with their own scales" in result.output, result.output
    want = (_whole(folders[1], "a.weight").double() + _whole(folders[2], "a.weight").double()) / 2
    assert torch.equal(load_file(out / "model.safetensors")["a.weight"], want.float())
    assert "quantization_config" not in (out / "config.json").read_text()
    said = CliRunner().invoke(app, ["inspect", str(folders[0])]).output
    assert "quantised: 1 tensor in FP8" in said and "48 parameters" in said

    refused = CliRunner().invoke(app, ["plan", str(_recipe(tmp_path, folders[1], plain, base=plain))])
    assert refused.exit_code == 2 and "the expert is quantised (1 tensor in FP8) and the base is not" in refused.output
    # What that message advises: a merge of the one model writes its numbers.
    result = CliRunner().invoke(app, ["merge", str(_recipe(tmp_path, folders[1])), str(tmp_path / "written")])
    assert result.exit_code == 0, result.output
    assert torch.equal(load_file(tmp_path / "written" / "model.safetensors")["a.weight"], _whole(folders[1], "a.weight"))
    # An expert trained from the dequantised base is merged over the quantised one.
    result = CliRunner().invoke(
        app, ["merge", str(_recipe(tmp_path, plain, base=folders[0], merge_method="task_arithmetic")), str(tmp_path / "over")]
    )
    assert result.exit_code == 0, result.output


def test_the_configuration_without_quantisation() -> None:
    config = {"a": 1, "quantization": {"bits": 4}, "text_config": {"b": 2, "quantization_config": {"quant_method": "fp8"}}}
    assert without_quantisation(config) == {"a": 1, "text_config": {"b": 2}}
