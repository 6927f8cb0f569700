"""The ten mistakes seen in other implementations.

Each test holds the mistaken version in a few lines, shows that it gives something else, and then that the engine is right.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from ota_core.errors import CheckpointError, MomentsError, OtaError, RecipeError
from ota_core.recipe.recipe import load_recipe
from tests import reference
from tests.checkpoints import (
    assert_merged,
    exact_v,
    ota_recipe,
    random_base,
    random_experts,
    read_tensors,
    rounded,
    run_merge,
    write_checkpoint,
    write_moments,
)
from tests.reference import Expert, Tensors

NAME = "model.norm.weight"
BASE = random_base(31)
EXPERTS = [replace(e, density=0.4) for e in exact_v(random_experts(BASE, 3))]


def one(values: list[float], v: list[float] | None = None, **options: Any) -> Expert:
    """An expert of a single vector."""
    return Expert(weights={NAME: np.array(values, np.float32)}, v={} if v is None else {NAME: np.array(v, np.float32)}, **options)


def merged(tmp: Path, base: Tensors, experts: list[Expert], parameters: dict[str, Any] | None = None, **options: Any) -> Tensors:
    return run_merge(ota_recipe(tmp, base, experts, parameters, **options), tmp / "out")[0]


def differ(a: Tensors, b: Tensors) -> bool:
    return any((np.abs(a[n] - b[n]) > 1e-5).any() for n in a)


def test_1_fully_masked_is_read_from_the_masks(tmp_path: Path) -> None:
    base = {NAME: np.array([1.0, 1.0], np.float32)}
    expert = one([2.0, 3.0], v=[1e-34, 1e-38])
    p = np.sqrt(expert.v[NAME].astype(np.float64))
    mistaken = np.where(p < 1e-12, base[NAME], expert.weights[NAME])
    assert mistaken.tolist() == [1.0, 1.0]
    assert merged(tmp_path / "whole", base, [expert])[NAME].tolist() == [2.0, 3.0]
    assert merged(tmp_path / "kept", base, [replace(expert, precond_threshold=0.0)])[NAME].tolist() == [2.0, 3.0]
    # With fallback mean, an element that is kept with a tiny weight is not taken for one that nobody keeps.
    pair = [replace(expert, density=0.5), replace(one([5.0, 1.0], v=[1e-34, 1e-34]), density=0.5)]
    got = merged(tmp_path / "mean", base, pair, {"fallback": "mean"})
    assert_merged(got, reference.ota(base, pair, fallback="mean"), base)


def test_2_no_epsilon_of_our_own(tmp_path: Path) -> None:
    experts = [replace(e, v={n: x * np.float32(1e-6) for n, x in e.v.items()}, density=None) for e in EXPERTS]
    mistaken, right = reference.ota(BASE, experts, epsilon=1e-8), reference.ota(BASE, experts)
    mean = {n: np.mean([e.weights[n].astype(np.float64) for e in experts], axis=0) for n in BASE}
    # √v is at most 1e-9 here, so that 1e-8 makes a plain mean of everything.
    spread = max(np.abs(right[n] - mean[n]).max() for n in BASE)
    assert max(np.abs(mistaken[n] - mean[n]).max() for n in BASE) < 0.2 * spread
    assert differ(mistaken, right)
    assert_merged(merged(tmp_path, BASE, experts), right, BASE)


def test_3_nobody_kept_and_no_curvature_give_no_nan(tmp_path: Path) -> None:
    base = {NAME: np.array([1.0, 2.0, 3.0], np.float32)}
    a, b = one([2.0, 2.0, 4.0], v=[0.0, 0.0, 0.0]), one([3.0, 5.0, 3.0], v=[0.0, 0.0, 1e-10])
    with np.errstate(invalid="ignore"):
        p = [np.sqrt(e.v[NAME]) for e in (a, b)]
        mistaken = base[NAME] + sum(x * (e.weights[NAME] - base[NAME]) for x, e in zip(p, (a, b), strict=True)) / sum(p)
    assert np.isnan(mistaken).any()
    for density in (None, 0.3):
        for fallback in ("base", "mean"):
            experts = [replace(e, density=density) for e in (a, b)]
            got = merged(tmp_path / f"{density}{fallback}", base, experts, {"fallback": fallback})
            assert np.isfinite(got[NAME]).all()
            assert_merged(got, reference.ota(base, experts, fallback=fallback), base)


@pytest.mark.parametrize("masked_merge", ["linear", "ties"])
def test_4a_masks_hold_in_every_branch(tmp_path: Path, masked_merge: str) -> None:
    mistaken = reference.ota(BASE, [replace(e, density=None) for e in EXPERTS], masked_merge=masked_merge)
    right = reference.ota(BASE, EXPERTS, masked_merge=masked_merge)
    assert differ(mistaken, right)
    assert_merged(merged(tmp_path, BASE, EXPERTS, {"masked_merge": masked_merge}), right, BASE)


@pytest.mark.parametrize(
    "change, nearest",
    [
        ({"masked_merge": "linaer"}, "linear"),
        ({"masked_merg": "linear"}, "masked_merge"),
        ({"densty": 0.4}, "density"),
        ({"compression": "rank_1"}, "rank1"),
        ({"fallback": "bass"}, "base"),
        ({"scope": "global_"}, "global"),
    ],
)
def test_4b_a_mistyped_option_never_means_the_default(tmp_path: Path, change: dict[str, Any], nearest: str) -> None:
    asked = {"merge_method": "ota", "base_model": "base", "models": [{"model": "a"}], "parameters": {"power": 0.5, **change}}
    key, value = next(iter(change.items()))
    mistaken = {"masked_merge": "precond", "compression": "none", "fallback": "base", "scope": "global"}
    assert mistaken.get(key, "ignored") != value
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(asked))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert key in str(caught.value) and nearest in str(caught.value)


def test_5_the_difference_is_taken_before_any_cast(tmp_path: Path) -> None:
    base, end = {NAME: np.array([1.0, -2.0], np.float32)}, one([1.0 + 2**-9, -2.0 + 2**-9], v=[1e-10, 1e-10])
    cast = rounded({"b": base[NAME], "e": end.weights[NAME]}, torch.bfloat16)
    mistaken = cast["b"] + 8 * (cast["e"] - cast["b"])
    assert mistaken.tolist() == [1.0, -2.0]
    got = merged(tmp_path, base, [end], {"lambda": 8.0}, top={"dtype": "bfloat16"})
    assert got[NAME].tolist() == [1.0 + 2**-6, -2.0 + 2**-6]
    # bfloat16 experts of a float32 base: the base is not rounded to match them.
    recipe = ota_recipe(tmp_path / "mixed", base, [end], {"lambda": 8.0}, top={"dtype": "bfloat16"})
    fine = {NAME: np.array([1.0 + 2**-9, -2.0 - 2**-9], np.float32)}
    recipe["base_model"] = str(write_checkpoint(tmp_path / "fine", fine))
    write_checkpoint(tmp_path / "mixed" / "expert0", {NAME: np.array([1.0, -2.0], np.float32)}, dtype=torch.bfloat16)
    want = rounded({NAME: fine[NAME] + np.array([-1, 1], np.float32) * 8 * 2**-9}, torch.bfloat16)[NAME]
    assert run_merge(recipe, tmp_path / "mixed" / "out")[0][NAME].tolist() == want.tolist()


def test_6a_rank1_divides_first(tmp_path: Path) -> None:
    """r and c near 1e-22: their product is below float32's smallest number."""
    name = "model.layers.0.self_attn.q_proj.weight"
    rng = np.random.default_rng(0)
    base = {name: rng.normal(0, 1, (6, 8)).astype(np.float32)}
    experts = [
        Expert(
            weights={name: base[name] + rng.normal(0, 0.1, (6, 8)).astype(np.float32)},
            v={name: (rng.random((6, 8)) * 1e-25).astype(np.float32)},
        )
        for _ in range(2)
    ]
    v = experts[0].v[name]
    mistaken = v.sum(1, keepdims=True) * v.sum(0, keepdims=True) / v.sum()
    assert not mistaken.any(), "the product underflows to zero"
    right = reference.ota(base, experts, compression="rank1")
    assert differ(right, base)
    assert_merged(merged(tmp_path, base, experts, {"compression": "rank1"}), right, base)


