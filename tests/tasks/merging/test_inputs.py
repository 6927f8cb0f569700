"""Where a recipe's models and second moments are looked up."""

from pathlib import Path
from typing import Any

import pytest

from ota_core.errors import OtaError
from ota_core.plan.inputs import MergeInputs, expert_name, unique_names
from ota_core.recipe.recipe import MergeRecipe
from tasks.merging.composed import locate
from tasks.merging.inputs import assemble, fetch_all
from tasks.storage import models as storage
from tasks.storage.layout import write_expert_json
from tests.checkpoints import random_base, random_expert, write_checkpoint, write_expert, write_moments
from tests.servers import S3Test

BASE = random_base()
EXPERT = random_expert(BASE, 1)


class World:
    """A recipe beside an expert, and somewhere else a working directory."""

    def __init__(self, root: Path) -> None:
        self.beside, self.cwd, self.cache = root / "beside", root / "cwd", root / "cache"
        self.cwd.mkdir(parents=True)
        self.expert = write_expert(self.beside / "expert", EXPERT)
        write_checkpoint(self.beside / "base", BASE)

    def inputs(self, path: str | None = None, *, model: str = "expert", method: str = "ota", **options: Any) -> MergeInputs:
        entry = {"model": model, "parameters": {"preconditioner_path": path} if path else {}}
        recipe = MergeRecipe.model_validate({"merge_method": method, "base_model": "base", "models": [entry]})
        return assemble(
            recipe,
            fetch_all(recipe, cache=self.cache, recipe_dir=self.beside),
            cache=self.cache,
            recipe_dir=self.beside,
            **options,
        )

    def moments(self, path: str | None = None, **options: Any) -> Path | None:
        return self.inputs(path, **options).experts[0].moments

    def refused(self, path: str | None = None, **options: Any) -> str:
        with pytest.raises(OtaError) as caught:
            self.inputs(path, **options)
        return str(caught.value)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(tmp_path)
    monkeypatch.chdir(world.cwd)
    return world


