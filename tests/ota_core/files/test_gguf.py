"""GGUF files as checkpoints: what transformers loads from them, row by row; what is not known is refused by name."""

import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file

from ota_core.compute.blocks import matrix_shape
from ota_core.errors import CheckpointError
from ota_core.files.checkpoint import Checkpoint
from tests.ota_core.files.tiny_gguf import tiny, write_gguf


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            tiny(kind).save_pretrained(made[kind])
        return made[kind]

    return folder


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3"])
def test_every_tensor_comes_back_under_its_name_and_in_its_order(folders: Any, tmp_path: Path, kind: str) -> None:
    write_gguf(tmp_path / "one.gguf", folders(kind), kind, "F32")
    expected = load_file(folders(kind) / "model.safetensors")
    with closing(Checkpoint(tmp_path)) as read:
        assert set(read.names()) == set(expected)
        for name, tensor in expected.items():
            assert read.info(name).shape == tuple(tensor.shape)
            rows = matrix_shape(tensor.shape)[0]
            seen = np.concatenate([read.read_rows(name, a, min(a + 5, rows)).to_float32() for a in range(0, rows, 5)])
            np.testing.assert_allclose(seen.reshape(tensor.shape), tensor.numpy(), atol=3e-7, err_msg=name)
        assert read.config["tie_word_embeddings"] == (kind in ("qwen2", "gemma2", "gemma3"))


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3"]
)  # of Mixtral, transformers reads none
def test_every_tensor_is_what_transformers_loads_from_the_same_file(folders: Any, tmp_path: Path, kind: str) -> None:
    """Interleaved rotary halves, the one that is added to norms, and stacks of experts, against transformers' own reading of the file."""
    import transformers

    write_gguf(tmp_path / "one.gguf", folders(kind), kind, "F32")
    # Of some, transformers reads no size of heads or experts, so that it is given the configuration.
    config = transformers.AutoConfig.from_pretrained(folders(kind))
    model = getattr(transformers, config.architectures[0]).from_pretrained(tmp_path, gguf_file="one.gguf", config=config)
    fresh = type(model)(model.config)  # transformers does not save what it read from GGUF
    fresh.load_state_dict(model.state_dict())
    fresh.save_pretrained(tmp_path / "again")
    expected = load_file(tmp_path / "again" / "model.safetensors")
    with closing(Checkpoint(tmp_path)) as read:
        assert set(read.names()) == set(expected)
        for name, tensor in expected.items():
            seen = read.read_rows(name, 0, matrix_shape(tensor.shape)[0]).to_float32().reshape(tensor.shape)
            np.testing.assert_allclose(seen, tensor.numpy(), atol=3e-7, err_msg=name)


def test_a_model_in_several_parts(folders: Any, tmp_path: Path) -> None:
    """huggingface/transformers#32266, sgl-project/sglang#28209: only the first part says what model it is; all are read."""
    write_gguf(tmp_path / "m.gguf", folders("llama"), "llama", "Q8_0", split=5)
    (tmp_path / "whole").mkdir()
    write_gguf(tmp_path / "whole" / "m.gguf", folders("llama"), "llama", "Q8_0")
    parts = sorted(path.name for path in tmp_path.glob("*.gguf"))
    assert parts[0] == "m-00001-of-00005.gguf" and len(parts) == 5
    (tmp_path / "mmproj-m-f16.gguf").write_bytes(b"GGUF")  # the projector of an image-text model is not read
    with closing(Checkpoint(tmp_path)) as read, closing(Checkpoint(tmp_path / "whole")) as whole:
        assert read.names() == whole.names() and read.config == whole.config
        for name in whole.names():
            rows = matrix_shape(whole.info(name).shape)[0]
            read.prefetch(name, 0, rows)
            np.testing.assert_array_equal(read.read_rows(name, 0, rows).held, whole.read_rows(name, 0, rows).held)
        read.drop_pages()
    (tmp_path / parts[2]).rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"one of 5 parts of a model; missing: m-00003-of-00005.gguf; fetch all"):
        Checkpoint(tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / parts[2])
    shutil.copy(tmp_path / parts[1], tmp_path / parts[2])
    with pytest.raises(CheckpointError, match=r"00003-of-00005.gguf: tensor .* is in an earlier part, too"):
        Checkpoint(tmp_path)
    for name in parts[1:]:
        (tmp_path / name).unlink()
    (tmp_path / parts[0]).rename(tmp_path / "first.gguf")
    with pytest.raises(CheckpointError, match=r"first.gguf is one of 5 parts, which are found by their names"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_quantised_numbers_are_those_that_transformers_loads(folders: Any, tmp_path: Path, quant: str) -> None:
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "one.gguf", folders("llama"), "llama", quant)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="one.gguf").state_dict()
    exact = load_file(folders("llama") / "model.safetensors")
    with closing(Checkpoint(tmp_path)) as read:
        for name in read.names():
            seen = read.read_rows(name, 0, matrix_shape(read.info(name).shape)[0]).to_float32().reshape(read.info(name).shape)
            np.testing.assert_array_equal(seen, loaded[name].float().numpy(), err_msg=name)
            np.testing.assert_allclose(seen, exact[name].numpy(), atol=0.1)
        kept = {"F16": "float16", "BF16": "bfloat16"}.get(quant, "float32")
        assert {str(read.kept_dtype(name)) for name in read.names()} == {kept}


def test_k_quants_are_read_by_rows(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_block_count(1)
    raw = np.random.default_rng(0).integers(0, 255, (6, 144), np.uint8)
    raw[:, :4] = np.frombuffer(np.array([0.01, 0.02], np.float16).tobytes(), np.uint8)  # scales that are finite
    writer.add_tensor("token_embd.weight", raw, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType.Q4_K)
    with closing(Checkpoint(tmp_path)) as read:
        assert read.info("model.embed_tokens.weight").shape == (6, 256)
        np.testing.assert_array_equal(read.read_rows("model.embed_tokens.weight", 2, 5).held, expected[2:5])


def test_what_is_not_known_is_refused_by_name(folders: Any, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "rwkv6")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="architecture rwkv6 cannot be read; known are llama"):
        Checkpoint(tmp_path)
    write_gguf(tmp_path / "two.gguf", folders("llama"), "llama", "F32")
    with pytest.raises(CheckpointError, match=r"2 GGUF models \(one.gguf, two.gguf\); name the one"):
        Checkpoint(tmp_path)
    (tmp_path / "one.gguf").unlink()
    whole = (tmp_path / "two.gguf").read_bytes()
    (tmp_path / "two.gguf").write_bytes(whole[:-500])
    with pytest.raises(CheckpointError, match=r"two.gguf (cannot be read as GGUF|is truncated)"):
        Checkpoint(tmp_path)
    (tmp_path / "two.gguf").write_bytes(b"nothing of the kind, but long enough")
    with pytest.raises(CheckpointError, match="cannot be read as GGUF"):
        Checkpoint(tmp_path)
