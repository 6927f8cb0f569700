"""What ``ota plan`` and ``ota inspect`` say, held against what a merge then really does."""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from ota_core.engine import engine
from ota_core.files.rows import Rows
from ota_core.files.safetensors_io import SafetensorsFile
from ota_core.moments.trainer import TrainerMoments
from ota_core.plan.inputs import resolve_local
from ota_core.plan.plan import open_plan
from ota_core.recipe.recipe import MergeRecipe
from tasks.merging.describe_plan import bytes_read
from tasks.storage import cache as storage_cache
from tasks.storage import s3
from tasks.storage.layout import write_expert_json
from tasks.storage.models import upload_folder
from tests.checkpoints import ota_recipe, random_base, random_experts, write_checkpoint, write_moments
from tests.flows.cli.typed import refused, said
from tests.ota_core.engine.test_output import add_moments, llama_experts
from tests.servers import S3Test
from tests.tasks.merging.test_architecture import llama, train
from tests.tiny_models import perturb, write_tiny_llama

ROOT = Path(__file__).parents[3]


def plan(recipe: dict[str, Any], folder: Path, *options: object) -> str:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return said("plan", folder / "recipe.yaml", "--home", folder / "home", *options)


def number(text: str, pattern: str) -> float:
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in:\n{text}"
    value, unit = re.match(r"([\d.]+) ?(.*)", found[1]).groups()  # type: ignore[union-attr]
    return float(value) * {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a tensor or hashing a file is an error from here on."""

    def refuse(*arguments: object, **_: object) -> None:
        raise AssertionError(f"weights were touched: {arguments}")

    monkeypatch.setattr(SafetensorsFile, "read_rows", refuse)
    monkeypatch.setattr(TrainerMoments, "read", refuse)
    monkeypatch.setattr(storage_cache, "digest_file", refuse)


@pytest.mark.usefixtures("no_weights")
def test_plan_touches_no_weights(tmp_path: Path) -> None:
    recipe = llama_experts(tmp_path, dtype=torch.bfloat16)
    # Second moments outside of the expert's folder are not hashed either.
    (tmp_path / "expert1" / "exp_avg_sq.safetensors").rename(tmp_path / "v.safetensors")
    recipe["models"][1]["parameters"] = {"preconditioner_path": "v.safetensors"}
    text = plan(recipe, tmp_path)
    assert f"ota of expert0, expert1 over {tmp_path / 'base'}\n" in text and "no problems found" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "parameters, top", [({"density": 0.4}, {}), ({"density": 0.4, "compression": "rank1"}, {"dtype": "bfloat16"})]
)
def test_plans_sizes_are_those_of_the_real_output(tmp_path: Path, parameters: dict[str, Any], top: dict[str, Any]) -> None:
    recipe = llama_experts(tmp_path, tie=True) | {"parameters": parameters} | top
    text = plan(recipe, tmp_path)
    engine.merge(MergeRecipe.model_validate(recipe), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    size = sum(tensor.nbytes for tensor in written.values())
    assert f"parameters: {sum(x.numel() for x in written.values()):,} in {len(written)} tensors" in text
    assert number(text, r"output: (.*) in 1 file\n") == pytest.approx(size, abs=6)
    inputs = sum(
        x.nbytes for name in ("base", "expert0", "expert1") for x in load_file(tmp_path / name / "model.safetensors").values()
    )
    assert number(text, r"inputs: (.*) of weights") == pytest.approx(inputs, abs=6)
    elements = sum(tensor.numel() for tensor in load_file(tmp_path / "expert0" / "exp_avg_sq.safetensors").values())
    for method in ("none", "rank1", "log8", "rank_k"):
        size = 2 * compressed_size(tmp_path / "expert0", tmp_path, method)
        label = method + (" with rank 4" if method == "rank_k" else "")
        mark = r" \(chosen\)" if method == parameters.get("compression", "none") else ""
        assert number(text, rf"  {label}: (.*), [\d.]+ bytes per parameter{mark}\n") == pytest.approx(size, abs=12)
        assert float(re.search(rf"  {label}: .*, ([\d.]+) bytes", text)[1]) == pytest.approx(size / 2 / elements, abs=1e-4)  # type: ignore[index]


def compressed_size(folder: Path, scratch: Path, method: str) -> int:
    engine.compress_moments(folder / "exp_avg_sq.safetensors", scratch / "c.safetensors", method=method)
    return sum(tensor.nbytes for tensor in load_file(scratch / "c.safetensors").values())


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Bytes that really come out of safetensors files, by file name."""
    counts: Counter[str] = Counter()
    original = SafetensorsFile.read_rows

    def counting(self: SafetensorsFile, name: str, start: int, stop: int) -> Rows:
        rows = original(self, name, start, stop)
        counts[self.path.name] += rows.nbytes
        return rows

    monkeypatch.setattr(SafetensorsFile, "read_rows", counting)
    yield counts


METHODS: list[dict[str, Any]] = [
    {"method": "ota", "parameters": {}},
    {"method": "ota", "parameters": {"density": 0.4}},
    {"method": "ota", "parameters": {"density": 0.4, "scope": "per_tensor", "rescale": True}},
    {"method": "ota", "parameters": {"density": 0.4, "metric": "magnitude", "normalise": "global"}},
    {"method": "ota", "parameters": {"density": 0.4, "compression": "rank1", "normalise": "global"}},
    {"method": "ota", "parameters": {"density": 0.4, "compression": "rank1", "mask_curvature": "full"}},
    {"method": "ota", "parameters": {"density": 0.4, "compression": "log8", "normalise": "global"}},
    {"method": "ota", "parameters": {"density": 0.4, "compression": "log8", "mask_curvature": "full", "scope": "per_tensor"}},
    {"method": "ota", "parameters": {"density": 0.4, "compression": "rank_k", "rank": 2}},
    {"method": "ota", "parameters": {"density": 0.4, "compression": "rank_k", "rank": 30, "mask_curvature": "full"}},
    {"method": "ota", "parameters": {"precond_threshold": 1e-18, "rescale": True}},
    {"method": "ota", "parameters": {"precond_threshold": 1e-18, "mask_curvature": "full"}},
    {"method": "fisher", "parameters": {}},
    {"method": "fisher", "parameters": {"compression": "rank1"}},
    {"method": "linear", "parameters": {}},
    {"method": "ties", "parameters": {"density": 0.5}},
    {"method": "ties", "parameters": {"density": 1}},
    {"method": "breadcrumbs", "parameters": {"density": 0.5, "gamma": 0.1}},
    {"method": "dare_ties", "parameters": {"density": 0.5}},
    {"method": "slerp", "parameters": {"t": 0.5}},
    {"method": "passthrough", "parameters": {}},
    {"method": "nearswap", "parameters": {"t": 0.01}},
    {"method": "arcee_fusion", "parameters": {}},
    {"method": "ram", "parameters": {}},
    {"method": "ramplus_tl", "parameters": {}},
    {"method": "sce", "parameters": {"density": 0.5}},
    {"method": "sce", "parameters": {}},
    {"method": "della", "parameters": {"density": 0.5}},
    {"method": "multislerp", "parameters": {}},
    {"method": "nuslerp", "parameters": {}},
    {"method": "nuslerp", "parameters": {"nuslerp_flatten": False}},
    {"method": "nuslerp", "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True}},
    {"method": "karcher", "parameters": {}},
    {"method": "model_stock", "parameters": {"filter_wise": True}},
]
EXPERTS = {"slerp": 1, "passthrough": 1, "nearswap": 1, "arcee_fusion": 1, "nuslerp": 2}


@pytest.mark.parametrize("case", METHODS, ids=str)
def test_the_bytes_that_plan_counts_are_those_that_are_read(tmp_path: Path, read: Counter[str], case: dict[str, Any]) -> None:
    shapes = {
        "model.embed_tokens.weight": (40, 64),
        "model.layers.0.self_attn.q_proj.weight": (64, 64),
        "model.norm.weight": (64,),
    }
    base = random_base(0, shapes)
    count = EXPERTS.get(case["method"], 3)
    recipe = MergeRecipe.model_validate(
        ota_recipe(tmp_path, base, random_experts(base, count), case["parameters"], method=case["method"])
    )
    with open_plan(recipe, resolve_local(recipe)) as opened:
        expected = bytes_read(opened)
    read.clear()
    engine.merge(recipe, tmp_path / "out")
    assert read.total() == pytest.approx(expected, rel=0.02), dict(read)


SHOW = "import sys; from flows.cli.app import app; sys.argv = ['ota', *sys.argv[1:]]; app()"


@pytest.mark.parametrize(
    "parameters", [{"density": 0.3}, pytest.param({"density": 0.3, "compression": "rank1"}, marks=pytest.mark.slow)], ids=str
)
def test_the_peak_memory_that_plan_foretells_is_realistic(tmp_path: Path, parameters: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2))]
    base = {name: rng.standard_normal((2048, 2048), dtype=np.float32) for name in names}
    write_checkpoint(tmp_path / "base", base)
    for i in range(2):
        expert = write_checkpoint(
            tmp_path / f"expert{i}",
            {name: x + np.float32(0.01) * rng.standard_normal(x.shape, dtype=np.float32) for name, x in base.items()},
        )
        write_moments(expert, {name: rng.random(x.shape, dtype=np.float32) * np.float32(1e-12) for name, x in base.items()})
    recipe = {
        "merge_method": "ota",
        "base_model": "base",
        "models": [{"model": f"expert{i}"} for i in range(2)],
        "parameters": parameters,
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))

    def gib(*arguments: str) -> float:
        command = [sys.executable, "-c", SHOW, *arguments, "--home", str(tmp_path / "home")]
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return number(shown, r"peak memory:? (?:about )?([\d.]+) GiB")

    foretold, real = gib("plan", str(tmp_path / "r.yaml")), gib("merge", str(tmp_path / "r.yaml"), str(tmp_path / "out"))
    assert real / 1.2 <= foretold <= 1.6 * real


