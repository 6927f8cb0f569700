"""Files with several recipes: the order of their stages, and what they refuse."""

from pathlib import Path

import pytest

from ota_core.errors import RecipeError
from ota_core.recipe.recipe import load_recipe
from tasks.merging.stages import read_stages

STAGE = "name: {name}\nmerge_method: linear\nmodels: [{{model: {one}}}, {{model: {other}}}]\n"


def written(tmp: Path, *documents: str) -> Path:
    path = tmp / "recipe.yaml"
    path.write_bytes(("\ufeff" + "---\n".join(documents)).replace("\n", "\r\n").encode())
    return path


def test_stages_stand_behind_those_that_they_need(tmp_path: Path) -> None:
    result = "merge_method: slerp\nbase_model: first\nmodels: [{model: second}]\nparameters: {t: 0.5}\n"
    stages = read_stages(
        written(
            tmp_path, result, STAGE.format(name="second", one="first", other="x"), STAGE.format(name="first", one="x", other="y")
        )
    )
    assert [stage.name for stage in stages] == ["first", "second", None]
    located = stages[2].located({"first": Path("/a"), "second": Path("/b")})
    assert located.base_model == "/a" and located.models[0].model == "/b" and located.models[0].name == "second"
    assert stages[2].recipe.base_model == "first"


def test_a_file_of_an_old_program_names_its_results_by_path(tmp_path: Path) -> None:
    first = STAGE.format(name="x", one="p", other="q").replace("name: x", "out_path: ./models/half")
    stages = read_stages(
        written(tmp_path, first, STAGE.format(name="end", one="models/half", other="q").replace("name: end\n", ""))
    )
    assert [stage.name for stage in stages] == ["./models/half", None] and stages[1].needs == ("./models/half",)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([STAGE.format(name="a", one="x", other="y"), STAGE.format(name="b", one="x", other="y")], "end in 2 results (a, b)"),
        ([STAGE.format(name="a", one="b", other="y"), STAGE.format(name="b", one="a", other="y")], "in a circle"),
        ([STAGE.format(name="a", one="x", other="y"), STAGE.format(name="a", one="x", other="y")], "given to 2 documents"),
        ([STAGE.format(name="a", one="x", other="y"), "merge_method: tis\nmodels: [{model: a}]\n"], "document 2: line 5: unknown merge_method 'tis'"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, documents: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_stages(written(tmp_path, *documents))
    assert message in str(caught.value)


def test_a_command_that_takes_one_recipe_says_which_takes_several(tmp_path: Path) -> None:
    path = written(tmp_path, STAGE.format(name="a", one="x", other="y"), STAGE.format(name="b", one="a", other="y"))
    with pytest.raises(RecipeError, match=r"holds 2 recipes .*`ota merge"):
        load_recipe(path)
