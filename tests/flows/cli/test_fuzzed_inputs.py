"""Small files of models that nobody wrote in earnest: ``ota merge`` makes a whole model, or says in few words what is wrong."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ota_core.artifact import read_record
from tests.flows.cli.typed import invoke
from tests.tiny_models import perturb, write_tiny_llama

EXPERT = {
    "capability": "math",
    "base_model": "base",
    "trained_at": "2026-01-01T00:00:00Z",
    "step": 100,
    "beta2": 0.999,
    "license": "mit",
}
CARD = {"license": "apache-2.0", "base_model": ["org/base"], "language": ["en"], "tags": ["a"]}
ADAPTER = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "base", "bias": "none", "rank_pattern": {},
    "alpha_pattern": {}, "use_dora": False, "use_rslora": False, "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None,
    "target_parameters": None, "trainable_token_indices": None, "task_type": "CAUSAL_LM",
}  # fmt: skip
FP8 = {
    "quant_method": "fp8",
    "weight_block_size": [8, 8],
    "ignored_layers": ["lm_head"],
    "config_groups": {"a": {"weights": {"num_bits": 8}}},
}
W = "model.layers.0.self_attn.q_proj.weight"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
RECIPES = {
    "linear": {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]},
    "ota": {"merge_method": "ota", "base_model": "base", "models": [{"model": "a"}], "parameters": {"density": 0.5, "bias_correction": True}},
    "union": {"merge_method": "ties", "base_model": "base", "models": [{"model": "a"}, {"model": "b"}], "tokenizer_source": "union"},
    "adapter": {"merge_method": "task_arithmetic", "base_model": "base", "models": [{"model": "adapter"}, {"model": "b"}], "chat_template": "auto"},
    "quantised": {"merge_method": "linear", "models": [{"model": "q"}, {"model": "b"}]},
    "slices": {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]}, {"sources": [{"model": "b", "layer_range": [1, 2]}]}]},
}  # fmt: skip
FILES = [
    ("linear", "a", "config.json"), ("linear", "a", "README.md"), ("linear", "b", "expert.json"), ("linear", "b", "model.safetensors.index.json"),
    ("linear", "a", "generation_config.json"), ("ota", "base", "config.json"), ("ota", "a", "expert.json"), ("union", "base", "tokenizer.json"),
    ("union", "a", "tokenizer_config.json"), ("union", "b", "added_tokens.json"), ("union", "b", "special_tokens_map.json"),
    ("adapter", "adapter", "adapter_config.json"), ("adapter", "adapter", "README.md"), ("adapter", "base", "tokenizer_config.json"),
    ("slices", "a", "config.json"), ("quantised", "q", "config.json"), ("quantised", "q", "config.json"),
]  # fmt: skip
VALUES: list[Any] = [
    None, True, 0, 1, -1, 200, 10**8, 10**12, 2**63, -(2**63) - 1, 10**400, 1e300, 0.5, float("nan"), float("inf"), "", "a", "x" * 3000, "\0",
    "\ud800", "../x", "/etc/passwd", "~nouser/x", "s3://x/y", "\x1b[31mred", "a\nb", "a'b", "{{ x", "(a+", [], [None], {}, {"a": 1}, [[]], [1] * 50,
    {"": None}, {"a": {"a": {"a": [1]}}}, [10**12] * 3, 3.7, {"content": 5}, [{"id": "x"}], {"rope_type": 5}, {"quant_method": "fp8"}, {"0": {"content": []}},
]  # fmt: skip
TEXTS = [
    b"", b"\0", b"\xff\xfe\0", b"<html>hunter2</html>", b"[" * 100_000, b'{"a":' * 500, b"null", b"[]", b"hunter2", b"NaN", b"{}", b"9" * 6000,
    b"---\n- &a [*a]\n---\n", b"---\na: &a [1,1,1,1,1,1,1,1]\n" + b"".join(b"%c: &%c [%s]\n" % (i + 1, i + 1, b",".join([b"*%c" % i] * 8)) for i in range(97, 105)) + b"---\n",
    b"---\na: 2026-02-30\nb: 25:61:61\n? [x]\n: y\n---\n",
]  # fmt: skip

Change = tuple[str, Any]
changes: st.SearchStrategy[Change] = st.one_of(
    st.tuples(st.just("put"), st.tuples(st.integers(0, 60), st.sampled_from(VALUES))),
    st.tuples(st.just("drop"), st.integers(0, 60)),
    st.tuples(st.just("key"), st.tuples(st.sampled_from(["", "x", "\x1b[2J", "\ud800", "k" * 2000, "quantization_config"]), st.sampled_from(VALUES))),
    st.tuples(st.just("text"), st.sampled_from(TEXTS)),
    st.tuples(st.just("cut"), st.integers(0, 500)),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, the outermost first; of long lists and mappings the first few."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in list(inner)[:40]:
        yield from places(one, (*path, key))


def edited(value: Any, path: tuple[Any, ...], new: Callable[[dict[Any, Any] | list[Any], Any], None]) -> Any:
    """A copy in which ``new`` was given the container and the key of a place."""
    copied = json.loads(json.dumps(value))
    *way, last = path
    inner = copied
    for key in way:
        inner = inner[key]
    new(inner, last)
    return copied


def changed(content: bytes, change: Change, *, is_card: bool) -> bytes:
    """A file's content after the change."""
    kind, what = change
    if kind == "text":
        return bytes(what)
    if kind == "cut":
        return content[:what]
    value = yaml.safe_load(content.decode().split("---")[1]) if is_card else json.loads(content)
    if kind == "key":
        value = {**value, what[0]: what[1]}
    else:
        found = list(places(value))[1:]
        path = found[(what if kind == "drop" else what[0]) % len(found)]
        new = (lambda held, key: held.__delitem__(key)) if kind == "drop" else (lambda held, key: held.__setitem__(key, what[1]))
        value = edited(value, path, new)
    if is_card:
        return b"---\n" + yaml.safe_dump(value).encode("utf-8", "surrogatepass") + b"---\n"
    return json.dumps(value).encode()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two experts, one of them in shards and one with second moments, and an adapter; each with every small file there is."""
    root = tmp_path_factory.mktemp("models")
    write_tiny_llama(root / "base")
    for seed, name in enumerate("ab"):
        perturb(root / "base", root / name, seed=seed)
        (root / name / "expert.json").write_text(json.dumps(EXPERT | {"capability": name}))
        (root / name / "added_tokens.json").write_text(json.dumps({f"<new {name}>": 127}))
        (root / name / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    weights = load_file(root / "a" / "model.safetensors")
    save_file({name: torch.full_like(tensor, 1e-6) for name, tensor in weights.items()}, root / "a" / "exp_avg_sq.safetensors")
    weights = load_file(root / "b" / "model.safetensors")
    (root / "b" / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in weights.items() if files[name] == file}, root / "b" / file)
    (root / "b" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    weights = load_file(shutil.copytree(root / "a", root / "q") / "model.safetensors")
    weights |= {W: weights[W].to(torch.float8_e4m3fn), f"{W}_scale_inv": torch.ones(2, 2)}
    save_file(weights, root / "q" / "model.safetensors", {"format": "pt"})
    config = json.loads((root / "q" / "config.json").read_text())
    (root / "q" / "config.json").write_text(json.dumps({"quantization_config": FP8} | config))
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(ADAPTER))
    factors = {f"{Q}.lora_A.weight": torch.ones(2, 16), f"{Q}.lora_B.weight": torch.ones(16, 2)}
    save_file(factors, root / "adapter" / "adapter_model.safetensors")
    settings = json.loads((root / "base" / "tokenizer_config.json").read_text())
    (root / "base" / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages }}"}))
    for name in ("a", "b", "base", "adapter"):
        (root / name / "README.md").write_text(f"---\n{yaml.safe_dump(CARD)}---\nA model.\n")
    for name, recipe in RECIPES.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return root


def check(root: Path, place: tuple[str, str, str], change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, model, file = place
    monkeypatch.setenv("OTA_HOME", str(root.parent / "home"))
    before = sorted(path.name for path in root.iterdir())
    path, out = root / model / file, root / "out"
    held = path.read_bytes()
    try:
        path.write_bytes(changed(held, change, is_card=file == "README.md"))
        start = time.monotonic()
        done = invoke("merge", root / f"{recipe}.yaml", out)
        seconds = time.monotonic() - start
    finally:
        path.write_bytes(held)
    told = done.stdout + done.stderr
    assert done.exit_code in (0, 2) and isinstance(done.exception, SystemExit | None), (told, done.exception)
    assert "fault of the program" not in told and "Traceback" not in told and "hunter2" not in told, told
    assert not {char for char in told if (ord(char) < 32 and char != "\n") or ord(char) == 127} and seconds < 1200, (
        seconds,
        ascii(told),
    )
    if done.exit_code == 0:
        assert (read_record(out).files and file != "config.json") or json.loads((out / "config.json").read_text())
        shutil.rmtree(out)
    else:
        assert 0 < len(done.stderr) < 4096, done.stderr
    assert sorted(path.name for path in root.iterdir()) == before


relaxed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=relaxed)
@given(st.sampled_from(FILES), changes)
@example(("linear", "a", "config.json"), ("key", ("x", "\ud800")))
@example(("ota", "base", "config.json"), ("key", ("rope_theta", 10**400)))
@example(("ota", "base", "config.json"), ("key", ("bos_token_id", 200)))
@example(("ota", "a", "expert.json"), ("key", ("step", float("nan"))))
@example(("union", "b", "added_tokens.json"), ("key", ("x", float("inf"))))
@example(("union", "base", "tokenizer.json"), ("key", ("added_tokens", [{"id": 10**8, "content": "far"}])))
@example(("adapter", "adapter", "README.md"), ("key", ("base_model", 5)))
@example(("adapter", "adapter", "adapter_config.json"), ("key", ("target_parameters", 5)))
@example(("adapter", "adapter", "adapter_config.json"), ("key", ("base_model_name_or_path", 5)))
@example(("adapter", "adapter", "adapter_config.json"), ("key", ("trainable_token_indices", {"a": 5})))
@example(("quantised", "q", "config.json"), ("put", (3, [0, 0])))
@example(("quantised", "q", "config.json"), ("drop", 2))
@example(("linear", "a", "README.md"), ("text", TEXTS[-2]))
@example(("linear", "a", "README.md"), ("text", b"---\na: 2026-02-30\n? [x]\n: y\n---\n"))
def test_small_files(models: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[str, str, str], change: Change) -> None:
    check(models, place, change, monkeypatch)


@pytest.mark.slow
@settings(max_examples=250, deadline=None, suppress_health_check=relaxed)
@given(st.sampled_from(FILES), changes)
def test_many_small_files(models: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[str, str, str], change: Change) -> None:
    check(models, place, change, monkeypatch)


def test_a_card_that_cannot_be_read_is_a_note(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTA_HOME", str(tmp_path / "home"))
    root = tmp_path / "models"
    shutil.copytree(models, root)
    (root / "a" / "README.md").write_bytes(b"\xff\xfe")
    (root / "b" / "README.md").write_bytes(TEXTS[-2])
    done = invoke("merge", root / "linear.yaml", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "note: a: its model card says nothing to this merge: README.md cannot be read (byte 0 is not UTF-8)" in done.stdout
    assert "note: b: its model card says nothing to this merge: README.md is not valid YAML" in done.stdout
    assert (
        "no input states a licence" in (tmp_path / "out" / "README.md").read_text()
        or "mit" in (tmp_path / "out" / "README.md").read_text()
    )
