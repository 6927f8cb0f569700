"""mergekit 0.1.5 as an oracle for the block ``tokenizer`` on real tiny models whose vocabularies differ: rows compared by token."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ota_core.engine.engine import merge
from ota_core.errors import OtaError
from ota_core.recipe.recipe import MergeRecipe, parse_recipe
from tests.checkpoints import read_tensors
from tests.ota_core.methods.test_mergekit_parity import by_mergekit
from tests.tiny_models import perturb, vocabulary, write_tiny_llama

pytest.importorskip("mergekit", reason="the oracle is a development dependency")
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = vocabulary(104)
SPECIAL: dict[str, list[str]] = {"base": [], "chat": ["<|start|>", "<|end|>"], "code": ["<|code|>", "<|end|>"]}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folders(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[dict[str, Path]]:
    """A base, and two experts that were given tokens of their own, one of them the same in both."""
    root = tmp_path_factory.mktemp("tokens")
    base = write_tiny_llama(root / "base", seed=0, vocab=TOKENS, tie=request.param)
    found = {"base": base}
    for seed, name in enumerate(("chat", "code"), 1):
        found[name] = perturb(base, root / name, seed=seed)
        for i, token in enumerate(SPECIAL[name]):
            add_token(found[name], token, 10 * seed + i)
    yield found


def add_token(folder: Path, token: str, seed: int) -> None:
    """As ``add_tokens`` and ``resize_token_embeddings`` do in training: one more row."""
    from transformers import AddedToken, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(token, special=True)])
    tokenizer.save_pretrained(folder)
    state, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(seed)
    for name in {EMBED, HEAD} & state.keys():
        state[name] = torch.cat([state[name], torch.randn((1, state[name].shape[1]), generator=generator)])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))


def ids(folder: Path) -> dict[str, int]:
    from transformers import AutoTokenizer

    found: dict[str, int] = AutoTokenizer.from_pretrained(folder).get_vocab()
    return found


def compare(raw: dict[str, Any], tmp: Path) -> dict[str, int]:
    """Both on the same recipe: every token's rows, those of padding, everything else, and the configuration. Returns our tokens."""
    raw = {"dtype": "float32", **raw}
    theirs = by_mergekit(raw, tmp / "theirs")
    merge(parse_recipe(raw), tmp / "ours", block_elements=64, threads=2)
    ours, tokens = read_tensors(tmp / "ours"), ids(tmp / "ours")
    assert sorted(ours) == sorted(theirs)
    # mergekit goes through a set of models, so that the order of added tokens is its hash's; some have a plain one of their own there.
    known = ids(tmp / "theirs")
    assert tokens.keys() == known.keys()
    for name, want in theirs.items():
        got = ours[name]
        assert got.shape == want.shape, name
        if name in (EMBED, HEAD):
            order = [[one[token] for token in sorted(tokens)] for one in (tokens, known)]
            padding = [range(len(tokens), len(got))] * 2
            got, want = (
                np.concatenate([one[rows], one[list(behind)]])
                for one, rows, behind in zip((got, want), order, padding, strict=True)
            )
        assert np.abs(got - want).max() <= 2e-6 * max(1.0, float(np.abs(want).max())), name
    sizes = [json.loads((tmp / one / "config.json").read_text())["vocab_size"] for one in ("ours", "theirs")]
    assert sizes[0] == sizes[1] == len(ours[EMBED])
    return tokens


def recipe(
    folders: dict[str, Path], method: str = "linear", block: dict[str, Any] | None = None, **parameters: Any
) -> dict[str, Any]:
    base = {} if method in ("linear", "multislerp", "karcher") else {"base_model": str(folders["base"])}
    weight = {"weight": 0.6} if method in ("linear", "ties", "task_arithmetic", "multislerp", "nuslerp") else {}
    models = [{"model": str(folders[name]), **({"parameters": weight} if weight else {})} for name in ("chat", "code")]
    return {"merge_method": method, **base, "models": models, "parameters": parameters, "tokenizer": block or {"source": "union"}}


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}), ("task_arithmetic", {"lambda": 0.7}), ("ties", {"density": 0.6}), ("sce", {"select_topk": 0.4}), ("karcher", {}),
    ("model_stock", {}), ("multislerp", {}), ("nuslerp", {}), ("ram", {}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "parameters"), METHODS, ids=[method for method, _ in METHODS])
def test_a_padded_union(folders: dict[str, Path], tmp_path: Path, method: str, parameters: dict[str, Any]) -> None:
    # One row of padding: of equal edits in several, mergekit's trim keeps whichever its sort puts first.
    block: dict[str, Any] = {"source": "union", "pad_to_multiple_of": 4}
    if method in ("ties", "sce"):  # of two edits that are each other's opposite, rounding elects the sign
        block["tokens"] = {"<|end|>": {"source": str(folders["chat"])}}
    tokens = compare(recipe(folders, method, block, **parameters), tmp_path)
    assert len(tokens) == 107 and tokens.keys() >= {"<|start|>", "<|end|>", "<|code|>"}


