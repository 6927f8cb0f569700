"""Which files of a folder are the model, what a folder is that is none, and tensors in every layout that torch saves."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ota_core.compute.blocks import matrix_shape
from ota_core.errors import CheckpointError
from ota_core.files.checkpoint import Checkpoint
from tests.checkpoints import write_checkpoint

OLD, NEW = {"a.weight": torch.zeros(2, 2)}, {"a.weight": torch.ones(2, 2)}
INDEX = "model.safetensors.index.json"


def _value(folder: Path) -> float:
    return float(Checkpoint(folder).read_rows("a.weight", 0, 2).to_float32()[0, 0])


def _index(folder: Path, name: str, file: str, tensors: dict[str, torch.Tensor], *more: str) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys([*tensors, *more], file)}))


def test_an_old_index_beside_a_newer_single_file(tmp_path: Path) -> None:
    """huggingface/diffusers#14769: what is left of an earlier save; transformers takes the single file first."""
    folder = write_checkpoint(tmp_path / "m", NEW)
    save_file(OLD, folder / "model-00001-of-00001.safetensors")
    _index(folder, INDEX, "model-00001-of-00001.safetensors", OLD)
    assert _value(folder) == 1.0
    (note,) = Checkpoint(folder).notes
    assert (
        note == f"{folder} holds several sets of weights; model.safetensors is read, as transformers does, and not {INDEX}"
        or "newer" in note
    )
    os.utime(folder / "model-00001-of-00001.safetensors", (2e9, 2e9))
    (note,) = Checkpoint(folder).notes
    assert note.endswith("though its files are newer: remove the set that is not meant")


def test_the_order_is_that_of_transformers(tmp_path: Path) -> None:
    """The values that the real class loads, for every pair of sets in one folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    small = dict(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=8
    )
    model = LlamaForCausalLM(LlamaConfig(**small))  # type: ignore[arg-type]
    model.save_pretrained(tmp_path / "m")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    folder, key = tmp_path / "m", "model.norm.weight"
    sets = {"model.safetensors": 1.0, INDEX: 2.0, "pytorch_model.bin": 3.0, "pytorch_model.bin.index.json": 4.0}
    (folder / "model.safetensors").unlink()

    def write(name: str) -> None:
        held = {**state, key: torch.full_like(state[key], sets[name])}
        file = name if "index" not in name else f"part-{sets[name]:g}" + (".safetensors" if name == INDEX else ".bin")
        save_file(held, folder / file, {"format": "pt"}) if file.endswith(".safetensors") else torch.save(held, folder / file)
        if "index" in name:
            _index(folder, name, file, held)

    for name in reversed(sets):
        write(name)
        loaded = LlamaForCausalLM.from_pretrained(folder).state_dict()[key]
        mine = Checkpoint(folder).read_rows(key, 0, 4).tensor().reshape(-1)
        assert torch.equal(mine, loaded) and float(loaded[0]) == sets[name]


def test_a_file_that_the_configuration_names(tmp_path: Path) -> None:
    """huggingface/transformers#38152: ``transformers_weights``, where another program's file has the usual name."""
    folder = write_checkpoint(tmp_path / "m", OLD, config={"transformers_weights": "mine.safetensors"})
    save_file(NEW, folder / "mine.safetensors")
    assert _value(folder) == 1.0
    (folder / "mine.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names the weights' file 'mine.safetensors' \(transformers_weights\)"):
        Checkpoint(folder)


def test_an_index_that_lists_what_is_tied(tmp_path: Path) -> None:
    """An entry for a tied alias that no file holds is fine; of another tensor it is not (Blaizzy/mlx-vlm#1827: stale indices on the hub)."""
    for tied, extra, fine in ((True, "lm_head.weight", True), (True, "b.weight", False), (False, "lm_head.weight", False)):
        folder = write_checkpoint(tmp_path / f"{tied}{extra}", {}, config={"tie_word_embeddings": tied})
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        save_file(NEW, folder / "part.safetensors")
        _index(folder, INDEX, "part.safetensors", NEW, extra)
        if fine:
            assert _value(folder) == 1.0
        else:
            with pytest.raises(CheckpointError, match=f"tensor '{extra}' lies in part.safetensors, but no file holds it"):
                Checkpoint(folder)


