"""What models were asked and what they answered, document by document: kept beside the scores, and compared between models.

The texts are cut, so that a suite of ten thousand documents stays some megabytes: of a prompt the end is kept, where the question stands.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ota_core.frozen import Frozen
from tasks.evaluation.comparison import own_capability
from tasks.evaluation.results import Result, document_keys
from tasks.evaluation.scores import ModelScores
from tasks.evaluation.subject import Subject
from tasks.evaluation.suites import Suite

if TYPE_CHECKING:
    import pandas as pd

ANSWERS_FILE = "answers.jsonl.gz"
PROMPT_LENGTH, ANSWER_LENGTH = 1200, 800
"""Characters that are kept."""
_SAME = 1e-9


class Answer(Frozen):
    """One model's answer to one document."""

    capability: str
    task: str
    document: str
    """Its hash, as in ``ModelScores.samples``."""
    prompt: str
    target: str
    answer: str


Answers = Mapping[tuple[str, str, str], Answer]
"""By capability, task and document."""


def answers_of(suite: Suite, results: Mapping[str, Sequence[Result]]) -> Iterator[Answer]:
    """The answers in lm-eval's results; of a repeated task those of the first time."""
    for capability, entry in suite.entries():
        for leaf, rows in results[entry.task][0]["samples"].items() if entry.task in results else ():
            kept = [row for row in rows if row["filter"] == entry.filter and row.get(entry.metric) is not None]
            for key, row in zip(document_keys(kept), kept, strict=True):
                choices = [str(one[1]) for one in row["arguments"] if len(one) > 1 and isinstance(one[1], str)]
                yield Answer(
                    capability=capability, task=leaf, document=key, prompt=_end(str(row["arguments"][0][0])),
                    target=_begin(_target(row["target"], choices)), answer=_begin(_answer(row, choices)),
                )  # fmt: skip


def write_answers(path: Path, answers: Iterator[Answer]) -> None:
    """A line of JSON for each answer, in gzip; the same answers give the same bytes."""
    with (
        open(path, "wb") as file,
        gzip.GzipFile("", "wb", fileobj=file, mtime=0) as stream,
    ):  # neither name nor time in the header
        for one in answers:
            stream.write(one.model_dump_json().encode() + b"\n")


def read_answers(path: Path) -> Answers | None:
    """What ``write_answers`` wrote; None where scores were kept without answers."""
    if not path.is_file():
        return None
    with gzip.open(path, "rb") as stream:
        found = [Answer.model_validate(json.loads(line)) for line in stream]
    return {(one.capability, one.task, one.document): one for one in found}


def documents_table(
    scores: Mapping[str, ModelScores], subjects: Mapping[str, Subject], answers: Mapping[str, Answers | None]
) -> pd.DataFrame:
    """One row a document that the merge was scored on. ``scores``, ``subjects``, ``answers``: by ``base``, ``expert/<name>`` and ``merged``.

    Columns: ``capability``, ``task``, ``document``, ``prompt``, ``target``; for ``base``, ``expert`` and ``merge`` the score 0…1 (NaN where not
    scored) and under ``<which>_answer`` the answer; ``expert_name``; ``against_base`` and ``against_expert``: won, lost, same, or none. The expert
    is the best one of those whose own capability it is. Texts are None where they were not kept.
    """
    import pandas as pd

    rows = []
    for capability, tasks in scores["merged"].samples.items():
        key = _best_expert(capability, scores, subjects)
        columns = {"base": "base" if "base" in scores else None, "expert": key, "merge": "merged"}
        for task, documents in tasks.items():
            for document in documents:
                at = (capability, task, document)
                said = {which: (answers.get(one) or {}).get(at) if one else None for which, one in columns.items()}
                asked = next((one for one in said.values() if one), None)
                values = {which: _score(scores, one, at) for which, one in columns.items()}
                rows.append(
                    {"capability": capability, "task": task, "document": document, "prompt": asked and asked.prompt,
                     "target": asked and asked.target, "expert_name": subjects[key].name if key else None}
                    | values | {f"{which}_answer": one and one.answer for which, one in said.items()}
                    | {f"against_{which}": _outcome(values["merge"], values[which]) for which in ("base", "expert")}
                )  # fmt: skip
    order = [
        "capability",
        "task",
        "document",
        "prompt",
        "target",
        "base",
        "expert",
        "merge",
        "expert_name",
        "against_base",
        "against_expert",
    ]
    table = pd.DataFrame(rows, columns=[*order, "base_answer", "expert_answer", "merge_answer"])
    return table.astype({"base": float, "expert": float, "merge": float})


def flipped(table: pd.DataFrame) -> pd.DataFrame:
    """The documents that the merge won or lost against base or expert."""
    return table[table[["against_base", "against_expert"]].isin(["won", "lost"]).any(axis=1)]


def at_most(table: pd.DataFrame, rows: int) -> pd.DataFrame:
    """So many rows of the table of documents at most, in its order: what flipped first, each capability with an equal share."""
    import pandas as pd

    if len(table) <= rows:
        return table
    first = flipped(table)
    ranked = pd.concat([first, table.drop(first.index)])
    turns = ranked.groupby("capability", sort=False).cumcount()
    later = (~ranked.index.isin(first.index)).astype(int)
    chosen = ranked.assign(_later=later, _turn=turns).sort_values(["_later", "_turn"], kind="stable").index[:rows]
    return table.loc[sorted(chosen)]


def _best_expert(capability: str, scores: Mapping[str, ModelScores], subjects: Mapping[str, Subject]) -> str | None:
    """The key of the expert to compare with on a capability."""
    own = {
        key: found.by_capability().get(capability)
        for key, found in scores.items()
        if own_capability(subjects[key], found) == capability
    }
    known = {key: value for key, value in own.items() if value is not None}
    return max(known, key=known.__getitem__) if known else None


def _score(scores: Mapping[str, ModelScores], key: str | None, at: tuple[str, str, str]) -> float | None:
    capability, task, document = at
    return scores[key].samples.get(capability, {}).get(task, {}).get(document) if key else None


def _outcome(merge: float | None, other: float | None) -> str:
    if merge is None or other is None:
        return "none"
    return "won" if merge > other + _SAME else "lost" if merge < other - _SAME else "same"


def _target(target: Any, choices: Sequence[str]) -> str:
    """In words where lm-eval gives the number of a choice."""
    if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(choices):
        return choices[target].strip()
    return str(target)


def _answer(row: Mapping[str, Any], choices: Sequence[str]) -> str:
    """What the model wrote before any filter; of several choices the likeliest."""
    first = [answers[0] for answers in row["resps"]]
    if isinstance(first[0], str):
        return first[0]
    likelihoods = [float(one[0]) if isinstance(one, tuple | list) else float(one) for one in first]
    if len(likelihoods) < 2 or len(choices) < len(likelihoods):
        return f"log-likelihood {likelihoods[0]:.4g}"
    return choices[max(range(len(likelihoods)), key=likelihoods.__getitem__)].strip()


def _begin(text: str) -> str:
    return text if len(text) <= ANSWER_LENGTH else f"{text[: ANSWER_LENGTH - 1]}…"


def _end(text: str) -> str:
    return text if len(text) <= PROMPT_LENGTH else f"…{text[1 - PROMPT_LENGTH :]}"
