"""Merges with made-up scores of single documents, logged as the flow logs them; shared by the tests of leaderboards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.evaluation.scores import CapabilityScore, ModelScores, negative_transfer, retention
from tasks.evaluation.suites import Capability, Suite, TaskEntry
from tasks.tracking.merge import ChildRun, InputRef, MergeRun, log_merge
from tasks.tracking.run import Benchmarked, uncertainty

CAPABILITIES = ("math", "code")
SUITE = Suite(
    name="s", include_defaults=True, capabilities={n: Capability(tasks=(TaskEntry(task=n, metric="acc"),)) for n in CAPABILITIES}
)

Documents = Mapping[str, Sequence[float] | NDArray[np.float64]]
"""Capability to the scores of its documents."""


def coins(seed: int, **chances: float) -> dict[str, NDArray[np.float64]]:
    """200 documents a capability, each right with this chance."""
    rng = np.random.default_rng(seed)
    return {name: (rng.random(200) < chance).astype(np.float64) for name, chance in chances.items()}


def model_scores(documents: Documents, *, limit: int | None = None, digest: str = "suite-digest") -> ModelScores:
    """As the benchmark gives them: means, lm-eval's standard errors, document hashes."""
    capabilities, samples = {}, {}
    for name, values in documents.items():
        array = np.asarray(values, dtype=np.float64)
        stderr = float(array.std(ddof=1) / math.sqrt(len(array)))
        capabilities[name] = CapabilityScore(
            score=float(array.mean()), stderr=stderr, n_samples=len(array), tasks={name: {"acc.none": float(array.mean())}}
        )
        samples[name] = {name: {f"{name}{i:04d}": float(value) for i, value in enumerate(array)}}
    return ModelScores(
        suite="s", suite_digest=digest, capabilities=capabilities, samples=samples, limit=limit, lm_eval_version="0", seconds=1.0
    )


def scored_merge(
    label: str, merged: Documents, *, base: Documents, experts: Mapping[str, Documents], limit: int | None = None, inputs: str = "1",
    digest: str = "suite-digest", params: Mapping[str, Any] | None = None, detailed: bool = True,
) -> MergeRun:  # fmt: skip
    """A merge as the flow tells it to MLflow. ``experts``: capability to the expert's documents; ``inputs``: seed of base and experts.

    ``detailed=False``: as versions before leaderboards logged it.
    """
    keys = {"base": base, **{f"expert/{name}": found for name, found in experts.items()}, "merged": merged}
    found = {key: model_scores(documents, limit=limit, digest=digest) for key, documents in keys.items()}
    plain = {
        key: {f"score/{n}": v for n, v in one.by_capability().items()} | {"score/avg": one.average} for key, one in found.items()
    }
    kept = retention(found["merged"], {name: (name, found[f"expert/{name}"]) for name in experts})
    metrics = plain["merged"] | {f"retention/{name}": value for name, value in kept.items()}
    metrics["negative_transfer"] = float(len(negative_transfer(found["merged"], found["base"])))
    more = {key: uncertainty(one) if detailed else {} for key, one in found.items()}
    run_id = f"{label}-{inputs}-{'+'.join(experts)}".replace(" ", "-")
    children = [
        ChildRun(name="base", role="base", digest=f"base-{inputs}", metrics=plain["base"] | more["base"]),
        *(
            ChildRun(name=name, role="expert", capability=name, digest=f"{name}-{inputs}",
                     metrics=plain[f"expert/{name}"] | more[f"expert/{name}"])
            for name in experts
        ),
        ChildRun(name=label, role="merge", digest=f"merged-{run_id}", metrics=plain["merged"] | more["merged"]),
    ]  # fmt: skip
    return MergeRun(
        name=f"{label} {'+'.join(experts)}",
        method=label.split(" ")[0],
        params={"experts": ",".join(experts), "base_model": f"s3://models/seed{inputs}", **(params or {})},
        tags={"recipe_fingerprint": f"fp-{run_id}"},
        metrics=metrics | more["merged"],
        recipe_yaml="merge_method: ota\n",
        record={},
        model_uri=f"s3://merged/{run_id}",
        model_digest=f"merged-{run_id}",
        inputs=[InputRef(name="base", source=f"s3://models/seed{inputs}", digest=f"base-{inputs}", role="base")],
        children=children,
        benchmarked=Benchmarked(suite=SUITE, data_digest="data", models=found) if detailed else None,
    )


BASE = coins(1, math=0.1, code=0.3)
EXPERTS = {"math": coins(2, math=0.9, code=0.1), "code": coins(3, math=0.1, code=0.8)}


def some_merges() -> dict[str, MergeRun]:
    """Three merges of the same experts: one clearly better, one a little, one that falls below the base on code."""
    made = {
        "ota rho=0.40": coins(4, math=0.72, code=0.66), "ties rho=0.50": coins(5, math=0.55, code=0.6), "linear": coins(6, math=0.5, code=0.1),
    }  # fmt: skip
    params = {
        "ota rho=0.40": {"density": 0.4, "power": 0.5},
        "ties rho=0.50": {"density": 0.5, "power": 0.0},
        "linear": {"density": 1.0},
    }
    return {name: scored_merge(name, found, base=BASE, experts=EXPERTS, params=params[name]) for name, found in made.items()}


def log_some(root: Path) -> dict[str, MergeRun]:
    """``some_merges``, logged to the MLflow below this folder."""
    merges = some_merges()
    for run in merges.values():
        log_merge(run, root=root)
    return merges
