"""The demo's data: JSON lines for five capabilities with disjoint splits, and text for the base model."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from random import Random

from pydantic import Field

from ota_core.errors import OtaError
from ota_core.frozen import Frozen
from tasks.local.demo.questions import (
    CAPABILITIES,
    Example,
    Generator,
    base,
    code,
    general_if,
    knowledge,
    math,
    precise_if,
    split_of,
)
from tasks.local.demo.questions.common import Split

__all__ = ["CAPABILITIES", "DataSettings", "read_jsonl", "write_data", "write_jsonl"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
GENERATORS: Mapping[str, Generator] = {
    "math": math.generate,
    "code": code.generate,
    "precise_if": precise_if.generate,
    "general_if": general_if.generate,
}


class DataSettings(Frozen):
    """Everything but the seed that decides the data's bytes. Sizes are numbers of examples."""

    version: int = 1
    """Raised when a generator changes, so that cached training counts as stale."""
    train: int = Field(default=5000, ge=1)
    validation: int = Field(default=100, ge=1)
    test: int = Field(default=200, ge=1)
    base: int = Field(default=40000, ge=1)
    """Documents for the base model."""
    pinch: float = Field(default=0.03, ge=0, le=0.2)
    """Share of the base's documents that each capability's train split provides."""
    places: int = Field(default=70, ge=1)
    """Invented places of each of the three kinds of ``knowledge``."""


def write_data(folder: Path, *, seed: int, settings: DataSettings | None = None) -> None:
    """Write ``<capability>/{train,validation,test}.jsonl`` (fields prompt, answer, key) and ``base/train.jsonl`` (field text).

    The same seed and settings give the same bytes. An existing folder is replaced as a whole: the files are written to a sibling
    and renamed. Raises OtaError when the settings ask for more distinct questions than the generators know.
    """
    settings = settings or DataSettings()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    splits = {name: _draw(name, seed, settings) for name in GENERATORS}
    known_to_base, splits["knowledge"] = _knowledge(seed, settings)
    for capability in CAPABILITIES:
        for split in SPLITS:
            write_jsonl(temporary / capability / f"{split}.jsonl", (example._asdict() for example in splits[capability][split]))
    pinches = {name: splits[name]["train"] for name in GENERATORS} | {"knowledge": known_to_base}
    write_jsonl(temporary / "base" / "train.jsonl", ({"text": text} for text in _base_texts(pinches, seed, settings)))
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write one JSON object a line; the folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[dict[str, str]]:
    """The rows of a file that ``write_jsonl`` wrote, where all values are text."""
    with open(path, encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def _draw(capability: str, seed: int, settings: DataSettings) -> dict[Split, list[Example]]:
    """Draw until every split is full. The split follows from the key, so no key lies in two; no prompt comes twice in one."""
    rng = Random(f"{seed}/{capability}")
    wanted: dict[Split, int] = {"train": settings.train, "validation": settings.validation, "test": settings.test}
    found: dict[Split, dict[str, Example]] = {split: {} for split in SPLITS}
    for _ in range(100 * sum(wanted.values())):
        example = GENERATORS[capability](rng)
        split = split_of(capability, example.key)
        if len(found[split]) < wanted[split]:
            found[split].setdefault(example.prompt, example)
        elif all(len(found[s]) == wanted[s] for s in SPLITS):
            break
    short = {split: len(found[split]) for split in SPLITS if len(found[split]) < wanted[split]}
    if short:
        raise OtaError(f"{capability} has too few distinct questions: found {short}, wanted {wanted}; ask for fewer")
    return {split: list(found[split].values()) for split in SPLITS}


def _knowledge(seed: int, settings: DataSettings) -> tuple[list[Example], dict[Split, list[Example]]]:
    """(what the base is told, splits). Facts of the asked places are trained, but never in the wording of validation and test."""
    rng = Random(f"{seed}/knowledge")
    kinds = knowledge.places(rng, base=settings.places, taught=settings.places, asked=settings.places)
    known, taught, asked = (knowledge.facts(names, rng) for names in kinds)
    questions = knowledge.examples(asked, wordings="held_out")
    rng.shuffle(questions)
    cut = min(settings.validation, len(questions) // 10)
    train = knowledge.examples(taught, wordings="all") + knowledge.examples(asked, wordings="trained")
    rng.shuffle(train)
    return knowledge.examples(known, wordings="all"), {
        "train": train,
        "validation": questions[:cut],
        "test": questions[cut : cut + settings.test],
    }


def _base_texts(pinches: Mapping[str, list[Example]], seed: int, settings: DataSettings) -> Iterable[str]:
    rng = Random(f"{seed}/base")
    names = list(pinches)
    for _ in range(settings.base):
        place = rng.random() / settings.pinch if settings.pinch else len(names)
        if place < len(names):
            example = rng.choice(pinches[names[int(place)]])
            yield f"{example.prompt} {example.answer}"
        else:
            yield base.generate(rng)