def test_6b_rank1_never_turns_into_the_full_v(tmp_path: Path) -> None:
    mistaken, right = reference.ota(BASE, EXPERTS), reference.ota(BASE, EXPERTS, compression="rank1")
    assert differ(mistaken, right)
    assert_merged(merged(tmp_path, BASE, EXPERTS, {"compression": "rank1"}), right, BASE)


def test_6c_compressed_moments_alone_are_enough(tmp_path: Path) -> None:
    """The full v is gone; the merge is the same to the last bit. Scoring with the full v then is an error, not something else."""
    from ota_core.compute.stream import Stream
    from ota_core.moments import open_moments
    from ota_core.moments.compression import compress, save_compressed

    recipe = ota_recipe(tmp_path, BASE, EXPERTS, {"compression": "rank1"})
    fused, _ = run_merge(recipe, tmp_path / "fused")
    for m, entry in enumerate(recipe["models"]):
        moments, _ = compress(open_moments(tmp_path / f"expert{m}" / "exp_avg_sq.safetensors"), stream=Stream())
        save_compressed(moments, tmp_path / f"small{m}.safetensors")
        (tmp_path / f"expert{m}" / "exp_avg_sq.safetensors").unlink()
        entry["parameters"]["preconditioner_path"] = str(tmp_path / f"small{m}.safetensors")
    staged, _ = run_merge(recipe, tmp_path / "staged")
    for name in fused:
        np.testing.assert_array_equal(staged[name], fused[name], err_msg=name)
    recipe["parameters"]["mask_curvature"] = "full"
    with pytest.raises(OtaError, match=r"full"):
        run_merge(recipe, tmp_path / "full")


