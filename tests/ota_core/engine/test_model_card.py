"""The model card: what a hub reads of it, licences, scores, digests."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from ota_core.engine.licences import card_head, licences
from ota_core.engine.model_card import model_card
from ota_core.plan.inputs import ExpertInput, MergeInputs, ModelInput
from ota_core.recipe.recipe import MergeRecipe

APACHE = "---\nlicense: apache-2.0\nlanguage: en\nbase_model: org/root\n---\n# A model\n"
SCORES = {"scores": "| model | math |\n| --- | ---: |\n| **ota** | 75.0 |", "measured": {"math": 0.75}, "suite": "demo"}


def inputs(
    tmp_path: Path, cards: dict[str, str | None], sources: dict[str, str] | None = None, folders: dict[str, str] | None = None
) -> MergeInputs:
    """Models with these cards, in folders of their names where ``folders`` tells no others."""
    paths = {name: tmp_path / (folders or {}).get(name, name) for name in cards}
    for name, text in cards.items():
        paths[name].mkdir(parents=True)
        if text is not None:
            (paths[name] / "README.md").write_text(text)
    source = {name: f"s3://models/{name}" for name in cards} | (sources or {})
    experts = [
        ExpertInput(name=name, path=paths[name], source=source[name], digest=f"xxh3:{name}") for name in cards if name != "base"
    ]
    base = ModelInput(name="base", path=paths["base"], source=source["base"], digest="xxh3:base") if "base" in cards else None
    return MergeInputs(base=base, experts=tuple(experts))


def recipe(found: MergeInputs) -> MergeRecipe:
    base = found.base.source if found.base else None
    models = [{"model": expert.source, "name": expert.name} for expert in found.experts]
    return MergeRecipe.model_validate(
        {"merge_method": "ota", "base_model": base, "models": models, "parameters": {"density": 0.4}, "dtype": "bfloat16"}
    )


def card(found: MergeInputs, **scores: Any) -> tuple[dict[str, Any], str]:
    """Head and body, as the hub's own library reads them and would write them again."""
    densities = {"math": {"kept": 400, "total": 1000, "density": 0.4}}
    text = model_card(recipe(found), found, {"densities": densities}, "f1", **scores)
    _, head, body = text.split("---\n", 2)
    read: dict[str, Any] = yaml.safe_load(head)
    assert ModelCard(text).data.to_dict() == read
    return read, body


def test_one_licence_of_all_inputs_is_carried_over(tmp_path: Path) -> None:
    head, body = card(inputs(tmp_path, {"base": APACHE.replace("apache-2.0", "Apache-2.0"), "math": APACHE, "code": APACHE}))
    assert head["license"] == "apache-2.0" and "Licence:" not in body
    assert head["language"] == ["en"]


@pytest.mark.parametrize(
    ("cards", "words"),
    [
        ({"base": APACHE, "math": "---\nlicense: cc-by-nc-4.0\n---\n"}, ["different licences", "base: apache-2.0; math: cc-by-nc-4.0"]),
        ({"base": APACHE, "math": None}, ["math state no licence", "apache-2.0"]),
        ({"base": None, "math": None}, ["no input states a licence"]),
        ({"base": APACHE, "math": "---\nlicense: mit\n---\n", "code": "no head"}, ["different licences", "Not stated for code"]),
        # What says nothing is no licence, however many say it.
        ({"base": "---\nlicense: unknown\n---\n", "math": "---\nlicense: unknown\n---\n"}, ["no input states a licence"]),
        ({"base": "---\nlicense: other\n---\n", "math": "---\nlicense: Other\nlicense_link: LICENSE\n---\n"}, ["no input states a licence"]),
        ({"base": APACHE, "math": "---\nlicense: [apache-2.0, unknown]\n---\n"}, ["math state no licence"]),
        ({"base": "---\nlicense: [mit, apache-2.0]\n---\n", "math": "---\nlicense: mit\n---\n"}, ["base: apache-2.0 or mit; math: mit"]),
        # One that has no identifier is another licence than an equally unnamed one.
        ({"base": "---\nlicense: other\nlicense_name: a\n---", "math": "---\nlicense: other\nlicense_name: b\n---"}, ["other: a", "other: b"]),
    ],
)  # fmt: skip
def test_licences_that_differ_or_are_silent_give_a_warning_and_no_licence(
    tmp_path: Path, cards: dict[str, str | None], words: list[str]
) -> None:
    found = inputs(tmp_path, cards)
    head, body = card(found)
    assert "license" not in head
    line = next(line for line in body.splitlines() if line.startswith("> **Licence:**"))
    assert all(word in line for word in words), line
    assert licences(found).warning is not None


def test_a_named_licence_keeps_its_name_and_link(tmp_path: Path) -> None:
    own = "---\nlicense: other\nlicense_name: model-licence\nlicense_link: https://example.org/l\n---\n"
    head, _ = card(inputs(tmp_path, {"base": own, "math": own}))
    assert (head["license"], head["license_name"], head["license_link"]) == ("other", "model-licence", "https://example.org/l")


