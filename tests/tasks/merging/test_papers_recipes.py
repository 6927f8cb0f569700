"""The configurations that the paper's authors publish (repository pmahdavi/ota-merge, arXiv 2509.11167): every combination of their keys, as a file
through the command line, against plain numpy. The models are small ones, the numbers fit these; keys and forms are theirs."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from typer.testing import CliRunner

from flows.cli.app import app
from tasks.storage import hub
from tests import reference
from tests.checkpoints import read_tensors
from tests.reference import Expert, Tensors
from tests.tiny_models import perturb, write_tiny_llama

ROOT = Path(__file__).parents[3]
EXPERTS = ("math", "coding", "precise")
ALL = """
models:
  - model: org/math
    parameters: {OWN0}
  - model: org/coding
    parameters: {OWN1}
  - model: org/precise
    parameters: {OWN2}
dtype: float32
tokenizer_source: union """
EXPORT = [f"preconditioner_path: org/{name}/export/exp_avg_sq.safetensors" for name in EXPERTS]
FISHER = [f"preconditioner_path: org/{name}/export/fisher_diag_s1024_bs128.safetensors" for name in EXPERTS]
STATE = [f"preconditioner_path: org/{name}/export_full_state/optimizer_full.pt" for name in EXPERTS]


def recipe(top: str, own: list[str], *more: str) -> str:
    """more: what stands under every model, or under each of them."""
    each = more if len(more) == len(own) else [more[0] if more else ""] * len(own)
    text = top + ALL
    for i, (one, other) in enumerate(zip(own, each, strict=True)):
        text = text.replace(f"OWN{i}", ", ".join(part for part in (one, other) if part))
    return text


PARAMETERS = "parameters:\n  epsilon: {epsilon} # Default epsilon, can be tuned\n  normalise: none\n  power: {power}\n"
BASE = "merge_method: ota\nbase_model: org/base\n"
THRESHOLDS = ["precond_threshold:  2.626e-21", "precond_threshold: 1.1152e-21", "precond_threshold: 5.8823e-22"]
OWN_THRESHOLDS = [2.626e-21, 1.1152e-21, 5.8823e-22]
CASES: dict[str, tuple[str, dict[str, Any], list[float] | float | None]] = {
    "ota without a base": (recipe("merge_method: ota\n" + PARAMETERS.format(epsilon="1e-24", power="1.0"), EXPORT), {"epsilon": 1e-24, "power": 1.0}, None),
    "epsilon alone, a torch file, weights": (
        recipe("merge_method: ota\n\nparameters:\n  epsilon: 1e-10 # tuned\n", STATE, "weight: 1.0"), {"epsilon": 1e-10}, None
    ),
    "other weights and a chat template": (
        recipe("merge_method: ota\nparameters:\n  epsilon: 1e-8\n", STATE, "weight: 0.15", "weight: 0.85", "weight: 0.5") + "\nchat_template: llama3 ",
        {"epsilon": 1e-8}, None,
    ),
    "normalise": (
        recipe('merge_method: ota\nparameters:\n  epsilon: 1e-10\n  normalise: "global"\n  power: 1.0 # for ablation\n', EXPORT, "weight: 1.0"),
        {"epsilon": 1e-10, "normalise": "global", "power": 1.0}, None,
    ),
    "one threshold, from a Fisher diagonal": (
        recipe(BASE + PARAMETERS.format(epsilon="1e-24", power="0.5") + "  precond_threshold: 1e-21\n  fallback_to_base: true # base\n", FISHER),
        {"epsilon": 1e-24}, 1e-21,
    ),
    "rank one": (
        recipe(BASE + PARAMETERS.format(epsilon="1e-24", power="0.5") + "  precond_threshold: 5e-22\n  fallback_to_base: true\n", EXPORT, "rank1_approx: true"),
        {"epsilon": 1e-24, "compression": "rank1"}, 5e-22,
    ),
    "one threshold, rank one, without rescale": (
        recipe(BASE + PARAMETERS.format(epsilon="1e-26", power="0.5") + "  fallback_to_base: true\n  rescale: false\n  precond_threshold: 6.0e-22\n", EXPORT, "rank1_approx: true"),
        {"epsilon": 1e-26, "compression": "rank1"}, 6e-22,
    ),
    "a threshold for each": (
        recipe(BASE + PARAMETERS.format(epsilon="1e-26", power="0.5") + "  fallback_to_base: true\n  rescale: false\n", EXPORT, *THRESHOLDS),
        {"epsilon": 1e-26}, OWN_THRESHOLDS,
    ),
    "linear, rescaled": (
        recipe(
            BASE + PARAMETERS.format(epsilon="1e-24", power="0.5") + "  fallback_to_base: true\n  rescale: true\n  approximate_norm: true\n"
            "  rescale_relative_threshold: 1e-6\n  masked_task_vector_merge_method: linear\n", EXPORT, *THRESHOLDS,
        ),
        {"epsilon": 1e-24, "masked_merge": "linear", "denominator": "all", "rescale": True}, OWN_THRESHOLDS,
    ),
}  # fmt: skip
"""Name to the recipe, the options of the reference, and thresholds."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Tensors, list[Expert]]]:
    """A folder with org/base and the experts, each with its second moments in every form that the configurations name."""
    root = tmp_path_factory.mktemp("paper")
    base, experts = write_tiny_llama(root / "org" / "base", vocab=104), []
    for seed, name in enumerate(EXPERTS, 1):
        folder = perturb(base, root / "org" / name, seed=seed)
        rng, weights = np.random.default_rng(seed), read_tensors(folder)
        v = {key: (10.0 ** rng.uniform(-20, -16, one.shape)).astype(np.float32) for key, one in weights.items()}
        for file in (
            "export/exp_avg_sq.safetensors",
            "export/fisher_diag_s1024_bs128.safetensors",
            "export_full_state/optimizer_full.pt",
        ):
            (folder / file).parent.mkdir(exist_ok=True)
            if file.endswith(".pt"):
                state = {key: {"exp_avg_sq": torch.from_numpy(one)} for key, one in v.items()}
                torch.save({"state": state, "param_groups": [{"params": [*v]}]}, folder / file)
            else:
                save_file(v, folder / file)
        experts.append(Expert(weights=weights, v=v))
    yield root, read_tensors(base), experts


