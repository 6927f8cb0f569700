"""Recipes go to other machines as JSON, and Prefect's server holds them against the schema of the form."""

import jsonschema
import pytest

from ota_core.recipe.recipe import MergeRecipe, parse_recipe


@pytest.mark.parametrize(
    "recipe",
    [
        {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]},
        {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"int8_mask": True}},
        {
            "merge_method": "ties", "base_model": "base", "tokenizer": {"source": "union", "pad_to_multiple_of": 8},
            "models": [{"model": "a", "parameters": {"weight": [0.1, 0.9], "density": 0.5}}, {"model": "b"}],
        },
        {
            "merge_method": "passthrough",
            "slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}]}, {"sources": [{"model": "b", "layer_range": [0, 1]}]}],
        },
    ],
    ids=["plain", "with a key that is ignored", "with a gradient and a padded vocabulary", "of slices"],
)  # fmt: skip
def test_a_recipe_that_travels_fits_the_schema_of_the_form(recipe: dict[str, object]) -> None:
    sent = parse_recipe(recipe).model_dump(mode="json", by_alias=True)
    jsonschema.validate(sent, MergeRecipe.model_json_schema())
    assert parse_recipe(sent) == parse_recipe(recipe)
