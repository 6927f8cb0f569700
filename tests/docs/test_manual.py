"""What the manual says is so: links lead somewhere, commands parse, recipes load, keys and messages are the code's."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from docs.site.manual import commands_page
from flows.cli.app import app
from ota_core.recipe.parameters import USED, MergeParameters, ModelParameters, default
from ota_core.recipe.recipe import MergeRecipe, ModelEntry, parse_recipe
from ota_core.recipe.yaml_text import parse_yaml
from tasks.evaluation.suites import Suite
from tasks.experiments.search.config import SearchConfig
from tasks.experiments.study.study import StudyConfig
from tasks.experiments.tune.config import ScalesConfig
from tasks.registry.nightly import NightlyConfig
from tests.docs.pages import PAGES, ROOT, Page, page

TOP = ("flows", "tasks", "ota_core", "tests", "docs", "deployments", "infra", ".ci")
SOURCES = [path for folder in ("flows", "tasks", "ota_core") for path in sorted((ROOT / folder).rglob("*.py"))]
each_page = pytest.mark.parametrize("one", PAGES, ids=str)


@each_page
def test_links_pictures_and_files_named_in_the_text_exist(one: Page) -> None:
    for link in one.links():
        target, _, anchor = link.partition("#")
        path = (one.path.parent / target).resolve() if target else one.path
        assert re.match(r"https?:", target) or path.is_file(), f"{one}: {link}"
        assert not anchor or anchor in Page(path).anchors(), f"{one}: {link}; {path.name} has {sorted(Page(path).anchors())}"
    for span in one.code_spans():
        if re.fullmatch(rf"({'|'.join(map(re.escape, TOP))})/[\w./*-]*", span) and span != "infra/.env":  # everybody's own
            assert (ROOT / span).exists() or list(ROOT.glob(span)), f"{one}: {span}"


def ota(words: list[str]) -> tuple[Any, list[str]]:
    """(click's command, the words behind it) of a command line without its first word."""
    command: Any = get_command(app)
    while hasattr(command, "commands") and words and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    return command, words


@each_page
def test_command_lines_parse(one: Page) -> None:
    for line in one.commands():
        if line.startswith(("ota ", ".venv/bin/ota ")):
            command, words = ota(shlex.split(line)[1:])
            assert not hasattr(command, "commands"), f"{one}: {line}"
            try:
                command.make_context("ota", words)
            except Exception as error:
                pytest.fail(f"{one}: {line}: {error}")
    for span in one.code_spans():
        if re.match(r"(\.venv/bin/)?ota( |$)", span):
            command, words = ota(span.split()[1:])
            assert not hasattr(command, "commands") or not words or words[0].startswith(("…", "-")), f"{one}: {span}"
            known = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
            assert {word for word in words if word.startswith("--")} <= known | {"--help"}, f"{one}: {span}"


@each_page
def test_make_targets_and_deployments_exist(one: Page) -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert all((ROOT / path).exists() for path in re.findall(r"\b(?:docs|deployments|tests)/[\w./-]*\w", makefile))
    targets = set(re.findall(r"^([\w-]+):(?!=)", makefile, re.MULTILINE))
    lines = [*one.commands(), *one.code_spans()]
    assert {name for line in lines for name in re.findall(r"^make ([\w-]+)", line)} <= targets
    deployed = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]
    names = {f"{one['entrypoint'].rpartition('.')[2].removesuffix('_flow')}/{one['name']}" for one in deployed}
    assert {name for line in lines for name in re.findall(r"prefect deployment run (\S+)", line)} <= names


@each_page
def test_yaml_is_what_our_readers_take(one: Page) -> None:
    for language, code in one.fences:
        if language == "yaml":
            raw = parse_yaml(code, str(one))
            tuned = ScalesConfig if "objective" in raw else SearchConfig
            kind = tuned if "recipe" in raw else Suite if "capabilities" in raw else None
            assert kind.model_validate(raw) if kind else parse_recipe(raw, str(one))


