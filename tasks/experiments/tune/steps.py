"""The learning of scales as a Prefect task: from a planned merge and a suite to the scales, told of step by step."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from ota_core.compute.stream import parse_memory, pick_device
from ota_core.plan.expert_scales import scales_for
from ota_core.plan.plan import open_plan
from ota_core.rules.rule import rule_of
from tasks.benchmark import Benchmark
from tasks.evaluation.in_memory import few_threads
from tasks.experiments.tune.config import ScalesConfig
from tasks.experiments.tune.documents import blocks_of, documents_of
from tasks.experiments.tune.result import Found
from tasks.merging.sources import Planned
from tasks.orchestration.budget_bar import BudgetBar
from tasks.settings import Places

if TYPE_CHECKING:
    from tasks.experiments.tune.learn import Step


@task(name="learn", task_run_name="learn scales per {config.per}", cache_policy=NO_CACHE, persist_result=False)
def learn_scales(
    plan: Planned, config: ScalesConfig, benchmark: Benchmark, where: Places, device: str, tell: Callable[[Step], None]
) -> Found:
    """Learn the scales on this machine; every step is told. Raises OtaError."""
    import torch

    from ota_core.learn.edits import Edits
    from ota_core.learn.model import ScaledModel
    from tasks.experiments.tune.goal import check_goal, goal_of
    from tasks.experiments.tune.learn import learn
    from tasks.experiments.tune.network import empty_network

    log, device, memory = get_run_logger(), pick_device(device), parse_memory(plan.memory)
    on_gpu = device != "cpu"
    wanted = config.dtype if config.dtype != "auto" else "bfloat16" if on_gpu else "float32"
    dtype: torch.dtype = getattr(torch, wanted)
    documents = documents_of(benchmark.tests, benchmark.data)
    # The parts of the edit are multiplied here, not by the merge itself.
    recipe = plan.recipe.model_copy(update={"scales": None})
    full = recipe.setting("mask_curvature") == "full"
    with (
        plan.sources.opened(where, memory, raw_moments=full) as inputs,
        tempfile.TemporaryDirectory(prefix="ota-tune-") as scratch,
        open_plan(recipe, inputs, memory=memory, device=device) as merge,
    ):
        check_goal(config, list(documents), inputs)
        merge.scratch = Path(scratch)
        start = _start(merge.inputs.scales, [one.name for one in merge.experts], [job.name for job in merge.canonical_jobs()])
        network, tokenizer = empty_network(merge, dtype, device)
        blocks = blocks_of(documents, tokenizer, config, benchmark.tests.apply_chat_template is True)
        counts = ", ".join(f"{name} {len(one.train)} + {len(one.held_out)}" for name, one in blocks.items())
        log.info("blocks to learn from + held out: %s", counts)
        rule = rule_of(merge)
        rule.prepare()
        goal = goal_of(config, blocks, merge, dtype, device)
        edits = Edits(merge, rule, memory)
        looks: list[float] = []

        def show(step: Step) -> None:
            tell(step)
            if step.value is not None:
                looks.append(step.value)
                log.info(
                    "step %d of at most %d: %s of what is held out %.4f", step.number, config.steps, config.objective, step.value
                )
            train = f"loss {fmean(step.train.values()):.3f}, " if step.train else ""
            bar.show(100 * step.number / config.steps, f"{train}held out {looks[-1]:.4f} (as given {looks[0]:.4f})")

        with (
            few_threads(merge.source_folder()),
            BudgetBar("learning") as bar,
            ScaledModel(network, edits, config.per, start) as model,
        ):
            if edits.kept_bytes < edits.bytes:
                log.info(
                    "%.1f of %.1f GiB of the experts' parts are kept in memory; the rest is computed again for every block of text. --memory %dGiB keeps all",
                    edits.kept_bytes / 2**30, edits.bytes / 2**30, edits.bytes // 2**30 + 1,
                )  # fmt: skip
            learned = learn(model, goal, config, show)
            bar.show(100, f"held out {learned.kept.value:.4f} (as given {looks[0]:.4f})")
            shapes = {name: job.shape for name, job in edits.jobs.items()}
            return Found(
                learned=learned, experts=tuple(edits.experts), scales=model.by_tensor(), shapes=shapes, notes=tuple(merge.notes)
            )


def _start(scales: Path | None, experts: list[str], tensors: list[str]) -> dict[str, list[float]] | None:
    """The coefficients of a recipe that has some already. Raises RecipeError."""
    if scales is None:
        return None
    from ota_core.errors import RecipeError, raise_all

    problems: list[str] = []
    found = scales_for(scales, experts, tensors, problems)
    raise_all(problems, RecipeError)
    assert found is not None
    return {name: row.tolist() for name, row in found.values.items()}
