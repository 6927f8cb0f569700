"""Recipes: what they say, in whose spelling, and what they refuse."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ota_core.errors import RecipeError
from ota_core.recipe.recipe import MergeRecipe, load_recipe, parse_recipe
from ota_core.recipe.yaml_text import parse_yaml

PUBLISHED = """\
merge_method: ota
base_model: org/base
models:
  - model: org/math
    parameters:
      preconditioner_path: org/math/optimizer/exp_avg_sq.safetensors
      precond_threshold: 1e-26
  - model: org/code
    parameters: {preconditioner_path: exp_avg_sq.safetensors, precond_threshold: 2.5E-27}
parameters:
  rank1_approx: true
  fallback_to_base: true
  masked_task_vector_merge_method: linear
  rescale: false
  epsilon: 1e-8
  scaling_factor: 1
  normalise: none
dtype: bfloat16
tokenizer: {source: base}
"""


def recipe(parameters: dict[str, Any] | None = None, own: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    raw = {"merge_method": "ota", "base_model": "b", "models": [{"model": "x", "parameters": own or {}}, {"model": "y"}]}
    return {**raw, "parameters": parameters or {}, **top}


def tokens(row: dict[str, Any]) -> dict[str, Any]:
    return {"source": "union", "tokens": {"<|x|>": row}}


def refused(raw: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(raw)
    return str(caught.value)


def test_a_published_recipe_runs_unchanged(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(PUBLISHED)
    read = load_recipe(tmp_path / "r.yaml")
    assert [read.setting("precond_threshold", i) for i in (0, 1)] == [1e-26, 2.5e-27]
    assert (
        read.setting("compression") == "rank1" and read.setting("fallback") == "base" and read.setting("masked_merge") == "linear"
    )
    assert read.setting("epsilon") == 1e-8 and read.output_dtype == "bfloat16" and read.tokenizer_source == "base"
    assert read.models[1].parameters.preconditioner_path == "exp_avg_sq.safetensors"
    assert read.ffg(0) and read.ffg(1)


@pytest.mark.parametrize(
    "text, value",
    [("1e-26", 1e-26), ("1E-26", 1e-26), ("+1e5", 1e5), ("-.5e3", -500.0), ("1.e-3", 1e-3), ("0.4", 0.4), ("12", 12), ("'1e-26'", "1e-26"), ("1e", "1e"),
     ("e5", "e5"), ("1e-26x", "1e-26x"), (".inf", float("inf"))],
)  # fmt: skip
def test_numbers_as_people_write_them(text: str, value: Any) -> None:
    got = parse_yaml(f"a: {text}", "r.yaml")["a"]
    assert got == value and type(got) is type(value)


def test_a_key_written_twice_names_key_and_line() -> None:
    with pytest.raises(
        RecipeError, match=r"(?s)r\.yaml is not valid YAML: the key 'density' appears twice\s+in \"r\.yaml\", line 2"
    ) as caught:
        parse_yaml("density: 0.4\ndensity: 0.5\n", "r.yaml")
    assert "<unicode string>" not in str(caught.value)


def test_a_models_parameters_win_and_one_threshold_replaces_the_other() -> None:
    read = parse_recipe(recipe({"density": 0.4, "scaling_factor": 2.0}, {"precond_threshold": 1e-20}))
    assert (read.setting("density", 0), read.setting("precond_threshold", 0)) == (None, 1e-20)
    assert (read.setting("density", 1), read.setting("precond_threshold", 1)) == (0.4, None)
    assert read.setting("scaling_factor", 0) == 2.0
    read = parse_recipe(recipe({"precond_threshold": 1e-20}, {"density": 0.1, "scaling_factor": 0}))
    assert (read.setting("density", 0), read.setting("precond_threshold", 0), read.setting("scaling_factor", 0)) == (0.1, None, 0)


@pytest.mark.parametrize(
    "ours, other",
    [
        ({"compression": "rank1"}, {"rank1_approx": True}),
        ({}, {"rank1_approx": False}),
        ({"fallback": "mean"}, {"fallback_to_base": False}),
        ({}, {"fallback_to_base": True}),
        ({"masked_merge": "ties", "denominator": "all"}, {"masked_task_vector_merge_method": "ties"}),
        ({"masked_merge": "linear"}, {"masked_task_vector_merge_method": "linear", "denominator": "kept"}),
        ({}, {"masked_task_vector_merge_method": "precond"}),
        ({"compression": "rank_k", "rank": 16}, {"rank": 16}),
        ({"compression": "rank1"}, {"rank": 1}),
        ({"rescale": True}, {"rescale": True, "approximate_norm": True}),
        ({}, {"int8_mask": True}),
        ({"power": 0.5, "lambda": 1.0, "epsilon": 0, "denominator": "kept"}, {}),
        ({"lambda": 2}, {"lambda": 2.0}),
    ],
)
def test_two_spellings_of_one_recipe_are_equal(ours: dict[str, Any], other: dict[str, Any]) -> None:
    assert parse_recipe(recipe(ours)).effective() == parse_recipe(recipe(other)).effective()


def test_where_a_parameter_is_written_does_not_matter() -> None:
    once = parse_recipe(recipe({"density": 0.4}))
    each = parse_recipe(
        recipe(models=[{"model": "x", "parameters": {"density": 0.4}}, {"model": "y", "parameters": {"density": 0.4}}])
    )
    assert once.effective() == each.effective()
    assert once.effective() != parse_recipe(recipe({"density": 0.41})).effective()
    assert (
        parse_recipe(recipe(dtype="float16", out_dtype="bfloat16")).effective()
        == parse_recipe(recipe(dtype="bfloat16")).effective()
    )
    assert (
        parse_recipe(recipe(models=[{"model": "elsewhere", "name": "n", "capability": "c"}, {"model": "y"}])).effective()
        == parse_recipe(recipe()).effective()
    )


# Control characters that PyYAML does not give back (U+0085) are in nobody's names.
WORDS = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"], exclude_characters="/\\"), min_size=1, max_size=60).filter(
    lambda word: word not in {".", ".."}
)


@given(
    parameters=st.fixed_dictionaries(
        {},
        optional={
            "density": st.floats(0.001, 1), "power": st.floats(0, 4), "lambda": st.floats(-3, 3), "scope": st.sampled_from(["global", "per_tensor"]),
            "epsilon": st.floats(0, 1), "compression": st.sampled_from(["none", "rank1", "log8", "rank_k"]), "rescale": st.booleans(), "scaling_factor": st.floats(0, 9),
            "masked_merge": st.sampled_from(["precond", "linear", "ties"]), "bias_correction": st.booleans(),
        },
    ),
    own=st.fixed_dictionaries({}, optional={"density": st.floats(1e-9, 1), "preconditioner_path": WORDS}),
    name=st.none() | WORDS,
)  # fmt: skip
def test_yaml_and_json_give_the_recipe_back(parameters: dict[str, Any], own: dict[str, Any], name: str | None) -> None:
    read = parse_recipe(recipe(parameters, own, models=[{"model": "x", "parameters": own, "name": name}, {"model": "y"}]))
    assert parse_recipe(parse_yaml(read.to_yaml(), "r.yaml")) == read
    assert MergeRecipe.model_validate_json(read.model_dump_json(by_alias=True)) == read
    assert MergeRecipe.model_validate(read.model_dump(mode="json")) == read


@pytest.mark.parametrize(
    "raw, message",
    [
        (recipe({"density": 0.4, "precond_threshold": 1e-20}), "both density and precond_threshold are given"),
        (recipe({"precond_threshold": 1e-20, "metric": "magnitude"}), "with metric magnitude give a density instead"),
        (recipe({"t": 0.5}), "'t' has no effect with merge_method ota"),
        (recipe({"power": 0.5}, merge_method="linear"), "'power' has no effect with merge_method linear"),
        (recipe({}, {"preconditioner_path": "v"}, merge_method="ties"), "'preconditioner_path' has no effect with merge_method ties"),
        (recipe({"rank1_approx": True}, merge_method="dare_ties"), "'compression' has no effect"),
        (recipe({"rank": 2}, merge_method="ties"), "'rank' has no effect with merge_method ties"),
        (recipe({"rank": 2, "compression": "none"}), "'rank' has no effect with compression none; remove it, or set compression: rank_k"),
        (recipe({"rank": 2, "compression": "rank1"}), "'rank' has no effect with compression rank1"),
        (recipe({"rank": 0, "compression": "rank_k"}), "parameters.rank: got 0"),
        (recipe({"rank": True, "compression": "rank_k"}), "parameters.rank: got True"),
        (recipe({"rank": 1.5, "compression": "rank_k"}), "parameters.rank: got 1.5"),
        (recipe({"density": 0.4}, base_model=None), "base_model is missing: FFG"),
        (recipe({"lambda": 1.5}, base_model=None), "parameters.lambda acts on task vectors"),
        (recipe({"rescale": True}, base_model=None), "parameters.rescale acts on task vectors"),
        (recipe({"masked_merge": "ties"}, base_model=None), "parameters.masked_merge acts on task vectors"),
        (recipe({}, base_model=None, merge_method="ties"), "base_model is missing: ties works on task vectors"),
        (recipe({}, merge_method="slerp"), "slerp needs 't'"),
        (recipe({"t": 0.5}, merge_method="slerp", models=[{"model": m} for m in "xyz"]), "the recipe names 3"),
        (recipe(tokenizer_source="model:"), "tokenizer_source: got 'model:'"),
        (recipe(tokenizer_source="largest"), "expected base, model:<name> or union"),
        (recipe(models=[{"model": "x", "name": "a"}, {"model": "y", "name": "a"}]), "the name 'a' is given twice"),
        (recipe(models=[{"model": "x", "name": "a/b"}]), "the name 'a/b' has a slash; names also label files, write 'a-b'"),
        (recipe(models=[{"model": "x", "name": "base"}]), "the name 'base' is kept for another model"),
        (recipe(models=[]), "models"),
        (recipe({"densty": 0.4}), "unknown key 'parameters.densty'; did you mean 'density'?"),
        (recipe({}, {"precond_treshold": 1}), "unknown key 'models[0].parameters.precond_treshold'; did you mean 'precond_threshold'?"),
        (recipe(base_modle="b"), "unknown key 'base_modle'; did you mean 'base_model'?"),
        (recipe({"rank1_aprox": True}), "did you mean 'rank1_approx'?"),
        (recipe({"rank1_approx": True, "compression": "none"}), "'parameters.rank1_approx'"),
        *((recipe({key: typed}), f"parameters.{key}: got '{typed}'; input should be {known}") for key, typed, known in (
            ("masked_merge", "linaer", "'precond', 'linear'"), ("compression", "rank_1", "'none', 'rank1'"),
            ("fallback", "bass", "'base' or 'mean'"), ("scope", "global_", "'global' or 'per_tensor'"))),
        (recipe({"masked_merg": "linear"}), "unknown key 'parameters.masked_merg'; did you mean 'masked_merge'?"),
        (recipe(merge_method="tis"), "unknown merge_method 'tis'; did you mean 'ties'?"),
        (recipe(slices=[]), "slices: the list is empty, expected at least one slice"),
        (recipe({"density": [0.1, 1.9]}), "parameters.density: got 1.9, input should be less than or equal to 1"),
        (recipe({"density": []}), "parameters.density: got an empty list, expected a number, a gradient such as"),
        (recipe({"density": [{"filter": "mlp"}]}), "parameters.density: got {'filter': 'mlp'} without 'value'"),
        (recipe({"density": [{"fliter": "mlp", "value": 0.1}]}), "parameters.density: got the keys fliter in a list of filters"),
        (recipe({"compression": ["none", "rank1"]}), "parameters.compression: got a list; compression holds for whole models"),
        (recipe(slices=[{"sources": [{"model": "x", "layer_range": [4, 2]}]}]), "slices[0].sources[0].layer_range: got [4, 2]; expected two layers"),
        (recipe(slices=[{"sources": [{"model": "x", "layer_range": [0, 2]}], "merge_method": "ties"}]), "a document of its own (---)"),
        (
            recipe(slices=[{"sources": [{"model": "x", "layer_range": [0, 2]}, {"model": "y", "layer_range": [0, 3]}]}]),
            "slices[0]: the sources of a slice give different numbers of layers",
        ),
        (
            recipe(slices=[{"sources": [{"model": "x", "layer_range": [0, 2]}, {"model": "y", "layer_range": [1, 3]}]}]),
            "name the base among the sources, with its layer_range",
        ),
        (recipe(merge_method="ffg"), "ffg grafts the edit of one expert onto the base, the recipe names 2"),
        (recipe(merge_method="DARE-TIES"), "unknown merge_method 'DARE-TIES'; write dare_ties"),
        (recipe({"ties_density": 0.2}), "'ties_density' has no effect with masked_merge precond"),
        (recipe(tokenizer=tokens({"source": {"kind": "zeroo"}})), "kind: got 'zeroo'; input should be 'zero' or 'model_token'"),
        (recipe(tokenizer=tokens({"source": {"kind": "model_token", "model": "x"}})), "takes a model and one of token and token_id"),
        (recipe(tokenizer=tokens({"source": "nowhere"})), "'<|x|>' takes its row from 'nowhere', which is no model of the recipe; expected one of: b, x, y"),
        (recipe(tokenizer=tokens({"force": True})), "force: true needs a source"),
        (recipe(tokenizer={"source": "union", "pad_to_multiple_of": 0}), "tokenizer.pad_to_multiple_of: got 0"),
        (recipe(tokenizer={"source": "base", "pad": 8}), "unknown key 'tokenizer.pad'"),
        (recipe(tokenizer={"source": "base"}, tokenizer_source="union"), "its source is base and tokenizer_source says union; keep one"),
        (recipe({}, merge_method="ties", models=[{"model": "x", "revision": "v1"}]), "write it behind the model's name: org/name@revision"),
        (recipe({"power": float("nan")}), "parameters.power"),
        (recipe({"lambda": float("inf")}), "parameters.lambda"),
        (recipe({"power": "half"}), "parameters.power: got 'half'"),
        ({"base_model": "b", "models": [{"model": "x"}]}, "the key 'merge_method' is missing"),
        ([1, 2], "expected a mapping with merge_method, base_model and models, got list"),
        (None, "expected a mapping"),
    ],
)  # fmt: skip
def test_what_is_refused_and_why(raw: Any, message: str) -> None:
    assert message in refused(raw)


@pytest.mark.parametrize("density", [0, -0.1, 1.0000001, 40, float("nan"), float("inf"), "0.4x", True])
@pytest.mark.parametrize("own", [False, True])
def test_a_density_outside_zero_to_one_is_named_with_its_place(density: Any, own: bool) -> None:
    text = refused(recipe({}, {"density": density}) if own else recipe({"density": density}))
    assert ("models[0].parameters.density" if own else "parameters.density") in text


def test_every_problem_is_listed() -> None:
    text = refused(recipe({"density": 2, "pwer": 1, "fallback": "bass"}, {"weights": 1}, dtype="int8", extra=1))
    assert text.startswith("6 problems found:")
    for part in (
        "parameters.density",
        "'parameters.pwer'",
        "parameters.fallback",
        "'models[0].parameters.weights'",
        "dtype",
        "'extra'",
    ):
        assert part in text
    text = refused(recipe({"density": 0.4, "precond_threshold": 1, "t": 0.1, "seed": 1}))
    assert text.startswith("4 problems found:") and "models[0] (x)" in text and "models[1] (y)" in text


def test_a_rank_is_in_force_with_rank_k_alone() -> None:
    assert MergeRecipe.model_validate(recipe({"compression": "rank_k"})).setting("rank") == 4
    given = MergeRecipe.model_validate(recipe({"compression": "rank_k", "rank": 7}))
    assert given.setting("rank") == given.effective()["parameters"]["rank"] == 7
    for compression in ("none", "rank1", "log8"):
        other = MergeRecipe.model_validate(recipe({"compression": compression}))
        assert other.setting("rank") is None and "rank" not in other.effective()["parameters"]


FORMS = """\
x-own: &own
  density: 0.4
