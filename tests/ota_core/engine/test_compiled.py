"""A merge by compiled passes has the bytes of one through tensors, for every method and option, with vocabularies that differ."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ota_core.engine import engine
from ota_core.plan.inputs import resolve_local
from ota_core.plan.plan import MergePlan, open_plan
from ota_core.recipe.recipe import MergeRecipe
from tests.checkpoints import write_checkpoint, write_moments

EMBED, HEAD, MATRIX, NORM = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.norm.weight",
)
TOKENS = [f"t{i}" for i in range(40)]
WIDTH = 9


def model(folder: Path, seed: int, tokens: list[str], *, own: int = 0, pad: int = 0, without: tuple[str, ...] = ()) -> Path:
    """A model whose rows are its tokens, the last ``own`` of them added tokens, and ``pad`` rows that no token has. bfloat16, with v.

    A token's row is near that of the same token in the other models. ``without``: tensors of which there are no second moments.
    """
    rng = np.random.default_rng([seed, 7])
    rows = {token: np.random.default_rng([1, i]).normal(0, 0.5, (2, WIDTH)) for i, token in enumerate(TOKENS)}
    shared = np.random.default_rng(0)
    start = np.stack([rows.get(token, rng.normal(0, 0.5, (2, WIDTH))) for token in tokens] + [np.full((2, WIDTH), 0.25)] * pad)
    tensors = {EMBED: start[:, 0], HEAD: start[:, 1], MATRIX: shared.normal(0, 0.5, (11, 7)), NORM: shared.normal(1, 0.1, 7)}
    if seed:
        for x in tensors.values():
            x += rng.normal(0, 0.02, x.shape) * (rng.random(x.shape) < 0.8)
    write_checkpoint(folder, tensors, dtype=torch.bfloat16, config={"vocab_size": len(tokens) + pad})
    v = {n: (10.0 ** rng.uniform(-20, -8, x.shape) * (rng.random(x.shape) < 0.9)).astype(np.float32) for n, x in tensors.items()}
    write_moments(folder, {name: x for name, x in v.items() if name not in without}, step=100, beta2=0.99)
    first = len(tokens) - own
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "model": {"type": "WordLevel", "vocab": {token: i for i, token in enumerate(tokens[:first])}},
        "added_tokens": [{"id": first + i, "content": token, **flags} for i, token in enumerate(tokens[first:])],
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def mixed(tokens: list[str]) -> list[str]:
    return [tokens[i] for i in np.random.default_rng(3).permutation(len(tokens))]


OWN = [[*TOKENS, "a", "b"], [*mixed(TOKENS), "b", "c", "d"], [*TOKENS, "d"]]
VOCABULARIES: dict[str, tuple[list[list[str]], list[int], list[int], dict[str, Any]]] = {
    # tokens of base and experts, how many of them were added, padding, keys of the recipe
    "same": ([TOKENS] * 4, [0] * 4, [0] * 4, {}),
    "base": ([TOKENS, TOKENS[:-5], mixed(TOKENS), TOKENS[3:]], [0] * 4, [3, 0, 5, 0], {}),
    "of an expert": ([TOKENS[:-5], mixed(TOKENS), TOKENS[:-2], TOKENS], [0] * 4, [0, 2, 0, 0], {"tokenizer_source": "model:expert0"}),
    "union": ([TOKENS, *OWN], [0, 2, 3, 1], [2, 0, 1, 0], {"tokenizer_source": "union"}),
}  # fmt: skip


def recipe_of(root: Path, method: str, parameters: dict[str, Any], vocabulary: str, *, base: bool = True,
              without: tuple[str, ...] = ()) -> MergeRecipe:  # fmt: skip
    tokens, own, pad, top = VOCABULARIES[vocabulary]
    folders = [
        model(root / name, seed, tokens[seed], own=own[seed], pad=pad[seed], without=without if seed == 2 else ())
        for seed, name in enumerate(("base", "expert0", "expert1", "expert2"))
    ]
    experts = folders[1:2] if method == "slerp" else folders[1:]
    raw: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(folder)} for folder in experts],
        "parameters": parameters,
    }
    if method in {"linear", "task_arithmetic", "ties"}:
        for entry, weight in zip(raw["models"], (0.3, 1.0, 0.7), strict=True):
            entry["parameters"] = {"weight": weight}
    if method == "ota":
        raw["models"][1]["parameters"] = {"scaling_factor": 0.3}
    return MergeRecipe.model_validate(raw | ({"base_model": str(folders[0])} if base else {}) | top)


METHODS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("linear", {}, {}),
    ("linear", {}, {"base": False}),
    ("slerp", {"t": 0.3}, {}),
    ("task_arithmetic", {"normalize": True, "lambda": 0.7}, {}),
    ("ties", {"density": 0.4}, {}),
    ("dare_ties", {"density": 0.4}, {}),
    ("breadcrumbs", {"density": 0.4, "gamma": 0.1}, {}),
    ("fisher", {}, {}),
    ("fisher", {"missing_curvature": "mean"}, {"without": (MATRIX, HEAD)}),
    ("ota", {}, {}),
    ("ota", {"epsilon": 1e-9, "power": 0.7, "normalise": "global"}, {}),
    ("ota", {"normalise": "global", "bias_correction": True, "density": 0.4, "compression": "rank1"}, {}),
    ("ota", {}, {"base": False}),
    ("ota", {"density": 0.4, "lambda": 1.7, "denominator": "all"}, {}),
    ("ota", {"density": 0.4, "compression": "rank1", "mask_curvature": "full", "scope": "per_tensor"}, {}),
    ("ota", {"density": 0.4, "masked_merge": "ties", "metric": "magnitude", "lambda": 0.7}, {}),
    ("ota", {"masked_merge": "ties", "rescale": True, "fallback": "mean", "density": 0.2}, {}),
    ("ota", {"density": 0.4, "masked_merge": "linear"}, {}),
    ("ota", {"density": 0.4, "rescale": True, "denominator": "all"}, {}),
    ("ota", {"density": 0.4, "rescale": True, "compression": "rank1"}, {}),
    ("ota", {"density": 0.2, "fallback": "mean", "lambda": 1.3}, {}),
    ("ota", {"density": 0.4, "missing_curvature": "mean", "lambda": 1.3, "fallback": "mean"}, {"without": (MATRIX, EMBED)}),
]


def merged(recipe: MergeRecipe, out: Path, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    report = engine.merge(recipe, out, **options)
    return load_file(out / "model.safetensors"), report.results


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name].view(torch.int16), other[name].view(torch.int16)), name


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize(("method", "parameters", "options"), METHODS, ids=str)
def test_compiled_passes_have_the_bytes_of_tensors(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    parameters: dict[str, Any],
    options: dict[str, Any],
    vocabulary: str,
) -> None:
    recipe = recipe_of(tmp_path, method, parameters, vocabulary, **options)
    with open_plan(recipe, resolve_local(recipe)) as plan:
        assert not plan.needs_torch()
    got, results = merged(recipe, tmp_path / "compiled", block_elements=100, threads=2)
    monkeypatch.setattr(MergePlan, "can_fuse", lambda *_, **__: False)
    wanted, expected = merged(recipe, tmp_path / "tensors")
    assert_same(got, wanted)
    assert results == expected
    assert all(torch.isfinite(x).all() for x in got.values())


@pytest.mark.parametrize("parameters", [{"density": 0.4}, {"masked_merge": "ties", "rescale": True, "density": 0.4}], ids=str)
def test_the_scale_of_a_matrix_is_that_of_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parameters: dict[str, Any]
) -> None:
    """Of the head, whose rows are matched by token, too."""
    recipe = recipe_of(tmp_path, "ota", parameters | {"lambda": "auto"}, "union")
    _, results = merged(recipe, tmp_path / "compiled", threads=2)
    monkeypatch.setattr(MergePlan, "can_fuse", lambda *_, **__: False)
    _, expected = merged(recipe, tmp_path / "tensors")
    assert results["lambda"]["per_tensor"].keys() == {HEAD, MATRIX}
    assert results["lambda"]["per_tensor"] == pytest.approx(expected["lambda"]["per_tensor"], rel=1e-5)


@pytest.mark.parametrize("vocabulary", ["base", "union"])
@pytest.mark.parametrize("parameters", [{"density": 0.4}, {"density": 0.4, "rescale": True}], ids=str)
def test_masks_made_before_give_the_same_bytes(tmp_path: Path, vocabulary: str, parameters: dict[str, Any]) -> None:
    """In rows that the base lacks there are no edits, hence no masks: made here or before."""
    recipe = recipe_of(tmp_path, "ota", parameters, vocabulary)
    got, results = merged(recipe, tmp_path / "direct")
    inputs = resolve_local(recipe)
    (tmp_path / "masks").mkdir()
    engine.mask(recipe, tmp_path / "masks", inputs=inputs)
    experts = tuple(replace(expert, masks=tmp_path / "masks" / f"{expert.name}.safetensors") for expert in inputs.experts)
    inputs = replace(inputs, experts=experts)
    staged, expected = merged(recipe, tmp_path / "staged", inputs=inputs)
    assert_same(got, staged)
    assert results == expected


@pytest.mark.parametrize(("method", "parameters", "base"), [("linear", {}, False), ("slerp", {"t": 0.3}, True)])
def test_what_one_model_lacks_is_the_others(tmp_path: Path, method: str, parameters: dict[str, Any], base: bool) -> None:
    """Not half of it: an average with rows of zeros would be."""
    recipe = recipe_of(tmp_path, method, parameters, "union", base=base)
    got, _ = merged(recipe, tmp_path / "out")
    rows = {
        entry["content"]: entry["id"] for entry in json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]
    }
    owner = load_file(tmp_path / "expert0" / "model.safetensors")
    assert torch.equal(got[EMBED][rows["a"]], owner[EMBED][len(TOKENS)])
