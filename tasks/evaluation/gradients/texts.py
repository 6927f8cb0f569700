"""Texts to take gradients on: JSON lines as trainers take them, plain text, a suite's documents, or random tokens."""

import json
import random
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ota_core.errors import OtaError
from ota_core.recipe.estimate import EstimateSettings
from tasks.evaluation.gradients.documents import Block, Document, cut, documents_of, in_template
from tasks.evaluation.suites import Suite

ANSWERS = ("answer", "response")
"""Other names of a completion, which a space parts from its prompt where neither has one."""
FORMS = "text; messages, the last of them the assistant's; or prompt and completion (or answer, or response)"


class TextError(OtaError):
    """Texts that are missing, malformed or too few."""


def file_blocks(path: Path, tokenizer: Any, settings: EstimateSettings, length: int) -> list[Block]:
    """``settings.samples`` blocks of at most ``length`` tokens from a file, which ones is decided by the seed. Raises TextError.

    Of JSON lines each that is drawn gives one block, its beginning; of plain text every piece of ``length`` tokens counts as a document.
    """
    blocks = _of_lines(path, tokenizer, settings, length) if _is_json(path) else _of_text(path, tokenizer, settings, length)
    return _enough(blocks, settings.samples, f"{path}")


def suite_blocks(
    suite: Suite, data: Path | None, capability: str | None, tokenizer: Any, settings: EstimateSettings, length: int
) -> list[Block]:
    """The same of one capability's documents in a suite; without one, of all that count for its average. Raises OtaError."""
    found = documents_of(suite, data)
    if capability is not None and capability not in found:
        raise TextError(f"suite {suite.name} has no capability '{capability}'; expected one of {', '.join(found)}")
    documents = [one for name, some in found.items() if capability in {None, name} for one in some]
    if suite.apply_chat_template is True:
        documents = [in_template(one, tokenizer) for one in documents]
    random.Random(settings.seed).shuffle(documents)
    blocks = (block for one in documents if (block := _first(one, tokenizer, length, end=True)) is not None)
    return _enough(blocks, settings.samples, f"suite {suite.name}" + (f", capability '{capability}'" if capability else ""))


def random_blocks(vocabulary: int, settings: EstimateSettings, length: int) -> list[Block]:
    """Blocks of ``length`` tokens, each drawn from the whole vocabulary; all but the first are predicted."""
    rng = random.Random(settings.seed)
    return [Block(tuple(rng.randrange(vocabulary) for _ in range(length)), 1, 0.0) for _ in range(settings.samples)]


def _enough(blocks: Iterator[Block], samples: int, where: str) -> list[Block]:
    taken = [block for block, _ in zip(blocks, range(samples), strict=False)]
    if len(taken) < samples:
        raise TextError(
            f"{where} gives {len(taken)} documents, {samples} are asked for (samples); give more texts, or ask for fewer"
        )
    return taken


def _first(document: Document, tokenizer: Any, length: int, *, end: bool) -> Block | None:
    """A document's first block; with ``end`` the token that ends a text follows on it, as in training."""
    if end and tokenizer.eos_token and not document.text.endswith(tokenizer.eos_token):
        document = Document(document.prompt, document.text + tokenizer.eos_token)
    return next(cut(document, tokenizer, length), None)


def _is_json(path: Path) -> bool:
    try:
        with open(path, "rb") as stream:
            first = next((line.strip() for line in stream if line.strip()), b"")
    except OSError as error:
        raise TextError(f"{path} cannot be read ({error.strerror}); expected a file of texts") from None
    return path.suffix in {".jsonl", ".json", ".ndjson"} or first.startswith(b"{")


def _of_lines(path: Path, tokenizer: Any, settings: EstimateSettings, length: int) -> Iterator[Block]:
    """Lines are looked up as they are drawn: of a large file only their places are in memory."""
    starts = array("Q", [0])
    with open(path, "rb") as stream:
        for line in stream:
            starts.append(starts[-1] + len(line))
        order = list(range(len(starts) - 1))
        random.Random(settings.seed).shuffle(order)
        for number in order:
            stream.seek(starts[number])
            line = stream.readline().strip()
            if line:
                document, end = _document(line, f"{path}, line {number + 1}", tokenizer)
                if (block := _first(document, tokenizer, length, end=end)) is not None:
                    yield block


def _of_text(path: Path, tokenizer: Any, settings: EstimateSettings, length: int) -> Iterator[Block]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is no text in UTF-8 ({error}); expected JSON lines or plain text") from None
    blocks = list(cut(Document("", text), tokenizer, length))
    random.Random(settings.seed).shuffle(blocks)
    return iter(blocks)


def _document(line: bytes, where: str, tokenizer: Any) -> tuple[Document, bool]:
    """(What a line asks and says, whether the token that ends a text is still to follow)."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TextError(f"{where} is no JSON ({error}); expected one object a line with {FORMS}") from None
    if not isinstance(row, Mapping):
        raise TextError(f"{where} holds a JSON {type(row).__name__}; expected an object with {FORMS}")
    key = next((key for key in ("completion", *ANSWERS) if key in row), None)
    prompt, said = row.get("prompt"), row.get(key) if key else None
    if "messages" in row:
        return _conversation(row["messages"], where, tokenizer), False
    if isinstance(prompt, list) and isinstance(said, list):
        return _conversation([*prompt, *said], where, tokenizer), False
    if isinstance(prompt, str) and isinstance(said, str):
        apart = key in ANSWERS and prompt and said and not (prompt[-1].isspace() or said[0].isspace())
        return Document(prompt, f"{' ' if apart else ''}{said}"), True
    if isinstance(row.get("text"), str):
        return Document("", row["text"]), True
    raise TextError(f"{where} has the keys {', '.join(map(str, row)) or 'none'}; expected {FORMS}")


def _conversation(messages: Any, where: str, tokenizer: Any) -> Document:
    """What the assistant says last as the answer to all before it, in the form of the tokenizer's chat template. Raises TextError."""
    if not getattr(tokenizer, "chat_template", None):
        raise TextError(
            f"{where} holds messages, but the model's tokenizer has no chat template; give text, or prompt and completion"
        )
    fits = (
        isinstance(messages, list) and len(messages) > 1 and all(isinstance(one, Mapping) and "role" in one for one in messages)
    )
    if not fits or messages[-1]["role"] != "assistant":
        raise TextError(f"{where}: expected messages of which the last is the assistant's, each with role and content")
    try:
        before = str(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True))
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates raise what they like
        raise TextError(f"{where}: the model's chat template refuses these messages: {error}") from error
    if not whole.startswith(before):
        raise TextError(
            f"{where}: in the model's chat template the answer does not follow on its prompt, so that its tokens cannot be told; give prompt and completion"
        )
    bos = tokenizer.bos_token or ""
    return Document(before.removeprefix(bos), whole[len(before) :])
