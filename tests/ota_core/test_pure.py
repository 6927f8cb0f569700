"""The direction of imports: flows → tasks → ota_core, never back, and nothing heavy where it is not needed."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {"prefect", "mlflow", "boto3", "botocore", "transformers", "lm_eval"}
# Who may import them within tasks; flows import what they like but these.
ONLY_IN = {
    "boto3": ("tasks/storage/",), "botocore": ("tasks/storage/",),
    "mlflow": ("tasks/tracking/", "tasks/registry/", "tasks/experiments/search/log.py", "tasks/experiments/study/log.py"),
    "lm_eval": ("tasks/evaluation/",),
}  # fmt: skip


def modules(package: str) -> list[str]:
    files = sorted((ROOT / package).rglob("*.py"))
    return [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]


def imported(path: Path) -> set[str]:
    """Every module that a file names in an import, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


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


@pytest.mark.parametrize("package, above", [("ota_core", {"tasks", "flows"}), ("tasks", {"flows"})])
def test_imports_never_run_upwards(package: str, above: set[str]) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {
        str(file.relative_to(ROOT)): found for file in files if (found := {n for n in imported(file) if n.split(".")[0] in above})
    }
    assert wrong == {}


def test_ota_core_names_no_forbidden_package_even_in_functions() -> None:
    for file in sorted((ROOT / "ota_core").rglob("*.py")):
        assert {name.split(".")[0] for name in imported(file)} & FORBIDDEN == set(), file


@pytest.mark.parametrize("package", sorted(ONLY_IN))
def test_each_service_has_its_own_files(package: str) -> None:
    for file in sorted([*(ROOT / "tasks").rglob("*.py"), *(ROOT / "flows").rglob("*.py")]):
        name = file.relative_to(ROOT).as_posix()
        if package in {found.split(".")[0] for found in imported(file)}:
            assert name.startswith(ONLY_IN[package]), f"{name} imports {package}"


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
