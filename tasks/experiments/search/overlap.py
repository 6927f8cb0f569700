"""Whether two suites share documents. What was chosen on a document says nothing when it is judged on it.

A document is shared when it is the same after normalisation (Unicode NFKC, case, white space), and contaminated when much of it is: at least 70 %
(Chowdhery et al., PaLM, arXiv:2204.02311, section 8) of its runs of 13 words (Brown et al., GPT-3, arXiv:2005.14165, appendix C; lm-eval's
own decontamination takes the same) occur in the other suite. As there, runs that more than ten documents have are the task's wording and do
not count, and what is shorter than 13 words is compared as a whole only.
"""

import json
import logging
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ota_core.frozen import Frozen
from tasks.evaluation.harness_tasks import load_tasks
from tasks.evaluation.quiet import quiet
from tasks.evaluation.suites import Suite
from tasks.experiments.search.search import SearchError

log = logging.getLogger(__name__)

WORDS = 13
SHARE = 0.7
COMMON = 10
SHOWN = 3

OnOverlap = Literal["refuse", "warn"]
"""What to do where suites share documents."""


class Overlap(Frozen):
    """What two suites share; documents by ``task[position]``."""

    chosen: int
    """Documents of the suite that chooses; of equal ones one."""
    judged: int
    """Of the suite that judges, likewise."""
    same: dict[str, str]
    """A document of the suite that judges to the equal one of the suite that chooses."""
    similar: dict[str, float]
    """A document of the suite that judges to how much of it occurs in the other, 0.7…1; without those that are the same."""

    def sentence(self, chooses: str, judges: str) -> str:
        """What was found, for people."""
        said = f"the suites {chooses} and {judges} share {len(self.same) or 'none'} of {self.judged} documents"
        if self.same:
            said += f" ({'; '.join(f'{theirs} is {mine}' for mine, theirs in list(self.same.items())[:SHOWN])})"
        if self.similar:
            most = sorted(self.similar.items(), key=lambda item: -item[1])[:SHOWN]
            listed = "; ".join(f"{100 * share:.0f} % of {name}" for name, share in most)
            said += f", and {len(self.similar)} more of {judges} stand in {chooses} for the most part word for word ({listed})"
        return said


class Document(NamedTuple):
    """What a model is asked and what counts as right. Names of columns, and columns that no model sees, do not count."""

    whole: str
    runs: frozenset[int]
    """Hashes of its runs of 13 words."""


def check_apart(
    validation: Suite, data: Path | None, test: Suite, test_data: Path | None, on_overlap: OnOverlap = "refuse"
) -> Overlap:
    """What the suites share. Raises SearchError when that is anything, unless ``on_overlap`` is to warn, and SuiteError for what cannot be loaded."""
    found = overlap(documents(validation, data), documents(test, test_data))
    said = found.sentence(validation.name, test.name)
    if found.same or found.similar:
        said += ": a recipe that was chosen on them cannot be judged on them"
        if on_overlap == "refuse":
            raise SearchError(f"{said}; give two splits of the data, or go on knowing it with overlap: warn")
    (log.warning if found.same or found.similar else log.info)(said)
    return found


def overlap(chosen: dict[str, Document], judged: dict[str, Document]) -> Overlap:
    """Documents that judge and that, or much of which, the others hold."""
    equal = {one.whole: name for name, one in reversed(chosen.items())}
    known = frozenset[int]().union(*(one.runs for one in chosen.values()))
    often = Counter(run for one in judged.values() for run in one.runs)
    same = {name: equal[one.whole] for name, one in judged.items() if one.whole in equal}
    similar = {}
    for name, one in judged.items():
        own = [run for run in one.runs if often[run] <= COMMON]
        share = sum(run in known for run in own) / len(own) if own else 0.0
        if share >= SHARE and name not in same:
            similar[name] = share
    return Overlap(chosen=len(chosen), judged=len(judged), same=same, similar=similar)


def documents(suite: Suite, data: Path | None) -> dict[str, Document]:
    """``task[position]`` to every document of a suite; of equal ones the first."""
    found: dict[str, Document] = {}
    with tempfile.TemporaryDirectory(prefix="ota-documents-") as cache, quiet(None):
        for loaded in load_tasks(suite, data, Path(cache)).values():
            for name, task in loaded["tasks"].items():
                for position, document in enumerate(task.eval_docs):
                    found[f"{name}[{position}]"] = _document(task, document)
    first: dict[str, str] = {}
    return {name: one for name, one in found.items() if first.setdefault(one.whole, name) == name}


def _document(task: Any, document: Any) -> Document:
    seen = [task.doc_to_text(document), task.doc_to_target(document)]
    if task.OUTPUT_TYPE == "multiple_choice":
        seen.append(task.doc_to_choice(document))
    whole = json.dumps(_plain(seen), default=str)
    words = re.findall(r"\w+", " ".join(_texts(_plain(seen))))
    return Document(whole, frozenset(hash(tuple(words[i : i + WORDS])) for i in range(len(words) - WORDS + 1)))


def _plain(value: Any) -> Any:
    """The same without what two copies of a text may differ in."""
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFKC", value).casefold().split())
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