def put(folder: Path, name: str = "v.safetensors", scale: float = 1.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return write_moments(folder, {n: x * scale for n, x in EXPERT.v.items()}).rename(folder / name)


def test_without_a_path_the_experts_folder_is_searched(world: World) -> None:
    assert world.moments() == world.expert / "exp_avg_sq.safetensors"
    assert world.moments(method="linear") is None
    (world.expert / "exp_avg_sq.safetensors").rename(world.cwd / "exp_avg_sq.safetensors")
    text = world.refused()
    assert (
        f"expert 'expert': {world.expert} holds no second moments; expected exp_avg_sq.safetensors, " in text
        and "Name the file with preconditioner_path" in text
    )
    assert world.moments("exp_avg_sq.safetensors") == world.cwd / "exp_avg_sq.safetensors"


@pytest.mark.parametrize("place", ["expert", "beside", "cwd"])
@pytest.mark.parametrize("name", ["v.safetensors", "optim/v.safetensors", "./v.safetensors"])
def test_a_path_is_looked_up_in_three_places(world: World, place: str, name: str) -> None:
    folder = {"expert": world.expert, "beside": world.beside, "cwd": world.cwd}[place]
    wanted = put((folder / name).parent)
    assert (world.moments(name) or Path()).resolve() == wanted.resolve()


@pytest.mark.parametrize("first, second", [("expert", "beside"), ("expert", "cwd"), ("beside", "cwd")])
def test_two_different_hits_are_an_error(world: World, first: str, second: str) -> None:
    places = {"expert": world.expert, "beside": world.beside, "cwd": world.cwd}
    one, two = put(places[first]), put(places[second], scale=2.0)
    text = world.refused("v.safetensors")
    assert "preconditioner_path 'v.safetensors' is found in 2 places" in text and str(one) in text and str(two) in text
    assert "give the full path of the one that is meant" in text
    assert world.moments(str(two)) == two


def test_the_same_file_under_two_names_is_one_hit(world: World) -> None:
    wanted = put(world.beside)
    (world.cwd / "v.safetensors").symlink_to(wanted)
    assert (world.moments("v.safetensors") or Path()).resolve() == wanted


def test_absolute_paths_and_paths_of_nothing(world: World, tmp_path: Path) -> None:
    wanted = put(tmp_path / "else")
    assert world.moments(str(wanted)) == wanted
    for name in ("no.safetensors", "./a/b/no.safetensors", str(tmp_path / "no" / "no.safetensors")):
        text = world.refused(name)
        assert f"preconditioner_path '{name}' does not exist" in text and str(world.expert) in text and str(world.cwd) in text


def test_a_path_in_a_hub_repository_that_cannot_be_had(world: World) -> None:
    text = world.refused("org/name/optimizer/exp_avg_sq.safetensors")
    assert "'org/name/optimizer/exp_avg_sq.safetensors' is no file here" in text
    assert "optimizer/exp_avg_sq.safetensors of the Hugging Face repository org/name could not be downloaded" in text


def test_second_moments_in_s3(world: World, s3_server: S3Test) -> None:
    local = put(world.cwd / "up", scale=3.0)
    storage.upload_folder(world.cwd / "up", f"{s3_server.uri}/v")
    inputs = world.inputs(f"{s3_server.uri}/v/v.safetensors")
    found = inputs.experts[0]
    assert found.moments is not None and found.moments.read_bytes() == local.read_bytes()
    assert found.moments_digest and found.moments_digest == world.inputs(str(local)).experts[0].moments_digest


def test_digests_cover_moments_elsewhere_and_can_be_left_out(world: World) -> None:
    inside = world.inputs().experts[0]
    assert inside.digest and inside.moments_digest is None  # the checkpoint's digest covers them
    outside = put(world.cwd)
    digest = world.inputs("v.safetensors").experts[0].moments_digest
    assert digest
    put(world.cwd, scale=2.0)
    assert world.inputs(str(outside)).experts[0].moments_digest not in {digest, None}
    assert world.inputs("v.safetensors", digests=False).experts[0].moments_digest is None


def test_models_beside_the_recipe_or_here(world: World, tmp_path: Path) -> None:
    assert locate("expert", world.beside) == str(world.expert)
    assert locate("s3://b/expert", world.beside) == "s3://b/expert" and locate("/abs/x", world.beside) == "/abs/x"
    assert locate("org/name@main", world.beside) == "org/name@main"
    write_expert(world.cwd / "here", EXPERT)
    assert world.moments(model="here") == world.cwd / "here" / "exp_avg_sq.safetensors"
    write_expert(world.cwd / "expert", EXPERT)
    text = world.refused()
    assert (
        "model 'expert' is found in" in text
        and str(world.expert) in text
        and str(world.cwd / "expert") in text
        and "give the full path" in text
    )
    assert world.moments(model=str(world.expert)) == world.expert / "exp_avg_sq.safetensors"


def test_names_come_from_the_recipe_the_manifest_or_the_path(world: World) -> None:
    write_expert_json(world.expert, capability="math", base_model="base", trained_at="2026-11-20", step=7, beta2=0.9)
    write_expert(world.beside / "plain", EXPERT)
    entries = [
        {"model": "expert"},
        {"model": "plain"},
        {"model": "expert", "name": "third"},
        {"model": "plain", "capability": "code"},
        {"model": "expert"},
    ]
    recipe = MergeRecipe.model_validate({"merge_method": "ota", "base_model": "base", "models": entries})
    inputs = assemble(
        recipe, fetch_all(recipe, cache=world.cache, recipe_dir=world.beside), cache=world.cache, recipe_dir=world.beside
    )
    assert [expert.name for expert in inputs.experts] == ["math", "plain", "third", "code", "math-2"]
    assert [expert.capability for expert in inputs.experts] == ["math", None, "math", "code", "math"]


def test_names_are_unique_and_leave_the_bases_alone() -> None:
    assert unique_names(["a", "a-2", "a", "base", "base", "a"]) == ["a", "a-2", "a-3", "base-2", "base-3", "a-4"]
    assert expert_name("s3://b/x/y@z/", None, None) == "y" and expert_name("x", "following/precise", None) == "following-precise"


def test_progress_names_what_is_fetched(world: World, s3_server: S3Test) -> None:
    storage.upload_folder(world.expert, f"{s3_server.uri}/e")
    seen: list[tuple[str, int, int]] = []
    recipe = MergeRecipe.model_validate(
        {"merge_method": "ota", "base_model": "base", "models": [{"model": f"{s3_server.uri}/e"}]}
    )
    fetch_all(recipe, cache=world.cache, recipe_dir=world.beside, progress=lambda *told: seen.append(told))
    assert {what for what, _, _ in seen} == {f"fetch {s3_server.uri}/e"} and seen[-1][1] == seen[-1][2] > 0
