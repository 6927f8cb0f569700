"""A merged model's folder, opened as whoever uses it will: configuration, names and shapes, tokenizer, chat template. No weight is read.

What the model that its configuration comes from has wrong as well is said, and ends no merge. Code that a model brings along never runs.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ota_core.errors import CheckpointError, raise_all
from ota_core.files.checkpoint import Checkpoint, read_json
from ota_core.files.tokens import added_entries
from tasks.merging.architecture import model_problems

Shapes = Mapping[str, tuple[int, ...]]
SAMPLE = "The quick brown fox: 3.14 jumps\nover 2 lazy dogs."
_SYSTEM, _USER, _ASSISTANT = ({"role": role, "content": "Hello"} for role in ("system", "user", "assistant"))
# Some templates want parts of a message, some no system's, some an answer of the assistant's.
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [_USER], [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}], [_SYSTEM, _USER], [_USER, _ASSISTANT, _USER],
    [_SYSTEM, _USER, _ASSISTANT, _USER], [_USER, _ASSISTANT], [{"role": "user", "content": "Hello", "tool_calls": []}],
]  # fmt: skip
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def opens(folder: Path, source: Path, tensors: Shapes, rows: int | None) -> list[str]:
    """Notes on a folder that is complete but for its weights. Raises CheckpointError for what only the merged folder has wrong.

    source: the folder that configuration and tokenizer come from; tensors: the weights' shapes, by name; rows: of the vocabulary, where one is known.
    """
    if not (folder / "config.json").is_file():
        return []
    notes: list[str] = []
    checks: list[tuple[str, Callable[[Path], list[str]], Callable[[Path], list[str]]]] = [
        ("model", lambda path: model_problems(path, tensors), lambda path: model_problems(path, _shapes(path)))
    ]
    if any((folder / name).is_file() for name in _TOKENIZERS):
        checks.append(
            ("tokenizer", lambda path: _tokenizer_problems(path, rows, notes), lambda path: _tokenizer_problems(path, None, []))
        )
    if "auto_map" in read_json(folder / "config.json"):
        return [
            f"the model brings its own code ({', '.join(_code(folder))}), which was copied and not run: load it with trust_remote_code=True"
        ]
    problems = []
    for what, of_output, of_source in checks:
        found = of_output(folder)
        if not found:
            continue
        known = of_source(source)
        if known:
            notes.append(f"the merged {what} was not checked, because {source} cannot be opened either: {_short(known[0])}")
        else:
            problems += found
    raise_all([f"the merged model would not load: {problem}" for problem in problems], CheckpointError)
    return notes


def _shapes(folder: Path) -> Shapes:
    checkpoint = Checkpoint(folder)
    try:
        return {name: tuple(checkpoint.info(name).shape) for name in checkpoint.names()}
    finally:
        checkpoint.close()


def _code(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.py")) or ["none lies beside the weights"]


def _tokenizer_problems(folder: Path, rows: int | None, notes: list[str]) -> list[str]:
    """What is wrong with a folder's tokenizer and chat template. rows: that token ids must not reach; notes: gain what is doubtful."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers' own code runs here and raises what it likes
        return [f"its tokenizer cannot be opened ({type(error).__name__}: {_short(error)})"]
    problems = []
    try:
        ids = tokenizer(SAMPLE)["input_ids"]
        again = tokenizer(tokenizer.decode(ids, skip_special_tokens=True))["input_ids"]
        if again != ids and tokenizer(tokenizer.decode(again, skip_special_tokens=True))["input_ids"] != again:
            problems.append("its tokenizer does not give the same tokens for what they stand for")
        if rows is not None and max(ids, default=0) >= rows:
            problems.append(f"its tokenizer gives the token {max(ids)}, the vocabulary has {rows} rows")
    except Exception as error:
        problems.append(f"its tokenizer cannot take a text ({type(error).__name__}: {_short(error)})")
    wrong = {
        token: seen
        for token, entry in added_entries(folder).items()
        if (seen := tokenizer.convert_tokens_to_ids(token)) != entry["id"]
    }
    if wrong:
        token, seen = next(iter(wrong.items()))
        problems.append(
            f"its tokenizer has {len(wrong)} added tokens in other rows than its files say, such as {token!r} in row {seen}"
        )
    problems += _template_problems(tokenizer, notes)
    return problems


def _template_problems(tokenizer: Any, notes: list[str]) -> list[str]:
    """A chat template that transformers itself cannot compile. One that takes none of the conversations here may want others: a note."""
    from jinja2 import TemplateSyntaxError

    held = getattr(tokenizer, "chat_template", None) or {}
    for name, template in (held if isinstance(held, dict) else {"": held}).items():
        called = f"its chat template{f' {name!r}' if name else ''}"
        said = ""
        for conversation in CONVERSATIONS:
            try:
                tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False, add_generation_prompt=True)
                break
            except TemplateSyntaxError as error:
                return [f"{called} cannot be read (line {error.lineno}: {_short(error)})"]
            except Exception as error:  # the template's own words, or what it does not find in these conversations
                said = said or f"{type(error).__name__}: {_short(error)}"
        else:
            notes.append(f"{called} can be read, but renders none of {len(CONVERSATIONS)} short conversations ({said})")
    return []


def _short(error: object) -> str:
    return " ".join(str(error).split())[:300]