def test_a_choice_of_licences_stays_a_list_of_identifiers(tmp_path: Path) -> None:
    both = "---\nlicense: [MIT, apache-2.0]\n---\n"
    head, body = card(inputs(tmp_path, {"base": both, "math": "---\nlicense:\n- Apache-2.0\n- mit\n---\n"}))
    assert head["license"] == ["apache-2.0", "mit"]
    assert "| base | s3://models/base | apache-2.0 or mit |" in body and "Licence:" not in body


def test_a_link_to_a_file_that_is_not_copied_is_left_out(tmp_path: Path) -> None:
    own = "---\nlicense: other\nlicense_name: model-licence\nlicense_link: LICENSE\n---\n"
    head, _ = card(inputs(tmp_path, {"base": own, "math": own}))
    assert (head["license"], head["license_name"]) == ("other", "model-licence") and "license_link" not in head


@pytest.mark.parametrize("language", ["no", "[no, en]", "\n- en\n- 'no'"])
def test_norwegian_is_a_language(tmp_path: Path, language: str) -> None:
    head, _ = card(inputs(tmp_path, {"base": f"---\nlanguage: {language}\n---\n", "math": None}))
    assert head["language"] in (["no"], ["no", "en"], ["en", "no"])


def test_an_experts_manifest_may_state_the_licence(tmp_path: Path) -> None:
    found = inputs(tmp_path, {"base": APACHE, "math": None})
    (tmp_path / "math" / "expert.json").write_text('{"capability": "math", "license": "apache-2.0"}')
    assert licences(found).head == {"license": "apache-2.0"}


@pytest.mark.parametrize(
    "text", ["", "---\n", "---\nlicense: [\n---\n", "---\n- a\n---\n", "# no head\n---\nlicense: mit\n---\n"]
)
def test_cards_without_a_readable_head_state_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert card_head(tmp_path) == {}


def test_the_hub_is_told_only_names_that_it_knows(tmp_path: Path) -> None:
    sources = {"base": "org/root@main", "math": "org/math", "code": "s3://experts/code"}
    folders = {name: f"hub/models--org--{of}/snapshots/0123abc" for name, of in (("base", "root"), ("math", "math"))}
    cards = {"base": APACHE, "math": None, "code": "---\nbase_model: other/start\n---\n"}
    head, body = card(inputs(tmp_path, cards, sources, folders))
    assert head["base_model"] == ["org/root", "org/math", "other/start"] and head["base_model_relation"] == "merge"
    assert "s3://experts/code" in body


def test_a_folder_that_looks_like_a_hubs_name_is_none(tmp_path: Path) -> None:
    (tmp_path / "experts").mkdir()
    found = inputs(tmp_path, {"base": None, "experts/math": None}, {"base": "base", "experts/math": "experts/math"})
    expert = found.experts[0]
    named = MergeInputs(base=found.base, experts=(ExpertInput(name="math", path=expert.path, source="experts/math"),))
    assert "base_model" not in card(named)[0]
    # A link of that name leads to a folder of another.
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "math").symlink_to(expert.path)
    led = ExpertInput(name="math", path=(tmp_path / "linked" / "math").resolve(), source="linked/math")
    assert "base_model" not in card(MergeInputs(base=found.base, experts=(led,)))[0]


def test_scores_stand_in_the_head_and_below_a_heading(tmp_path: Path) -> None:
    found = inputs(tmp_path, {"base": APACHE, "math": APACHE, "code": APACHE})
    head, body = card(found, **SCORES)
    result = head["model-index"][0]["results"][0]
    assert result["metrics"] == [{"type": "math", "value": 0.75, "name": "math (0 to 1)"}]
    # A suite is no data set of the hub's: an id of one would name somebody else's.
    assert result["dataset"] == {"type": "custom", "name": "lm-eval, suite demo"} and result["task"]["type"] == "text-generation"
    assert f"\n## Scores\n\n{SCORES['scores']}\n\n## Recipe" in body
    quick, body = card(found, **SCORES | {"measured": {}})
    assert "model-index" not in quick and "## Scores" in body


def test_every_input_is_named_with_its_digest(tmp_path: Path) -> None:
    found = inputs(tmp_path, {"base": APACHE, "math": APACHE})
    expert = found.experts[0]
    moments = ExpertInput(
        name="math", path=expert.path, source="s3://models/math", digest="xxh3:math", moments=tmp_path / "optimizer.pt", moments_digest="xxh3:v"
    )  # fmt: skip
    head, body = card(MergeInputs(base=found.base, experts=(moments,)))
    for line in (
        "| base | s3://models/base | apache-2.0 | xxh3:base |",
        "| expert math | s3://models/math | apache-2.0 | xxh3:math |",
        "| second moments of math | optimizer.pt |  | xxh3:v |",
        "| math | 400 | 1,000 | 0.400000 |",
    ):
        assert line in body
    assert "model-index" not in head and "## Scores" not in body
    assert head["tags"] == ["merge", "ota-merging", "ota"] and head["library_name"] == "transformers"
    assert MergeRecipe.model_validate(yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])) == recipe(found)