def test_6d_a_sum_that_overflows_is_an_error(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    v = {n: x.copy() for n, x in EXPERTS[0].v.items()}
    v[name][:] = 3e38
    with np.errstate(over="ignore"):
        assert np.isinf(v[name].sum(axis=1)).all() and np.isfinite(v[name]).all()
    with pytest.raises(OtaError, match="q_proj"):
        merged(tmp_path, BASE, [replace(EXPERTS[0], v=v), *EXPERTS[1:]], {"compression": "rank1"})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("compression", ["none", "rank1"])
@pytest.mark.parametrize("bad", [-1e-20, float("nan"), float("inf")])
def test_6e_a_bad_entry_of_v_is_never_repaired(tmp_path: Path, bad: float, compression: str) -> None:
    v = {n: x.copy() for n, x in EXPERTS[1].v.items()}
    v["model.layers.1.mlp.up_proj.weight"][4, 5] = bad
    with pytest.raises(MomentsError) as caught:
        merged(tmp_path, BASE, [EXPERTS[0], replace(EXPERTS[1], v=v)], {"compression": compression})
    assert "up_proj" in str(caught.value) and "exp_avg_sq.safetensors" in str(caught.value)
    assert not (tmp_path / "out").exists()


def _llamas(
    tmp: Path, rearrange: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]] | None, tokens: list[str], rows: int
) -> dict[str, Any]:
    """A base, and an expert whose vocabulary rows are rearranged; returns what the tests compare."""
    from tests.tiny_models import edit_config, perturb, vocabulary, write_tiny_llama, write_tokenizer

    base_folder = write_tiny_llama(tmp / "base", vocab=vocabulary(120))
    folder = perturb(base_folder, tmp / "expert", seed=1)
    base, weights = read_tensors(base_folder), read_tensors(folder)
    rng = np.random.default_rng(2)
    v = {n: (10.0 ** rng.uniform(-20, -8, x.shape)).astype(np.float32) for n, x in weights.items()}
    other_v = {n: (10.0 ** rng.uniform(-20, -8, x.shape)).astype(np.float32) for n, x in weights.items()}
    other = perturb(base_folder, tmp / "other", seed=5)
    write_moments(other, other_v)
    stored, stored_v = dict(weights), dict(v)
    if rearrange is not None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            stored[name], stored_v[name] = rearrange(weights[name]), rearrange(v[name])
        (folder / "model.safetensors").unlink()
        config = json.loads((folder / "config.json").read_text())
        write_checkpoint(folder, stored, config=config)
        edit_config(folder, vocab_size=rows)
        write_tokenizer(folder, tokens)
    write_moments(folder, stored_v)
    experts = [Expert(weights=weights, v=v, density=0.5), Expert(weights=read_tensors(other), v=other_v, density=0.5)]
    recipe = {
        "merge_method": "ota", "base_model": str(base_folder), "models": [{"model": str(folder)}, {"model": str(other)}],
        "parameters": {"density": 0.5},
    }  # fmt: skip
    return {"base": base, "experts": experts, "recipe": recipe, "stored": stored, "stored_v": stored_v}


def test_7_rows_of_v_follow_the_rows_of_the_embedding(tmp_path: Path) -> None:
    from tests.tiny_models import SPECIAL, vocabulary

    tokens = vocabulary(120)
    order = np.concatenate([np.arange(len(SPECIAL)), len(SPECIAL) + np.random.default_rng(3).permutation(120 - len(SPECIAL))])
    case = _llamas(tmp_path, lambda x: x[order], [tokens[i] for i in order], 120)
    right = reference.ota(case["base"], case["experts"])
    # Mistaken: θ is matched by token, v is left as it lay; or nothing is matched at all.
    half = replace(case["experts"][0], v=case["stored_v"])
    neither = replace(half, weights=case["stored"])
    assert differ(reference.ota(case["base"], [half, case["experts"][1]]), right)
    assert differ(reference.ota(case["base"], [neither, case["experts"][1]]), right)
    got, _ = run_merge(case["recipe"], tmp_path / "out")
    assert_merged(got, right, case["base"])