def test_the_page_on_recipes_names_every_key_with_its_default() -> None:
    said = page("docs/recipes.md").keys()
    for model in (MergeRecipe, ModelEntry, ModelParameters, MergeParameters):
        keys = {field.alias or name for name, field in model.model_fields.items()}
        assert keys <= set(said), f"{model.__name__}: {keys - set(said)}"
    for method, used in USED.items():
        for key in used:
            value = default(method, key)
            if value is not None:
                word = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
                assert word in re.split(r"[^\w.-]+", said[key]), f"{key} of {method}: {value}, the page says {said[key]}"


def test_the_page_on_recipes_says_which_method_uses_which_parameter() -> None:
    keys = page("docs/recipes.md").keys()
    assert {method: set(re.findall(r"`(\w+)`", keys[method])) for method in USED} == USED


@pytest.mark.parametrize(
    ("name", "model"),
    [("benchmarks", Suite), ("nightly", NightlyConfig), ("experiments", StudyConfig), ("experiments", SearchConfig)],
)
def test_keys_of_configurations_are_documented(name: str, model: Any) -> None:
    known = page(f"docs/{name}.md")
    words = set(known.keys()) | {key for language, code in known.fences if language == "yaml" for key in re.findall(r"\w+", code)}
    words |= set(known.code_spans())
    missing = {field.alias or name for name, field in model.model_fields.items()} - words
    assert not missing


def test_every_variable_of_ours_is_documented() -> None:
    inner = {"OTA_STACK", "OTA_STACK_PROCESS"}  # marks of the stack's own processes
    used = {name for path in SOURCES for name in re.findall(r"\bOTA_[A-Z_]*[A-Z]\b", path.read_text())}
    assert used - inner <= set(page("docs/prefect-mlflow.md").code_spans())


def test_the_command_reference_is_that_of_the_command() -> None:
    assert page("docs/commands.md").text == commands_page(), "run `make docs`, which writes docs/commands.md anew"


def test_the_code_refers_to_pages_and_sections_that_exist() -> None:
    sections = set(re.findall(r"^## (\d)\. ", page("docs/methods.md").text, re.MULTILINE))
    for path in [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]:
        text = path.read_text(encoding="utf-8")
        for name, numbers in re.findall(r"\b(docs/[\w-]+\.md)(?:,? sections? (\d(?: and \d)*))?", text):
            assert (ROOT / name).is_file(), f"{path}: {name}"
            assert set(re.findall(r"\d", numbers)) <= sections, f"{path}: {name} {numbers}"


def messages() -> str:
    """Every text of the code, one below the other, in the parts between what is filled in."""
    nodes = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def test_troubleshooting_quotes_what_the_code_says() -> None:
    said = messages()
    quoted = [row[0] for row in page("docs/troubleshooting.md").rows() if row[0] != "it says"]
    assert len(quoted) > 40
    parts = [part.strip(" ,'") for text in quoted for part in re.split("…|;", text)]
    assert [part for part in parts if len(part) > 3 and part not in said] == []


def test_the_walk_and_the_readme_are_short() -> None:
    walk = page("CONTRIBUTING.md").text.split("\n## A new reader's walk of `ota run`\n")[1].split("\n## ")[0]
    files = re.findall(r"^\d+\. `([\w/.]+\.py)`", walk, re.MULTILINE)
    assert 5 < len(files) <= 15 and all((ROOT / path).is_file() for path in files)
    readme = page("README.md").text
    assert len(readme.splitlines()) <= 200 and readme.count("![") == 1


def test_the_site_builds_and_asks_no_other_host(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
    built = sorted(tmp_path.glob("*.html"))
    assert len(built) >= len(PAGES)
    for path in built:
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]* src="(https?:[^"]*)"|<link[^>]* href="(https?:[^"]*)"', path.read_text()
        )
        assert loaded == [], path.name
