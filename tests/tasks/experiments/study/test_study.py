"""Studies: a grid becomes recipes, each under a name of its own, and every mistake in it is told at once."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ota_core.errors import RecipeError
from tasks.experiments.study.study import StudyConfig, load_study
from tests.servers import S3Test

RAW: dict[str, Any] = {
    "name": "small", "base_model": "base", "models": [{"model": "math", "capability": "math"}, {"model": "code"}], "suite": "demo",
    "grid": [
        {"merge_method": "ota", "parameters": {"density": [0.1, 0.4], "lambda": [1, 0.5], "compression": "rank1"}},
        {"merge_method": "linear"},
    ],
}  # fmt: skip


def problems(folder: Path, **changes: Any) -> tuple[str, ...]:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(RAW | changes))
    with pytest.raises(RecipeError) as caught:
        load_study(str(file))
    return caught.value.problems


def test_every_combination_is_a_cell_in_the_order_of_the_grid() -> None:
    recipes = {one.label: one.recipes[0] for one in StudyConfig.model_validate(RAW | {"dtype": "float32"}).cells()}
    assert list(recipes) == [
        "ota density=0.1 lambda=1 compression=rank1",
        "ota density=0.1 lambda=0.5 compression=rank1",
        "ota density=0.4 lambda=1 compression=rank1",
        "ota density=0.4 lambda=0.5 compression=rank1",
        "linear",
    ]
    third = recipes["ota density=0.4 lambda=1 compression=rank1"]
    assert (third.setting("density", 1), third.setting("lambda"), third.setting("compression")) == (0.4, 1, "rank1")
    for recipe in recipes.values():
        assert recipe.base_model == "base" and recipe.output_dtype == "float32"
        assert [(one.model, one.capability) for one in recipe.models] == [("math", "math"), ("code", None)]


def test_mergekits_spellings_are_understood() -> None:
    grid = [{"merge_method": "ota", "parameters": {"rank1_approx": [True, False]}}]
    cells = StudyConfig.model_validate(RAW | {"grid": grid}).cells()
    assert [cell.recipes[0].setting("compression") for cell in cells] == ["rank1", "none"]


def test_the_folder_is_where_relative_paths_start(tmp_path: Path, s3_server: S3Test) -> None:
    text = yaml.safe_dump(RAW)
    (tmp_path / "study.yaml").write_text(text)
    assert load_study(str(tmp_path / "study.yaml")) == (StudyConfig.model_validate(RAW), tmp_path.resolve())
    s3_server.client.put_object(Bucket=s3_server.bucket, Key="study.yaml", Body=text.encode())
    assert load_study(f"{s3_server.uri}/study.yaml") == (StudyConfig.model_validate(RAW), None)


def test_every_mistake_in_the_file_is_told_at_once(tmp_path: Path) -> None:
    told = problems(
        tmp_path,
        modles=[],
        models=[{"model": "a", "parmeters": {}}],
        limit=0,
        grid=[{"merge_method": "tis"}, {"merge_method": "ota", "parameters": {"density": []}}, {"method": "ota"}],
    )
    expected = [
        "unknown key 'modles'; did you mean 'models'?",
        "unknown key 'models[0].parmeters'; did you mean 'parameters'?",
        "limit: got 0",
        "grid[0].merge_method: unknown 'tis'",
        "grid: ota has no value for density; give at least one",
        "the key 'grid[2].merge_method' is missing",
        "unknown key 'grid[2].method'; did you mean 'merge_method'?",
    ]
    for text in expected:
        assert any(line.startswith(f"{tmp_path}/study.yaml: {text}") for line in told), (text, told)
    assert len(told) == len(expected)


def test_every_cell_that_cannot_be_merged_is_told_at_once(tmp_path: Path) -> None:
    grid = [
        {"merge_method": "ota", "parameters": {"density": [0, 0.4, 2]}},
        {"merge_method": "linear", "parameters": {"lambda": 1}},
    ]
    told = problems(tmp_path, grid=grid)
    assert len(told) == 3
    assert "grid[0] (ota density=0)" in told[0] and "grid[0] (ota density=2)" in told[1]
    assert "grid[1] (linear lambda=1): parameters: 'lambda' has no effect with merge_method linear" in told[2]


def test_a_study_needs_models_and_a_grid(tmp_path: Path) -> None:
    told = problems(tmp_path, models=[], grid=[])
    assert len(told) == 2 and "models: got []" in told[0] and "grid: got []" in told[1]
