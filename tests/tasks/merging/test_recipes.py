"""Recipes from a file of this machine, from the repository, or from S3."""

from pathlib import Path

import pytest

from ota_core.errors import RecipeError, StorageError
from tasks.merging.recipes import ROOT, find_file, read_recipe, read_yaml
from tests.servers import S3Test

TEXT = "merge_method: linear\nmodels: [{model: ./a}, {model: ./b}]\n"


def test_a_file_and_the_folder_that_its_paths_start_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "recipe.yaml").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    recipe, folder = read_recipe("sub/recipe.yaml")
    assert [one.model for one in recipe.models] == ["./a", "./b"] and folder == tmp_path.resolve() / "sub"


def test_a_recipe_of_the_repository_from_anywhere_but_the_working_directory_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "deployments/recipes/demo-ota.yaml"
    assert find_file(name) == ROOT / name
    recipe, folder = read_recipe(name)
    assert recipe.merge_method == "ota" and folder == ROOT / "deployments" / "recipes"
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text(TEXT)
    assert read_recipe(name)[0].merge_method == "linear"


def test_a_recipe_in_s3_has_no_folder(s3_server: S3Test) -> None:
    s3_server.client.put_object(Bucket=s3_server.bucket, Key="r.yaml", Body=TEXT.encode())
    recipe, folder = read_recipe(f"{s3_server.uri}/r.yaml")
    assert recipe.merge_method == "linear" and folder is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "is no text .*expected YAML in UTF-8"),
        (b"merge_method: [", "is not valid YAML"),
        (b"merge_method: otta\nmodels: [{model: a}]", "r.yaml: unknown merge_method 'otta'; did you mean 'ota'"),
    ],
)
def test_what_is_wrong_with_a_recipe_in_s3_is_told_with_its_address(s3_server: S3Test, content: bytes, message: str) -> None:
    s3_server.client.put_object(Bucket=s3_server.bucket, Key="r.yaml", Body=content)
    with pytest.raises(RecipeError, match=f"(?s){s3_server.uri}/r.yaml.*{message.removeprefix('r.yaml')}"):
        read_recipe(f"{s3_server.uri}/r.yaml")


def test_what_is_not_there(s3_server: S3Test, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=f"{s3_server.uri}/none.yaml"):
        read_yaml(f"{s3_server.uri}/none.yaml")
    with pytest.raises(RecipeError, match=r"none\.yaml does not exist; expected a YAML file"):
        read_yaml(str(tmp_path / "none.yaml"))
    with pytest.raises(RecipeError, match="cannot be read as text"):
        read_yaml(str(tmp_path))
