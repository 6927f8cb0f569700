"""What a nightly merge may be configured as, what decides a night, and the note that it leaves."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ota_core.errors import OtaError, RecipeError, StorageError
from tasks.evaluation.suites import digest_data, load_suite
from tasks.merging.recipes import ROOT
from tasks.registry.nightly import LastNight, NightlyConfig, NightlyError, last_night, load_nightly, remember
from tasks.settings import Places, places
from tests.servers import S3Test
from tests.tiny_suite import edited, write_tiny_suite

OTA = {"name": "ota", "merge_method": "ota", "parameters": {"density": 0.4, "lambda": 0.5}}
LINEAR = {"name": "linear", "merge_method": "linear"}
RAW: dict[str, Any] = {"experts": "s3://b/experts", "base_model": "s3://b/base", "suite": "demo", "candidates": [OTA, LINEAR]}


def write(folder: Path, **changes: Any) -> str:
    file = folder / "nightly.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in (RAW | changes).items() if value is not None}))
    return str(file)


def problems(folder: Path, **changes: Any) -> tuple[str, ...]:
    file = write(folder, **changes)
    with pytest.raises(RecipeError) as caught:
        load_nightly(file)
    assert all(problem.startswith(f"{file}: ") for problem in caught.value.problems)
    return tuple(problem.removeprefix(f"{file}: ") for problem in caught.value.problems)


def test_a_candidate_becomes_the_recipe_of_tonights_experts(tmp_path: Path) -> None:
    config = load_nightly(write(tmp_path))
    recipe = config.candidates[0].recipe(config.base_model, {"math": "s3://b/experts/math/1", "code": "s3://b/experts/code/2"})
    assert recipe.base_model == "s3://b/base" and recipe.merge_method == "ota"
    assert [(one.capability, one.model) for one in recipe.models] == [
        ("math", "s3://b/experts/math/1"),
        ("code", "s3://b/experts/code/2"),
    ]
    assert recipe.setting("density", 0) == 0.4 and recipe.setting("lambda") == 0.5


def test_every_mistake_is_told_at_once_with_the_nearest_known_key(tmp_path: Path) -> None:
    broken = [
        {"name": "a", "merge_method": "linear", "parameters": {"density": 0.5}},
        {"name": "b", "merge_method": "otaa", "parametrs": {}},
        {"name": "c", "merge_method": "ota", "parameters": {"densty": 0.4, "lamda": 1}},
        {"name": "d/e", "merge_method": "ties", "parameters": {"density": 7}},
    ]
    told = problems(
        tmp_path,
        candidates=broken,
        basemodel="x",
        base_model=None,
        gate={"confidense": 0.9},
        device="gpu",
        limit=0,
        capabilities=[],
    )
    expected = [
        "candidate 'a': parameters: 'density' has no effect with merge_method linear",
        "candidates[1].merge_method: unknown 'otaa'; expected 'ota', 'linear'",
        "unknown key 'candidates[1].parametrs'; did you mean 'parameters'?",
        "unknown key 'candidates[2].parameters.densty'; did you mean 'density'?",
        "unknown key 'candidates[2].parameters.lamda'; did you mean 'lambda'?",
        "candidates[3].name: got 'd/e'",
        "candidates[3].parameters.density: got 7",
        "unknown key 'basemodel'; did you mean 'base_model'?",
        "the key 'base_model' is missing",
        "unknown key 'gate.confidense'; did you mean 'confidence'?",
        "device: unknown 'gpu'; expected 'auto', 'cpu' or 'cuda'",
        "limit: got 0",
        "capabilities: got []",
    ]
    for text in expected:
        assert any(line.startswith(text) for line in told), (text, told)
    assert len(told) == len(expected)


def test_mistakes_between_the_parts(tmp_path: Path) -> None:
    slerp = {"name": "slerp", "merge_method": "slerp", "parameters": {"t": 0.5}}
    clashing = {"name": "code", "merge_method": "linear"}
    told = problems(tmp_path, candidates=[slerp, clashing, LINEAR, LINEAR], capabilities=["math", "code", "if"], memory="much")
    assert len(told) == 4
    assert "got twice: linear" in told[0]
    assert "candidate 'slerp'" in told[1] and "the recipe names 3" in told[1]
    assert "candidate 'code': a row of the table" in told[2] and "memory: got 'much'" in told[3]
    # Where nobody says which experts there are, the night itself finds out.
    config = load_nightly(write(tmp_path, candidates=[slerp]))
    with pytest.raises(RecipeError, match=r"candidate 'slerp': slerp interpolates between two models, the recipe names 3"):
        config.candidates[0].recipe("s3://b/base", dict.fromkeys("abc", "s3://b/m"))
    with pytest.raises(RecipeError, match="candidate 'slerp': a row of the table"):
        config.candidates[0].recipe("s3://b/base", {"slerp": "s3://b/m"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "expected a mapping with experts, base_model, candidates, suite, got list"),
        ("", "expected a mapping .* got NoneType"),
    ],
)
def test_what_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "n.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_nightly(str(tmp_path / "n.yaml"))


def test_a_night_is_decided_by_what_can_change_its_result_and_nothing_else(tmp_path: Path) -> None:
    file, data = write_tiny_suite(tmp_path / "suite", n=4)
    config, suite, content = NightlyConfig.model_validate(RAW | {"capabilities": ["math", "code"]}), load_suite(str(file)), "d"
    digest = config.digest(suite, content)

    def changed(**changes: Any) -> str:
        return NightlyConfig.model_validate(config.model_dump(by_alias=True) | changes).digest(suite, content)

    same: list[dict[str, Any]] = [
        {},
        {"memory": "8GiB"},
        {"device": "cpu"},
        {"data_dir": "elsewhere"},
        {"experts": "s3://moved"},
        {"leave_out": "propose"},
    ]
    assert {changed(**one) for one in same} == {digest}
    other: list[dict[str, Any]] = [
        {"candidates": [OTA]},
        {"candidates": [OTA | {"parameters": {"density": 0.2, "lambda": 0.5}}, LINEAR]},
        {"candidates": [OTA | {"name": "other"}, LINEAR]},
        {"candidates": [OTA | {"dtype": "float32"}, LINEAR]},
        {"gate": {"confidence": 0.99}},
        {"capabilities": ["math"]},
        {"capabilities": None},
        {"base_model": "s3://b/other"},
        {"limit": 3},
        {"name": "other"},
        {"publish": "s3://b/merged"},
        {"leave_out": "measured"},
        {"leave_out": "each"},
    ]
    digests = {digest, *(changed(**one) for one in other), config.digest(suite, "other data")}
    digests.add(config.digest(edited(file, ("metric: acc", "metric: acc, weight: 2")), content))
    digests.add(config.digest(load_suite(str(write_tiny_suite(tmp_path / "again", n=4)[0])), digest_data(data)))
    assert len(digests) == len(other) + 4


@pytest.fixture(params=["folder", "s3"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Places:
    if request.param == "folder":
        return places(tmp_path / "home")
    server: S3Test = request.getfixturevalue("s3_server")
    return places(tmp_path / "home", f"{server.uri}/artifacts")


NOTE: dict[str, Any] = {
    "seen": "s", "merged": "m", "experts": {"math": "s3://b/m"}, "left_out": ["code/1: is broken"], "outcome": "kept",
}  # fmt: skip


def test_the_note_of_the_last_night(where: Places) -> None:
    assert last_night(where, "ota-merged") is None
    remember(where, "ota-merged", **NOTE)
    found = last_night(where, "ota-merged")
    assert found == LastNight(**NOTE, at=found.at if found else "") and found is not None
    remember(where, "ota-merged", **NOTE | {"seen": "t"})
    again = last_night(where, "ota-merged")
    assert again is not None and again.seen == "t"
    assert last_night(where, "another") is None


def test_a_damaged_note_is_told_with_its_place(where: Places) -> None:
    from tasks.storage import models as storage

    remember(where, "n", **NOTE)
    uri = storage.join(where.artifacts, "nightly", "n.json")
    for content in (b"{", b"", b'{"seen": "s"}', b"\xff\xfe"):
        if storage.is_s3(uri):
            storage.write_bytes(uri, content)
        else:
            Path(uri).write_bytes(content)
        with pytest.raises(NightlyError, match=f"^{re.escape(uri)} is damaged .*delete it"):
            last_night(where, "n")


def test_a_note_that_cannot_be_written_is_told(s3_server: S3Test, tmp_path: Path) -> None:
    with pytest.raises(OtaError, match="no-such-bucket"):
        remember(places(tmp_path, "s3://no-such-bucket-here"), "n", **NOTE)


def test_a_configuration_that_was_not_uploaded_yet_says_what_to_do(s3_server: S3Test) -> None:
    uri = f"{s3_server.uri}/nightly.yaml"
    with pytest.raises(
        NightlyError, match=rf"{uri}: no nightly configuration lies there yet; .*deployments/nightly\.yaml.*OTA_NIGHTLY"
    ):
        load_nightly(uri)
    with pytest.raises(StorageError, match="there is no bucket"):
        load_nightly("s3://no-such-bucket/nightly.yaml")


def test_the_guides_command_uploads_a_configuration(s3_server: S3Test) -> None:
    guide = (ROOT / "infra" / "README.md").read_text()
    (line,) = set(re.findall(r'python -c "(.*)" < nightly\.yaml', guide))
    uri = f"{s3_server.uri}/nightly.yaml"
    content = (ROOT / "deployments" / "nightly.yaml").read_bytes()
    command = [sys.executable, "-c", line.replace("s3://ota-experts/nightly.yaml", uri)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, input=content, check=True)
    assert load_nightly(uri) == load_nightly("deployments/nightly.yaml")
