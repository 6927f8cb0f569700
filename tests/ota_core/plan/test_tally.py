"""The k-th largest scores against a full sort, whatever the sample said, however the work is cut."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ota_core.fused import counts as fused
from ota_core.methods.numbers import locate
from ota_core.plan import tally
from ota_core.plan.inputs import resolve_local
from ota_core.plan.plan import MergePlan, open_plan
from ota_core.plan.prepare import ffg_group
from ota_core.plan.scoring import Scoring, ffg_scoring
from ota_core.plan.tally import Brackets, Group, bins_of, count_brackets, count_high, kth_largest, read_off
from ota_core.recipe.recipe import MergeRecipe
from tests.checkpoints import ota_recipe, random_base, random_experts
from tests.reference import Tensors

SHAPES = {"model.a.weight": (301, 70), "model.b.weight": (64, 129), "model.norm.weight": (77,)}


@contextmanager
def opened(root: Path, **options: Any) -> Iterator[tuple[MergePlan, list[Tensors]]]:
    """A plan over three experts, and their FFG scores in float32."""
    base = random_base(3, SHAPES)
    experts = random_experts(base)
    recipe = MergeRecipe.model_validate(ota_recipe(root, base, experts, {"density": 0.4}))
    scores = []
    for expert in experts:
        delta = {name: (expert.weights[name].astype(np.float64) - base[name]).astype(np.float32) for name in base}
        scores.append({name: np.abs(np.sqrt(expert.v[name]) * delta[name]) for name in base})
    with open_plan(recipe, resolve_local(recipe), **options) as plan:
        yield plan, scores


def sorted_scores(scores: Tensors, names: list[str] | None = None) -> Any:
    return np.sort(np.concatenate([scores[name].reshape(-1) for name in (names or scores)]))[::-1]


RANKS = [(1,), (9000, 20_000), (29_403,), ()]


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize(("threads", "block"), [(1, 1 << 20), (3, 500)])
def test_ranks_of_a_whole_expert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampled: bool, threads: int, block: int
) -> None:
    monkeypatch.setattr(tally, "WORTH_SAMPLING", 1000 if sampled else 10**9)
    with opened(tmp_path, threads=threads, block_elements=block) as (plan, scores):
        total = scores[0]["model.a.weight"].size + scores[0]["model.b.weight"].size + 77
        for ranks in [*RANKS, (total,)]:
            group = Group(jobs=plan.merged_jobs(), experts=(0, 2), ranks={0: ranks, 2: ranks[:1]})
            (found,) = kth_largest(ffg_scoring(plan), [group], what="rank")
            assert found[0] == [float(sorted_scores(scores[0])[k - 1]) for k in ranks]
            assert found[2] == [float(sorted_scores(scores[2])[k - 1]) for k in ranks[:1]]


def test_a_sample_that_misleads_costs_a_second_pass_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[str] = []
    for name in ("count_high", "count_brackets"):
        original = getattr(fused, name)

        def counted(*args: Any, name: str = name, whole: Any = original, **options: Any) -> Any:
            passes.append("sample" if options.get("stride", 1024) != 1024 else name)
            return whole(*args, **options)

        monkeypatch.setattr(fused, name, counted)
    monkeypatch.setattr(tally, "WORTH_SAMPLING", 1000)
    monkeypatch.setattr(tally, "SAMPLE_STRIDE", 256)  # every element: a sample that is right
    with opened(tmp_path) as (plan, scores):
        group = Group(jobs=plan.merged_jobs(), experts=(1,), ranks={1: (12_000,)})
        expected = {1: [float(sorted_scores(scores[1])[11_999])]}
        assert kth_largest(ffg_scoring(plan), [group], what="rank") == [expected]
        tensors = len(group.jobs)
        assert passes == ["sample"] * tensors + ["count_brackets"] * tensors
        passes.clear()
        monkeypatch.setattr(tally, "_around", lambda scoring, group, high: Brackets.empty(np.array([[3]])))
        assert kth_largest(ffg_scoring(plan), [group], what="rank") == [expected]
        assert passes[tensors:] == ["count_brackets"] * tensors + ["count_high"] * tensors + ["count_brackets"] * tensors


def test_ranks_of_each_tensor(tmp_path: Path) -> None:
    with opened(tmp_path, threads=2, block_elements=900) as (plan, scores):
        jobs = plan.merged_jobs()
        groups = [
            Group(jobs=[job], experts=(0, 1, 2), ranks={e: (1, job.elements // 2, job.elements) for e in range(3)})
            for job in jobs
        ]
        found = kth_largest(ffg_scoring(plan), groups, what="rank")
        for job, values in zip(jobs, found, strict=True):
            for expert in range(3):
                expected = sorted_scores(scores[expert], [job.name])
                assert values[expert] == [
                    float(expected[k - 1]) for k in groups[0].ranks and (1, job.elements // 2, job.elements)
                ]


@pytest.mark.parametrize("compiled", [True, False])
def test_histograms_of_parts_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """What machines do that each hold some of the tensors: two rounds of sums give the scores of the whole."""
    if not compiled:
        monkeypatch.setattr(MergePlan, "can_fuse", lambda *_, **__: False)
    with opened(tmp_path) as (plan, scores):
        group, scoring = ffg_group(plan, plan.experts), ffg_scoring(plan)

        parts = [Group(jobs=[job], experts=group.experts, ranks={}) for job in group.jobs]
        high = sum(count_high(scoring, part, what="part") for part in parts)
        bins = bins_of(group, high)
        assert read_off(group, Brackets.empty(bins + 1)) is None
        brackets = Brackets.empty(bins)
        for part in parts:
            brackets += count_brackets(scoring, part, bins, what="part")
        found = read_off(group, brackets)
        assert found is not None
        for expert in range(3):
            assert found[expert] == [float(sorted_scores(scores[expert])[group.ranks[expert][0] - 1])]


def test_magnitudes_need_no_second_moments(tmp_path: Path) -> None:
    base = random_base(3, SHAPES)
    experts = random_experts(base, 2)
    recipe = MergeRecipe.model_validate(ota_recipe(tmp_path, base, experts, {}, method="task_arithmetic"))
    with open_plan(recipe, resolve_local(recipe)) as plan:
        scoring = Scoring(plan, curvature=False, everywhere=True)
        group = Group(jobs=plan.merged_jobs(), experts=(0, 1), ranks={0: (5000,), 1: (1,)})
        (found,) = kth_largest(scoring, [group], what="rank")
    sizes = [{n: np.abs((e.weights[n].astype(np.float64) - base[n]).astype(np.float32)) for n in base} for e in experts]
    assert found == {0: [float(sorted_scores(sizes[0])[4999])], 1: [float(sorted_scores(sizes[1])[0])]}


@settings(max_examples=100, deadline=None)
@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=60), data=st.data())
def test_locate_is_a_sort(counts: list[int], data: st.DataObject) -> None:
    high = np.zeros(65536, np.int64)
    high[1000 : 1000 + len(counts)] = counts
    values = np.repeat(np.arange(65536), high)[::-1]
    if not values.size:
        return
    k = data.draw(st.integers(1, values.size))
    index, above = locate(high, k)
    assert index == values[k - 1] and above == (values > index).sum()
    assert torch.tensor(above).item() < k
