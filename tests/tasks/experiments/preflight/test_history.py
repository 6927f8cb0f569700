"""What predictions learn from: merges as MLflow holds them, scores of the same models, the studies' merges and how their file is made."""

import json
from pathlib import Path
from typing import Any

import pytest

from ota_core.errors import StorageError
from ota_core.plan.inputs import ExpertInput, MergeInputs, ModelInput
from tasks.experiments.preflight.features import MEASURES
from tasks.experiments.preflight.history import examples, here, scored, shipped, write_shipped
from tasks.experiments.preflight.predict import Predictor, why_not
from tasks.tracking.experiment import read_experiment
from tasks.tracking.merge import ChildRun, MergeRun, log_merge
from tasks.tracking.store import Store, resolve_store

CAPABILITIES = ("math", "code")


def log(store: Store, number: int, *, measured: bool = True, refine: str | None = None, lineup: int = 0) -> None:
    """A merge of two experts; ``lineup`` tells which."""
    features = {
        f"preflight/{measure}/{name}": 0.1 * number + 0.01 * i for i, name in enumerate(CAPABILITIES) for measure in MEASURES
    }
    retention = {f"retention/{name}": 0.5 + 0.02 * number for name in CAPABILITIES}
    children = [
        ChildRun(name="base", role="base", digest="d-base", metrics={"score/math": 0.1, "score/code": 0.2, "score/avg": 0.15}),
        *(
            ChildRun(name=name, role="expert", capability=name, digest=f"d-{name}{lineup}", metrics={f"score/{name}": 0.9})
            for name in CAPABILITIES
        ),
        ChildRun(name="merged", role="merge", digest=f"m{number}"),
    ]
    run = MergeRun(
        name=f"merge {number}", method="ota", params={"expert_count": 2, **({"refine": refine} if refine else {})}, model_uri="/nowhere",
        tags={"recipe_fingerprint": f"f{number}", "suite": "tiny"}, metrics=retention | (features if measured else {}), children=children,
        recipe_yaml="", record={}, model_digest=f"m{number}", registered_model=None,
    )  # fmt: skip
    log_merge(run, tracking_uri=store.uri)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two merges of one set of experts, one of another, and one that an earlier version logged."""
    found = resolve_store(root=tmp_path_factory.mktemp("mlflow"))
    log(found, 1)
    log(found, 2, refine="rowspace")
    log(found, 3, lineup=1)
    log(found, 4, measured=False, lineup=1)
    return found


def inputs(lineup: int) -> MergeInputs:
    nowhere: dict[str, Any] = {"path": Path("/nowhere")}
    experts = (ExpertInput(name=name, digest=f"d-{name}{lineup}", capability=name, **nowhere) for name in CAPABILITIES)
    return MergeInputs(base=ModelInput(name="base", digest="d-base", **nowhere), experts=tuple(experts))


def test_merges_are_read_back_with_their_measures(store: Store) -> None:
    found = [*here(read_experiment(store))]
    assert len(found) == 6 and {one.capability for one in found} == {"tiny/math", "tiny/code"} and all(one.here for one in found)
    assert len({one.group for one in found}) == 2 and [one.refined for one in found].count(True) == 2
    newest = next(one for one in found if one.capability == "tiny/code")
    assert newest.features == pytest.approx(dict.fromkeys(MEASURES, 0.31)) and newest.retention == pytest.approx(0.56)
    assert examples(store) == [*shipped(), *found]


def test_scores_of_the_very_same_models_are_known(store: Store) -> None:
    known, capabilities = scored(store, inputs(1))
    assert known and known.base == {"math": 0.1, "code": 0.2} and known.experts == {"math": ("math", 0.9), "code": ("code", 0.9)}
    assert capabilities == {"math": "tiny/math", "code": "tiny/code"}
    assert scored(store, inputs(1), "other") == scored(store, inputs(2)) == (None, {})


def test_a_store_without_merges_is_not_made_and_a_server_that_is_away_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = resolve_store(root=tmp_path)
    assert examples(empty) == shipped() and scored(empty, inputs(0)) == (None, {}) and not [*tmp_path.iterdir()]
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(StorageError, match="failed while reading the experiment"):
        examples(resolve_store(tracking_uri="http://127.0.0.1:9"))


def test_what_is_shipped_is_enough_and_says_how_it_was_made() -> None:
    found = shipped()
    assert not why_not(found) and not any(one.here for one in found)
    said = json.loads((Path(__file__).parents[4] / "tasks/experiments/preflight/shipped.json").read_text())
    learned = Predictor(found)
    assert said["error"] == pytest.approx(learned.error, abs=1e-4) and said["made_by"].startswith("python -m")
    assert {name: value for name, (value, _) in said["coefficients"].items()} == pytest.approx(
        {name: value for name, (value, _) in learned.coefficients().items()}, abs=1e-4
    )


def test_shipping_makes_a_group_of_each_study(store: Store, tmp_path: Path) -> None:
    assert write_shipped({"a": store, "b": store, "c": store}, tmp_path / "shipped.json") == 18
    held = json.loads((tmp_path / "shipped.json").read_text())["examples"]
    assert {one["group"] for one in held} == {"a", "b", "c"} and not any(one["here"] for one in held)
