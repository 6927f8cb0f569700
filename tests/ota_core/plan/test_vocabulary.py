"""Vocabularies that differ: rows of the embeddings, of the head and of v follow their tokens, never their numbers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ota_core.engine import engine
from ota_core.errors import OtaError
from ota_core.plan.inputs import resolve_local
from ota_core.recipe.recipe import MergeRecipe
from tests.checkpoints import write_moments
from tests.ota_core.engine.test_output import loaded
from tests.tiny_models import SPECIAL, vocabulary, write_tiny_llama, write_tokenizer

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = vocabulary(104)
OPTIONS: dict[str, Any] = {"density": 0.3, "compression": "rank1"}


def model(folder: Path, seed: int, order: list[int], *, pad: int = 0, tie: bool = False) -> Path:
    """A tiny Llama whose row i holds the token TOKENS[order[i]], then ``pad`` rows that no token has. The same seed and order-free numbers:
    two models of one seed differ in the order of their rows alone."""
    plain = write_tiny_llama(folder, seed=0, vocab=TOKENS, tie=tie)
    state = load_file(plain / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    if seed:
        state = {name: x + 0.02 * torch.randn(x.shape, generator=generator) for name, x in sorted(state.items())}
    v = {name: 10.0 ** (-16 + 6 * torch.rand(x.shape, generator=generator)) for name, x in sorted(state.items())}
    for tensors, filler in ((state, 0.5), (v, 1e-3)):
        for name in {EMBED, HEAD} & tensors.keys():
            tensors[name] = torch.cat([tensors[name][order], torch.full((pad, tensors[name].shape[1]), filler)])
    save_file({name: x.contiguous() for name, x in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, [TOKENS[i] for i in order])
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": len(order) + pad}
    (folder / "config.json").write_text(json.dumps(config))
    if seed:
        write_moments(folder, v)
    return folder


SAME = list(range(len(TOKENS)))
SHUFFLED = [*range(len(SPECIAL)), *np.random.default_rng(0).permutation(np.arange(len(SPECIAL), len(TOKENS))).tolist()]


def merged(root: Path, base: list[int], experts: list[list[int]], *, pads: tuple[int, ...] = (), tie: bool = False, parameters: dict[str, Any] = OPTIONS,
           **top: Any) -> dict[str, torch.Tensor]:  # fmt: skip
    padding = pads or (0,) * (1 + len(experts))
    model(root / "base", 0, base, pad=padding[0], tie=tie)
    for i, order in enumerate(experts):
        model(root / f"expert{i}", i + 1, order, pad=padding[i + 1], tie=tie)
    return merge(root, len(experts), parameters, **top)


def merge(root: Path, count: int, parameters: dict[str, Any] = OPTIONS, **top: Any) -> dict[str, torch.Tensor]:
    raw = {
        "merge_method": "ota",
        "base_model": str(root / "base"),
        "models": [{"model": str(root / f"expert{i}")} for i in range(count)],
    }
    engine.merge(MergeRecipe.model_validate(raw | {"parameters": parameters} | top), root / "out")
    return load_file(root / "out" / "model.safetensors")


def by_token(state: dict[str, torch.Tensor], folder: Path, name: str = EMBED) -> dict[str, torch.Tensor]:
    table = json.loads((folder / "tokenizer.json").read_text())
    ids = table["model"]["vocab"] | {entry["content"]: entry["id"] for entry in table["added_tokens"]}
    return {token: state[name][row] for token, row in ids.items()}


def assert_same_tokens(a: Path, b: Path, tokens: list[str] | None = None, *, tie: bool = False) -> None:
    one, two = (load_file(path / "out" / "model.safetensors") for path in (a, b))
    for name in one.keys() - {EMBED, HEAD}:
        assert torch.equal(one[name], two[name]), name
    for name in (EMBED,) if tie else (EMBED, HEAD):
        left, right = by_token(one, a / "out", name), by_token(two, b / "out", name)
        for token in tokens or list(left):
            assert torch.equal(left[token], right[token]), (name, token)


# Without compression: the column sums of rank1 would be added in another order and could differ in the last bit.
@pytest.mark.parametrize(
    "parameters", [{"density": 0.3}, {"density": 0.3, "scope": "per_tensor"}, {}, {"normalise": "global"}], ids=str
)
@pytest.mark.parametrize("tie", [False, True])
def test_permuted_tokens_merge_as_if_they_were_not(tmp_path: Path, parameters: dict[str, Any], tie: bool) -> None:
    merged(tmp_path / "plain", SAME, [SAME, SAME], parameters=parameters, tie=tie)
    got = merged(tmp_path / "mixed", SAME, [SHUFFLED, SAME], parameters=parameters, tie=tie)
    if parameters.get("normalise"):  # a mean over rows in another order
        want = load_file(tmp_path / "plain" / "out" / "model.safetensors")
        assert all(torch.allclose(got[name], want[name], rtol=1e-6, atol=1e-9) for name in want)
    else:
        assert_same_tokens(tmp_path / "plain", tmp_path / "mixed", tie=tie)
    # The mistaken version, row by row, is another model.
    expert = load_file(tmp_path / "mixed" / "expert0" / "model.safetensors")[EMBED]
    assert not torch.allclose(got[EMBED], expert, atol=0.1)
    loaded(tmp_path / "mixed" / "out")


@pytest.mark.parametrize(
    ("pads", "parameters"), [((0, 8, 0), {}), ((8, 0, 3), {}), ((24, 8, 0), {}), ((0, 8, 0), {"density": 0.3})], ids=str
)
def test_padded_rows_are_no_tokens(tmp_path: Path, pads: tuple[int, ...], parameters: dict[str, Any]) -> None:
    """Padding takes no part where a model lacks it; the real rows are those of a merge without padding. So with a mask: it counts nowhere."""
    merged(tmp_path / "plain", SAME, [SAME, SAME], parameters=parameters)
    got = merged(tmp_path / "padded", SAME, [SAME, SAME], pads=pads, parameters=parameters)
    assert_same_tokens(tmp_path / "plain", tmp_path / "padded")
    assert got[EMBED].shape[0] == len(TOKENS) + pads[0]
    assert json.loads((tmp_path / "padded" / "out" / "config.json").read_text())["vocab_size"] == len(TOKENS) + pads[0]
    assert (got[EMBED][len(TOKENS) :] == 0.5).all()
    loaded(tmp_path / "padded" / "out")


def test_tokens_that_only_the_base_or_only_an_expert_has(tmp_path: Path) -> None:
    """base: the base's rows; what an expert lacks is merged of the others, what the base lacks is left out."""
    short = SAME[:-4]
    got = merged(tmp_path / "a", SAME, [short, SAME], parameters={})
    base, expert = (load_file(tmp_path / "a" / name / "model.safetensors") for name in ("base", "expert1"))
    for name in (EMBED, HEAD):
        # Only expert1 knows the last four tokens: there the merge is that expert.
        assert torch.equal(got[name][-4:], expert[name][-4:]) and not torch.equal(got[name][-4:], base[name][-4:])
        assert not torch.equal(got[name][:-4], expert[name][:-4])
    got = merged(tmp_path / "b", short, [SAME, short], parameters={})
    assert got[EMBED].shape[0] == len(short)
    loaded(tmp_path / "b" / "out")


