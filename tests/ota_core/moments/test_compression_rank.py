"""rank1 and rank_k against numpy: plain sums, and the truncated singular value decomposition of √v."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

from ota_core.compute.stream import Stream
from ota_core.compute.subspace import eigenvectors, leading_directions, orthonormalise
from ota_core.errors import MomentsError
from ota_core.moments import open_moments
from ota_core.moments.compression import CompressionReport, compress, rank_k
from tests import reference

Array = NDArray[Any]


def compressed(tmp: Path, tensors: dict[str, Array], **choice: Any) -> tuple[dict[str, Array], CompressionReport]:
    save_file({name: x.astype(np.float32) for name, x in tensors.items()}, tmp / "v.safetensors")
    moments, report = compress(open_moments(tmp / "v.safetensors"), **choice, stream=Stream())
    read = {}
    for name, x in tensors.items():
        rows = int(np.prod(x.shape[:-1])) if x.ndim > 1 else x.size
        read[name] = moments.read(name, 0, rows).reshape(x.shape)
    return read, report


def realistic(shape: tuple[int, int], seed: int = 0, parts: int = 1) -> Array:
    """Lognormal scales of rows and columns, ``parts`` × ``parts`` blocks of different size, squared noise, 5 % zeros."""
    rng = np.random.default_rng(seed)
    tiles = np.exp(np.kron(rng.normal(size=(parts, parts)), np.ones((-(-shape[0] // parts), -(-shape[1] // parts)))))
    v = np.exp(rng.normal(size=(shape[0], 1))) * np.exp(rng.normal(size=shape[1])) * tiles[: shape[0], : shape[1]]
    return (1e-12 * v * rng.normal(size=shape) ** 2 * (rng.random(shape) >= 0.05)).astype(np.float32)


def error(v: Array, approximate: Array) -> float:
    x, y = np.sqrt(v.astype(np.float64)), np.sqrt(approximate.astype(np.float64))
    return float(np.linalg.norm(x - y) / np.linalg.norm(x))


@pytest.mark.parametrize("chunk", [1 << 22, 300])
def test_rank1_is_the_outer_product_of_the_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Also across chunks that cut every matrix."""
    monkeypatch.setattr("ota_core.moments.compression.rank1.CHUNK", chunk)
    tensors = {"a": realistic((70, 33)), "s": np.stack([realistic((9, 20), i) for i in range(4)]), "z": np.zeros((5, 6), np.float32), "one": realistic((5, 400)),
               "v": realistic((1, 50))[0], "conv": realistic((60, 9)).reshape(4, 5, 3, 9)}  # fmt: skip
    got, report = compressed(tmp_path, tensors, method="rank1")
    for name, v in tensors.items():
        np.testing.assert_allclose(got[name], reference.rank1(v), rtol=3e-7, atol=0)
        if v.any():
            assert report.sqrt_error_per_tensor[name] == pytest.approx(error(v, got[name]), rel=1e-6)
    assert report.sqrt_error_per_tensor["z"] == report.sqrt_error_per_tensor["v"] == 0


def test_the_error_of_an_exact_rank1_is_next_to_zero_and_a_number(tmp_path: Path) -> None:
    exact = np.outer(2.0 ** np.arange(-8, 9), 2.0 ** np.arange(-60, -30)).astype(np.float32)
    for choice in ({"method": "rank1"}, {"method": "rank_k", "rank": 1}):
        got, report = compressed(tmp_path, {"a": exact}, **choice)
        np.testing.assert_allclose(got["a"], exact, rtol=1e-6)
        assert 0 <= report.sqrt_error <= 3e-7


def test_sums_beyond_float32_are_refused_by_rank1_and_kept_finite_by_rank_k(tmp_path: Path) -> None:
    v = {"a": np.full((40, 50), 3e38, np.float32)}
    with pytest.raises(MomentsError, match=r"a row or column of 'a' adds up to 1.5e\+40"):
        compressed(tmp_path, v, method="rank1")
    got, _ = compressed(tmp_path, v, method="rank_k", rank=2)
    np.testing.assert_allclose(got["a"], v["a"], rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-30, 1e30])
def test_extreme_scales(tmp_path: Path, scale: float) -> None:
    rng = np.random.default_rng(0)
    v = {"a": (rng.integers(0, 4, (40, 50)) * np.float32(scale)).astype(np.float32)}
    errors = [
        compressed(tmp_path, v, method=m, **r)[1].sqrt_error
        for m, r in (("rank1", {}), ("rank_k", {"rank": 1}), ("rank_k", {"rank": 8}))
    ]
    assert 0.9 > errors[0] >= errors[1] > errors[2] > 0 or scale < 1e-40


