"""Files that would fill the memory, wait for ever, or have another form: each ends with a CheckpointError, soon and in few words."""

import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ota_core.errors import CheckpointError, MomentsError, raise_all
from ota_core.files.checkpoint import Checkpoint
from ota_core.files.pickled.bin_file import BinFile
from ota_core.files.safetensors_io import SafetensorsFile
from ota_core.files.tokens import tokens_of
from ota_core.files.weight_sets import read_json, weight_files
from ota_core.moments.pointers import pointer
from ota_core.plan.inputs import expert_facts
from ota_core.reading import json_value, quoted


def test_a_deflated_pickle(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(4)}, tmp_path / "plain.bin")
    with (
        zipfile.ZipFile(tmp_path / "plain.bin") as plain,
        zipfile.ZipFile(tmp_path / "bomb.bin", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name) if name.endswith("pkl") else bytes(50_000_000))
    with pytest.raises(CheckpointError, match="compressed"):
        BinFile(tmp_path / "bomb.bin", None)


def test_more_elements_than_the_storage_has(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(10**12)}, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match="its storage 1"):
        BinFile(tmp_path / "a.bin", None)


def test_an_empty_bin(tmp_path: Path) -> None:
    (tmp_path / "a.bin").touch()
    with pytest.raises(CheckpointError, match="cannot be read as PyTorch weights"):
        BinFile(tmp_path / "a.bin", None)


@pytest.mark.parametrize("shape", [[1] * 70_000, [10**300] * 60])
def test_shapes(tmp_path: Path, shape: list[int]) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(CheckpointError) as error:
        SafetensorsFile(tmp_path / "a.safetensors")
    assert len(str(error.value)) < 1500


def test_pipes_and_devices(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "config.json")
    (tmp_path / "index.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="a pipe, a device"):
        SafetensorsFile(tmp_path / "model.safetensors")
    for name in ("config.json", "index.json"):
        with pytest.raises(CheckpointError, match="a pipe, a device"):
            read_json(tmp_path / name)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 200 + "1" + "}" * 200, "<html>hunter2</html>", "", "[1]", "9" * 5000])
def test_json_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError) as error:
        read_json(tmp_path / "a.json")
    assert "hunter2" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"model": []}, {"model": {"vocab": 5}}, {"model": {"vocab": [5]}}, {"model": {"vocab": {"a": "x"}}}, {"model": {"vocab": {"a": 10**12}}},
        {"model": {"vocab": {"a": -1}}}, {"model": {"vocab": {}}, "added_tokens": 5}, {"model": {"vocab": {}}, "added_tokens": [{"id": 1}]},
        {"model": {"vocab": {"a": None}}}, {"model": {"vocab": {"a": [1]}}},
    ],
)  # fmt: skip
def test_tokenizers_of_another_form(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="token"):
        tokens_of(tmp_path)


@pytest.mark.parametrize("capability", [5, ["a"], {"a": 1}, True])
def test_a_capability_that_is_no_word(tmp_path: Path, capability: Any) -> None:
    (tmp_path / "expert.json").write_text(json.dumps({"capability": capability}))
    with pytest.raises(CheckpointError, match="expected a word"):
        expert_facts(tmp_path)


def test_quoted_values_are_cut() -> None:
    nested: Any = []
    for _ in range(60):
        nested = [nested, nested]
    for value in ("x" * 10**6, [1] * 10**6, {"a": "b" * 10**6}, 10**10_000, nested):
        assert len(quoted(value)) <= 201


def test_a_configuration_larger_than_any(tmp_path: Path) -> None:
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(20 * 2**30)
    (tmp_path / "model.safetensors").touch()
    for read in (lambda: read_json(tmp_path / "config.json"), lambda: weight_files(tmp_path)):
        with pytest.raises(CheckpointError, match="at most 536870912 are read"):
            read()


def test_names_of_tensors_are_lines(tmp_path: Path) -> None:
    for name in ("a\x1b[2J", "a" * 2000, "a\u202eb"):
        save_file({name: torch.zeros(2)}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match="a tensor is called") as error:
            Checkpoint(tmp_path)
        assert len(str(error.value)) < 600 and "\x1b" not in str(error.value)


@pytest.mark.parametrize("text", ['"\\ud800"', '{"a": ["\\udfff"]}', '{"\\ud83d": 1}'])
def test_half_of_a_character_is_no_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="half of a character"):
        read_json(tmp_path / "a.json")
    assert json_value('{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}


@pytest.mark.parametrize(
    "facts",
    [{"capability": "a\x1b[31m"}, {"step": [1]}, {"step": True}, {"beta2": float("nan")}, {"base_model": 5}, {"trained_at": {}}, {"capability": "x" * 5000}],
)  # fmt: skip
def test_facts_of_another_kind(tmp_path: Path, facts: dict[str, Any]) -> None:
    (tmp_path / "expert.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=f"{next(iter(facts))} is .*, expected") as error:
        expert_facts(tmp_path)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("pointer_file", ["pipe", "device", "large"])
def test_what_names_a_folder_is_a_short_file(tmp_path: Path, pointer_file: str) -> None:
    path = tmp_path / "latest"
    if pointer_file == "pipe":
        os.mkfifo(path)
    elif pointer_file == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(b"x" * 5000)
    with pytest.raises(MomentsError, match="the name of a folder beside it was expected"):
        pointer(path)


def test_messages_hold_nothing_that_a_terminal_obeys() -> None:
    assert str(CheckpointError("a\x1b[2J\u202eb\x9b\n\ud800")) == "a\\x1b[2J\\u202eb\\x9b\n\\ud800"
    assert len(str(CheckpointError("x" * 10**6))) < 20_000
    with pytest.raises(CheckpointError) as error:
        raise_all(["y" * 10**6, *["z"] * 5000], CheckpointError)
    assert 3000 < len(str(error.value)) < 4096 and str(error.value).endswith(" more, of the same kinds")
