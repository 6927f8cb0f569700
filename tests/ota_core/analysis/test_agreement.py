"""Rank correlation and mask overlap of compressed second moments, against scipy and plain sorting."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from ota_core.analysis.agreement import agreement
from ota_core.compute.stream import Stream
from ota_core.errors import CheckpointError
from ota_core.files.checkpoint import Checkpoint
from ota_core.moments import open_moments
from ota_core.moments.compression import compress
from tests import reference
from tests.checkpoints import random_base, random_expert, write_checkpoint, write_moments

SHAPES = {"a.weight": (70, 60), "b.weight": (41, 33), "norm.weight": (50,)}


@pytest.mark.parametrize("density", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("block", [64, 10**6])
def test_agreement_is_that_of_the_sorted_scores(tmp_path: Path, density: float, block: int) -> None:
    base = random_base(3, SHAPES)
    expert = random_expert(base, 4, still=0.0)
    for folder, weights in (("base", base), ("expert", expert.weights)):
        write_checkpoint(tmp_path / folder, weights)
    full = open_moments(write_moments(tmp_path / "expert", expert.v))
    stream = Stream(block_elements=block)
    small, _ = compress(full, stream=stream)
    found = agreement(full, small, Checkpoint(tmp_path / "expert"), Checkpoint(tmp_path / "base"), density=density, stream=stream)

    approximate = {name: reference.rank1(v) for name, v in expert.v.items()}
    exact, close = (
        np.concatenate([(np.sqrt(v[n]) * np.abs(expert.weights[n] - base[n])).astype(np.float32).ravel() for n in sorted(SHAPES)])
        for v in (expert.v, approximate)
    )
    assert found.spearman == pytest.approx(spearmanr(exact, close).statistic, abs=2e-3)
    k = int(np.floor(density * exact.size + 0.5))
    masks = [(x >= np.sort(x)[::-1][k - 1]) & (x > 0) for x in (exact, close)]
    assert found.jaccard == pytest.approx((masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum(), abs=2e-3)
    assert (
        agreement(
            full, full, Checkpoint(tmp_path / "expert"), Checkpoint(tmp_path / "base"), density=density, stream=stream
        ).jaccard
        == 1
    )


def test_another_base_is_refused(tmp_path: Path) -> None:
    base = random_base(3, SHAPES)
    write_checkpoint(tmp_path / "expert", base)
    write_checkpoint(tmp_path / "base", {**base, "a.weight": base["a.weight"][:10]})
    full = open_moments(write_moments(tmp_path / "expert", {name: np.ones_like(x) for name, x in base.items()}))
    with pytest.raises(CheckpointError, match=r"tensor 'a.weight' has shape \[10, 60\], its second moments \[70, 60\]"):
        agreement(full, full, Checkpoint(tmp_path / "expert"), Checkpoint(tmp_path / "base"), density=0.5, stream=Stream())
