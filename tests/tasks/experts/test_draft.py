"""Recipes that are written for experts: what they say, that the engine merges by them, and what stands in the way."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ota_core.engine import engine
from ota_core.errors import OtaError
from ota_core.moments import find_moments
from ota_core.recipe.recipe import MergeRecipe, load_recipe
from tasks.experts.draft import Draft, draft
from tasks.storage.layout import write_expert_json
from tasks.storage.models import EXPERT_JSON, upload_folder
from tests.flows.cli.typed import refused, said
from tests.ota_core.engine.test_output import add_moments, llama_experts, loaded
from tests.servers import S3Test
from tests.tiny_models import perturb, write_tiny_llama


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``base``, and ``expert0`` and ``expert1`` with second moments."""
    llama_experts(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OTA_HOME", str(tmp_path / "home"))
    return tmp_path


def drafted(folder: Path, *experts: str, base: str | None = "base") -> Draft:
    return draft(experts or ("expert0", "expert1"), base, cache=folder / "home" / "cache", recipe_dir=folder)


def merged(folder: Path, found: Draft) -> MergeRecipe:
    """The recipe as ``ota merge`` reads it, once the engine has merged by it."""
    (folder / "recipe.yaml").write_text(found.text("recipe.yaml"))
    recipe = load_recipe(folder / "recipe.yaml")
    engine.merge(recipe, folder / "merged", recipe_dir=folder)
    loaded(folder / "merged")
    return recipe


def problem(folder: Path, *experts: str, base: str | None = "base") -> str:
    with pytest.raises(OtaError) as caught:
        drafted(folder, *experts, base=base)
    return str(caught.value)


def test_second_moments_of_all_make_it_ota_with_ffg_auto_and_refine(folder: Path) -> None:
    recipe = merged(folder, drafted(folder))
    assert (recipe.merge_method, recipe.setting("density"), recipe.setting("lambda")) == ("ota", 0.4, "auto")
    assert recipe.refined and recipe.base_model == "base" and [one.name for one in recipe.models] == ["expert0", "expert1"]
    assert not drafted(folder).notes


def test_without_second_moments_it_is_the_row_space_regression(folder: Path) -> None:
    for name in ("expert0", "expert1"):
        (folder / name / "exp_avg_sq.safetensors").unlink()
    found = drafted(folder)
    recipe = merged(folder, found)
    assert recipe.merge_method == "rowspace" and recipe.refined and recipe.setting("lambda") == "auto" and not found.notes


def test_second_moments_of_some_are_told_and_not_used(folder: Path) -> None:
    (folder / "expert1" / "exp_avg_sq.safetensors").write_bytes(b"no tensors")
    found = drafted(folder)
    assert merged(folder, found).merge_method == "rowspace"
    why, then = found.notes
    assert why.startswith("expert1 has no second moments that a merge can read: ") and "exp_avg_sq.safetensors" in why
    assert "only expert0 has them, so that the recipe does without" in then


def test_moments_that_are_compressed_already_stay_so(folder: Path) -> None:
    for name in ("expert0", "expert1"):
        path = find_moments(folder / name)
        assert path
        engine.compress_moments(path, folder / "small.safetensors", method="rank_k", rank=2)
        shutil.move(folder / "small.safetensors", path)
    recipe = merged(folder, drafted(folder))
    assert (recipe.merge_method, recipe.setting("compression"), recipe.setting("rank")) == ("ota", "rank_k", 2)


def test_an_expert_says_its_capability_and_its_base(folder: Path) -> None:
    for name, capability in (("expert0", "math"), ("expert1", "true")):
        write_expert_json(folder / name, capability=capability, base_model=str(folder / "base"), trained_at="2026-11-20")
    found = drafted(folder, base=None)
    recipe = merged(folder, found)
    assert [(one.name, one.capability) for one in recipe.models] == [("math", "math"), ("true", "true")]
    assert recipe.base_model == "base" and found.notes[0].startswith(f"base: {folder / 'base'}, as expert.json of ")
    other = drafted(folder, base="./base").notes
    assert len(other) == 2 and "be sure that these are the same weights" in other[0]


def test_a_model_card_names_the_base_as_on_the_hub(folder: Path) -> None:
    for name in ("expert0", "expert1"):
        (folder / name / "README.md").write_text(f"---\nbase_model: [{folder / 'base'}]\n---\n# A model\n")
    assert drafted(folder, base=None).base == "base"
    (folder / "expert1" / "README.md").write_text("---\nbase_model: org/other\n---\n")
    told = problem(folder, base=None)
    assert "the experts name 2 bases" in told and "expert1: org/other" in told and "--base" in told
    for name in ("expert0", "expert1"):
        (folder / name / "README.md").unlink()
    assert "name the base with --base" in problem(folder, base=None)


def test_folders_that_say_nothing_are_called_by_those_above_them(folder: Path) -> None:
    shutil.copytree(folder / "expert0", folder / "math" / "checkpoint-350")
    shutil.copytree(folder / "expert1", folder / "code" / "2026-11-20")
    recipe = merged(folder, drafted(folder, "math/checkpoint-350", "code/2026-11-20/"))
    assert [one.name for one in recipe.models] == ["math", "code"]
    assert [one.model for one in recipe.models] == ["math/checkpoint-350", "code/2026-11-20"]


def test_what_lies_beside_the_recipe_is_named_from_there_and_all_else_in_full(folder: Path, tmp_path: Path) -> None:
    (folder / "recipes").mkdir()
    found = draft(("expert0", "expert1"), "base", cache=folder / "cache", recipe_dir=folder / "recipes")
    assert found.base == str(folder / "base") and found.recipe().models[0].model == str(folder / "expert0")


def test_an_experts_chat_template_is_kept_where_the_base_has_none(folder: Path) -> None:
    (folder / "expert1" / "chat_template.jinja").write_text("{{ messages }}")
    assert merged(folder, drafted(folder)).tokenizer_source == "model:expert1"
    assert (folder / "merged" / "chat_template.jinja").is_file()
    (folder / "base" / "chat_template.jinja").write_text("{{ messages }}")
    assert drafted(folder).recipe().tokenizer_source == "base"


def test_everything_that_stands_in_the_way_is_told(folder: Path) -> None:
    same = problem(folder, "expert0", "base", "./expert0")
    assert "expert base-2 (base) has the same weights as the base base: it has learned nothing; leave it out" in same
    assert "has the same weights as expert0 (expert0)" in same and "leave one of them out" in same
    perturb(write_tiny_llama(folder / "wide", hidden=32), folder / "other", seed=1)
    assert "other" in problem(folder, "expert0", "other") and "same base" in problem(folder, "expert0", "other")
    assert "Is base_model the one that they were fine-tuned from?" in problem(folder, base="wide")
    assert "'nowhere' does not exist" in problem(folder, "expert0", "nowhere")
    assert "'nowhere' does not exist" in problem(folder, base="nowhere")


def test_experts_in_s3_by_address_or_all_below_a_prefix(folder: Path, s3_server: S3Test) -> None:
    uri = s3_server.uri
    upload_folder(folder / "base", f"{uri}/base")
    perturb(folder / "base", folder / "old", seed=9)
    add_moments(folder / "old")
    for name, capability, at in (
        ("old", "math", "2026-11-19"),
        ("expert0", "math", "2026-11-20"),
        ("expert1", "code", "2026-11-20"),
    ):
        write_expert_json(folder / name, capability=capability, base_model=f"{uri}/base", trained_at=at)
        upload_folder(folder / name, f"{uri}/experts/{capability}/{at}", last=EXPERT_JSON)
    whole = drafted(folder, f"{uri}/experts", base=f"{uri}/base").recipe()
    assert [one.model for one in whole.models] == [f"{uri}/experts/code/2026-11-20", f"{uri}/experts/math/2026-11-20"]
    assert whole.merge_method == "ota" and [one.name for one in whole.models] == ["code", "math"]
    named = drafted(folder, f"{uri}/experts/math/2026-11-20", f"{uri}/experts/code/2026-11-20", base=None).recipe()
    assert named.base_model == f"{uri}/base" and named.models[1] == whole.models[0]


def test_the_command_writes_a_recipe_and_says_what_to_do_next(folder: Path) -> None:
    told = said("init", "expert0", "expert1", "--base", "base")
    assert "expert0: expert0; second moments: exp_avg_sq.safetensors" in told and "ota run recipe.yaml" in told
    before = (folder / "recipe.yaml").read_text()
    assert "# Written by ota init: a merge of 2 experts" in before and "ota merge recipe.yaml merged/" in before
    assert "no problems found" in said("plan", "recipe.yaml")
    told = json.loads(said("merge", "recipe.yaml", "merged", "--json"))
    assert told["results"]["lambda"]["value"] > 0
    (folder / "recipe.yaml").write_text("mine")
    assert "recipe.yaml exists already" in refused("init", "expert0", "expert1", "--base", "base")
    assert (folder / "recipe.yaml").read_text() == "mine"
    said("init", "expert0", "expert1", "--base", "base", "--overwrite")
    assert (folder / "recipe.yaml").read_text() == before
    assert "is a folder" in refused("init", "expert0", "--base", "base", "--out", folder)
    assert "does not exist; make it" in refused("init", "expert0", "--base", "base", "--out", "no/where.yaml")
    assert "nothing; leave it out" in refused("init", "expert0", "base", "--base", "base", "--out", "x.yaml")
    assert not (folder / "x.yaml").exists()


@pytest.mark.parametrize("name", ["plain", "2026", "yes", "a b", "mit: Doppelpunkt", "#x", "'q'", '"q"', "1e5", "ä", "~", "null"])
def test_any_name_is_read_back_as_it_is(name: str) -> None:
    from tasks.experts.draft import Expert

    facts: dict[str, Any] = {"capability": name, "moments": "", "compression": ("none", None)}
    found = Draft(base=f"/{name}/base", experts=(Expert(source=f"./{name}", name=name, **facts),), tokenizer=name, notes=())
    recipe = found.recipe()
    assert (recipe.base_model, recipe.models[0].model, recipe.models[0].name) == (f"/{name}/base", f"./{name}", name)
    assert recipe.models[0].capability == name and recipe.tokenizer_source == f"model:{name}"
