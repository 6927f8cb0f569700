"""What the site is made of besides the pages in docs/: the command reference, and README, CONTRIBUTING, CHANGELOG and infra/README.

``python docs/site/manual.py`` writes docs/commands.md from the command itself; MkDocs loads this file as a hook (mkdocs.yml).
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BESIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "infra/README.md": "infra.md",
}
"""Pages that lie outside of docs/, and what the site calls them."""
_LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")


def commands(app: Any) -> Iterator[tuple[str, Any]]:
    """(name as it is typed, click's command) of every command that runs, in the order of ``ota --help``. app: the Typer."""
    from typer.main import get_command

    def below(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        if not hasattr(command, "commands"):
            yield name, command
            return
        for word, one in command.commands.items():
            yield from below(f"{name} {word}", one)

    return below("ota", get_command(app))


def commands_page() -> str:
    """docs/commands.md: every command with its arguments, options and defaults."""
    from flows.cli.app import app

    lines = [
        "# Commands", "",
        "Every command of `ota` with its arguments and options. This page is written by `make docs` from the command itself, which says the",
        "same with `--help`. `ota` here is `.venv/bin/ota`, where `make` installs it.", "",
        "A mistake in the input ends with exit code 2 and a message that lists every problem. `ota search` ends with 3 when no trial holds all",
        "floors, `ota stack status` with 1 when a process does not do its work. An output file or folder appears complete or not at all.",
        "`ota merge`, `compress` and `mask` print one line of JSON with `--json`, seconds included.", "",
    ]  # fmt: skip
    for name, command in commands(app):
        arguments = [one for one in command.params if one.param_type_name == "argument"]
        words = [one.metavar.strip("[]{}") if one.required else f"[{one.metavar.strip('[]{}')}]" for one in arguments]
        lines += [f"## {name}", "", f"`{' '.join([name, *words])}`", "", *_plain(command.help), "", *_table(command), ""]
    return "\n".join(lines).rstrip() + "\n"


def _plain(text: str) -> list[str]:
    return [" ".join(part.split()) if part.strip() else "" for part in text.replace("``", "`").strip().splitlines()]


def _table(command: Any) -> Iterator[str]:
    rows = []
    for one in command.params:
        if one.param_type_name == "argument":
            spelled = f"`{one.metavar.strip('[]{}')}`"
        elif one.name == "help":
            continue
        else:
            spelled = ", ".join(f"`{word}`" for word in [*one.opts, *one.secondary_opts])
        rows.append(f"| {spelled} | {_cell(one.help or '')} | {_default(one)} |")
    if rows:
        yield "| | | default |"
        yield "| --- | --- | --- |"
        yield from rows


def _default(one: Any) -> str:
    """What holds where the option is not given, as ``--help`` says it."""
    if one.required:
        return "required"
    if isinstance(one.show_default, str):
        return _cell(one.show_default)
    value = one.default
    if one.secondary_opts and isinstance(value, bool):
        return f"`{(one.opts if value else one.secondary_opts)[0]}`"
    return "" if value is None or value is False else _cell(f"`{value}`")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie outside of docs/."""
    from mkdocs.structure.files import File

    for source, page in BESIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links between README and docs/ are those of the repository; on the site all pages lie in one folder."""
    own = {site: source for source, site in BESIDE.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(own), match[2]))
        target = BESIDE.get(target, target.removeprefix("docs/"))
        return f"{match[1]}{target}{match[3] or ''}{match[4]}"

    return _LINK.sub(moved, markdown)


if __name__ == "__main__":
    (ROOT / "docs" / "commands.md").write_text(commands_page(), encoding="utf-8")
