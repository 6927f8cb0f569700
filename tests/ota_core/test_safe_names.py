"""Names from elsewhere that may be joined to a folder."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ota_core.artifact import read_record
from ota_core.errors import ArtifactError, CheckpointError, RecipeError
from ota_core.files.checkpoint import Checkpoint
from ota_core.names import as_name, why_unsafe
from ota_core.plan.inputs import expert_name
from ota_core.recipe.recipe import parse_recipe

BAD = [
    "",
    "/etc/passwd",
    "../up",
    "a/../../up",
    "a//b",
    "a/./b",
    "a/",
    ".",
    "..",
    "a\\b",
    "a\0b",
    "a\nb",
    "x" * 256,
    "\ud800",
    "\x7f",
]
GOOD = ["a", "a/b.safetensors", "..a", "a..b", ".hidden", "数学 (final) @v1,+x=2", "é" * 127, "~", "-rf", "a b"]


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    assert why_unsafe(name)


@pytest.mark.parametrize("name", GOOD)
def test_taken(name: str, tmp_path: Path) -> None:
    assert why_unsafe(name) is None
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x")


@given(st.text(st.sampled_from("./\\a~\0é") | st.characters(), max_size=12))
def test_what_is_taken_stays_inside(name: str) -> None:
    folder = Path("/somewhere/deep")
    if why_unsafe(name) is None:
        path = folder / name
        assert path.is_relative_to(folder) and path != folder and ".." not in path.parts


@given(st.text(st.sampled_from("./\\a~\0é") | st.characters(), max_size=400))
def test_any_text_becomes_a_name(text: str) -> None:
    name = as_name(text)
    assert (why_unsafe(name) is None and "/" not in name) if text else name == ""


def test_a_record_an_index_a_manifest_and_a_recipe_cannot_lead_outside(tmp_path: Path) -> None:
    record = {"kind": "merged", "fingerprint": "0", "algorithm_version": {}, "config": {}, "inputs": {}}
    (tmp_path / "record.json").write_text(json.dumps(record | {"files": {"../../x": 1}}))
    with pytest.raises(ArtifactError, match=r"'\.\./\.\./x' is refused: one of its parts is '\.\.'"):
        read_record(tmp_path)
    for file in ("..", "../model.safetensors", "/etc/passwd", "a\\b"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": file}}))
        with pytest.raises(CheckpointError, match="expected the name of a file beside the index"):
            Checkpoint(tmp_path)
    assert expert_name("s3://b/e", "../../math", None) == "..-..-math"
    with pytest.raises(RecipeError, match="the name 'x/y' has a slash; names also label files, write 'x-y'"):
        parse_recipe({"merge_method": "linear", "models": [{"model": "a", "name": "x/y"}, {"model": "b"}]})