def merged(root: Path, text: str, tmp: Path) -> Tensors:
    path = root / f"{tmp.name}.yml"
    path.write_text(text, encoding="utf-8")
    result = CliRunner().invoke(app, ["merge", str(path), str(tmp / "out"), "--home", str(tmp / "home")])
    assert result.exit_code == 0, result.output
    return read_tensors(tmp / "out")


@pytest.mark.parametrize("case", CASES)
def test_a_published_configuration(case: str, world: tuple[Path, Tensors, list[Expert]], tmp_path: Path) -> None:
    root, base, experts = world
    text, options, limits = CASES[case]
    each = limits if isinstance(limits, list) else [limits] * len(experts)
    own = [replace(one, precond_threshold=limit) for one, limit in zip(experts, each, strict=True)]
    start = base if "base_model" in text else {name: np.zeros_like(one) for name, one in base.items()}
    want = reference.ota(start, own, **options)
    got = merged(root, text, tmp_path)
    for name, one in want.items():
        error = np.abs(got[name] - one)
        assert error.max() <= 2e-6 * max(1.0, float(np.abs(one).max())), f"{name}: by up to {error.max():.3g}"
    if limits is not None:
        assert any((got[name] == base[name]).any() and (got[name] != base[name]).any() for name in base), (
            "the threshold masks some"
        )


def test_rank_16(world: tuple[Path, Tensors, list[Expert]], tmp_path: Path) -> None:
    """Of matrices with sixteen rows or columns a factorisation of that rank is nearly all of v."""
    root, base, experts = world
    text = recipe(
        BASE + PARAMETERS.format(epsilon="1e-24", power="0.5") + "  precond_threshold: 5e-20\n  fallback_to_base: true\n",
        EXPORT,
        "rank: 16",
    )
    got = merged(root, text, tmp_path)
    assert any((got[name] != base[name]).any() for name in base)
    assert all(
        np.isfinite(one).all() and np.abs(one).max() < 2 * np.abs(experts[0].weights[name]).max() + 1 for name, one in got.items()
    )


@pytest.mark.parametrize("metric", ["fisher", "magnitude"])
def test_a_graft(metric: str, world: tuple[Path, Tensors, list[Expert]], tmp_path: Path) -> None:
    root, base, experts = world
    own = "    parameters:\n      preconditioner_path: org/coding/export/exp_avg_sq.safetensors\n" if metric == "fisher" else ""
    text = (
        f"merge_method: ffg\nbase_model: org/base\n\nparameters:\n  density: 0.30   # keep 30 %\n  metric: {metric}\n\nmodels:\n"
        f"  - model: org/base        # base model (w_0)\n  - model: org/coding        # fine-tuned model (w_T)\n{own}\ndtype: float32\ntokenizer_source: union "
    )
    got = merged(root, text, tmp_path)
    expert = replace(experts[1], density=0.3)
    score = reference.scores(base, expert, expert.v, "curvature" if metric == "fisher" else "magnitude")
    tau = reference.thresholds(expert, score)
    for name, start in base.items():
        kept = (score[name] >= tau[name]) & (score[name] > 0)
        assert np.array_equal(got[name], np.where(kept, expert.weights[name], start)), name