@pytest.mark.parametrize("label", ["expert0", "path"])
def test_tokenizer_of_an_expert(tmp_path: Path, label: str) -> None:
    source = "model:" + ("expert0" if label == "expert0" else str(tmp_path / "m" / "expert0"))
    merged(tmp_path / "plain", SAME, [SAME, SAME], parameters={"density": 0.3})
    merged(tmp_path / "m", SAME, [SHUFFLED, SAME], parameters={"density": 0.3}, tokenizer_source=source)
    assert (tmp_path / "m" / "out" / "tokenizer.json").read_bytes() == (
        tmp_path / "m" / "expert0" / "tokenizer.json"
    ).read_bytes()
    assert_same_tokens(tmp_path / "plain", tmp_path / "m")
    loaded(tmp_path / "m" / "out")


def test_a_tokenizer_source_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(OtaError, match=r"tokenizer_source: no model 'expert7'; the recipe's models are base, expert0"):
        merged(tmp_path, SAME, [SHUFFLED], tokenizer_source="model:expert7")


def add_token(folder: Path, token: str, seed: int, *, moved: bool = True) -> None:
    """What ``add_tokens`` and ``resize_token_embeddings`` do in training: one more row in both tensors and in v."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    tokenizer.save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    for file, scale in (("model.safetensors", 1.0), ("exp_avg_sq.safetensors", 1e-12)):
        if (folder / file).exists():
            state = load_file(folder / file)
            for name in (EMBED, HEAD):
                state[name] = torch.cat([state[name], scale * torch.rand((1, state[name].shape[1]), generator=generator)])
            save_file(state, folder / file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))


def test_union_has_every_token_and_its_ids_fit_the_rows(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    plain = merged(tmp_path / "plain", SAME, [SAME, SAME, SHUFFLED], parameters={})
    merged(tmp_path / "u", SAME, [SAME, SAME, SHUFFLED], parameters={})
    add_token(tmp_path / "u" / "expert0", "<|think|>", 1)
    add_token(tmp_path / "u" / "expert1", "<|tool|>", 2)
    add_token(tmp_path / "u" / "expert2", "<|tool|>", 3)
    (tmp_path / "u" / "out").rename(tmp_path / "u" / "before")
    got = merge(tmp_path / "u", 3, {}, tokenizer_source="union")
    assert_same_tokens(tmp_path / "plain", tmp_path / "u", tokens=TOKENS)
    out = tmp_path / "u" / "out"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == len(TOKENS) + 2 == got[EMBED].shape[0] == got[HEAD].shape[0]
    ids = tokenizer.convert_tokens_to_ids(["<|think|>", "<|tool|>"])
    assert ids == [len(TOKENS), len(TOKENS) + 1]
    assert tokenizer("a<|tool|>b").input_ids == [TOKENS.index("a"), ids[1], TOKENS.index("b")]
    assert tokenizer.decode([ids[0]], skip_special_tokens=False) == "<|think|>"
    experts = [load_file(tmp_path / "u" / f"expert{i}" / "model.safetensors")[EMBED] for i in range(3)]
    assert torch.equal(got[EMBED][ids[0]], experts[0][-1])
    low, high = torch.minimum(experts[1][-1], experts[2][-1]), torch.maximum(experts[1][-1], experts[2][-1])
    assert ((got[EMBED][ids[1]] >= low) & (got[EMBED][ids[1]] <= high)).all() and not torch.equal(
        got[EMBED][ids[1]], experts[1][-1]
    )
    model = loaded(out)
    assert model.generate(**tokenizer("a<|tool|>", return_tensors="pt"), max_new_tokens=2, do_sample=False).shape[1] > 2
    assert torch.equal(plain["model.norm.weight"], got["model.norm.weight"])


def test_rows_that_a_recipe_gives_have_no_edit(tmp_path: Path) -> None:
    """Under OTA with FFG: the output has the donor's row to the bit, whatever the curvature; tokens that all have are merged as before."""
    plain = merged(tmp_path / "plain", SAME, [SAME, SHUFFLED])
    root = tmp_path / "given"
    merged(root, SAME, [SAME, SHUFFLED])
    add_token(root / "expert0", "<|tool|>", 1)
    add_token(root / "expert1", "<|tool|>", 2)
    (root / "out").rename(root / "before")
    tokens = {
        "<|tool|>": {"source": str(root / "expert0"), "force": True},
        "a": {"source": "expert1", "force": True},
        "<|new|>": {"source": {"kind": "model_token", "model": str(root / "base"), "token": "z"}},
    }
    got = merge(
        root, 2, {"density": 1.0, "power": 0.5}, tokenizer={"source": "union", "tokens": tokens, "pad_to_multiple_of": 16}
    )
    states = [load_file(root / f"expert{i}" / "model.safetensors") for i in range(2)]
    base = load_file(root / "base" / "model.safetensors")
    for name in (EMBED, HEAD):
        rows, theirs = by_token(got, root / "out", name), by_token(states[1], root / "expert1", name)
        assert torch.equal(rows["<|tool|>"], states[0][name][-1]) and torch.equal(rows["a"], theirs["a"])
        assert torch.equal(rows["<|new|>"], by_token(base, root / "base", name)["z"])
        assert got[name].shape[0] == 112 and not torch.equal(rows["b"], theirs["b"])
        assert torch.equal(got[name][-1], got[name][-2]) and got[name][-1].abs().max() < got[name][:104].abs().max()
    assert not plain.keys() ^ got.keys()
    raw = {
        "merge_method": "ota", "base_model": str(root / "base"), "models": [{"model": str(root / f"expert{i}")} for i in range(2)],
        "parameters": {"density": 0.4}, "tokenizer": {"source": "union", "tokens": {"<|tool|>": {"source": "expert0"}}, "pad_to_multiple_of": 16},
    }  # fmt: skip
    recipe, masks = MergeRecipe.model_validate(raw), root / "masks"
    masks.mkdir()
    engine.merge(recipe, root / "whole")
    engine.merge(recipe, root / "blocks", block_elements=40, threads=3)
    inputs = resolve_local(recipe)
    engine.mask(recipe, masks, inputs=inputs)
    experts = tuple(replace(one, masks=masks / f"{one.name}.safetensors") for one in inputs.experts)
    engine.merge(recipe, root / "masked", inputs=replace(inputs, experts=experts))
    files = [(root / out / "model.safetensors").read_bytes() for out in ("whole", "blocks", "masked")]
    assert files[0] == files[1] == files[2]


