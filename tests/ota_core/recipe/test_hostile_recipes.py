"""Recipes that nobody wrote in earnest: whatever a file holds, it ends as a recipe or as a RecipeError, soon and with a short message."""

import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ota_core.errors import RecipeError
from ota_core.recipe.parameters import MergeParameters
from ota_core.recipe.recipe import MergeRecipe, parse_recipe, parse_text
from ota_core.recipe.yaml_text import dump_yaml, parse_yaml

LONGEST = 120_000
"""Characters of a message with a hundred problems."""
KEYS = sorted(
    {field.alias or name for kind in (MergeRecipe, MergeParameters) for name, field in kind.model_fields.items()}
    | {
        "tokenizer",
        "modules",
        "slices",
        "sources",
        "layer_range",
        "model",
        "value",
        "filter",
        "rank1_approx",
        "select_topk",
        "<<",
        "name",
    }
)
METHODS = ["ota", "ties", "slerp", "linear", "della", "passthrough", "sce", "nuslerp", "ffg", "nearswap", "fisher", "rowspace"]
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([10**12, -(2**63), 2**63, 10**400, 1e300, -0.0, float("nan"), float("inf")])
    | st.floats()
    | st.sampled_from(
        ["base", "a/b", "", "~nouser/x", "\ud800", "\0", "x" * 3000, "union", "auto", "rank_k", "model:", "model:x", "none", "{{"]
    )
    | st.text(max_size=5)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | scalars.filter(lambda one: one == one), inner, max_size=3)
    ),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {"model": st.sampled_from(["a", "b", "base"]) | values},
    optional={"parameters": st.dictionaries(st.sampled_from(KEYS), values, max_size=3) | values},
)
recipes = st.fixed_dictionaries(
    {"merge_method": st.sampled_from(METHODS) | values, "models": st.lists(entries | values, max_size=3) | values},
    optional={"base_model": st.just("base") | values, "parameters": st.dictionaries(st.sampled_from(KEYS), values, max_size=4) | values,
              "slices": st.lists(st.fixed_dictionaries({"sources": st.lists(entries, max_size=2) | values}) | values, max_size=2),
              "modules": st.dictionaries(st.text(max_size=3), st.fixed_dictionaries({"slices": values}) | values, max_size=2),
              "tokenizer_source": values, "chat_template": values, "dtype": values, "scales": values,
              "tokenizer": values},
)  # fmt: skip


def understood(call: Any) -> str:
    """What the error says, empty without one. Any other exception than RecipeError goes on."""
    start = time.monotonic()
    try:
        call()
    except RecipeError as error:
        assert len(str(error)) < LONGEST
        return str(error)
    finally:
        assert time.monotonic() - start < 30
    return ""


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipes)
def test_any_values(raw: dict[str, Any]) -> None:
    understood(lambda: parse_recipe(raw))


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    recipes,
    st.integers(0, 400),
    st.sampled_from(
        ["", "&a ", "*a", "!x ", "? ", "- ", ": ", "[", "{", "'", '"', "\\ud800", "<<: ", "\t", "2026-02-30", "%", "|"]
    ),
)
def test_any_text(raw: dict[str, Any], place: int, put: str) -> None:
    try:
        text = dump_yaml(raw)
    except Exception:
        return
    understood(lambda: parse_text(text[:place] + put + text[place:], "r.yaml"))


EXPANDING = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "\n".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("? [a]\n: b", "a key is a list"),
        ("? {a: b}\n: c", "a key is a dict"),
        ("a: " + "9" * 5000, "no int that can be read"),
        ("a: " + "9" * 300, "more than 64 bits"),
        ("a: 0x_", "no int that can be read"),
        ("a: !!int foo", "no int that can be read"),
        ("a: !!bool x", "no bool that can be read"),
        ("a: !!timestamp foo", "a tag (!)"),
        ("a: !!binary xx", "a tag (!)"),
        ("a: !!python/object:os.system x", "a tag (!)"),
        ("!!map x", "a tag calls it a mapping"),
        ('a: "\\ud800"', "a text holds a character"),
        ('a: "\\0"', "a text holds a character"),
        ('a: "\\UFFFFFFFF"', "an escape"),
        ("a: &a [*a]", "an anchor holds itself"),
        ("[" * 5000, "nested deeper than 100 levels"),
        (EXPANDING, "more than 100000 values"),
        ("<<: 3", "expected a mapping"),
    ],
    ids=lambda text: text[:20],
)
def test_yaml_that_is_none(text: str, said: str) -> None:
    assert said in understood(lambda: parse_yaml(text, "r.yaml"))


def test_dates_are_texts() -> None:
    assert parse_yaml("a: 2026-02-30\nb: 2026-01-01 25:61:61", "r.yaml") == {"a": "2026-02-30", "b": "2026-01-01 25:61:61"}


@pytest.mark.parametrize("text", ["a: *hunter2secret", "[default]\nkey = hunter2secret", "a: hunter2secret: b", "hunter2secret"])
def test_what_is_no_recipe_is_not_quoted(text: str) -> None:
    said = understood(lambda: parse_text(text, "credentials"))
    assert said and "hunter2secret" not in said


def test_twenty_thousand_models() -> None:
    raw = {"merge_method": "linear", "models": [{"model": "a"}] * 20_000}
    assert "at most 1000" in understood(lambda: parse_recipe(raw))


@pytest.mark.parametrize(
    "raw",
    [
        {"merge_method": "ota", "models": [{"model": "a"}], "base_model": []},
        {"merge_method": "ffg", "models": [{"model": "a"}], "parameters": {"varying": True}},
        {"merge_method": "ffg", "models": [{"model": "a"}], "parameters": {"varying": {"density": 5}}},
        {"merge_method": {"a": "x" * 100_000}, "models": ["y" * 100_000], "z" * 100_000: 1},
    ],
    ids=["base", "varying", "varying values", "long"],
)
def test_found_by_fuzzing(raw: dict[str, Any]) -> None:
    assert 0 < len(understood(lambda: parse_recipe(raw))) < 5000
