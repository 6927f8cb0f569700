"""The keys that every method's runs share."""

from typing import Any

import pytest

from ota_core.recipe.recipe import MergeRecipe
from tasks.tracking.params import comparable_params

KEYS = {"density", "power", "compression", "lambda", "expert_count"}


def recipe(method: str, models: list[dict[str, Any]] | None = None, **parameters: Any) -> MergeRecipe:
    entries = models or [{"model": "a"}, {"model": "b"}]
    return MergeRecipe.model_validate({"merge_method": method, "base_model": "base", "models": entries, "parameters": parameters})


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (recipe("ota", density=0.4, compression="rank1"), (0.4, 0.5, "rank1", 1.0)),
        (recipe("ota"), (1.0, 0.5, "none", 1.0)),
        (recipe("ota", power=1.0, **{"lambda": 1.5}), (1.0, 1.0, "none", 1.5)),
        (recipe("linear"), (1.0, 0.0, "unused", 1.0)),
        (recipe("task_arithmetic", **{"lambda": 0.3}), (1.0, 0.0, "unused", 0.3)),
        (recipe("ties", density=0.2), (0.2, 0.0, "unused", 1.0)),
        (recipe("fisher", compression="log8"), (1.0, 1.0, "log8", 1.0)),
        (recipe("slerp", [{"model": "a"}], t=0.5), (1.0, 0.0, "unused", 1.0)),
    ],
)  # fmt: skip
def test_every_method_has_every_key(made: MergeRecipe, expected: tuple[float, float, str, float]) -> None:
    params = comparable_params(made, {})
    assert set(params) == KEYS
    assert (params["density"], params["power"], params["compression"], params["lambda"]) == expected
    assert all(isinstance(params[key], float) for key in ("density", "power", "lambda")), "an axis of numbers"
    assert params["expert_count"] == len(made.models)


def test_densities_that_differ_are_one_number_and_a_list() -> None:
    models = [{"model": "a", "parameters": {"density": 0.2}}, {"model": "b"}]
    params = comparable_params(recipe("ota", models, density=0.6), {"a": 0.2001, "b": 0.6001})
    assert params["density"] == pytest.approx(0.4) and params["density_per_expert"] == "0.2,0.6"


def test_a_threshold_counts_as_the_density_that_it_led_to() -> None:
    params = comparable_params(recipe("ota", precond_threshold=1e-20), {"a": 0.25, "b": 0.75})
    assert params["density"] == 0.5 and params["density_per_expert"] == "0.25,0.75"
    models = [{"model": "a", "parameters": {"precond_threshold": 1e-20}}, {"model": "b", "parameters": {"density": 0.5}}]
    assert comparable_params(recipe("ota", models), {"a": 0.1, "b": 0.4999})["density_per_expert"] == "0.1,0.5"
