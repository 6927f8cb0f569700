"""A tuning in MLflow: one run of role ``tune``, with every step as a point of its curves as it ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean
from uuid import uuid4

from tasks.experiments.tune.learn import Learned, Step
from tasks.tracking.kept_run import KeptRun, as_bytes, texts
from tasks.tracking.run import TAG_FLOW_RUN
from tasks.tracking.write import TAG_ROLE


def tune_run(name: str, params: Mapping[str, object], flow_run_id: str | None) -> KeptRun:
    """The run of this flow run, before its first step."""
    return KeptRun(name=name, identity={TAG_ROLE: "tune", TAG_FLOW_RUN: flow_run_id or str(uuid4())}, params=texts(params))


def with_steps(run: KeptRun, steps: Iterable[Step]) -> KeptRun:
    """The run with the losses of these steps: ``loss/train`` and, where it was looked at, ``loss/held_out``, each also by capability."""
    return run.model_copy(update={"points": {step.number: _losses(step) for step in steps}})


def whole(run: KeptRun, learned: Learned, files: Mapping[str, str | bytes], out: str) -> KeptRun:
    """The run of a tuning that has ended, with all steps and with files by their paths among its artifacts. out: where the recipe was written."""
    run = with_steps(run, learned.steps)
    run.points[0]["seconds/tune"] = learned.steps[-1].seconds
    safe = f"The recipe and its scales are written: {out}."
    return run.model_copy(update={"tags": {"best_step": str(learned.best)}, "files": as_bytes(files), "safe": safe})


def _losses(step: Step) -> dict[str, float]:
    metrics = {f"loss/train/{name}": value for name, value in step.train.items()}
    if step.train:
        metrics |= {"loss/train": fmean(step.train.values()), "scales/distance": step.distance}
    if step.held_out and step.value is not None:
        metrics |= {f"loss/held_out/{name}": value for name, value in step.held_out.items()}
        metrics |= {"loss/held_out": fmean(step.held_out.values()), "objective": step.value}
    return metrics
