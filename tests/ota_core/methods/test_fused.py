"""The compiled pass gives the same bits as the rule on tensors, for every option that it covers."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ota_core.compute.kernels import count_high, count_low
from ota_core.files.rows import Rows
from ota_core.fused import counts
from ota_core.fused.counts import Candidate
from ota_core.fused.memory import load, load_bytes, store
from ota_core.fused.ota import Vote, ota_block
from ota_core.fused.sources import BY_CURVATURE, BY_MAGNITUDE, F32, TILE, VSource, rank1_source, source_of
from ota_core.fused.task_vectors import Part, combine_block, linear_block
from ota_core.methods.averages import linear
from ota_core.methods.dare import drop, uniform
from ota_core.methods.numbers import NOTHING
from ota_core.methods.ota import curvature_weights, ota
from ota_core.methods.saliency import curvature_scores, keep, magnitude_scores
from ota_core.methods.task_vectors import add_up, elect_and_add, trim


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


def v_source(v: torch.Tensor, factor: float = 1.0) -> VSource:
    return VSource(source_of(Rows.of(v)), factor, v)


STORED = [torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=80, deadline=None)
@given(
    stored=st.sampled_from(STORED),
    written=st.sampled_from([torch.float32, torch.bfloat16]),
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
    stored: torch.dtype,
    written: torch.dtype,
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
    base, thetas = base.to(stored), [theta.to(stored) for theta in thetas]
    hats = [v * torch.tensor(factor) for v in vs]
    masks: list[torch.Tensor | None] = []
    votes = []
    for theta, v, hat in zip(thetas, vs, hats, strict=True):
        delta = theta.double() - base.double()
        scores = magnitude_scores(delta) if mode == "magnitude" else curvature_scores(hat, delta)
        tau = scores.median().item()
        masks.append(None if mode == "off" else keep(scores, tau))
        how: dict[str, Any] = (
            {"kept": keep(scores, tau).numpy()} if mode == "given" else {"threshold": None if mode == "off" else tau}
        )
        metric = BY_MAGNITUDE if mode == "magnitude" else BY_CURVATURE
        votes.append(
            Vote(
                theta=Rows.of(theta), v=v_source(v, factor), scale=scale, mean=1.0 if mean is None else mean, metric=metric, **how
            )
        )
    weights = [curvature_weights(hat, power=power, scale=scale, mean=mean, epsilon=epsilon) for hat in hats]
    expected = ota([t.double() for t in thetas], weights, masks, base.double(), lam=lam, denominator=denominator)
    got = torch.empty(size, dtype=written)
    kept, bad = ota_block(Rows.of(base), votes, Rows.of(got), power=power, epsilon=epsilon, lam=lam, denominator=denominator)
    assert torch.equal(got, expected.to(written))
    assert bad is None
    assert kept == [size if mask is None else int(mask.sum()) for mask in masks]


@pytest.mark.parametrize("metric", [BY_CURVATURE, BY_MAGNITUDE])
@pytest.mark.parametrize("size", [1, 1024, 5000])
def test_the_fused_histogram_is_that_of_the_scores(metric: int, size: int) -> None:
    base, [theta], [v] = experts(3, 1, size)
    delta = theta.double() - base.double()
    scores = magnitude_scores(delta) if metric == BY_MAGNITUDE else curvature_scores(v * torch.tensor(2.5), delta)
    expected = np.zeros(65536, np.int64)
    count_high(scores, expected)
    one = Candidate(theta=Rows.of(theta), v=None if metric == BY_MAGNITUDE else v_source(v, 2.5), metric=metric, row=1)
    high = np.zeros((2, 65536), np.int64)
    assert counts.count_high(Rows.of(base), [one], high) is None
    assert np.array_equal(high[1], expected) and not high[0].any() and high.sum() == size
    fullest = int(expected.argmax())
    inside = np.zeros(65536, np.int64)
    count_low(scores, fullest, inside)
    lowest = np.array([[-1, -1, -1], [fullest << 16, -1, 0]])
    above, found = np.zeros((2, 3), np.int64), np.zeros((2, 3, 65536), np.int64)
    assert counts.count_brackets(Rows.of(base), [one], lowest=lowest, above=above, inside=found) is None
    assert np.array_equal(found[1, 0], inside) and not found[0].any() and not found[1, 1].any()
    bits = scores.view(torch.int32) >> 16
    assert above.tolist() == [[0, 0, 0], [int((bits > fullest).sum()), 0, int((bits > 0).sum())]]
    assert found[1, 2].sum() == int((bits == 0).sum())


def test_a_sample_counts_pieces_of_every_stride() -> None:
    base, [theta], [v] = experts(4, 1, 5000)
    scores = curvature_scores(v, theta.double() - base.double())
    expected = np.zeros(65536, np.int64)
    count_high(torch.cat([scores[start : start + 100] for start in range(0, 5000, 700)]), expected)
    high = np.zeros((1, 65536), np.int64)
    one = Candidate(theta=Rows.of(theta), v=v_source(v), metric=BY_CURVATURE, row=0)
    assert counts.count_high(Rows.of(base), [one], high, piece=100, stride=700) is None
    assert np.array_equal(high[0], expected)


@pytest.mark.parametrize("value", [-1e-20, float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1500, 2999])
def test_a_bad_second_moment_is_told_by_the_expert(value: float, place: int) -> None:
    base, thetas, vs = experts(6, 3, 3000)
    vs[1][place] = value
    out = torch.empty(3000)
    votes = [Vote(theta=Rows.of(theta), v=v_source(v)) for theta, v in zip(thetas, vs, strict=True)]
    assert ota_block(Rows.of(base), votes, Rows.of(out), power=0.5, epsilon=0.0, lam=1.0, denominator="kept")[1] == 1
    candidates = [
        Candidate(theta=Rows.of(theta), v=v_source(v), metric=BY_CURVATURE, row=i)
        for i, (theta, v) in enumerate(zip(thetas, vs, strict=True))
    ]
    assert counts.count_high(Rows.of(base), candidates, np.zeros((3, 65536), np.int64)) == 1
    lowest, above, inside = np.full((3, 1), -1), np.zeros((3, 1), np.int64), np.zeros((3, 1, 65536), np.int64)
    assert counts.count_brackets(Rows.of(base), candidates, lowest=lowest, above=above, inside=inside) == 1


def test_every_16_bit_pattern_is_loaded_as_torch_reads_it() -> None:
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        stored = patterns.view(dtype)
        got = np.empty(TILE, np.float32)
        for first in range(0, 1 << 16, TILE):
            load(source_of(Rows.of(stored))[()], first, TILE, got)
            expected = stored[first : first + TILE].float()
            same = torch.from_numpy(got).view(torch.int32) == expected.view(torch.int32)
            assert bool((same | (expected.isnan() & torch.from_numpy(got).isnan())).all())


def test_every_rounding_to_16_bits_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), (1 << 31) - 1, (1 << 18,), generator=generator, dtype=torch.int64).to(torch.int32)
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16 | 0x8000  # exactly between two values
    values = torch.cat([bits.view(torch.float32), halves.view(torch.float32), torch.tensor([3.4e38, -3.4e38])]).double()
    got, scratch = torch.empty(TILE, dtype=torch.bfloat16), np.empty(TILE, np.float32)
    for first in range(0, values.numel(), TILE):
        tile = values[first : first + TILE].contiguous()
        store(tile.numpy(), tile.numel(), 1, got.data_ptr(), 0, scratch)
        expected = tile.to(torch.bfloat16)
        same = got[: tile.numel()].view(torch.int16) == expected.view(torch.int16)
        assert bool((same | expected.isnan()).all())


@pytest.mark.parametrize(("shape", "start", "stop"), [((7, 300), 2, 6), ((3, 5, 700), 3, 12), ((2, 4, 1), 1, 8)])
def test_rank_one_rows_are_the_products(shape: tuple[int, ...], start: int, stop: int) -> None:
    generator = torch.Generator().manual_seed(1)
    share, columns = torch.rand(shape[:-1], generator=generator), torch.rand((*shape[:-2], shape[-1]), generator=generator)
    expected = (share[..., None] * columns[..., None, :]).reshape(-1, shape[-1])[start:stop].reshape(-1)
    source = rank1_source(share.numpy(), columns.numpy(), start)[()]
    got = np.empty(TILE, np.float32)
    for first in range(0, expected.numel(), 333):
        count = min(333, expected.numel() - first)
        load(source, first, count, got)
        assert np.array_equal(got[:count], expected[first : first + count].numpy())


def test_masks_are_loaded_by_address() -> None:
    mask = torch.rand(3000, generator=torch.Generator().manual_seed(2)) < 0.5
    got = np.empty(TILE, np.bool_)
    load_bytes(mask.data_ptr(), 777, 1000, got)
    assert np.array_equal(got[:1000], mask[777:1777].numpy())
    assert F32 == 0 and source_of(Rows.of(mask.float()))["kind"] == F32


@settings(max_examples=40, deadline=None)
@given(
    stored=st.sampled_from(STORED),
    seed=st.integers(0, 2**31),
    count=st.integers(1, 4),
    weights=st.lists(st.sampled_from([1.0, 0.3, -1.0, 2.0]), min_size=4, max_size=4),
    elect=st.booleans(),
    normalize=st.booleans(),
    lam=st.sampled_from([1.0, 0.6]),
    mode=st.sampled_from(["all", "trim", "dare", "dare without rescale"]),
)
def test_fused_task_vectors_are_the_rules(
    stored: torch.dtype, seed: int, count: int, weights: list[float], elect: bool, normalize: bool, lam: float, mode: str
) -> None:
    size = 1025
    base, thetas, _ = experts(seed, count, size)
    base, thetas = base.to(stored), [theta.to(stored) for theta in thetas]
    lefts, parts = [], []
    for m, (theta, weight) in enumerate(zip(thetas, weights, strict=False)):
        delta = theta.double() - base.double()
        if mode == "trim":
            lowest, highest = delta.abs().float().quantile(torch.tensor([0.3, 0.95])).tolist()
            lefts.append(trim(delta, lowest, highest))
            parts.append(Part(theta=Rows.of(theta), weight=weight, lowest=lowest, highest=highest))
        elif mode == "all":
            lefts.append(delta)
            parts.append(Part(theta=Rows.of(theta), weight=weight))
        else:
            rescale = mode == "dare"
            lefts.append(drop(delta, uniform(seed, m, "t", 77, size), density=0.4, rescale=rescale))
            parts.append(Part(theta=Rows.of(theta), weight=weight, random=(seed, m, "t", 77), density=0.4, rescale=rescale))
    rule = elect_and_add if elect else add_up
    expected = base.double() + lam * rule(lefts, weights[:count], normalize=normalize)
    for written in (torch.float32, torch.bfloat16):
        got = torch.empty(size, dtype=written)
        combine_block(Rows.of(base), parts, Rows.of(got), elect=elect, normalize=normalize, lam=lam, nothing=NOTHING)
        assert torch.equal(got, expected.to(written))


def test_the_fused_average_is_the_average() -> None:
    _, thetas, _ = experts(5, 3, 999)
    for normalize in (True, False):
        expected = linear([t.double() for t in thetas], [0.2, 1.0, 3.0], normalize=normalize)
        got = torch.empty(999)
        linear_block([Rows.of(t) for t in thetas], [0.2, 1.0, 3.0], Rows.of(got), normalize=normalize)
        assert torch.equal(got, expected.float())


@pytest.mark.parametrize("metric", [BY_CURVATURE, BY_MAGNITUDE])
@pytest.mark.parametrize("size", [1, 1024, 3001])
def test_the_fused_mask_is_that_of_the_scores(metric: int, size: int) -> None:
    base, [theta], [v] = experts(8, 1, size)
    delta = theta.double() - base.double()
    scores = magnitude_scores(delta) if metric == BY_MAGNITUDE else curvature_scores(v * torch.tensor(2.5), delta)
    one = Candidate(theta=Rows.of(theta), v=None if metric == BY_MAGNITUDE else v_source(v, 2.5), metric=metric, row=7)
    for threshold in (scores.median().item(), 0.0, float("inf")):
        expected = keep(scores, threshold)
        found = counts.keep_block(Rows.of(base), one, threshold)
        assert found is not None and np.array_equal(found[0], expected.numpy()) and found[1] == int(expected.sum())
    if metric == BY_CURVATURE:
        v[-1] = float("nan")
        assert counts.keep_block(Rows.of(base), one, 0.0) is None


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 4),
    power=st.sampled_from([0.5, 1.0]),
    stored=st.sampled_from(STORED),
    written=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_fused_pass_without_a_base_is_the_rule(
    seed: int, count: int, power: float, stored: torch.dtype, written: torch.dtype
) -> None:
    _, thetas, vs = experts(seed, count, 1025)
    thetas = [torch.where(theta.abs() < 1e-3, -0.0, theta).to(stored) for theta in thetas]
    for v in vs[1:]:  # elements that nobody has curvature for are the plain mean
        v[vs[0] == 0] = 0.0
    weights = [curvature_weights(v, power=power, scale=0.7, mean=None, epsilon=0.0) for v in vs]
    expected = ota([t.double() for t in thetas], weights, [None] * count, None)
    got = torch.empty(1025, dtype=written)
    votes = [Vote(theta=Rows.of(theta), v=v_source(v), scale=0.7) for theta, v in zip(thetas, vs, strict=True)]
    assert ota_block(None, votes, Rows.of(got), power=power, epsilon=0.0, lam=1.0, denominator="kept")[1] is None
    whole = torch.int32 if written == torch.float32 else torch.int16
    assert torch.equal(got.view(whole), expected.to(written).view(whole))