merge_method: ota
base_model: b
models:
  - model: b
  - model: x
    parameters:
      <<: *own
      densty: 0.3
  - model: y
    parameters: {gamma: 0.3}
parameters:
  power: half
"""


@pytest.mark.parametrize("start, end", [("", "\n"), ("\ufeff", "\r\n")])
def test_a_refusal_names_the_line(tmp_path: Path, start: str, end: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes((start + FORMS.replace("\n", end)).encode())
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert "line 10: unknown key 'models[1].parameters.densty'; did you mean 'density'?" in str(caught.value)
    assert "line 14: parameters.power: got 'half'" in str(caught.value)
    path.write_text(FORMS.replace("densty", "density").replace("power: half", "power: 0.5"))
    with pytest.raises(RecipeError, match=r"line 12: models.*'gamma' has no effect"):
        load_recipe(path)
    path.write_text(FORMS.replace("densty", "density").replace("power: half", "power: 0.5").replace("{gamma: 0.3}", "{}"))
    found = load_recipe(path)
    assert [entry.model for entry in found.models] == ["x", "y"] and found.setting("density", 0) == 0.3


@pytest.mark.parametrize(
    "raw",
    [
        recipe({"density": [0.1, 0.9], "lambda": [{"filter": "mlp", "value": [1, 2]}, {"value": 0.5}]}, {"scaling_factor": [1, 2]}),
        recipe({"weight": 2}, {"rank1_approx": True}, chat_template="llama3"),
        {
            "merge_method": "linear", "parameters": {"weight": [1, 2]},
            "slices": [{"sources": [{"model": "x", "layer_range": [0, 2], "parameters": {"weight": [{"filter": "mlp", "value": 1}]}}]}],
        },
        {
            "merge_method": "task_arithmetic", "base_model": "b",
            "modules": {"decoder": {"models": [{"model": "x"}, {"model": "b"}]}, "encoder": {"slices": [{"sources": [{"model": "y", "layer_range": [0, 1]}]}]}},
        },
    ],
)  # fmt: skip
def test_varied_recipes_come_back_from_yaml_and_json(raw: dict[str, Any]) -> None:
    read = parse_recipe(raw)
    assert parse_recipe(parse_yaml(read.to_yaml(), "r.yaml")) == read
    assert MergeRecipe.model_validate_json(read.model_dump_json(by_alias=True)) == read
    assert MergeRecipe.model_validate(read.model_dump(mode="json", by_alias=True)).effective() == read.effective()


def test_what_mergekit_leaves_unread_is_left_out_and_named() -> None:
    raw = recipe(
        {"normalize": 1.0, "t": [0, 1], "int8_mask": 1.0, "density": 0.4},
        {"weight": 0.3, "normalize": False},
        merge_method="task_arithmetic",
    )
    read = parse_recipe(raw | {"trust_remote_code": True})
    assert read.ignored == ("trust_remote_code", "parameters.t", "parameters.density", "models[0].parameters.normalize")
    assert read.setting("normalize") is True and not read.varies
    plain = recipe({"normalize": True}, {"weight": 0.3}, merge_method="task_arithmetic")
    assert read.effective() == parse_recipe(plain).effective()
    assert (
        parse_recipe(parse_yaml(read.to_yaml(), "r.yaml"))
        == read
        == MergeRecipe.model_validate_json(read.model_dump_json(by_alias=True))
    )
    with pytest.raises(RecipeError, match=r"a study: parameters: 't' has no effect with merge_method task_arithmetic; remove it"):
        parse_recipe(raw, "a study", strict=True)
    said = (
        parse_recipe(recipe({"lambda": 0.5}, merge_method="sce")).remarks()
        + parse_recipe(recipe(merge_method="linear")).remarks()
    )
    assert "mergekit's sce has no such parameter" in said[0] and "the base takes no part in linear" in said[1]
    listed = [{"model": "b"}, {"model": "x"}]
    assert not parse_recipe(recipe({"lambda": 0.5}, merge_method="ties")).remarks()
    assert not parse_recipe(recipe(merge_method="linear", models=listed)).remarks()


def test_of_masked_ties_over_all_experts_alone_the_identity_changed() -> None:
    """Versions before divided by the experts that agree, whatever the denominator."""
    keys = {
        (merge, denominator): "ties_divided_by"
        in parse_recipe(recipe({"masked_merge": merge, "denominator": denominator})).effective()
        for merge in ("precond", "linear", "ties")
        for denominator in ("kept", "all")
    }
    assert [key for key, new in keys.items() if new] == [("ties", "all")]
    for method in ("ties", "breadcrumbs", "breadcrumbs_ties"):
        assert "rescale" not in parse_recipe(recipe(merge_method=method)).effective()["parameters"]
        assert parse_recipe(recipe({"rescale": True}, merge_method=method)).effective()["parameters"]["rescale"]


def test_what_decides_nothing_or_is_new_leaves_the_identity_of_old_recipes() -> None:
    keys = set(parse_recipe(recipe({"density": 0.4})).effective()["parameters"])
    assert not keys & {"rescale_relative_threshold", "approximate_norm", "ties_density", "slices", "chat_template"}
    assert parse_recipe(recipe({"density": 0.4})).effective()["experts"][0] == {
        "density": 0.4, "precond_threshold": None, "scaling_factor": 1.0
    }  # fmt: skip
    base = {"model": "b"}
    assert parse_recipe(recipe(models=[base, {"model": "x"}, {"model": "y"}])).effective() == parse_recipe(recipe()).effective()
    with_lists, other = (parse_recipe(recipe({"density": value})).effective() for value in ([0.1, 0.2], [0.1, 0.3]))
    assert with_lists != other


def test_values_at_a_tensor() -> None:
    read = parse_recipe(recipe({"density": [0.2, 0.8]}, {"density": [{"filter": "mlp", "value": [0.1, 0.5, 0.3]}]}))
    at = read.at("model.layers.1.mlp.up_proj.weight", 0.25)
    assert (at.setting("density", 0), at.setting("density", 1)) == (pytest.approx(0.3), pytest.approx(0.35))
    assert read.at("model.norm.weight", 0.0).setting("density", 0) == 0.2