def test_a_threshold_without_a_base_says_what_to_do(world: tuple[Path, Tensors, list[Expert]], tmp_path: Path) -> None:
    """One of the configurations has a threshold and no base, where the published program compares v alone with it."""
    root = world[0]
    path = root / "without.yml"
    path.write_text(
        recipe(
            "merge_method: ota\n\n" + PARAMETERS.format(epsilon="1e-16", power="0.5") + "  precond_threshold: 1e-11  # mask\n",
            EXPORT,
        )
    )
    result = CliRunner().invoke(app, ["merge", str(path), str(tmp_path / "out"), "--home", str(tmp_path / "home")])
    said = " ".join(result.output.split())
    assert result.exit_code == 2 and "line 7: base_model is missing: FFG (density or precond_threshold)" in said
    assert "add base_model, or leave the threshold out" in said


def test_experts_without_second_moments_are_refused_as_the_published_program_does(
    world: tuple[Path, Tensors, list[Expert]], tmp_path: Path
) -> None:
    root = world[0]
    for name in EXPERTS:
        perturb(root / "org" / "base", tmp_path / "org" / name, seed=3)
    write_tiny_llama(tmp_path / "org" / "base", vocab=104)
    path = tmp_path / "r.yml"
    path.write_text(recipe(BASE + "parameters:\n  epsilon: 1e-10\n", ["weight: 1.0 # the rest"] * 3).replace(" # the rest", ""))
    result = CliRunner().invoke(app, ["merge", str(path), str(tmp_path / "out"), "--home", str(tmp_path / "home")])
    said = " ".join(result.output.split())
    assert (
        result.exit_code == 2
        and said.count("Name the file with preconditioner_path") == 3
        and "missing_curvature: estimate" in said
    )


class _Hub(BaseHTTPRequestHandler):
    """What a hub answers to who downloads one file: ``/org/name/resolve/revision/path``."""

    root: Path

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        file = self.root.joinpath(*parts[:2], *parts[4:]) if parts[2:3] == ["resolve"] else self.root / "nowhere"
        data = file.read_bytes() if file.is_file() else b""
        self.send_response(200 if data else 404)
        if data:
            self.send_header("ETag", '"0123456789abcdef0123456789abcdef01234567"')
            self.send_header("X-Repo-Commit", "f" * 40)
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_second_moments_from_the_hub(world: tuple[Path, Tensors, list[Expert]], tmp_path: Path) -> None:
    """The hub's address is read when its library is imported, hence processes of their own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"root": world[0]}))
    Thread(target=server.serve_forever, daemon=True).start()
    environ = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf")}
    environ |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    for name in ("base", "math", "coding"):
        shutil.copytree(world[0] / "org" / name, tmp_path / "models" / name, ignore=shutil.ignore_patterns("export*"))
    path = tmp_path / "r.yml"
    path.write_text(
        "merge_method: ota\nbase_model: models/base\nparameters: {precond_threshold: 1e-21}\ndtype: float32\nmodels:\n"
        "  - model: models/math\n    parameters: {preconditioner_path: org/math/export/exp_avg_sq.safetensors}\n"
        "  - model: models/coding\n    parameters: {preconditioner_path: 'org/coding@main:export/exp_avg_sq.safetensors'}\n"
    )

    def run(out: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flows.cli", "merge", str(path), str(tmp_path / out), "--home", str(tmp_path / "home")]
        return subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True)

    done = run("out")
    assert done.returncode == 0, done.stdout + done.stderr
    want = reference.ota(world[1], [replace(one, precond_threshold=1e-21) for one in world[2][:2]])
    for name, got in read_tensors(tmp_path / "out").items():
        assert np.abs(got - want[name]).max() <= 2e-6, name
    server.shutdown()
    server.server_close()
    shutil.rmtree(tmp_path / "hf")
    failed = run("out2")
    said = " ".join((failed.stdout + failed.stderr).split())
    assert failed.returncode == 2 and "Traceback" not in said
    assert "preconditioner_path 'org/coding@main:export/exp_avg_sq.safetensors' is no file here" in said
    assert "Check the spelling and the network, or name a local file" in said


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("org/math/export/v.safetensors", ("org/math", None, "export/v.safetensors")),
        ("org/math:export/v.safetensors", ("org/math", None, "export/v.safetensors")),
        ("org/math@v1:v.pt", ("org/math", "v1", "v.pt")),
        ("org/math", ("org/math", None, None)),
        ("export/v.safetensors", None),
        ("v.safetensors", None),
    ],
)
def test_addresses_on_the_hub(address: str, parts: tuple[str, str | None, str | None] | None) -> None:
    assert hub.repository_in(address) == parts