def test_7_padding_rows_are_no_tokens(tmp_path: Path) -> None:
    """An expert padded to a multiple of 64: the rows beyond its tokens, and their v, take no part."""
    from tests.tiny_models import vocabulary

    def pad(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.concatenate([x, np.full((8, x.shape[1]), 1e-3, x.dtype)])

    case = _llamas(tmp_path, pad, vocabulary(120), 128)
    got, report = run_merge(case["recipe"], tmp_path / "out")
    assert_merged(got, reference.ota(case["base"], case["experts"]), case["base"])
    assert len({d["total"] for d in report.densities.values()}) == 1


def test_7_sizes_that_differ_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    base = {"model.embed_tokens.weight": BASE["model.embed_tokens.weight"]}
    wider = {"model.embed_tokens.weight": np.concatenate([base["model.embed_tokens.weight"]] * 2)}
    expert = Expert(weights=wider, v={n: np.full(x.shape, 1e-10, np.float32) for n, x in wider.items()})
    with pytest.raises(CheckpointError, match=r"vocabularies differ.*13 rows.*26 rows"):
        merged(tmp_path, base, [expert])
    assert not (tmp_path / "out").exists()


def test_8_integer_keys_follow_the_optimizers_groups(tmp_path: Path) -> None:
    """All parameters have one shape here, so that only the order can tell them apart."""
    from ota_core.moments import ParameterLayout, open_moments

    names = ["a.norm.weight", "b.proj.weight", "c.norm.bias", "d.proj.weight", "e.norm.weight"]
    decayed = [n for n in names if "proj" in n]
    parameters = {n: torch.nn.Parameter(torch.randn(4, 4)) for n in names}
    optimizer = torch.optim.AdamW([
        {"params": [parameters[n] for n in decayed], "weight_decay": 0.1},
        {"params": [parameters[n] for n in names if n not in decayed], "weight_decay": 0.0},
    ])  # fmt: skip
    for _ in range(3):
        for i, p in enumerate(parameters.values()):
            p.grad = torch.randn(4, 4) * (i + 1)
        optimizer.step()
    live = {n: optimizer.state[p]["exp_avg_sq"] for n, p in parameters.items()}
    state = optimizer.state_dict()
    mistaken = {n: state["state"][i]["exp_avg_sq"] for i, n in enumerate(names)}
    assert any(not torch.equal(mistaken[n], live[n]) for n in names)
    torch.save(state, tmp_path / "optimizer.pt")
    layout = ParameterLayout(shapes=dict.fromkeys(names, (4, 4)), decayed=frozenset(decayed))
    moments = open_moments(tmp_path / "optimizer.pt", layout=lambda: layout)
    for n in names:
        assert np.array_equal(moments.read(n, 0, 4), live[n]), n


@pytest.mark.parametrize("spelling, value", [("1e-26", 1e-26), ("5E-9", 5e-9), ("1.0e-30", 1e-30), ("2e0", 2.0)])
def test_9_numbers_in_yaml_are_numbers(tmp_path: Path, spelling: str, value: float) -> None:
    parameters = f"parameters: {{precond_threshold: {spelling}, epsilon: {spelling}}}"
    text = f"merge_method: ota\nbase_model: base\nmodels: [{{model: a}}]\n{parameters}\n"
    if spelling in {"1e-26", "5E-9", "2e0"}:
        assert isinstance(yaml.safe_load(text)["parameters"]["epsilon"], str), "YAML 1.1 wants a dot"
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    recipe = load_recipe(path)
    assert (recipe.setting("precond_threshold", 0), recipe.setting("epsilon")) == (value, value)


def test_10_nothing_of_an_older_output_survives(tmp_path: Path) -> None:
    recipe = ota_recipe(tmp_path, BASE, EXPERTS)
    out = write_checkpoint(tmp_path / "out", random_base(99), shards=3)
    (out / "model.safetensors").write_bytes(b"half a file")
    old = {p.name for p in out.iterdir()}
    # Mistaken: writing into the folder leaves an index that names the old shards, and transformers follows the index.
    assert "model.safetensors.index.json" in old
    with pytest.raises(OtaError, match=r"overwrite|exists|empty"):
        run_merge(recipe, out)
    assert {p.name for p in out.iterdir()} == old, "a refused merge touches nothing"
    got, _ = run_merge(recipe, out, overwrite=True)
    assert_merged(got, reference.ota(BASE, EXPERTS), BASE)
    assert not [p.name for p in out.iterdir() if "-of-" in p.name or p.name.endswith("index.json")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "expert0", "expert1", "expert2", "out"], (
        "no temporary folder is left"
    )
