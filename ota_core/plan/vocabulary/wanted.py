"""What a recipe says of single tokens and of padding (``tokenizer``), with the models that it names: which rows a model takes from elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ota_core.errors import CheckpointError, raise_all
from ota_core.files.tokens import added_entries
from ota_core.plan.vocabulary.filled import Fill
from ota_core.recipe.checks import position_of
from ota_core.recipe.recipe import MergeRecipe
from ota_core.recipe.tokenizer import TokenRow, TokenSource

SHOWN = 4
Models = Sequence[tuple[str, Path, int]]
"""(Name, folder, rows of the embedding) of each model, base first."""
Maps = Sequence[NDArray[np.int64] | None]


@dataclass(kw_only=True)
class Wanted:
    """``tokens`` and ``pad_to_multiple_of`` of a recipe."""

    tokens: Mapping[str, TokenRow]
    donors: Mapping[str, int]
    """Token → the position of the model that its entry names."""
    multiple: int | None

    @classmethod
    def of(cls, recipe: MergeRecipe) -> "Wanted | None":
        """What the recipe says; None where it says nothing of the kind."""
        block = recipe.tokenizer
        if block is None:
            return None
        known = [("base", recipe.base_model), *((entry.name, entry.model) for entry in recipe.models)]
        offset = 0 if recipe.base_model is not None else 1
        found = {token: position_of(row.model, known) for token, row in (block.tokens or {}).items() if row.model is not None}
        return cls(
            tokens=block.tokens or {},
            donors={token: place - offset for token, place in found.items() if place is not None},
            multiple=block.pad_to_multiple_of,
        )

    def new_entries(self, folders: Sequence[Path], target: Mapping[str, int]) -> list[dict[str, Any]]:
        """Entries of added tokens for those that the output's tokenizer does not have, with rows behind its last: as a model has them, else plain."""
        new = [token for token in self.tokens if token not in target]
        entries = [added_entries(folder) for folder in folders] if new else []
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
        row = max(target.values(), default=-1) + 1
        return [
            {**next((one[token] for one in entries if token in one), {"content": token, **plain}), "id": row + i}
            for i, token in enumerate(new)
        ]

    def fills(
        self, target: Mapping[str, int], tables: Sequence[Mapping[str, int]], models: Models, maps: Maps, with_base: bool
    ) -> tuple[tuple[dict[int, Fill], ...], tuple[str, ...]]:
        """For each model the rows of the output that it takes from elsewhere, and what is to be said. target: token to row of the output.

        A token that the recipe does not name is the base's where the base has it, else the mean of those that have it, else zeros. Raises
        CheckpointError for all rows that are not there.
        """
        found: tuple[dict[int, Fill], ...] = tuple({} for _ in models)
        unused, nowhere, problems = [], [], list[str]()
        for token, row in target.items():
            own = [row if rows is None else int(rows[row]) for rows in maps]
            lacking = [m for m, place in enumerate(own) if place < 0]
            said = self.tokens.get(token)
            if not lacking and not (said and said.force):
                unused += [token] if said and said.source is not None else []
                continue
            if said is not None and said.source is not None:
                fill = self._named(token, said, own, tables, models, problems)
            else:
                having = [(m, place) for m, place in enumerate(own) if place >= 0]
                nowhere += [] if having else [token]
                fill = tuple(having[:1] if with_base and own[0] >= 0 else having)
            for m in range(len(models)) if said and said.force else lacking:
                found[m][row] = fill
        raise_all(problems, CheckpointError)
        notes = []
        if unused:
            notes.append(
                f"tokenizer.tokens: every model has {_shown(unused)}, so that no source is needed; force: true takes it all the same"
            )
        if nowhere:
            notes.append(f"no model has a row for {_shown(nowhere)}: zeros; a source in tokenizer.tokens gives another")
        return found, tuple(notes)

    def _named(
        self,
        token: str,
        said: TokenRow,
        own: Sequence[int],
        tables: Sequence[Mapping[str, int]],
        models: Models,
        problems: list[str],
    ) -> Fill:
        """The row that the recipe names for a token."""
        source = said.source
        if isinstance(source, TokenSource) and source.kind == "zero":
            return ()
        donor = self.donors[token]
        name, _, rows = models[donor]
        if not isinstance(source, TokenSource):
            if own[donor] < 0:
                problems.append(
                    f"tokenizer.tokens: {token!r} takes its row from {name}, which has no such token; name a model that has it, or another token of "
                    "it: {kind: model_token, model: …, token: …}"
                )
            return ((donor, own[donor]),)
        place = source.token_id if source.token is None else tables[donor].get(source.token)
        if place is None or place >= rows:
            what = f"row {source.token_id}" if source.token is None else f"token {source.token!r}"
            problems.append(f"tokenizer.tokens: {token!r} takes its row from {what} of {name}, which is not there ({rows} rows)")
        return ((donor, place or 0),)


def _shown(tokens: Sequence[str]) -> str:
    return ", ".join(repr(token) for token in tokens[:SHOWN]) + (
        f" and {len(tokens) - SHOWN} more" if len(tokens) > SHOWN else ""
    )