def test_an_adapter_beside_a_whole_model(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", NEW)
    (folder / "adapter_config.json").write_text("{}")
    save_file(OLD, folder / "adapter_model.safetensors")
    assert _value(folder) == 1.0
    assert "holds a whole model and an adapter; the whole model is read" in Checkpoint(folder).notes[0]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["adapter_model.bin", "adapter_config.json"], "a LoRA adapter, not a whole model"),
        (["a.gguf", "b.gguf"], "2 GGUF models"),
        (["global_step10/mp_rank_00_model_states.pt", "latest"], "zero_to_fp32.py"),
        (["optimizer_0/__0_0.distcp"], "accelerate merge-weights"),
        (["checkpoint-9/config.json", "checkpoint-10/config.json"], "checkpoint-10"),
        (["optimizer.pt", "trainer_state.json"], "the state of a training run (optimizer.pt, trainer_state.json)"),
        (["consolidated.00.pth", "params.json"], "convert_llama_weights_to_hf"),
        (["tf_model.h5"], "from_tf=True"),
        (["flax_model.msgpack"], "from_flax=True"),
        (["model.onnx"], "a graph for ONNX"),
        (["model_index.json", "unet/config.json"], "a pipeline of diffusers, not one model; name one of its parts (unet)"),
        (["refs/main", "snapshots/abc/config.json"], "snapshots/abc"),
        ([".cache/huggingface/download/x.incomplete"], "a download that did not finish"),
    ],
)  # fmt: skip
def test_folders_that_are_no_model(tmp_path: Path, files: list[str], says: str) -> None:
    """hiyouga/LlamaFactory#1097, arcee-ai/mergekit#197: adapters, and the like, given as models."""
    for file in files:
        (tmp_path / "m" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / file).write_bytes(b"x")
    with pytest.raises(CheckpointError) as error:
        Checkpoint(tmp_path / "m")
    assert says in str(error.value) and str(error.value).startswith(f"{tmp_path / 'm'} ")


def test_placeholders_of_zero_3(tmp_path: Path) -> None:
    """OpenRLHF/OpenRLHF#839, huggingface/transformers#20082: saved without gathering."""
    folder = write_checkpoint(tmp_path / "m", {"a.weight": torch.zeros(0), "b.weight": torch.zeros(0), "n.weight": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"2 of 3 tensors have the shape \[0\] \(a.weight, b.weight\).*zero_to_fp32.py"):
        Checkpoint(folder)


def test_every_layout_that_torch_saves(tmp_path: Path) -> None:
    """Transposed, permuted, sliced, expanded, channels-last and aliased tensors of a .bin are read as torch reads them."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 8, generator=g), torch.randn(3, 4, 5, generator=g)
    tensors = {
        "transposed": a.t(), "permuted": b.permute(2, 0, 1), "sliced": torch.randn(10, 20, generator=g)[2:7, 3:18:2],
        "expanded": torch.randn(1, 5, generator=g).expand(4, 5), "tied": a, "scalar": torch.tensor(3.0), "column": b[:, 1, 1],
        "conv": torch.randn(2, 3, 4, 4, generator=g).to(memory_format=torch.channels_last), "part": a[2:4],
    }  # fmt: skip
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.save(tensors, folder / "pytorch_model.bin")
    checkpoint = Checkpoint(folder)
    for name, tensor in tensors.items():
        rows, columns = matrix_shape(tensor.shape)
        for step in (1, 2, 100):
            blocks = [checkpoint.read_rows(name, start, min(start + step, rows)) for start in range(0, rows, step)]
            assert torch.equal(torch.cat([block.tensor() for block in blocks]), tensor.reshape(rows, columns)), name
            assert all(block.held.flags.c_contiguous for block in blocks)
