"""What an analysis does without, and that it says so; what it refuses; how much memory it takes."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ota_core.analysis import Analysis, analyse
from ota_core.analysis.agreement import agreements
from ota_core.compute.stream import Stream
from ota_core.engine import engine
from ota_core.errors import CheckpointError, MomentsError, OtaError
from ota_core.files.checkpoint import Checkpoint
from ota_core.moments import open_moments
from ota_core.plan.inputs import resolve_local
from ota_core.recipe.recipe import MergeRecipe
from tests.checkpoints import ota_recipe, random_base, random_experts, with_compressed, write_checkpoint, write_moments
from tests.ota_core.analysis import analysis_reference as plain
from tests.ota_core.analysis.test_analysis_numbers import NAMES, assert_equal, run, world

EDITS = ("task_vector", "localisation", "moe", "sparsity")
# One tensor of ``world`` stacks the experts of a mixture, hence the rows of ``moe``.
WITHOUT_CURVATURE = {("task_vector", "")} | {(kind, "magnitude") for kind in ("localisation", "moe", "sparsity")}


def kinds(found: Analysis) -> set[tuple[str, str]]:
    return {(row.analysis, row.variant) for row in found.rows}


def recipe_of(root: Path, method: str, *, moments: bool = True, **more: Any) -> dict[str, Any]:
    base, experts = world()
    if not moments:
        experts = [replace(e, v={}) for e in experts]
    return ota_recipe(root, base, experts, method=method, **more)


def test_a_merge_without_second_moments_has_edits_and_magnitude_alone(tmp_path: Path) -> None:
    base, experts = world()
    found = run(recipe_of(tmp_path, "linear", moments=False), {"density": 0.3})
    assert kinds(found) == WITHOUT_CURVATURE
    assert found.left_out == [
        "everything of the curvature of expert0, expert1, expert2: no second moments are given; their masks are by magnitude alone"
    ]
    assert "merge masks nothing of expert0, expert1, expert2" in found.notes[0] and "density 0.3" in found.notes[0]
    want = plain.task_vectors(base, dict(zip(NAMES, experts, strict=True)))
    for name, expert in zip(NAMES, experts, strict=True):
        score = {n: np.abs(expert.weights[n] - base[n]) for n in base}
        flat = plain.flat(score, list(base))
        want |= plain.localisation(
            name, "magnitude", plain.split(plain.top(flat, int(np.floor(0.3 * flat.size + 0.5))), score, list(base))
        )
    assert_equal(plain.by_key(found.rows), want)


def test_second_moments_beside_experts_are_used_where_the_merge_needs_none(tmp_path: Path) -> None:
    found = run(recipe_of(tmp_path / "ties", "ties", top={"parameters": {"density": 0.7}}), {"compressions": ("rank1",)})
    assert found.settings["density"] == 0.4 and found.left_out == []
    same = run(recipe_of(tmp_path / "ota", "ota", top={"parameters": {"density": 0.4}}), {"compressions": ("rank1",)})
    assert [repr(row) for row in found.rows] == [repr(row) for row in same.rows]
    assert found.notes == [
        "the merge masks nothing of expert0, expert1, expert2: their masks are those of FFG at density 0.4, for comparison"
    ]
    off = run(recipe_of(tmp_path / "off", "ties"), {"curvature": "off"})
    assert kinds(off) == WITHOUT_CURVATURE


def test_one_expert_without_second_moments_does_not_keep_the_others_from_being_compared(tmp_path: Path) -> None:
    base, experts = world()
    experts[1] = replace(experts[1], v={})
    found = run(ota_recipe(tmp_path, base, experts, method="linear"), {"compressions": ("rank1",)})
    pairs = {(r.expert, r.other) for r in found.rows if r.analysis == "curvature_overlap"}
    assert pairs == {("expert0", "expert2")}
    assert {r.expert for r in found.rows if r.analysis == "compression"} == {"expert0", "expert2"}
    variants = {(r.expert, r.variant) for r in found.rows if r.analysis == "localisation"}
    assert ("expert1", "magnitude") in variants and ("expert1", "curvature") not in variants
    assert found.left_out == [
        "everything of the curvature of expert1: no second moments are given; their masks are by magnitude alone"
    ]


def test_second_moments_can_be_required(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "linear", moments=False)
    with pytest.raises(MomentsError, match=r"(?s)3 problems found.*expert0.*holds no second moments.*curvature: auto") as error:
        run(recipe, {"curvature": "require"})
    assert len(error.value.problems) == 3


def test_a_recipe_that_masks_only_one_expert_keeps_its_mask(tmp_path: Path) -> None:
    base, experts = world()
    experts[0] = replace(experts[0], density=0.1)
    found = run(ota_recipe(tmp_path, base, experts), {"density": 0.25, "compressions": ()})
    densities = {
        r.expert: r.value
        for r in found.rows
        if (r.analysis, r.role, r.layer, r.variant, r.measure) == ("localisation", "all", None, "curvature", "density")
    }
    assert densities == pytest.approx({"expert0": 0.1, "expert1": 0.25, "expert2": 0.25}, abs=2e-3)
    assert {name: mask["of"] for name, mask in found.settings["masks"].items()} == {
        "expert0": "the merge", "expert1": "the analysis", "expert2": "the analysis",
    }  # fmt: skip


def test_without_a_base_the_curvature_alone_is_compared(tmp_path: Path) -> None:
    base, experts = world()
    recipe = ota_recipe(tmp_path, base, experts)
    del recipe["base_model"]
    found = run(recipe, {"compressions": ("none", "rank1")})
    assert {kind for kind, _ in kinds(found)} == {"curvature_overlap", "compression"}
    assert {r.measure for r in found.rows if r.analysis == "compression"} == {"sqrt_error", "bytes_per_param"}
    assert "no base_model" in found.left_out[0]
    with pytest.raises(OtaError, match="no base_model and none of its experts has second moments"):
        run(recipe, {"curvature": "off"})


def test_masks_and_compressed_moments_of_earlier_stages_give_the_same(tmp_path: Path) -> None:
    base, experts = world()
    recipe = MergeRecipe.model_validate(ota_recipe(tmp_path, base, experts, {"density": 0.3, "compression": "rank1"}))
    inputs = resolve_local(recipe)
    plain_run = analyse(recipe, inputs)
    staged = with_compressed(inputs, tmp_path, "rank1")
    (tmp_path / "masks").mkdir()
    engine.mask(recipe, tmp_path / "masks", inputs=staged)
    masked = tuple(replace(e, masks=tmp_path / "masks" / f"{e.name}.safetensors") for e in staged.experts)
    for one in (staged, replace(staged, experts=masked)):
        assert [repr(row) for row in analyse(recipe, one).rows] == [repr(row) for row in plain_run.rows]

    # With nothing but the compressed second moments, curvature is theirs, and there is nothing to compare compressions with.
    bare = tuple(replace(e, full_moments=None) for e in staged.experts)
    found = analyse(recipe, replace(staged, experts=bare))
    assert "compression" not in {row.analysis for row in found.rows}
    assert len(found.left_out) == 3 and "expert0: only second moments compressed with rank1" in found.notes[0]
    assert_equal(
        plain.by_key(found.rows, lambda r: r.analysis in EDITS), plain.by_key(plain_run.rows, lambda r: r.analysis in EDITS)
    )


def test_tensors_without_second_moments_are_named(tmp_path: Path) -> None:
    base, experts = world()
    name = "model.layers.0.self_attn.q_proj.weight"
    experts[2] = replace(experts[2], v={n: x for n, x in experts[2].v.items() if n != name})
    with pytest.raises(MomentsError, match="changed in training but have no second moments"):
        run(ota_recipe(tmp_path / "ota", base, experts, {"density": 0.4}))
    found = run(ota_recipe(tmp_path / "linear", base, experts, method="linear"), {"compressions": ()})
    assert found.left_out == ["curvature overlap: 64 elements of tensors of which some expert has no second moments"]
    assert f"hence unmasked in a merge: {name}" in found.notes[1]
    assert (0, "q") not in {(r.layer, r.role) for r in found.rows if r.expert == "expert2" and r.analysis == "localisation"}


@pytest.mark.parametrize(("bad", "said"), [(float("nan"), "1 NaN"), (float("inf"), "1 infinite")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, bad: float, said: str) -> None:
    base, experts = world()
    recipe = ota_recipe(tmp_path, base, experts, method="linear")
    experts[1].weights["model.norm.weight"][3] = bad
    write_checkpoint(tmp_path / "expert1", experts[1].weights)
    with pytest.raises(CheckpointError, match=rf"expert1 \(expert1\): tensor 'model.norm.weight' holds {said} of 7 numbers"):
        run(recipe, {"curvature": "off"})


def test_bad_second_moments_are_named(tmp_path: Path) -> None:
    base, experts = world()
    recipe = ota_recipe(tmp_path, base, experts)
    experts[1].v["model.layers.1.mlp.up_proj.weight"][2, 3] = -1e-9
    write_moments(tmp_path / "expert1", experts[1].v)
    for method in ("ota", "linear"):
        with pytest.raises(MomentsError, match=r"expert1/exp_avg_sq.safetensors.*'model.layers.1.mlp.up_proj.weight'"):
            run(recipe | {"merge_method": method})


def sgd(folder: Path) -> str:
    """What SGD leaves beside an expert, in place of its second moments; what is wrong with it."""
    (folder / "exp_avg_sq.safetensors").unlink()
    state = {0: {"momentum_buffer": torch.zeros(2)}}
    torch.save({"state": state, "param_groups": [{"params": [0], "momentum": 0.9, "dampening": 0}]}, folder / "optimizer.pt")
    return "keeps a momentum and no second moments"


def truncated(folder: Path) -> str:
    """An optimizer's state of which the end is missing."""
    sgd(folder)
    content = (folder / "optimizer.pt").read_bytes()
    (folder / "optimizer.pt").write_bytes(content[: len(content) // 2])
    return "truncated"


def several(folder: Path) -> str:
    """More than one set of second moments."""
    (folder / "optimizer.pt").write_bytes(b"PK\x03\x04")
    return "holds several second moments"


@pytest.mark.parametrize(("method", "spoil"), [("ties", sgd), ("linear", sgd), ("linear", truncated), ("linear", several)])
def test_second_moments_that_a_merge_does_not_need_may_be_unreadable(
    tmp_path: Path, method: str, spoil: Callable[[Path], str]
) -> None:
    recipe = recipe_of(tmp_path, method)
    reason = spoil(tmp_path / "expert1")
    found = run(recipe, {"compressions": ()})
    (said,) = found.left_out
    assert said.startswith("everything of the curvature of expert1, whose masks are by magnitude alone: ") and reason in said
    assert found.settings["with_curvature"] == ["expert0", "expert2"]
    with pytest.raises(OtaError, match=reason):
        run(recipe, {"curvature": "require"})
    del recipe["base_model"]
    for other in ("expert0", "expert2"):
        (tmp_path / other / "exp_avg_sq.safetensors").unlink()
    if method == "linear":
        with pytest.raises(OtaError, match=f"none of its experts has second moments: nothing.*expert1: .*{reason}"):
            run(recipe)


def test_a_merge_that_needs_second_moments_is_analysed_with_them_or_not_at_all(tmp_path: Path) -> None:
    recipe = MergeRecipe.model_validate(recipe_of(tmp_path, "ota"))
    inputs = resolve_local(recipe)
    (tmp_path / "expert1" / "exp_avg_sq.safetensors").write_bytes(b"no second moments")
    with pytest.raises(OtaError, match=r"exp_avg_sq\.safetensors is not a safetensors file"):
        analyse(recipe, inputs)


def test_an_expert_that_never_moved_has_no_direction(tmp_path: Path) -> None:
    base, experts = world()
    still = [experts[0], replace(experts[1], weights=base)]
    found = plain.by_key(run(ota_recipe(tmp_path, base, still, {"density": 0.4}), {"compressions": ()}).rows)
    assert found["localisation", "expert1", None, None, "all", "curvature", "density", None] == 0
    assert found["task_vector", "expert1", None, None, "all", "", "norm", None] == 0
    for measure in ("cosine", "sign_conflict"):
        assert np.isnan(found["task_vector", "expert0", "expert1", None, "all", "", measure, None])


def test_a_base_of_another_shape_is_no_ground_for_agreement(tmp_path: Path) -> None:
    base = random_base(3, {"a.weight": (70, 60)})
    write_checkpoint(tmp_path / "expert", base)
    write_checkpoint(tmp_path / "base", {**base, "a.weight": base["a.weight"][:10]})
    full = open_moments(write_moments(tmp_path / "expert", {name: np.ones_like(x) for name, x in base.items()}))
    with pytest.raises(CheckpointError, match=r"tensor 'a.weight' has shape \[10, 60\], its second moments \[70, 60\]"):
        agreements(full, [full], Checkpoint(tmp_path / "expert"), Checkpoint(tmp_path / "base"), density=0.5, stream=Stream())


MEASURE = """
import resource, sys
from pathlib import Path
from ota_core.analysis import analyse
from ota_core.plan.inputs import resolve_local
from ota_core.recipe.recipe import load_recipe
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
small, large = (load_recipe(Path(path)) for path in sys.argv[1:])
analyse(small, resolve_local(small), memory="64MiB", threads=2)  # compiled code, libraries
before = peak()
analyse(large, resolve_local(large), memory="64MiB", threads=2)
print((peak() - before) / 1024)
"""


@pytest.mark.slow
def test_memory_stays_within_the_budget_not_the_model(tmp_path: Path) -> None:
    """Three experts of 16 M parameters, 384 MiB of weights and second moments, within 64 MiB and what the allocator keeps."""
    paths = []
    for name, width in (("small", 64), ("large", 2048)):
        shapes = {f"model.layers.{i}.self_attn.{p}_proj.weight": (width, width) for i in range(2) for p in ("q", "k")}
        base = random_base(1, shapes)
        recipe = MergeRecipe.model_validate(
            ota_recipe(tmp_path / name, base, random_experts(base, 3), {"density": 0.4, "compression": "rank1"})
        )
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(recipe.to_yaml())
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, paths)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100, done.stdout
