"""The compiled pass gives the same bits as the rule on tensors, for every option that it covers."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ota_core.fused import BY_CURVATURE, BY_MAGNITUDE, Vote, count_scores, ota_block
from ota_core.fused_task_vectors import Part, combine_block, linear_block
from ota_core.kernels import count_high, count_low
from ota_core.methods.averages import linear
from ota_core.methods.dare import drop, uniform
from ota_core.methods.ota import curvature_weights, ota
from ota_core.methods.task_vectors import NOTHING, add_up, elect_and_add, trim
from ota_core.saliency import curvature_scores, keep, magnitude_scores


def experts(seed: int, count: int, size: int) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """(base, thetas, vs): some elements unmoved, some v exactly 0, tiny or −0."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(size, generator=generator) * 0.02
    thetas, vs = [], []
    for _ in range(count):
        moved = torch.rand(size, generator=generator) > 0.2
        thetas.append(torch.where(moved, base + torch.randn(size, generator=generator) * 1e-3, base))
        v = torch.pow(10.0, torch.rand(size, generator=generator) * 30 - 38)
        v[torch.rand(size, generator=generator) < 0.1] = 0.0
        v[torch.rand(size, generator=generator) < 0.02] = -0.0
        vs.append(v)
    return base, thetas, vs


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 4),
    size=st.sampled_from([1, 7, 1023, 1024, 2049]),
    power=st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.7]),
    lam=st.sampled_from([1.0, 0.3, 1.8]),
    epsilon=st.sampled_from([0.0, 1e-12]),
    scale=st.sampled_from([1.0, 0.7]),
    mean=st.sampled_from([None, 3e-7]),
    denominator=st.sampled_from(["kept", "all"]),
    factor=st.sampled_from([1.0, 4.75]),
    mode=st.sampled_from(["off", "curvature", "magnitude", "given"]),
)
def test_the_fused_pass_is_the_rule(
    seed: int,
    count: int,
    size: int,
    power: float,
    lam: float,
    epsilon: float,
    scale: float,
    mean: float | None,
    denominator: str,
    factor: float,
    mode: str,
) -> None:
    base, thetas, vs = experts(seed, count, size)
    hats = [v * torch.tensor(factor) for v in vs]
    masks: list[torch.Tensor | None] = []
    votes = []
    for theta, v, hat in zip(thetas, vs, hats, strict=True):
        delta = theta.double() - base.double()
        scores = magnitude_scores(delta) if mode == "magnitude" else curvature_scores(hat, delta)
        tau = scores.median().item()
        masks.append(None if mode == "off" else keep(scores, tau))
        how: dict[str, Any] = {"kept": masks[-1]} if mode == "given" else {"threshold": None if mode == "off" else tau}
        metric = BY_MAGNITUDE if mode == "magnitude" else BY_CURVATURE
        votes.append(Vote(theta=theta, v=v, factor=factor, scale=scale, mean=1.0 if mean is None else mean, metric=metric, **how))
    weights = [curvature_weights(hat, power=power, scale=scale, mean=mean, epsilon=epsilon) for hat in hats]
    expected = ota([t.double() for t in thetas], weights, masks, base.double(), lam=lam, denominator=denominator)
    got, kept = ota_block(base, votes, power=power, epsilon=epsilon, lam=lam, denominator=denominator)
    assert torch.equal(got, expected)
    assert kept == [size if mask is None else int(mask.sum()) for mask in masks]


@pytest.mark.parametrize("metric", [BY_CURVATURE, BY_MAGNITUDE])
@pytest.mark.parametrize("size", [1, 1024, 5000])
def test_the_fused_histogram_is_that_of_the_scores(metric: int, size: int) -> None:
    base, [theta], [v] = experts(3, 1, size)
    delta = theta.double() - base.double()
    scores = magnitude_scores(delta) if metric == BY_MAGNITUDE else curvature_scores(v * torch.tensor(2.5), delta)
    expected, got = torch.zeros(2, 65536, dtype=torch.int64), torch.zeros(2, 65536, dtype=torch.int64)
    count_high(scores, expected[0])
    fullest = int(expected[0].argmax())
    count_low(scores, fullest, expected[1])
    count_scores(base, theta, v, 2.5, metric, None, got[0])
    count_scores(base, theta, v, 2.5, metric, fullest, got[1])
    assert torch.equal(got, expected)
    assert int(got[0].sum()) == size


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 4),
    weights=st.lists(st.sampled_from([1.0, 0.5, -1.0, 2.0]), min_size=4, max_size=4),
    elect=st.booleans(),
    normalize=st.booleans(),
    lam=st.sampled_from([1.0, 0.6]),
    mode=st.sampled_from(["all", "trim", "dare", "dare without rescale"]),
)
def test_fused_task_vectors_are_the_rules(
    seed: int, count: int, weights: list[float], elect: bool, normalize: bool, lam: float, mode: str
) -> None:
    size = 1025
    base, thetas, _ = experts(seed, count, size)
    lefts, parts = [], []
    for m, (theta, weight) in enumerate(zip(thetas, weights, strict=False)):
        delta = theta.double() - base.double()
        if mode == "trim":
            lowest, highest = delta.abs().float().quantile(torch.tensor([0.3, 0.95])).tolist()
            lefts.append(trim(delta, lowest, highest))
            parts.append(Part(theta=theta, weight=weight, lowest=lowest, highest=highest))
        elif mode == "all":
            lefts.append(delta)
            parts.append(Part(theta=theta, weight=weight))
        else:
            rescale = mode == "dare"
            lefts.append(drop(delta, uniform(seed, m, "t", 77, size), density=0.4, rescale=rescale))
            parts.append(Part(theta=theta, weight=weight, random=(seed, m, "t", 77), density=0.4, rescale=rescale))
    rule = elect_and_add if elect else add_up
    expected = base.double() + lam * rule(lefts, weights[:count], normalize=normalize)
    got = combine_block(base, parts, elect=elect, normalize=normalize, lam=lam, nothing=NOTHING)
    assert torch.equal(got, expected)


def test_the_fused_average_is_the_average() -> None:
    _, thetas, _ = experts(5, 3, 999)
    for normalize in (True, False):
        expected = linear([t.double() for t in thetas], [0.2, 1.0, 3.0], normalize=normalize)
        assert torch.equal(linear_block(thetas, [0.2, 1.0, 3.0], normalize=normalize), expected)