def test_union_refuses_what_only_another_tokenizers_own_model_knows(tmp_path: Path) -> None:
    with pytest.raises(OtaError, match=r"token .* of expert0 is part of its tokenizer's own model, not an added token"):
        merged(tmp_path, SAME[:-2], [SAME], tokenizer_source="union")


@pytest.mark.parametrize("which", ["base", "expert0"])
def test_sizes_that_differ_without_a_tokenizer_are_refused(tmp_path: Path, which: str) -> None:
    merged(tmp_path, SAME, [SAME], pads=(0, 8), parameters={})
    (tmp_path / "out").rename(tmp_path / "before")
    (tmp_path / which / "tokenizer.json").unlink()
    with pytest.raises(
        OtaError,
        match=rf"base: 104 rows, expert0: 112 rows.*which token in: {which}\. Put the tokenizer files beside the weights",
    ):
        merge(tmp_path, 1, {})
    assert not (tmp_path / "out").exists()


def test_equal_sizes_need_no_tokenizer(tmp_path: Path) -> None:
    merged(tmp_path, SAME, [SAME], parameters={})
    want = load_file(tmp_path / "out" / "model.safetensors")
    (tmp_path / "out").rename(tmp_path / "before")
    (tmp_path / "expert0" / "tokenizer.json").unlink()
    got = merge(tmp_path, 1, {})
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_every_baseline_follows_the_tokens(tmp_path: Path) -> None:
    merged(tmp_path / "plain", SAME, [SAME, SAME])
    merged(tmp_path / "mixed", SAME, [SHUFFLED, SAME])
    for method, parameters in {"linear": {}, "task_arithmetic": {}, "ties": {"density": 0.5}, "breadcrumbs": {"density": 0.5, "gamma": 0.1}, "fisher": {},
                               "dare_ties": {"density": 0.5}, "della": {"density": 0.5}, "sce": {"density": 0.5}, "ram": {},
                               "model_stock": {}}.items():  # fmt: skip
        for root in ("plain", "mixed"):
            (tmp_path / root / "out").rename(tmp_path / root / f"before-{method}")
            merge(tmp_path / root, 2, parameters, merge_method=method)
        assert_same_tokens(tmp_path / "plain", tmp_path / "mixed")
