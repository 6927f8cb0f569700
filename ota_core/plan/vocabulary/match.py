"""Vocabularies that differ: embedding rows are matched by token, never by row number (docs/methods.md section 4).

The rows of θ and of v go through the same map, so that curvature stays with its token.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ota_core.errors import CheckpointError
from ota_core.files.architecture import is_vocabulary, tied_names
from ota_core.files.byte_source import SourceOf
from ota_core.files.checkpoint import Checkpoint, adapter_of, weight_files
from ota_core.files.safetensors_io import FORMAT_KEY, SafetensorsFile
from ota_core.files.tokens import added_entries, tokens_of
from ota_core.plan.vocabulary.filled import Fill, Filled, Reads
from ota_core.plan.vocabulary.wanted import Wanted
from ota_core.reading import quoted


def is_vocabulary_tensor(name: str) -> bool:
    """Whether the rows of this tensor stand for tokens."""
    return is_vocabulary(name)


def tied_tensors(checkpoint: Checkpoint) -> dict[str, str]:
    """Alias to the tensor it is tied to, by the configuration and what is known of its class (``files/architecture.py``)."""
    return tied_names(checkpoint.config, checkpoint.names())


def tensor_names(checkpoint: Checkpoint) -> frozenset[str]:
    """The names of the weights, and those of what is tied to them: what second moments of this checkpoint may be called."""
    return frozenset(checkpoint.names()) | tied_tensors(checkpoint).keys()


def names_in(folder: Path, source_of: SourceOf | None = None) -> frozenset[str] | None:
    """The same of the weights in a folder, None where it holds none. Raises CheckpointError for damaged ones."""
    try:
        weight_files(folder)
    except CheckpointError:
        return None
    if adapter_of(folder) is not None:
        return None
    with closing(Checkpoint(folder, source_of)) as checkpoint:
        # A folder may hold nothing but a file that this project wrote, of second moments or masks.
        ours = any(isinstance(file, SafetensorsFile) and FORMAT_KEY in file.metadata for file in checkpoint.files)
        return None if ours else tensor_names(checkpoint)


SPARE = 2**16
"""Rows that tokens may lie behind those of the embeddings: some tokenizers have tokens without a row."""


@dataclass(frozen=True)
class Vocabulary:
    """The output's rows, and where each model holds them."""

    rows: int
    maps: tuple[NDArray[np.int64] | None, ...]
    """For each model, base first: int64 (rows,) with the model's row for each output row, −1 where it lacks the token; None for the identity."""
    source: int
    """The model (by position, base first) whose tokenizer files the output takes."""
    added: tuple[dict[str, Any], ...] = ()
    """With ``union``: entries to append to the source's added tokens."""
    brought: tuple[int, ...] = ()
    """With ``union``: the models (by position) that brought those."""
    dropped: tuple[Mapping[str, int], ...] = ()
    """For each model, base first: its own tokens that the output lacks, with their rows in the model."""
    fills: tuple[Mapping[int, Fill], ...] = ()
    """For each model, base first: the output's rows that it takes from elsewhere. Empty: none."""
    padding: int | None = None
    """The first row that no token has, where those are the mean of all others; None: there are no such rows."""
    notes: tuple[str, ...] = ()

    def filled(self, model: int, models: Sequence[Reads]) -> Filled | None:
        """What of a model's vocabulary (by position) is not its own; None where all is."""
        given = self.fills[model] if self.fills else {}
        if not given and self.padding is None:
            return None
        return Filled(given=given, padding=self.rows if self.padding is None else self.padding, models=models)