def test_rows_of_single_tokens(folders: dict[str, Path], tmp_path: Path) -> None:
    chat, code = str(folders["chat"]), str(folders["code"])
    tokens = {
        "<|start|>": {"source": chat},
        "<|end|>": {"source": code, "force": True},
        "<|code|>": {"source": {"kind": "model_token", "model": chat, "token": "<|start|>"}},
        "<|call|>": {"source": {"kind": "model_token", "model": code, "token_id": 7}},
        "<|blank|>": {"source": {"kind": "zero"}},
        "a": {"source": {"kind": "zero"}, "force": True},
        "b": {"source": chat},
    }
    for i, (method, parameters) in enumerate([("linear", {}), ("ties", {"density": 0.5}), ("task_arithmetic", {})]):
        block = {"source": "union", "tokens": tokens} | ({"pad_to_multiple_of": 5} if i else {})
        rows = compare(recipe(folders, method, block, **parameters), tmp_path / method)
        assert rows["<|call|>"] >= 104 and not read_tensors(tmp_path / method / "ours")[EMBED][rows["<|blank|>"]].any()


@pytest.mark.parametrize("source", ["base", "chat"])
def test_tokens_that_are_added_to_one_models_tokenizer(folders: dict[str, Path], tmp_path: Path, source: str) -> None:
    """To the base's tokenizer without the oracle: mergekit 0.1.5 stops there with a KeyError."""
    whose = source if source == "base" else str(folders[source])
    tokens = {
        "<|code|>": {"source": str(folders["code"])},
        "<|user|>": {"source": {"kind": "model_token", "model": str(folders["base"]), "token": "z"}},
    }
    raw = recipe(folders, "task_arithmetic", {"source": whose, "tokens": tokens, "pad_to_multiple_of": 4})
    if source == "base":
        merge(parse_recipe(raw), tmp_path / "ours")
    rows = ids(tmp_path / "ours") if source == "base" else compare(raw, tmp_path)
    got, base, code = (read_tensors(one)[EMBED] for one in (tmp_path / "ours", folders["base"], folders["code"]))
    assert np.array_equal(got[rows["<|code|>"]], code[ids(folders["code"])["<|code|>"]])
    assert np.array_equal(got[rows["<|user|>"]], base[ids(folders["base"])["z"]])
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    text = tokenizer("a<|user|>b", return_tensors="pt", add_special_tokens=False)
    assert text.input_ids.tolist() == [[rows["a"], rows["<|user|>"], rows["b"]]]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert model.config.vocab_size % 4 == 0 and torch.isfinite(model(**text).logits).all()


def test_the_same_tokenizers_padded_and_forced(folders: dict[str, Path], tmp_path: Path) -> None:
    twins = dict(folders) | {"code": tmp_path / "twin"}
    perturb(folders["chat"], tmp_path / "twin", seed=8)
    tokens = {"z": {"source": str(folders["chat"]), "force": True}}
    raw = recipe(twins, "linear", {"source": str(folders["chat"]), "tokens": tokens, "pad_to_multiple_of": 64})
    compare(raw, tmp_path)


def test_bytes_do_not_depend_on_blocks_and_the_recipe_is_the_same_when_it_is_read_again(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    raw = recipe(
        folders,
        "ties",
        {"source": "union", "tokens": {"<|end|>": {"source": str(folders["code"])}}, "pad_to_multiple_of": 16},
        density=0.4,
    )
    read = parse_recipe(raw)
    again = MergeRecipe.model_validate_json(read.model_dump_json(by_alias=True))
    assert again == read and again.effective() == read.effective()
    reports = [
        merge(one, tmp_path / f"out{i}", block_elements=size, threads=threads)
        for i, (one, size, threads) in enumerate([(read, 64, 1), (again, 1000, 3)])
    ]
    assert reports[0].fingerprint == reports[1].fingerprint
    assert (tmp_path / "out0" / "model.safetensors").read_bytes() == (tmp_path / "out1" / "model.safetensors").read_bytes()
    other = parse_recipe(raw | {"tokenizer": {**raw["tokenizer"], "pad_to_multiple_of": 32}})
    assert other.effective() != read.effective()
    plain = raw | {"tokenizer": {"source": "union"}}
    assert "tokenizer" not in parse_recipe(plain).effective() and parse_recipe(plain).tokenizer is None


def test_unlike_types_meet_in_one_row(folders: dict[str, Path], tmp_path: Path) -> None:
    """A row of float32 is put into a model of bfloat16 as it is."""
    half = tmp_path / "half"
    shutil.copytree(folders["code"], half)
    state = {name: x.to(torch.bfloat16) for name, x in load_file(half / "model.safetensors").items()}
    save_file(state, half / "model.safetensors", metadata={"format": "pt"})
    compare(recipe(dict(folders) | {"code": half}, "linear", {"source": "union", "pad_to_multiple_of": 16}), tmp_path)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"<|start|>": {"source": "CODE", "force": True}}, "takes its row from code, which has no such token; name a model that has it"),
        ({"<|x|>": {"source": {"kind": "model_token", "model": "CODE", "token": "<|nowhere|>"}}}, "takes its row from token '<|nowhere|>' of code"),
        ({"<|x|>": {"source": {"kind": "model_token", "model": "CODE", "token_id": 900}}}, r"row 900 of code, which is not there \(106 rows\)"),
    ],
)  # fmt: skip
def test_rows_that_are_not_there(folders: dict[str, Path], tmp_path: Path, tokens: dict[str, Any], message: str) -> None:
    text = json.dumps(tokens).replace("CODE", str(folders["code"]))
    with pytest.raises(OtaError, match=message):
        merge(parse_recipe(recipe(folders, "linear", {"source": "union", "tokens": json.loads(text)})), tmp_path / "out")
    assert not (tmp_path / "out").exists()
