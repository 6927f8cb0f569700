"""The house: which way imports run, where Prefect's tasks and each library stand, how full a folder is, what is typed."""

import ast
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("ota_core", "tasks", "flows")  # each may import those before it
PLATFORM = {"prefect", "mlflow", "boto3", "botocore", "transformers", "lm_eval"}  # nothing for ota_core
# Where a library is imported. Types of Prefect's client (prefect.client.schemas) may be named anywhere.
ONLY_IN = {
    "boto3": ("tasks/storage/",),
    "botocore": ("tasks/storage/",),
    "mlflow": (
        "tasks/tracking/",
        "tasks/registry/",
    ),
    "lm_eval": ("tasks/evaluation/",),
    "prefect.client.orchestration": ("tasks/orchestration/",),  # and not as prefect.get_client
}
# Prefect's tasks: the stages in tasks/*.py, and rooms with steps of their own.
TASK_ROOMS = ("tasks/registry/", "tasks/experiments/", "tasks/local/")
FULL = 20


def files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    return name_of(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")


@cache
def imports() -> dict[str, set[str]]:
    """Per file what it imports, inside functions too: modules, and the names taken from them (``package.name``)."""
    found: dict[str, set[str]] = {}
    for path in files():
        names = found[name_of(path)] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name_of(path)} imports relative to itself; name the module in full"
                assert node.names[0].name != "*", f"{name_of(path)} imports * from {node.module}; name what it needs"
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("package", PACKAGES[:-1])
def test_imports_never_run_upwards(package: str) -> None:
    above = PACKAGES[PACKAGES.index(package) + 1 :]
    wrong = {
        file: up
        for file, names in imports().items()
        if file.startswith(f"{package}/") and (up := {name for name in names if any(within(name, one) for one in above)})
    }
    assert wrong == {}


def test_the_engine_names_nothing_of_the_platform() -> None:
    for file, names in imports().items():
        if file.startswith("ota_core/"):
            assert {name.split(".")[0] for name in names} & PLATFORM == set(), file


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_has_one_place(library: str) -> None:
    users = {file for file, names in imports().items() if any(within(name, library) for name in names)}
    assert not any("prefect.get_client" in names for names in imports().values())
    assert users, f"nothing imports {library}: take it out of ONLY_IN"
    assert {file for file in users if not file.startswith(ONLY_IN[library])} == set()


def circles(edges: dict[str, set[str]]) -> set[tuple[str, ...]]:
    """Groups of nodes that reach each other."""
    reach: dict[str, set[str]] = {}
    for start in edges:
        seen, todo = set[str](), [start]
        while todo:
            new = edges.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        reach[start] = seen
    return {tuple(sorted(b for b in reach[a] if a in reach.get(b, ()))) for a in reach if a in reach[a]}


def children(package: str, edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """What the children of a package, its files and folders, import of each other."""
    depth = package.count(".") + 2
    between = defaultdict[str, set[str]](set)
    for source, targets in edges.items():
        for target in targets:
            if source.startswith(f"{package}.") and target.startswith(f"{package}."):
                one, other = (".".join(name.split(".")[:depth]) for name in (source, target))
                if one != other:
                    between[one].add(other)
    return between


def test_no_circles_at_any_level() -> None:
    modules = {module_of(path): name_of(path) for path in files()}
    edges = {
        module: {own for name in imports()[file] if (own := name if name in modules else name.rpartition(".")[0]) in modules}
        for module, file in modules.items()
    }
    packages = {module.rpartition(".")[0] for module in modules} - {""}
    assert {circle for package in packages for circle in circles(children(package, edges))} == set()


def test_a_circle_is_found() -> None:
    edges = {"p.a.x": {"p.b"}, "p.b": {"p.c"}, "p.c": {"p.a.y", "p.d"}, "p.a.y": set[str](), "p.d": set[str]()}
    assert circles(children("p", edges)) == {("p.a", "p.b", "p.c")} and circles(edges) == set()


def has_tasks(path: Path) -> bool:
    """Whether a function of the file is a Prefect task."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for one in getattr(node, "decorator_list", ()):
            named = one.func if isinstance(one, ast.Call) else one
            if ast.unparse(named) in {"task", "prefect.task"}:
                return True
    return False


def test_tasks_stand_in_stage_files_and_in_rooms_with_steps() -> None:
    with_tasks = {name_of(path) for path in files() if has_tasks(path)}
    stages = {file for file in with_tasks if file.startswith("tasks/") and file.count("/") == 1}
    assert with_tasks - stages - {file for file in with_tasks if file.startswith(TASK_ROOMS)} == set()
    assert "tasks/job.py" in stages


def folders() -> Iterator[Path]:
    for top in (*PACKAGES, "tests", "deployments", "infra", "docs"):
        yield ROOT / top
        yield from (path for path in (ROOT / top).rglob("*") if path.is_dir() and path.name != "__pycache__")


def test_no_folder_is_too_full() -> None:
    count = {
        name_of(folder): sum(path.name not in {"__pycache__", "__init__.py"} for path in folder.iterdir()) for folder in folders()
    }
    assert {folder: entries for folder, entries in count.items() if entries > FULL} == {}


def test_every_package_says_in_a_line_what_lives_there() -> None:
    for folder in {path.parent for path in files()}:
        said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        line = said.partition("\n")[0]
        assert line.endswith(".") and len(line) > 20, f"{name_of(folder)}/__init__.py: its docstring's first line says '{line}'"


def test_mypy_is_strict_on_everything() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    assert config["strict"] and set(config["packages"]) == set(PACKAGES)
    # Overrides are for libraries without types, and for what Altair's methods give.
    of_our_own = [one for one in config["overrides"] if any(name.split(".")[0] in PACKAGES for name in one["module"])]
    assert all(set(one) <= {"module", "warn_return_any"} for one in of_our_own)
    assert {key for one in config["overrides"] for key in one} <= {"module", "ignore_missing_imports", "warn_return_any"}