def match(
    models: Sequence[tuple[str, Path, int]], source: str | int, wanted: Wanted | None = None, *, with_base: bool = False
) -> Vocabulary | None:
    """How the vocabularies fit. models: (name, folder, rows of the embedding), base first. source: position, or ``union``.

    wanted: what the recipe says of single tokens and of padding; with_base: whether the first model is the base, whose rows stand in first
    for tokens that others lack. None when all agree row by row. Raises CheckpointError, with all problems, when rows differ and a tokenizer
    that would say why is missing, and for tokens that are not where they are to come from.
    """
    tables = [tokens_of(folder) for _, folder, _ in models]
    first = 0 if source == "union" else int(source)
    same_rows = len({rows for _, _, rows in models}) == 1
    known = [table for table in tables if table is not None]
    if same_rows and all(table == known[0] for table in known):
        if wanted is None:
            return None if first == 0 else Vocabulary(models[0][2], (None,) * len(models), first)
        tables = [known[0] if known else None] * len(models)
    if wanted is not None and not known:
        raise CheckpointError(
            "tokenizer: no model has a tokenizer, which says what row a token has; put its files beside the weights"
        )
    without = [name for (name, _, _), table in zip(models, tables, strict=True) if table is None]
    if without:
        raise CheckpointError(
            f"the vocabularies differ ({', '.join(f'{name}: {rows} rows' for name, _, rows in models)}) and no tokenizer says which row is "
            f"which token in: {', '.join(without)}. Put the tokenizer files beside the weights"
        )
    target = dict(tables[first] or {})
    count = models[first][2]
    added: list[dict[str, Any]] = []
    brought: list[int] = []
    if source == "union":
        added, brought = _extra_tokens(models, tables, target)
        for entry in added:
            target[entry["content"]] = entry["id"]
        count = max(count, max(target.values(), default=-1) + 1)
        _check_rows(target, models)
    padding = None
    if wanted is not None:
        _check_rows(target, models)
        for entry in wanted.new_entries([folder for _, folder, _ in models], target):
            target[entry["content"]] = entry["id"]
            added.append(entry)
        last = max(target.values(), default=-1) + 1
        count, padding = (
            (max(count, last), None) if wanted.multiple is None else (-(-last // wanted.multiple) * wanted.multiple, last)
        )
    token_at = {row: token for token, row in target.items()}
    maps = tuple(_row_map(count, token_at, table or {}, model[2], padding) for table, model in zip(tables, models, strict=True))
    fills, notes = wanted.fills(target, [table or {} for table in tables], models, maps, with_base) if wanted else ((), ())
    return Vocabulary(
        count,
        maps,
        first,
        tuple(added),
        tuple(brought),
        tuple(
            {token: row for token, row in (table or {}).items() if token not in target and row < rows}
            for table, (_, _, rows) in zip(tables, models, strict=True)
        ),
        fills,
        padding,
        notes,
    )


def _check_rows(target: Mapping[str, int], models: Sequence[tuple[str, Path, int]]) -> None:
    """Raise CheckpointError where a token of the output lies far behind all rows that the models have."""
    token = max(target, key=lambda one: target[one], default="")
    most = sum(rows for _, _, rows in models)
    if target.get(token, 0) >= most + SPARE:
        raise CheckpointError(
            f"tokenizer_source: token {quoted(token)} has the row {target[token]}, and the models' embeddings have {most} rows together: "
            "the tokenizer is not of these weights; fetch it again"
        )


def _row_map(
    count: int, token_at: dict[int, str], table: dict[str, int], rows: int, padding: int | None = None
) -> NDArray[np.int64] | None:
    """padding: from which row on no row is anybody's own."""
    taken = set(table.values())
    result = []
    for row in range(count):
        token = token_at.get(row)
        behind = row if row not in taken and padding is None else -1  # rows behind the last token match each other
        place = behind if token is None else table.get(token, -1)
        result.append(place if place < rows else -1)
    return None if result == list(range(rows)) else np.array(result, np.int64)


def _extra_tokens(
    models: Sequence[tuple[str, Path, int]], tables: Sequence[dict[str, int] | None], target: dict[str, int]
) -> tuple[list[dict[str, Any]], list[int]]:
    """Added-token entries for what later models know and the first does not, in their order, with new rows behind the first's last token.

    And the positions of the models that brought any.
    """
    extra: dict[str, dict[str, Any]] = {}
    brought = []
    row = max(target.values(), default=-1) + 1
    for i, ((name, folder, _), table) in enumerate(zip(models, tables, strict=True)):
        missing = sorted((set(table or {}) - set(target) - set(extra)), key=lambda token: (table or {})[token])
        entries = added_entries(folder) if missing else {}
        brought += [i] if missing else []
        for token in missing:
            if token not in entries:
                raise CheckpointError(
                    f"tokenizer_source union: token {token!r} of {name} is part of its tokenizer's own model, not an added token; "
                    "it cannot be joined to another tokenizer. Choose base or model:<name>"
                )
            extra[token] = {**entries[token], "id": row}
            row += 1
    return list(extra.values()), brought
