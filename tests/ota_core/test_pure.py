"""What an import loads: nothing heavy where it is not needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
    assert {"ota_core", "ota_core.merge.engine", "ota_core.moments.trainer", "ota_core.methods.ota"} <= set(names)
    loaded = loaded_after("import importlib\nfor name in " + repr(names) + ": importlib.import_module(name)")
    assert set(names) <= loaded
    assert {name.split(".")[0] for name in loaded} & FORBIDDEN == set()


def test_help_answers_without_loading_anything_heavy() -> None:
    loaded = loaded_after(
        "import sys\nsys.argv = ['ota', '--help']\nfrom flows.cli.app import app\ntry: app()\nexcept SystemExit: pass"
    )
    assert "flows.cli.app" in loaded
    assert {name.split(".")[0] for name in loaded} & (FORBIDDEN | {"torch", "numpy", "numba", "pandas", "pydantic"}) == set()


HEAVY = FORBIDDEN | {"pandas", "matplotlib", "datasets", "sklearn"}


@pytest.mark.parametrize(
    "module, allowed",
    [("tasks.merging.inputs", {"botocore"}), ("flows.cli.engine", {"botocore"}), ("flows.merge", {"botocore", "prefect"})],
)
def test_a_command_loads_only_what_it_needs(module: str, allowed: set[str]) -> None:
    """``ota merge`` of local folders, ``ota compress``, and a flow that finds everything in its cache."""
    loaded = loaded_after(f"import {module}")
    assert module in loaded
    assert {name.split(".")[0] for name in loaded} & HEAVY <= allowed