def test_plan_lists_the_parameters_in_force_and_what_is_not_sure(tmp_path: Path) -> None:
    recipe = llama_experts(tmp_path)
    recipe["parameters"] = {"density": 0.4, "lambda": 1.5}
    recipe["models"][1] |= {"name": "coder", "parameters": {"density": 0.1, "scaling_factor": 2}}
    state = load_file(tmp_path / "expert0" / "exp_avg_sq.safetensors")
    state.pop("model.norm.weight")
    write_moments(tmp_path / "expert0", state)
    text = plan(recipe, tmp_path)
    assert "lambda=1.5" in text and "power=0.5" in text and "fallback=base" in text
    assert "expert0: density=0.4, scaling_factor=1.0" in text and "coder: density=0.1, scaling_factor=2.0" in text
    assert (
        "note: expert0: 1 tensor without second moments (model.norm.weight); the merge is refused if training changed them"
        in text
    )
    assert "budget 0.25 GiB" in plan(recipe, tmp_path, "--memory", "256MiB")
    ties = {
        "merge_method": "ties",
        "base_model": recipe["base_model"],
        "models": recipe["models"][:1],
        "parameters": {"density": 0.5},
    }
    text = plan(ties, tmp_path)
    assert "0 B of second moments" in text and "note:" not in text


