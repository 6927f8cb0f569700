"""What scales are learned from: a suite's documents as blocks of tokens, some of them held out."""

import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ota_core.errors import raise_all
from tasks.evaluation.harness_tasks import load_tasks
from tasks.evaluation.quiet import quiet
from tasks.evaluation.suites import Suite, SuiteError
from tasks.evaluation.tiers import deciding
from tasks.experiments.tune.config import ScalesConfig


@dataclass(frozen=True)
class Document:
    """What a model is asked, and what it should say."""

    prompt: str
    """Empty where the text itself is what counts."""
    text: str


@dataclass(frozen=True)
class Block:
    """A piece of one document as tokens."""

    ids: tuple[int, ...]
    first: int
    """Of the tokens, the first that is predicted; from here on all are. Of a prompt whose answer is yet to come, the number of tokens."""
    size: float
    """Bytes of text that the predicted tokens stand for."""


@dataclass(frozen=True)
class Blocks:
    """One capability's blocks."""

    train: tuple[Block, ...]
    held_out: tuple[Block, ...]


def documents_of(suite: Suite, data: Path | None) -> dict[str, list[Document]]:
    """Capability to its documents: the text of its held-out loss where the suite has one, else prompts with their right answers.

    Of the tier development alone, which decides. Few-shot examples are left out. Raises SuiteError for what cannot be loaded.
    """
    found: dict[str, list[Document]] = {}
    with tempfile.TemporaryDirectory(prefix="ota-documents-") as cache, quiet(None):
        loaded = load_tasks(suite, data, Path(cache))
        for name in deciding(suite.capabilities, suite.tiers):
            loss = suite.losses.get(name)
            entries = [loss.task] if loss else [entry.task for entry in suite.capabilities[name].tasks]
            tasks = [task for entry in entries if entry in loaded for task in loaded[entry]["tasks"].values()]
            found[name] = [document for task in tasks for one in task.eval_docs if (document := _document(task, one)).text]
    return found


def _document(task: Any, document: Any) -> Document:
    target = task.doc_to_target(document)
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return Document("", str(target))
    if task.OUTPUT_TYPE == "multiple_choice" and isinstance(target, int):
        target = task.doc_to_choice(document)[target]
    if isinstance(target, list):  # several right answers
        target = target[0] if target else ""
    return Document(str(task.doc_to_text(document)), f"{task.config.target_delimiter}{target}")


def blocks_of(
    documents: Mapping[str, Sequence[Document]], tokenizer: Any, config: ScalesConfig, chat: bool = False
) -> dict[str, Blocks]:
    """Every capability's blocks. Whole documents are held out, until their blocks are enough; those after them are learned from.

    chat: whether the suite asks in the form of the model's chat template. Raises SuiteError with all capabilities that have too few documents,
    or where there is no template.
    """
    if chat and not getattr(tokenizer, "chat_template", None):
        raise SuiteError("the suite sets apply_chat_template, but the merged model's tokenizer has no chat template")
    if chat:
        documents = {name: [_in_template(one, tokenizer) for one in some] for name, some in documents.items()}
    found, problems = {}, []
    for name, some in documents.items():
        order = list(some)
        random.Random(f"{config.seed} {name}").shuffle(order)
        cut = (list(_cut(one, tokenizer, config)) for one in order)
        held_out = _take(cut, config.held_out)
        train = _take(cut, config.blocks)
        if not train or not held_out:
            problems.append(
                f"capability '{name}': its {len(order)} documents give {len(held_out)} blocks that are held out and {len(train)} to learn from; "
                "expected documents for both: give more, a smaller held_out, or another suite"
            )
        found[name] = Blocks(train=tuple(train), held_out=tuple(held_out))
    raise_all(problems, SuiteError)
    return found


def _in_template(document: Document, tokenizer: Any) -> Document:
    """A prompt as a user's message, its answer as what the model says then."""
    if not document.prompt:
        return document
    asked = [{"role": "user", "content": document.prompt}]
    prompt = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    return Document(prompt.removeprefix(tokenizer.bos_token or ""), document.text.lstrip(" "))


def _take(documents: Iterator[list[Block]], count: int) -> list[Block]:
    """The first ``count`` blocks; of the document that the last one is from, the rest is dropped."""
    taken: list[Block] = []
    while len(taken) < count and (blocks := next(documents, None)) is not None:
        taken += blocks
    return taken[:count]


def _cut(document: Document, tokenizer: Any, config: ScalesConfig) -> Iterator[Block]:
    """With objective ``kl`` an answer is not looked at: the expert gives its own. An answer that does not fit with its prompt is cut."""
    prompt, text = document.prompt, document.text
    before = _tokens(tokenizer, prompt)
    # As lm-eval has it: together, so that no token is cut where the answer begins.
    ids = _tokens(tokenizer, prompt + text)[len(before) :]
    # What lm-eval puts before a text, so that its first token is predicted, too.
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    start = ([prefix] if prefix is not None else []) + before
    if not ids or (len(start) == 0 and len(ids) < 2):
        return
    size = len(text.encode()) / len(ids)
    if prompt and config.objective == "kl":
        kept = start[-max(config.length - config.answer, 1) :]
        yield Block(tuple(kept), len(kept), 0.0)
        return
    if prompt:
        kept = start[-(config.length - min(len(ids), config.length // 2)) :]
        ids = ids[: config.length - len(kept)]
        yield Block((*kept, *ids), len(kept), size * len(ids))
        return
    room = config.length - len(start)
    for at in range(0, len(ids), room):
        part = ids[at : at + room]
        first = max(len(start), 1)
        if len(start) + len(part) > first:
            yield Block((*start, *part), first, size * (len(start) + len(part) - first))


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
