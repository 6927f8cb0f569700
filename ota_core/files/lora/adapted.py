"""A base with an adapter on it, as the tensors of one model: every row is made when it is read, and nothing is kept on the disk."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from copy import copy
from math import prod
from pathlib import Path
from threading import Lock
from typing import Self

import numpy as np

from ota_core.compute.blocks import matrix_shape
from ota_core.errors import CheckpointError
from ota_core.files.byte_source import SourceOf
from ota_core.files.checkpoint import Checkpoint, open_weights, weight_files
from ota_core.files.layouts.relaid import RelaidWeights
from ota_core.files.lora.config import read_config
from ota_core.files.lora.edits import Edit, Factors, LowRank, Numbers
from ota_core.files.lora.find_edits import find_edits
from ota_core.files.lora.tensors import numbers, sorted_tensors
from ota_core.files.rows import F32, F64, Dtype, Rows
from ota_core.files.safetensors_io import TensorInfo

# Bytes of factors that are kept as numbers; those that are read now stay whatever their size.
_KEPT = 64 * 2**20


class AdaptedCheckpoint(Checkpoint):
    """The tensors of a base with a LoRA adapter on it. What the adapter edits is float32, float64 where the base is: W + s·B·A is made in
    float64 and rounded once. Raises CheckpointError for an adapter that is no LoRA, or does not fit the base."""

    def __init__(self, base: Checkpoint, folder: Path, source_of: SourceOf | None = None) -> None:
        """``base`` is closed with this one. ``source_of`` as for ``Checkpoint``, of the adapter's file."""
        self.base, self.path, self.sharded = base, folder, False
        self.adapter = read_config(folder)
        self._file = open_weights(weight_files(folder)[0], source_of)
        self.files = [*base.files, self._file]
        try:
            found = find_edits(self.adapter, sorted_tensors(self._file), base)
            self._edits, self._whole = found.edits, found.whole
            self._drop_tied_head()
        except BaseException:
            self._file.close()
            raise
        self._infos = {name: self._edited_info(name) for name in self._edits}
        self._factors = _Kept()
        for edit in (one for edits in self._edits.values() for one in edits):
            if isinstance(edit, LowRank):
                edit.factors = self._factors.keeping(edit.factors)
        self.quantised = base.quantised
        self.folders, self.known_as = (folder, *base.folders), base.known_as
        self.config, self.notes = dict(base.config), list(base.notes)
        self._note_base()

    def names(self) -> list[str]:
        return sorted({*self.base.names(), *self._whole})

    def names_by_place(self) -> list[str]:
        return [*self.base.names_by_place(), *(name for name in self._whole if name not in self.base)]

    def rename(self, names: Mapping[str, str]) -> None:
        self.base.rename({old: new for old, new in names.items() if old in self.base})
        self._whole = {names.get(name, name): stored for name, stored in self._whole.items()}
        self._edits = {names.get(name, name): edits for name, edits in self._edits.items()}
        self._infos = {names.get(name, name): info for name, info in self._infos.items()}

    def leave_aside(self, names: Collection[str]) -> None:
        self.base.leave_aside(names)
        self._whole = {name: stored for name, stored in self._whole.items() if name not in names}
        self._edits = {name: edits for name, edits in self._edits.items() if name not in names}

    def as_it_is(self) -> Self:
        found = copy(self)
        found.base = self.base.as_it_is()
        return found

    def replace(self, names: Collection[str], made: RelaidWeights) -> None:
        """The new tensors hold the edits of those whose place they take."""
        self.leave_aside(names)
        self.base.replace((), made)

    def __contains__(self, name: str) -> bool:
        return name in self.base or name in self._whole

    def info(self, name: str) -> TensorInfo:
        if name in self._infos:
            return self._infos[name]
        return self._below_info(name)

    def kept_dtype(self, name: str) -> Dtype:
        return self.base.kept_dtype(name) if name in self.base else self._below_info(name).dtype

    def read_rows(self, name: str, start: int, stop: int) -> Rows:
        edits = self._edits.get(name)
        if edits is None:
            return self._below(name, start, stop)
        dtype = self._infos[name].dtype
        return Rows(dtype, self._edited(name, edits, start, stop, dtype.held))

    def prefetch(self, name: str, start: int, stop: int) -> None:
        if name in self._whole:
            self._file.prefetch(self._whole[name], start, stop)
        else:
            self.base.prefetch(name, start, stop)

    def drop_pages(self) -> None:
        self.base.drop_pages()
        self._file.drop_pages()

    def close(self) -> None:
        self._file.close()
        self.base.close()

    def _edited(self, name: str, edits: list[Edit], start: int, stop: int, held: type) -> Numbers:
        *before, last = edits
        if not before:
            return last.rows(lambda a, b: numbers(self._below(name, a, b)).held, start, stop, held)
        return last.rows(lambda a, b: self._edited(name, before, a, b, held), start, stop, held)

    def _below(self, name: str, start: int, stop: int) -> Rows:
        stored = self._whole.get(name)
        return self.base.read_rows(name, start, stop) if stored is None else self._file.read_rows(stored, start, stop)

    def _below_info(self, name: str) -> TensorInfo:
        stored = self._whole.get(name)
        return self.base.info(name) if stored is None else self._file.infos[stored]

    def _edited_info(self, name: str) -> TensorInfo:
        below = self._below_info(name)
        if not below.dtype.is_floating_point:
            raise CheckpointError(
                f"{self.path} edits '{name}', which its base {self.base.path} holds as {below.dtype}: quantised weights cannot be edited. "
                "Name the base in bfloat16 or float32, in models as base+adapter or as base_model"
            )
        dtype = F64 if below.dtype == F64 else F32
        return TensorInfo(name, dtype, below.shape, 0, prod(below.shape) * dtype.itemsize)

    def _drop_tied_head(self) -> None:
        """A head that was saved beside the embedding it is tied to says nothing new, or is another model than the base."""
        heads = [name for name in self._whole if name.endswith(("lm_head.weight", "embed_out.weight")) and name not in self.base]
        if not heads or not self.base.config.get("tie_word_embeddings"):
            return
        embedding = next(
            (name for name in self.base.names() if name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight"))), None
        )
        for head in heads:
            if embedding is None or embedding in self._edits or not self._equal(head, embedding):
                raise CheckpointError(
                    f"{self.path} trains {head} apart from the embedding, to which its base {self.base.path} ties it; a tied model cannot hold "
                    "both. Merge the adapter with PEFT, save the model with tie_word_embeddings: false, and name that"
                )
            del self._whole[head]

    def _equal(self, head: str, embedding: str) -> bool:
        if self._below_info(head).shape != self._below_info(embedding).shape:
            return False
        rows, cols = matrix_shape(self._below_info(head).shape)
        step = max(1, 2**20 // max(1, cols))
        return all(
            np.array_equal(
                self._below(head, a, min(a + step, rows)).to_float32(),
                self._below(embedding, a, min(a + step, rows)).to_float32(),
            )
            for a in range(0, rows, step)
        )

    def _note_base(self) -> None:
        said = self.adapter.base
        if said is None:
            return
        known = {str(self.base.config.get("_name_or_path") or ""), str(self.base.path), *self.base.known_as}
        if _last(said) not in {_last(one) for one in known if one}:
            self.notes.append(
                f"the adapter {self.path} says that it was trained on {said}; it is applied to {self.base.path}, whose tensors have the same "
                "names and shapes"
            )


def _last(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].split("@")[0].lower()


class _Kept:
    """Factors as numbers, those used last: the blocks of a tensor come one after another, in several threads."""

    def __init__(self) -> None:
        self._held: OrderedDict[int, Factors] = OrderedDict()
        self._lock = Lock()

    def keeping(self, read: Callable[[], Factors]) -> Callable[[], Factors]:
        key = id(read)

        def kept() -> Factors:
            with self._lock:
                if key in self._held:
                    self._held.move_to_end(key)
                    return self._held[key]
                found = self._held[key] = read()
                while len(self._held) > 1 and sum(a.nbytes + b.nbytes for a, b in self._held.values()) > _KEPT:
                    self._held.popitem(last=False)
                return found

        return kept
