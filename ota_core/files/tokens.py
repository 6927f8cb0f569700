"""Which row of an embedding stands for which token, from the tokenizer files of a folder: fast tokenizers, and the slow ones before them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ota_core.errors import CheckpointError
from ota_core.files.checkpoint import read_json
from ota_core.reading import MAX_ROWS, check_regular, quoted, read_file

# SentencePiece models whose pieces are rows as they stand. sentencepiece.bpe.model is not among them: its classes shift the rows.
_PIECES = ("tokenizer.model", "spiece.model")


def tokens_of(folder: Path) -> dict[str, int] | None:
    """Token to row; None where the folder holds no tokenizer that can be read as a table.

    From ``tokenizer.json``, else ``vocab.json``, ``vocab.txt`` or a SentencePiece model; with the tokens that ``added_tokens.json`` and
    ``tokenizer_config.json`` add. Raises CheckpointError for damaged files.
    """
    try:
        table = _own_table(folder)
        if table is None:
            return None
        taken = set(table.values())
        for token, entry in _added(folder).items():
            if token not in table and entry["id"] not in taken:
                table[token] = entry["id"]
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{folder}: its tokenizer's files have another form than a table of tokens ({type(error).__name__}: {str(error)[:200]}); fetch or save "
            "them again"
        ) from None
    for token, row in table.items():
        if not isinstance(token, str) or type(row) is not int or not 0 <= row < MAX_ROWS:
            raise CheckpointError(
                f"{folder}: the tokenizer gives the token {quoted(token)} the row {quoted(row)}, expected a number below {MAX_ROWS}; fetch it again"
            )
    return table


def added_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """The tokens that a tokenizer has beside its own model's: token to its entry, as ``added_tokens`` of a tokenizer.json has it."""
    found = _added(folder)
    if (folder / "tokenizer.json").exists():
        found |= {entry["content"]: dict(entry) for entry in read_json(folder / "tokenizer.json").get("added_tokens", [])}
    return found


def add_tokens(folder: Path, added: Sequence[dict[str, Any]]) -> None:
    """Append entries to the added tokens of copied tokenizer files, in each place where the files keep them."""
    file = folder / "tokenizer.json"
    if file.exists():
        tokenizer = read_json(file)
        tokenizer["added_tokens"] = [*tokenizer.get("added_tokens", []), *added]
        file.write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2), encoding="utf-8")
    file = folder / "added_tokens.json"
    if file.exists() or not (folder / "tokenizer.json").exists():
        known = read_json(file) if file.exists() else {}
        known |= {entry["content"]: entry["id"] for entry in added}
        file.write_text(json.dumps(known, ensure_ascii=False, indent=2), encoding="utf-8")
    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.exists() else {}
    if isinstance(settings.get("added_tokens_decoder"), dict):
        for entry in added:
            settings["added_tokens_decoder"][str(entry["id"])] = {key: value for key, value in entry.items() if key != "id"}
        file.write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")


def _own_table(folder: Path) -> dict[str, int] | None:
    if (folder / "tokenizer.json").exists():
        tokenizer = read_json(folder / "tokenizer.json")
        table = _model_vocabulary(tokenizer.get("model", {}))
        table.update({entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", [])})
        return table
    if (folder / "vocab.json").exists():
        return dict(read_json(folder / "vocab.json"))
    if (folder / "vocab.txt").exists():
        lines = read_file(folder / "vocab.txt").decode("utf-8").split("\n")
        return {line.rstrip("\r"): row for row, line in enumerate(lines) if line or row < len(lines) - 1}
    return next((_pieces(folder / name) for name in _PIECES if (folder / name).exists()), None)


def _model_vocabulary(model: dict[str, Any]) -> dict[str, int]:
    vocabulary = model.get("vocab", {})
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score, in row order
        return {entry[0]: row for row, entry in enumerate(vocabulary)}
    return dict(vocabulary)


def _pieces(file: Path) -> dict[str, int] | None:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise CheckpointError(
            f"{file}: which row is which token is said by a SentencePiece model, which takes the package sentencepiece to read: install it, or save the "
            "tokenizer again with a tokenizer.json"
        ) from None
    try:
        check_regular(file)
        model = SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        if _is_sentencepiece(file):
            raise CheckpointError(f"{file} is no readable SentencePiece model ({error}); fetch it again") from None
        return None  # another format under the same name, such as tekken's or a table of tiktoken
    return {model.id_to_piece(row): row for row in range(model.get_piece_size())}


def _is_sentencepiece(file: Path) -> bool:
    """The first field of a model is its first piece: a length-delimited field with the number 1."""
    return read_file(file)[:1] == b"\n"


def _added(folder: Path) -> dict[str, dict[str, Any]]:
    """What ``tokenizer_config.json``, and before it ``added_tokens.json``, say of added tokens."""
    special: set[str] = set()
    if (folder / "special_tokens_map.json").exists():
        for value in read_json(folder / "special_tokens_map.json").values():
            for one in value if isinstance(value, list) else [value]:
                special.add(one["content"] if isinstance(one, dict) else str(one))
    found: dict[str, dict[str, Any]] = {}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    if (folder / "added_tokens.json").exists():
        for token, row in read_json(folder / "added_tokens.json").items():
            found[token] = {"id": int(row), "content": token, **plain, "special": token in special}
    if (folder / "tokenizer_config.json").exists():
        decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
        for row, entry in (decoder if isinstance(decoder, dict) else {}).items():
            if isinstance(entry, dict) and "content" in entry:
                found[entry["content"]] = {"id": int(row), **plain, **{k: v for k, v in entry.items() if k != "__type"}}
    return found