class Gets:
    """The objects and the number of bytes that GetObject asked for."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()

    def __call__(self, http_response: Any, parsed: dict[str, Any], context: Any, **_: Any) -> None:
        self.bytes[str(context.get("signing", {}).get("bucket"))] += int(parsed.get("ContentLength", 0))


@pytest.fixture
def gets(s3_server: S3Test) -> Iterator[Gets]:
    counter = Gets()
    events = [s3.client(patient=patient).meta.events for patient in (False, True)]
    for each in events:
        each.register("after-call.s3.GetObject", counter, unique_id="test")
    yield counter
    for each in events:
        each.unregister("after-call.s3.GetObject", unique_id="test")


def test_plan_of_models_in_s3_reads_headers_alone(tmp_path: Path, s3_server: S3Test, gets: Gets) -> None:
    """hidden 128: megabytes of weights beside kilobytes of everything else."""
    base = write_tiny_llama(tmp_path / "base", hidden=128, layers=4)
    expert = perturb(base, tmp_path / "math", seed=1)
    add_moments(expert)
    write_expert_json(expert, capability="math", base_model="base", trained_at="2026-11-20", step=100, beta2=0.999)
    uri = f"{s3_server.uri}/experts/math/1"
    upload_folder(expert, uri, last="expert.json")
    upload_folder(base, f"{s3_server.uri}/base")
    remote = {
        "merge_method": "ota",
        "base_model": f"{s3_server.uri}/base",
        "models": [{"model": uri}],
        "parameters": {"density": 0.4},
    }
    text = plan(remote, tmp_path)
    total = sum(path.stat().st_size for folder in (base, expert) for path in folder.glob("*.safetensors"))
    assert total > 2_000_000 and 0 < sum(gets.bytes.values()) < 0.05 * total
    assert f"  math: {uri}\n" in text and f"ota of math over {s3_server.uri}/base\n" in text
    local = plan(remote | {"base_model": str(base), "models": [{"model": str(expert)}]}, tmp_path)

    def figures(shown: str) -> list[str]:
        return [line for line in shown.splitlines() if line.startswith(("parameters:", "inputs:", "output:"))]

    assert figures(text) == figures(local) and len(figures(text)) == 3
    gets.bytes.clear()
    assert figures(plan(remote, tmp_path)) == figures(text)
    assert sum(gets.bytes.values()) < 2_000  # nothing changed: the headers are known, expert.json alone is read again
    shown = said("inspect", uri, "--home", tmp_path / "home2")
    assert "checkpoint: llama" in shown and "exp_avg_sq.safetensors: second moments of" in shown
    assert sum(gets.bytes.values()) < 0.05 * total


def test_plan_with_an_optimizer_state_in_s3_says_what_it_could_not_see(tmp_path: Path, s3_server: S3Test, gets: Gets) -> None:
    recipe = llama_experts(tmp_path, count=1)
    expert = tmp_path / "expert0"
    (expert / "exp_avg_sq.safetensors").unlink()
    (expert / "optimizer.pt").write_bytes(b"x" * 3_000_000)
    upload_folder(expert, f"{s3_server.uri}/e")
    recipe["models"] = [{"model": f"{s3_server.uri}/e"}]
    text = plan(recipe, tmp_path)
    missing = (
        f"note: {s3_server.uri}/e/optimizer.pt cannot be read by ranges (it is no zip file of torch.save): a merge downloads it"
    )
    assert missing in text
    assert "note: the second moments are not counted in the figures above" in text
    assert sum(gets.bytes.values()) < 1_000_000
    recipe["models"] = [{"model": str(expert), "parameters": {"preconditioner_path": f"{s3_server.uri}/e/optimizer.pt"}}]
    assert missing in plan(recipe, tmp_path)
    assert sum(gets.bytes.values()) < 1_000_000
    assert missing.removeprefix("note: ") in said("inspect", f"{s3_server.uri}/e", "--home", tmp_path / "home")


def test_plan_counts_the_second_moments_of_an_optimizer_state_in_s3(tmp_path: Path, s3_server: S3Test, gets: Gets) -> None:
    recipe = llama_experts(tmp_path, count=1)
    expert = tmp_path / "expert0"
    v = load_file(expert / "exp_avg_sq.safetensors")
    (expert / "exp_avg_sq.safetensors").unlink()
    state = {name: {"step": torch.tensor(9.0), "exp_avg": x, "exp_avg_sq": x.clone()} for name, x in v.items()}
    torch.save({"state": state, "param_groups": [{"params": list(state)}]}, expert / "optimizer.pt")
    local = plan(recipe, tmp_path)
    upload_folder(expert, f"{s3_server.uri}/expert0")
    recipe["models"] = [{"model": f"{s3_server.uri}/expert0"}]
    text = plan(recipe, tmp_path)
    assert "note:" not in text
    figures = [line for line in local.splitlines() if line.startswith(("parameters:", "inputs:", "output:"))]
    assert len(figures) == 3 and all(line in text for line in figures)


def test_inspect_each_kind_of_thing(tmp_path: Path) -> None:
    recipe = llama_experts(tmp_path, tie=True) | {"dtype": "bfloat16"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    home = ("--home", tmp_path / "home")
    said("merge", tmp_path / "r.yaml", tmp_path / "out", *home)
    said("mask", tmp_path / "r.yaml", tmp_path / "masks", *home)
    said("compress", tmp_path / "expert0", tmp_path / "rank1.safetensors", *home)
    said("compress", tmp_path / "expert0", tmp_path / "none.safetensors", "--method", "none", *home)
    state = load_file(tmp_path / "base" / "model.safetensors")
    parameters = sum(prod(x.shape) for x in state.values())

    text = said("inspect", tmp_path / "base")
    assert f"checkpoint: llama, {parameters:,} parameters in {len(state)} tensors and 1 file, " in text
    assert (
        f"data types: float32 ({len(state)} tensors)" in text and "tied embeddings: yes" in text and "second moments" not in text
    )
    text = said("inspect", tmp_path / "expert0")
    assert (
        f"exp_avg_sq.safetensors: second moments of {parameters:,} parameters in {len(state)} tensors, as the trainer left them"
        in text
    )
    assert "β₂ 0.999, step 100" in text
    text = said("inspect", tmp_path / "expert0" / "model.safetensors")
    assert text.startswith("model.safetensors holds weights") and "checkpoint: llama" in text
    for file, how in (("rank1.safetensors", "rank1"), ("none.safetensors", "none")):
        assert f"{file}: second moments of {parameters:,} parameters in {len(state)} tensors, {how}, " in said(
            "inspect", tmp_path / file
        )

    text = said("inspect", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert f"artifact: merged {record['fingerprint']}, complete" in text and "bfloat16" in text
    assert "experts: density=0.4, scaling_factor=1.0; density=0.4" in text and "{" not in text and "None" not in text
    densities = json.loads((tmp_path / "masks" / "densities.json").read_text())
    shown = said("inspect", tmp_path / "masks")
    for name, found in densities.items():
        assert f"density {name}: {found['density']:.6f} ({found['kept']:,} of {found['total']:,})" in text
        line = f"{name}.safetensors: FFG mask of {name}: keeps {found['kept']:,} of {found['total']:,} elements (density {found['density']:.6f})"
        assert line in shown and line in said("inspect", tmp_path / "masks" / f"{name}.safetensors")
    (tmp_path / "out" / "model.safetensors").write_bytes(b"")
    assert "model.safetensors has 0 bytes instead of" in refused("inspect", tmp_path / "out")


def test_inspect_a_trainers_folder(tmp_path: Path) -> None:
    folder, live = train(llama(), tmp_path)
    total = sum(v.numel() for v in live.values())
    text = said("inspect", folder)
    assert (
        f"optimizer.pt: second moments of {total:,} parameters in {len(live)} tensors, as the trainer left them" in text
        and "β₂ 0.98, step 3" in text
    )
    assert text.splitlines()[-1].strip() == said("inspect", folder / "optimizer.pt").strip()


def test_inspect_what_is_none_of_these(tmp_path: Path) -> None:
    assert f"{tmp_path / 'no'} does not exist; expected a checkpoint" in refused("inspect", tmp_path / "no")
    assert "./no/where does not exist" in refused("inspect", "./no/where")
    (tmp_path / "notes.txt").write_text("some text of no format")
    text = refused("inspect", tmp_path / "notes.txt")
    assert f"{tmp_path / 'notes.txt'} is neither a mask file nor second moments that can be read" in text
    assert "holds no weights (it holds: notes.txt)" in refused("inspect", tmp_path)


def test_plan_counts_tensors_that_are_worked_on_whole(tmp_path: Path) -> None:
    recipe = llama_experts(tmp_path) | {
        "merge_method": "nuslerp",
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    }
    for model in recipe["models"]:
        model.pop("parameters", None)
    whole = plan(recipe, tmp_path)
    assert "worked on whole; the largest, " in whole
    recipe["parameters"] = {"nuslerp_flatten": False}
    assert "worked on whole" not in plan(recipe, tmp_path)
