"""Held-out text of ``tasks.local.real.corpus`` as what lm-eval asks: passages for the loss, and which of four continuations is the true one.

A document gives one passage and one question. All is drawn by the documents' digests: the same corpora give the same bytes.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Literal

from pydantic import Field

from ota_core.errors import OtaError
from ota_core.frozen import Frozen
from tasks.local.demo.data import read_jsonl, write_jsonl

HeldOut = Literal["validation", "test"]


class QuestionSettings(Frozen):
    """What decides the questions besides the corpora. Lengths in characters; words are never cut."""

    version: int = 1
    """Raised when the drawing changes."""
    context: int = Field(default=96, ge=1)
    """Of the text before a continuation."""
    continuation: int = Field(default=48, ge=1)
    """Of a continuation, at most; at least two thirds of it."""
    choices: int = Field(default=4, ge=2)
    questions: Mapping[HeldOut, int] = {"validation": 4, "test": 60}
    """At most so many a domain. Few for validation: a search looks at the passages' loss, which tells models apart by far fewer of them."""
    passage: int = Field(default=256, ge=1)
    passages: Mapping[HeldOut, int] = {"validation": 30, "test": 80}
    """At most so many a domain."""


def write_questions(corpora: Path, out: Path, settings: QuestionSettings) -> dict[str, dict[str, int]]:
    """Write ``<domain>/<split>-{questions,passages}.jsonl`` for every domain of ``corpora``; returns the numbers of rows.

    Questions have the fields context, choices, answer (the true one's position); passages have text. Raises OtaError when a
    domain gives fewer than two questions or passages; what was written by then is the caller's to remove.
    """
    counts: dict[str, dict[str, int]] = {}
    for folder in sorted(path for path in corpora.iterdir() if path.is_dir()):
        counts[folder.name] = {}
        for split in ("validation", "test"):
            documents = read_jsonl(folder / f"{split}.jsonl")
            rows = {
                "questions": _questions(documents, settings, settings.questions[split]),
                "passages": _passages(documents, settings, settings.passages[split]),
            }
            for what, found in rows.items():
                if len(found) < 2:
                    raise OtaError(f"{folder / f'{split}.jsonl'} gives {len(found)} {what}; expected at least two")
                write_jsonl(out / folder.name / f"{split}-{what}.jsonl", found)
                counts[folder.name][f"{split}_{what}"] = len(found)
    return counts


def _questions(documents: list[dict[str, str]], settings: QuestionSettings, wanted: int) -> list[dict[str, object]]:
    """One question a document: its own continuation among those of other documents of the split."""
    cuts = {}
    for document in documents:
        cut = _cut(document, settings)
        if cut is not None:
            cuts[document["digest"]] = cut
    continuations = {digest: after for digest, (_, after) in cuts.items()}
    rows: list[dict[str, object]] = []
    for digest, (context, true) in list(cuts.items())[:wanted]:
        rng = Random(f"choices {digest}")
        # Of those that are nearest in length, so that length tells nothing.
        others = sorted({text for other, text in continuations.items() if other != digest and text != true})
        rng.shuffle(others)
        others.sort(key=_distance_to(len(true)))
        if len(others) < settings.choices - 1:
            continue
        choices = [true, *rng.sample(others[: 4 * settings.choices], settings.choices - 1)]
        rng.shuffle(choices)
        rows.append({"context": context, "choices": choices, "answer": choices.index(true)})
    return rows


def _distance_to(size: int) -> Callable[[str], int]:
    return lambda text: abs(len(text) - size)


def _cut(document: dict[str, str], settings: QuestionSettings) -> tuple[str, str] | None:
    """(context, continuation) around a space within a line, drawn by the digest; None where the document is too short."""
    text = document["text"]
    places = [match.start() + 1 for match in re.finditer(r"\S \S", text)]
    last = len(text) - settings.continuation
    places = [place for place in places if settings.context <= place <= last]
    if not places:
        return None
    place = Random(f"cut {document['digest']}").choice(places)
    start = re.search(r"\s", text[place - settings.context :])
    assert start is not None
    before = text[place - settings.context + start.end() : place]
    after = text[place + 1 : place + 1 + settings.continuation]
    end = re.search(r"\s\S*$", after)
    shortened = after[: end.start()].rstrip() if end else after
    if 3 * len(shortened) < 2 * settings.continuation or not before.strip():
        return None
    return before, shortened


def _passages(documents: list[dict[str, str]], settings: QuestionSettings, wanted: int) -> list[dict[str, object]]:
    """One passage a document, from a place drawn by its digest to the end of a word."""
    rows: list[dict[str, object]] = []
    for document in documents[:wanted]:
        text = document["text"]
        starts = [0, *(match.end() for match in re.finditer(r"\n", text))]
        starts = [start for start in starts if start <= len(text) - settings.passage] or [0]
        start = Random(f"passage {document['digest']}").choice(starts)
        passage = text[start : start + settings.passage]
        end = re.search(r"\s\S*$", passage) if start + settings.passage < len(text) else None
        rows.append({"text": (passage[: end.start()] if end else passage).strip("\n")})
    return rows
