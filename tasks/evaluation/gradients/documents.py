"""Texts as blocks of tokens: what losses and their gradients are taken of."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.evaluation.harness_tasks import load_tasks
from tasks.evaluation.quiet import quiet
from tasks.evaluation.suites import Suite, SuiteError
from tasks.evaluation.tiers import deciding


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


def in_template(document: Document, tokenizer: Any) -> Document:
    """A prompt as a user's message, its answer as what the model says then. Raises SuiteError where the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise SuiteError("the suite sets apply_chat_template, but the model's tokenizer has no chat template")
    if not document.prompt:
        return document
    asked = [{"role": "user", "content": document.prompt}]
    prompt = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    return Document(prompt.removeprefix(tokenizer.bos_token or ""), document.text.lstrip(" "))


def cut(document: Document, tokenizer: Any, length: int, *, answer: int | None = None) -> Iterator[Block]:
    """The document in blocks of at most ``length`` tokens. An answer that does not fit with its prompt is cut, after its prompt's beginning.

    answer: leave the document's own out, and so many tokens of room for one that is yet to come.
    """
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
    if prompt and answer is not None:
        kept = start[-max(length - answer, 1) :]
        yield Block(tuple(kept), len(kept), 0.0)
        return
    if prompt:
        kept = start[-(length - min(len(ids), length // 2)) :]
        ids = ids[: length - len(kept)]
        yield Block((*kept, *ids), len(kept), size * len(ids))
        return
    room = length - len(start)
    for at in range(0, len(ids), room):
        part = ids[at : at + room]
        first = max(len(start), 1)
        if len(start) + len(part) > first:
            yield Block((*start, *part), first, size * (len(start) + len(part) - first))


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
