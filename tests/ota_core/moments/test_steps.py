"""Which of several checkpoint-N belongs to the weights beside them: folders as the Trainer leaves them, written by hand."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ota_core.errors import MomentsError
from ota_core.moments import choice_in, find_moments


def checkpoint(folder: Path, step: int | None, *, weights: float | None = None, moments: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if weights is not None:
        save_file({"w": torch.full((3, 2), weights), "still": torch.ones(2)}, folder / "model.safetensors")
    if moments:
        torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pt")
    if step is not None:
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))


def test_the_one_with_the_same_weights_is_taken(tmp_path):
    checkpoint(tmp_path, 30, weights=2.0, moments=False)  # load_best_model_at_end: the best is not the newest
    for step, weights in ((10, 1.0), (20, 2.0), (30, 3.0)):
        checkpoint(tmp_path / f"checkpoint-{step}", step, weights=weights)
    assert find_moments(tmp_path) == tmp_path / "checkpoint-20" / "optimizer.pt"
    choice = choice_in(tmp_path)
    assert choice is not None
    assert choice.note == "second moments of checkpoint-20, which holds the same weights (2 other checkpoints left aside)"


def test_of_two_that_fit_the_newest_by_its_state_is_taken(tmp_path):
    checkpoint(tmp_path, None, weights=2.0, moments=False)
    checkpoint(tmp_path / "checkpoint-9", 100, weights=2.0)
    checkpoint(tmp_path / "checkpoint-50", 50, weights=2.0)
    assert find_moments(tmp_path) == tmp_path / "checkpoint-9" / "optimizer.pt"


def test_without_weights_the_step_says_which(tmp_path):
    for name in ("trainer_state.json", "expert.json"):
        folder = tmp_path / name.partition(".")[0]
        checkpoint(folder, None, weights=1.0, moments=False)
        (folder / name).write_text(json.dumps({"global_step": 20, "step": 20}))
        for step in (10, 20, 30):
            checkpoint(folder / f"checkpoint-{step}", None)
        assert find_moments(folder) == folder / "checkpoint-20" / "optimizer.pt"
        choice = choice_in(folder)
        assert choice is not None and "as the weights are those of step 20 (2 other" in choice.note


def test_weights_that_differ_do_not_fit_whatever_the_step_says(tmp_path):
    checkpoint(tmp_path, 20, weights=5.0, moments=False)
    for step in (10, 20):
        checkpoint(tmp_path / f"checkpoint-{step}", step, weights=1.0)
    with pytest.raises(
        MomentsError, match=r"holds several second moments: checkpoint-10/optimizer\.pt, checkpoint-20/optimizer\.pt; one"
    ):
        find_moments(tmp_path)


def test_weights_written_again_are_compared_again(tmp_path):
    checkpoint(tmp_path, None, weights=1.0, moments=False)
    for step in (10, 20):
        checkpoint(tmp_path / f"checkpoint-{step}", step, weights=float(step))
    with pytest.raises(MomentsError, match="several"):
        find_moments(tmp_path)
    checkpoint(tmp_path / "checkpoint-10", 10, weights=1.0)
    assert find_moments(tmp_path) == tmp_path / "checkpoint-10" / "optimizer.pt"


def test_what_lies_beside_the_weights_comes_first(tmp_path):
    checkpoint(tmp_path, None, weights=1.0)
    checkpoint(tmp_path / "checkpoint-10", 10, weights=2.0)
    assert find_moments(tmp_path) == tmp_path / "optimizer.pt"
    assert choice_in(tmp_path) is None


def test_a_single_checkpoint_is_no_choice(tmp_path):
    checkpoint(tmp_path, None, weights=1.0, moments=False)
    checkpoint(tmp_path / "checkpoint-10", 10)
    assert find_moments(tmp_path) == tmp_path / "checkpoint-10" / "optimizer.pt"
    assert choice_in(tmp_path) is None
