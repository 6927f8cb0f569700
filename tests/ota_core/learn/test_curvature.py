"""Mean squared gradients against plain autograd in float64, what is left of a killed run, and what readers see of the file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ota_core.compute.stream import Stream
from ota_core.errors import MomentsError, OtaError
from ota_core.learn.curvature import SquaredGradients
from ota_core.moments import how_estimated, open_moments
from ota_core.moments.compression import write_compressed
from ota_core.plan.views import bias_factor

BATCHES = [torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(i)) for i in range(6)]
SAID = {"samples": 24, "batch": 4, "max_length": 5, "clip": None, "texts": "x"}


class Network(torch.nn.Module):
    """Predicts the next of 11 tokens; the embedding is the output's weight, too, and one matrix is frozen."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embed = torch.nn.Parameter(torch.randn(11, 6, generator=generator, dtype=torch.float64).to(dtype))
        self.frozen = torch.nn.Parameter(torch.randn(6, 6, generator=generator, dtype=torch.float64).to(dtype))
        self.mix = torch.nn.Parameter(torch.randn(6, 6, generator=generator, dtype=torch.float64).to(dtype))
        self.norm = torch.nn.Parameter(torch.ones(6, dtype=dtype))
        self.head = self.embed

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.embed[ids[:, :-1]] @ self.frozen) * self.norm
        logits = (hidden + torch.tanh(hidden @ self.mix)) @ self.head.T
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        return {"embed": self.embed, "mix": self.mix, "norm": self.norm}


def added(
    clip: float | None = None, dtype: torch.dtype = torch.float64, batches: list[torch.Tensor] = BATCHES
) -> SquaredGradients:
    network = Network(dtype)
    found = SquaredGradients(network, network.trained, clip)
    for ids in batches:
        found.add(loss_of(network, ids))
    return found


def loss_of(network: Network, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: network.loss(ids)


def plain(clip: float | None, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """The same by autograd over all batches with torch's own clipping, everything kept."""
    network = Network(dtype)
    network.frozen.requires_grad_(False)
    squares = {name: torch.zeros(one.shape, dtype=torch.float64) for name, one in network.trained.items()}
    for ids in BATCHES:
        network.zero_grad()
        network.loss(ids).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(network.trained.values(), clip)
        for name, one in network.trained.items():
            assert one.grad is not None
            squares[name] += one.grad.double() ** 2 / len(BATCHES)
    return squares


@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
def test_it_is_the_mean_square_of_what_clipping_leaves_of_the_gradients(clip: float | None, tmp_path: Path) -> None:
    found = added(clip)
    found.write(tmp_path / "v.safetensors", SAID)
    moments, wanted = open_moments(tmp_path / "v.safetensors"), plain(clip)
    assert set(moments.shapes()) == set(wanted)
    for name, square in wanted.items():
        v = moments.read(name, 0, len(square))
        torch.testing.assert_close(torch.from_numpy(v.copy()).reshape(square.shape).double(), square, rtol=2e-6, atol=0)
    assert len(found.norms) == len(found.losses) == 6
    norms = [norm for norm in found.norms if clip is not None and norm > clip]
    assert bool(norms) is (clip == 0.5)


def test_in_bfloat16_gradients_are_squared_and_added_in_float32() -> None:
    found, wanted = added(None, torch.bfloat16), plain(None, torch.bfloat16)
    for name, one in found.sums.items():
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double() / 6, wanted[name], rtol=2e-6, atol=0)


def test_a_gradient_is_freed_before_the_next_one_is_complete_and_nothing_is_left_as_it_was_not() -> None:
    network = Network()
    network.norm.requires_grad_(False)
    alive: list[int] = []
    found = SquaredGradients(network, network.trained, 1.0)
    for parameter in network.trained.values():
        parameter.requires_grad_(True)
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(one.grad is not None for one in network.parameters()))
        )
    network.norm.requires_grad_(False)
    found.add(loss_of(network, BATCHES[0]))
    assert max(alive) == 1 and all(one.grad is None for one in network.parameters())
    assert [one.requires_grad for one in (network.embed, network.frozen, network.norm)] == [True, True, False]


@pytest.mark.parametrize("clip", [None, 0.5])
def test_what_goes_on_after_a_kill_has_the_same_bytes(clip: float | None, tmp_path: Path) -> None:
    added(clip).write(tmp_path / "whole", SAID)
    added(clip, batches=BATCHES[:2]).save(tmp_path / "kept", "one")
    network = Network()
    found = SquaredGradients(network, network.trained, clip)
    found.load(tmp_path / "nothing", "one")
    assert found.batches == 0
    found.load(tmp_path / "kept", "one")
    assert found.batches == 2
    for ids in BATCHES[2:]:
        found.add(loss_of(network, ids))
    found.write(tmp_path / "resumed", SAID)
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert (found.losses, found.norms) == (added(clip).losses, added(clip).norms)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "kept", "resumed"}


def test_the_beginning_of_another_estimate_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    added(batches=BATCHES[:1]).save(tmp_path / "kept", "one")
    with pytest.raises(MomentsError, match="another estimate; delete it"):
        added(batches=[]).load(tmp_path / "kept", "two")
    network = Network()
    with pytest.raises(MomentsError, match="another estimate"):
        SquaredGradients(network, {"mix": network.mix}).load(tmp_path / "kept", "one")
    (tmp_path / "kept").write_bytes((tmp_path / "kept").read_bytes()[:40])
    with pytest.raises(MomentsError, match="damaged"):
        added(batches=[]).load(tmp_path / "kept", "one")


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_loss_that_is_no_number_is_an_error_that_names_the_batch(clip: float | None) -> None:
    network = Network()
    found = SquaredGradients(network, network.trained, clip)
    found.add(loss_of(network, BATCHES[0]))
    with torch.no_grad():
        network.mix[0, 0] = torch.nan
    with pytest.raises(OtaError, match="batch 2: the loss is nan"):
        found.add(loss_of(network, BATCHES[1]))


@pytest.mark.parametrize("method", ["none", "rank1", "log8", "rank_k"])
def test_readers_know_an_estimate_in_every_form_and_correct_no_bias(method: str, tmp_path: Path) -> None:
    added().write(tmp_path / "v.safetensors", SAID)
    # What expert.json says is of the training, not of the estimate.
    (tmp_path / "expert.json").write_text('{"step": 3, "beta2": 0.9}')
    full = open_moments(tmp_path / "v.safetensors")
    assert full.estimated == SAID and bias_factor(full, "mix") == 1.0
    write_compressed(full, tmp_path / "form", method=method, stream=Stream(memory=2**24))
    form = open_moments(tmp_path / "form")
    assert form.estimated == SAID and bias_factor(form, "mix") == 1.0
    assert how_estimated(SAID).startswith(
        "estimated: the mean squared gradient over 24 documents of at most 5 tokens in batches of 4, not"
    )
    if method == "none":
        assert np.array_equal(form.read("mix", 0, 6), full.read("mix", 0, 6))
