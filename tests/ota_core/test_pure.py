"""What an import loads: nothing heavy where it is not needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.checkpoints import ota_recipe, random_base, random_experts

ROOT = Path(__file__).parents[2]
FORBIDDEN = {"prefect", "mlflow", "boto3", "botocore", "transformers", "lm_eval"}


def modules(package: str) -> list[str]:
    files = sorted((ROOT / package).rglob("*.py"))
    return [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]


def loaded_after(code: str) -> set[str]:
    """The modules that a fresh interpreter holds after running this."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_ota_core_loads_no_forbidden_package() -> None:
    names = modules("ota_core")
    assert {"ota_core", "ota_core.engine.engine", "ota_core.moments.trainer", "ota_core.methods.ota"} <= set(names)
    loaded = loaded_after("import importlib\nfor name in " + repr(names) + ": importlib.import_module(name)")
    assert set(names) <= loaded
    assert {name.split(".")[0] for name in loaded} & FORBIDDEN == set()


def test_help_answers_without_loading_anything_heavy() -> None:
    loaded = loaded_after(
        "import sys\nsys.argv = ['ota', '--help']\nfrom flows.cli.app import app\ntry: app()\nexcept SystemExit: pass"
    )
    assert "flows.cli.app" in loaded
    assert {name.split(".")[0] for name in loaded} & (FORBIDDEN | {"torch", "numpy", "numba", "pandas", "pydantic"}) == set()


LIGHT = [
    (["plan", "ties"], {"numba"}),
    (["plan", "ota"], {"numba"}),
    (["merge", "linear", "OUT"], set()),
    (["merge", "ties", "OUT"], set()),
    (["merge", "ota", "OUT"], set()),
    (["merge", "slerp", "OUT"], set()),
    (["merge", "rare", "OUT"], set()),
    (["compress", "expert0", "OUT"], set()),
]
"""What is typed about recipes named after their methods, and what it does without beside torch."""


@pytest.mark.parametrize("arguments, without", LIGHT, ids=lambda value: " ".join(value))
def test_a_command_on_the_cpu_needs_no_torch(tmp_path: Path, arguments: list[str], without: set[str]) -> None:
    base = random_base()
    experts = random_experts(base)
    rare = {"density": 0.4, "masked_merge": "ties", "rescale": True, "fallback": "mean", "normalise": "global"}
    recipes = {"linear": {}, "ties": {"density": 0.4}, "ota": {"density": 0.4}, "slerp": {"t": 0.4}, "rare": rare}
    method = "ota" if arguments[1] == "rare" else arguments[1]
    if method in recipes:
        parts = experts[:1] if method == "slerp" else experts
        recipe = ota_recipe(tmp_path, base, parts, recipes[arguments[1]], method=method, dtype=torch.bfloat16)
        if "rare" in arguments:  # the last expert has other tokens, and lacks some of the base's
            recipe["tokenizer_source"] = "union"
            for folder, first in (("base", 0), ("expert0", 0), ("expert1", 0), ("expert2", 3)):
                tokens = [{"id": row, "content": f"t{row + first}"} for row in range(13)]
                (tmp_path / folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
        (tmp_path / arguments[1]).write_text(json.dumps(recipe))
    else:
        ota_recipe(tmp_path, base, experts, dtype=torch.bfloat16)
    out = tmp_path / "out"
    typed = [str(out if word == "OUT" else tmp_path / word) if i else word for i, word in enumerate(arguments)]
    # An output with tokens of its own is tried by transformers in the end: not what is looked at here.
    untried = "import tasks.merging.opened as opened\nopened.opens = None\n" if "rare" in arguments else ""
    loaded = loaded_after(
        f"{untried}import sys\nsys.argv = {['ota', *typed, '--home', str(tmp_path / 'home')]!r}\nfrom flows.cli.app import app\n"
        "try: app()\nexcept SystemExit as end: assert not end.code"
    )
    assert out.exists() == ("OUT" in arguments)
    assert {name.split(".")[0] for name in loaded} & (HEAVY | {"torch", "cffi", "psutil", *without}) <= {"botocore"}
    assert "scipy.linalg" not in loaded


HEAVY = FORBIDDEN | {"pandas", "matplotlib", "datasets", "sklearn"}


@pytest.mark.parametrize("module, allowed", [("tasks.merging.inputs", {"botocore"}), ("flows.merge", {"botocore", "prefect"})])
def test_a_command_loads_only_what_it_needs(module: str, allowed: set[str]) -> None:
    """``ota merge`` of local folders, and a flow that finds everything in its cache."""
    loaded = loaded_after(f"import {module}")
    assert module in loaded
    assert {name.split(".")[0] for name in loaded} & HEAVY <= allowed