@pytest.mark.parametrize("rank", [1, 2, 4, 9])
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("shape", [(600, 400), (90, 1500), (2000, 60)])
def test_rank_k_is_near_the_best_of_its_rank_and_never_above_rank1(
    tmp_path: Path, rank: int, parts: int, shape: tuple[int, int]
) -> None:
    v = realistic(shape, parts=parts)
    got, report = compressed(tmp_path, {"a": v}, method="rank_k", rank=rank)
    singular = np.linalg.svd(np.sqrt(v.astype(np.float64)), compute_uv=False)
    best = float(np.sqrt((singular[rank:] ** 2).sum() / (singular**2).sum()))
    assert report.sqrt_error == pytest.approx(error(v, got["a"]), rel=1e-5)
    assert best * 0.99 <= report.sqrt_error <= best * 1.03  # squares of a negative √ṽ may even gain a little on it
    assert report.sqrt_error < compressed(tmp_path, {"a": v}, method="rank1")[1].sqrt_error
    assert (got["a"] >= 0).all() and (got["a"][v.sum(1) == 0] == 0).all() and (got["a"][:, v.sum(0) == 0] == 0).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(5, 300), st.integers(5, 300), st.integers(1, 3), st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 0.95]))
def test_rank_k_is_never_above_rank1_and_never_negative(tmp_path_factory: pytest.TempPathFactory, rows: int, cols: int, rank: int, seed: int, zeros: float) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    v = (10.0 ** rng.uniform(-20, -8, (rows, cols)) * (rng.random((rows, cols)) >= zeros)).astype(np.float32)
    tmp = tmp_path_factory.mktemp("v")
    one, (got, more) = compressed(tmp, {"a": v}, method="rank1")[1], compressed(tmp, {"a": v}, method="rank_k", rank=rank)
    assert (got["a"] >= 0).all() and np.isfinite(got["a"]).all()
    assert more.sqrt_error <= one.sqrt_error * (1 + 1e-6) + 3e-7


def test_a_root_of_rank_k_comes_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    v = {f"{k}": np.square((rng.random((500, k)) @ rng.random((k, 700))) * 1e-6).astype(np.float32) for k in (1, 2, 4)}
    v["0"] = np.zeros((500, 700), np.float32)
    got, report = compressed(tmp_path, v, method="rank_k", rank=4)
    for name in v:
        np.testing.assert_allclose(got[name], v[name], rtol=1e-4, atol=1e-18)
    assert report.sqrt_error < 1e-5


def test_rank_k_of_large_matrices_in_chunks_is_as_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    v = {"a": realistic((900, 500), parts=4)}
    whole = compressed(tmp_path, v, method="rank_k", rank=4)[0]["a"]
    monkeypatch.setattr(rank_k, "CHUNK", 20_000)
    cut = compressed(tmp_path, v, method="rank_k", rank=4)[0]["a"]
    np.testing.assert_allclose(np.sqrt(cut), np.sqrt(whole), rtol=1e-3, atol=1e-9)


def test_stacks_are_factored_matrix_by_matrix(tmp_path: Path) -> None:
    stack = np.stack([realistic((40, 60), i) for i in range(3)])
    got, _ = compressed(tmp_path, {"s": stack}, method="rank_k", rank=2)
    for i, matrix in enumerate(stack):
        alone, _ = compressed(tmp_path, {"m": matrix}, method="rank_k", rank=2)
        assert (got["s"][i] == alone["m"]).all()


def test_what_factors_would_not_shrink_is_stored_whole(tmp_path: Path) -> None:
    v = {"small": realistic((8, 8)), "vector": realistic((1, 90))[0], "large": realistic((100, 100))}
    got, report = compressed(tmp_path, v, method="rank_k", rank=4)
    assert (got["small"] == v["small"]).all() and (got["vector"] == v["vector"]).all()
    assert report.bytes_per_param == 4 * (64 + 90 + 4 * 200) / (64 + 90 + 10_000)
    assert report.sqrt_error_per_tensor["small"] == 0 < report.sqrt_error_per_tensor["large"]


def test_eigenvectors_against_lapack() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 5, 30):
        root = rng.normal(size=(size, size)) * 10.0 ** rng.uniform(-4, 4, size)
        matrix = root.T @ root
        found, vectors = eigenvectors(matrix)
        np.testing.assert_allclose(found, np.linalg.eigvalsh(matrix)[::-1], rtol=1e-9, atol=1e-12 * found[0])
        np.testing.assert_allclose(vectors @ vectors.T, np.eye(size), atol=1e-12)
        np.testing.assert_allclose(vectors @ matrix, found[:, None] * vectors, atol=1e-9 * found[0])


def test_directions_are_orthonormal_and_hold_the_first() -> None:
    rng = np.random.default_rng(0)
    sketch = rng.normal(size=(20, 50)) @ np.diag(2.0 ** -np.arange(50))
    first = rng.normal(size=50)
    found = leading_directions(sketch, first, 6, 4)
    np.testing.assert_allclose(found @ found.T, np.eye(7), atol=1e-12)
    np.testing.assert_allclose(found.T @ (found @ first), first, atol=1e-12)
    leading = np.linalg.svd(sketch)[2][:3]
    np.testing.assert_allclose(found.T @ (found @ leading.T), leading.T, atol=1e-3)
    twice = np.concatenate([first[None], 2 * first[None], np.zeros((1, 50))])
    orthonormalise(twice)
    assert (twice[1:] == 0).all() and torch.tensor(twice[0]).norm().item() == pytest.approx(1)
