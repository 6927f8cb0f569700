"""The manual as its tests read it: pages, headings, links, code in fences and in lines."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from markdown.extensions.toc import slugify

ROOT = Path(__file__).resolve().parents[2]
BESIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "infra/README.md")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Page:
    """One Markdown file."""

    path: Path

    def __str__(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def fences(self) -> list[tuple[str, str]]:
        """(language, code) of every block between fences."""
        return _FENCE.findall(self.text)

    @cached_property
    def prose(self) -> str:
        """The text without the blocks."""
        return _FENCE.sub("", self.text)

    def code_spans(self) -> list[str]:
        """What stands between backticks in the text."""
        return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", self.prose)

    def links(self) -> list[str]:
        """Targets of links and pictures."""
        return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]+`", "", self.prose))

    def anchors(self) -> set[str]:
        """The anchors that GitHub and MkDocs both give the headings."""
        plain = [re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", one) for one in re.findall(r"^#+ (.+)$", self.prose, re.MULTILINE)]
        github = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}
        return github & {slugify(heading, "-") for heading in plain}

    def commands(self) -> Iterator[str]:
        """Every line of a block without a language, continued ones joined and without its comment."""
        for language, code in self.fences:
            for line in re.sub(r" *\\\n *", " ", code).splitlines() if not language else ():
                yield re.sub(r"(^| )# .*", "", line).strip()

    def rows(self) -> list[list[str]]:
        """The cells of every row of every table but the lines below the headers."""
        lines = [line for line in self.prose.splitlines() if line.startswith("|") and set(line) - set("|-: ")]
        return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]

    def keys(self) -> dict[str, str]:
        """Key, in backticks in a table's first cell (of several each), to the second cell."""
        return {key: row[1] for row in self.rows() for key in re.findall(r"`([^`]+)`", row[0])}


PAGES = tuple(Page(path) for path in [*(ROOT / name for name in BESIDE), *sorted((ROOT / "docs").glob("*.md"))])
"""The manual."""


def page(name: str) -> Page:
    """The page of this name, relative to the repository."""
    return Page(ROOT / name)
