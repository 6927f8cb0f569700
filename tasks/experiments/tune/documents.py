"""What scales are learned from: a suite's documents as blocks of tokens, some of them held out."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ota_core.errors import raise_all
from tasks.evaluation.gradients.documents import Block, Document, cut, in_template
from tasks.evaluation.suites import SuiteError
from tasks.experiments.tune.config import ScalesConfig


@dataclass(frozen=True)
class Blocks:
    """One capability's blocks."""

    train: tuple[Block, ...]
    held_out: tuple[Block, ...]


def blocks_of(
    documents: Mapping[str, Sequence[Document]], tokenizer: Any, config: ScalesConfig, chat: bool = False
) -> dict[str, Blocks]:
    """Every capability's blocks. Whole documents are held out, until their blocks are enough; those after them are learned from.

    chat: whether the suite asks in the form of the model's chat template. Raises SuiteError with all capabilities that have too few documents,
    or where there is no template.
    """
    if chat:
        documents = {name: [in_template(one, tokenizer) for one in some] for name, some in documents.items()}
    answer = config.answer if config.objective == "kl" else None  # each expert gives its own
    found, problems = {}, []
    for name, some in documents.items():
        order = list(some)
        random.Random(f"{config.seed} {name}").shuffle(order)
        cuts = (list(cut(one, tokenizer, config.length, answer=answer)) for one in order)
        held_out = _take(cuts, config.held_out)
        train = _take(cuts, config.blocks)
        if not train or not held_out:
            problems.append(
                f"capability '{name}': its {len(order)} documents give {len(held_out)} blocks that are held out and {len(train)} to learn from; "
                "expected documents for both: give more, a smaller held_out, or another suite"
            )
        found[name] = Blocks(train=tuple(train), held_out=tuple(held_out))
    raise_all(problems, SuiteError)
    return found


def _take(documents: Iterator[list[Block]], count: int) -> list[Block]:
    """The first ``count`` blocks; of the document that the last one is from, the rest is dropped."""
    taken: list[Block] = []
    while len(taken) < count and (blocks := next(documents, None)) is not None:
        taken += blocks
    return taken[:count]
