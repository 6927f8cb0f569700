"""The merges that predictions learn from: those that MLflow holds here, and those of our studies, which come with the program.

``python -m tasks.experiments.preflight.history STORE=NAME …`` writes the latter anew (``shipped.json``) from the MLflow stores of studies, each
with the name by which its experts are told from others'.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ota_core.errors import OtaError, StorageError
from ota_core.plan.inputs import MergeInputs
from tasks.experiments.preflight.features import of_metrics
from tasks.experiments.preflight.outlook import Known
from tasks.experiments.preflight.predict import Example, Predictor
from tasks.tracking.experiment import Experiment, read_experiment
from tasks.tracking.registered import TAG_DIGEST
from tasks.tracking.run import TAG_SUITE
from tasks.tracking.store import Store, mlflow_name, resolve_store
from tasks.tracking.write import PARENT, TAG_ROLE

if TYPE_CHECKING:
    import pandas as pd

SHIPPED = Path(__file__).with_name("shipped.json")


def shipped() -> list[Example]:
    """The merges of our studies; all of one base are one group."""
    if not SHIPPED.is_file():
        return []
    return [Example.model_validate(one) for one in json.loads(SHIPPED.read_text(encoding="utf-8"))["examples"]]


def here(experiment: Experiment) -> Iterator[Example]:
    """The scored merges of an experiment that were logged with the measures of a preflight."""
    below = _children(experiment)
    for row in _rows(experiment.merges):
        if row["status"] != "FINISHED":
            continue
        metrics = {key.removeprefix("metrics."): float(value) for key, value in row.items() if key.startswith("metrics.")}
        models = below.get(row["run_id"], [])
        group = _group(models)
        for child in models:
            capability = child.get("params.capability")
            if child[f"tags.{TAG_ROLE}"] != "expert" or capability is None:
                continue
            found = of_metrics(metrics, child["params.model"])
            retention = metrics.get(mlflow_name(f"retention/{capability}"))
            if found is None or retention is None:
                continue
            yield Example(
                merge=row["run_id"], group=group, here=True, capability=f"{row.get(f'tags.{TAG_SUITE}', '')}/{capability}",
                refined="rowspace" in {row.get("params.refine"), row.get("params.merge_method")},
                experts=int(float(row.get("params.expert_count", 1))), features=found, retention=retention,
            )  # fmt: skip


def examples(store: Store) -> list[Example]:
    """All merges that predictions may learn from, shipped and of this store. Raises StorageError where MLflow cannot be asked."""
    experiment = _experiment(store)
    return [*shipped(), *(here(experiment) if experiment else ())]


def _experiment(store: Store) -> Experiment | None:
    """What the store holds; None where nothing was logged yet. An embedded database is not made for that."""
    if store.artifacts is not None and not Path(store.uri.removeprefix("sqlite:///")).is_file():
        return None
    try:
        return read_experiment(store)
    except StorageError:
        raise
    except OtaError:  # there is no such experiment
        return None


def scored(store: Store, inputs: MergeInputs, suite: str | None = None) -> tuple[Known | None, dict[str, str]]:
    """(what a merge's base and experts score, expert → its capability as ``Example`` names it), by the newest merge that they were scored for.

    suite: only scores on this one. (None, nothing) where these very models were never scored together. Raises StorageError as ``examples``.
    """
    experiment = _experiment(store)
    if experiment is None:
        return None, {}
    below, base = _children(experiment), inputs.base.digest if inputs.base else None
    for row in _rows(experiment.merges):
        on = row.get(f"tags.{TAG_SUITE}", "")
        found = {child.get(f"tags.{TAG_DIGEST}"): _scores(child) for child in below.get(row["run_id"], [])}
        if (suite is None or on == suite) and {base, *(one.digest for one in inputs.experts)} <= found.keys():
            return known_of(on, found[base], {one.name: (one.capability, found[one.digest]) for one in inputs.experts})
    return None, {}


def known_of(
    suite: str, base: Mapping[str, float], experts: Mapping[str, tuple[str | None, Mapping[str, float]]]
) -> tuple[Known, dict[str, str]]:
    """The same from scores that are at hand: experts by name, each with its stated capability and its scores."""
    own = {name: capability or name for name, (capability, _) in experts.items()}
    scores = {name: (own[name], found[own[name]]) for name, (_, found) in experts.items() if own[name] in found}
    return Known(base=base, experts=scores), {name: f"{suite}/{own[name]}" for name in scores}


def _scores(row: Mapping[str, Any]) -> dict[str, float]:
    start = "metrics.score/"
    return {key.removeprefix(start): float(value) for key, value in row.items() if key.startswith(start) and key != f"{start}avg"}


def _children(experiment: Experiment) -> dict[str, list[dict[str, Any]]]:
    """Merge → the models that were scored with it."""
    below: dict[str, list[dict[str, Any]]] = {}
    for row in _rows(experiment.models):
        below.setdefault(row[f"tags.{PARENT}"], []).append(row)
    return below


def _group(models: Sequence[Mapping[str, Any]]) -> str:
    digests = sorted(str(one.get(f"tags.{TAG_DIGEST}")) for one in models if one[f"tags.{TAG_ROLE}"] != "merge")
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:12]


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as dictionaries without their gaps."""
    import pandas as pd

    return [{key: value for key, value in row.items() if not pd.isna(value)} for row in table.to_dict("records")]


def write_shipped(studies: Mapping[str, Store], out: Path = SHIPPED) -> int:
    """Write ``shipped.json`` from the stores of studies, by name; how many values there are."""
    found = []
    for name, store in studies.items():
        for one in here(read_experiment(store)):
            rounded = {key: round(value, 5) for key, value in one.features.items()}
            told = {"group": name, "merge": f"{name} {one.merge[:8]}", "here": False, "features": rounded}
            found.append(one.model_copy(update=told | {"retention": round(one.retention, 5)}))
    learned = Predictor(found)
    content = {
        "made_by": "python -m tasks.experiments.preflight.history",
        "error": round(learned.error, 4),
        "coefficients": {name: [round(value, 4), round(error, 4)] for name, (value, error) in learned.coefficients().items()},
        "examples": [one.model_dump(mode="json") for one in found],
    }
    lines = json.dumps(content, indent=1).replace("\n   ", " ").replace("\n  }", " }")
    out.write_text(lines + "\n", encoding="utf-8")
    return len(found)


if __name__ == "__main__":
    stores = {name: resolve_store(tracking_uri=uri) for uri, _, name in (one.rpartition("=") for one in sys.argv[1:])}
    print(f"{SHIPPED}: {write_shipped(stores)} values")
