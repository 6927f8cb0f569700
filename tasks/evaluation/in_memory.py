"""A loaded model in this process: its weights exchanged in place under the names that its files have, and the threads that it is worth."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self, Unpack

from ota_core.compute.blocks import matrix_shape
from ota_core.compute.stream import Limits
from ota_core.engine import engine
from ota_core.files.checkpoint import Checkpoint
from ota_core.files.place import new_folder
from ota_core.files.rows import Rows
from ota_core.plan.inputs import MergeInputs
from ota_core.recipe.recipe import MergeRecipe
from tasks.evaluation.harness import LoadedModel
from tasks.evaluation.quiet import Progress
from tasks.evaluation.scores import ModelScores
from tasks.evaluation.suites import Suite, SuiteError
from tasks.storage.cache import remove_tree

log = logging.getLogger(__name__)
SHOWN = 3
SMALL_BYTES = 64 * 2**20
"""Weights of a model below which torch computes with one thread: more of them wait for each other longer than they compute."""


class Weights:
    """Takes the rows of a merge in place of what a torch model holds, in the model's own types: what loading their file would leave there.

    ``put`` for every row of every tensor, then ``settle``, make it another model. Tied tensors are one in memory. The model is never copied.
    """

    def __init__(self, module: Any) -> None:
        self._module, self._held = module, dict(module.state_dict())
        # Some rotary embeddings change their buffers with the length of what was read last.
        self._buffers = [
            (one, name, buffer.clone())
            for prefix, one in module.named_modules()
            for name, buffer in one.named_buffers(recurse=False)
            if f"{prefix}.{name}" not in self._held
        ]
        self._lengths = [
            (one, one.max_seq_len_cached) for one in module.modules() if isinstance(getattr(one, "max_seq_len_cached", None), int)
        ]

    def put(self, name: str, start: int, rows: Rows) -> None:
        """Rows of a tensor, (n, C), from ``start`` on; from any thread. What files hold and the model does not, loading leaves out as well."""
        import torch

        held = self._held.get(name)
        if held is not None:
            with torch.no_grad():
                held.view(matrix_shape(held.shape))[start : start + len(rows.held)].copy_(rows.tensor())

    def settle(self) -> None:
        """What no file holds is as it was when the model was loaded."""
        for one, name, buffer in self._buffers:
            one.register_buffer(name, buffer.clone(), persistent=False)
        for one, length in self._lengths:
            one.max_seq_len_cached = length

    def problem(self, folder: Path) -> str | None:
        """Why rows cannot be put under the names of these files, from which the model was just loaded; None where they can.

        A loader may rename, join or turn tensors. Their numbers, which tell their places (``write_holes``), must stand where the file has them.
        """
        import torch

        filled, other = set[int](), list[str]()
        checkpoint = Checkpoint(folder)
        try:
            for name in checkpoint.names():
                if (held := self._held.get(name)) is None:
                    continue
                shape = checkpoint.info(name).shape
                rows = checkpoint.read_rows(name, 0, matrix_shape(shape)[0]).tensor()
                fits = tuple(held.shape) == tuple(shape) and held.is_contiguous()
                if fits and torch.equal(held.view(rows.shape).cpu(), rows.to(held.dtype)):
                    filled.add(held.data_ptr())
                else:
                    other.append(name)
        finally:
            checkpoint.close()
        for name in [name for name in other if self._held[name].data_ptr() in filled]:
            del self._held[name]  # tied to a tensor that the file holds, too: loading takes that one
            other.remove(name)
        other += [name for name, one in self._module.named_parameters(remove_duplicate=False) if one.data_ptr() not in filled]
        return f"transformers does not keep its tensors as the files hold them ({', '.join(other[:SHOWN])})" if other else None


class MergedModel:
    """A suite's tasks and a model in memory, each loaded once, that becomes one merge after another. A context manager.

    The merges are of the same models, to the same type and vocabulary. The scores are those of the folder that a merge would write. ``spare``:
    a folder of the machine's own, for architectures whose weights cannot be exchanged in place; a warning says so.
    """

    def __init__(self, suite: Suite, data_dir: Path | None, device: str, spare: Path) -> None:
        self._load = partial(LoadedModel, suite=suite, data_dir=data_dir, device=device)
        self._suite, self._device, self._spare, self._stack = suite, device, spare / "trial", ExitStack()
        self._weights: Weights | None = None
        self._problem: str | None = None
        if suite.backend.is_server:
            raise SuiteError(
                f"suite {suite.name}: {suite.backend.server} cannot be asked for a merge that is in memory alone; choose by a suite whose backend "
                "loads models, such as hf"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def become(self, recipe: MergeRecipe, inputs: MergeInputs, **limits: Unpack[Limits]) -> None:
        """Hold this merge. After an error it holds no whole one. Raises OtaError."""
        limits["device"] = self._device
        if self._weights is None and self._problem is None:
            with TemporaryDirectory(prefix="ota-trial-") as outline:
                engine.outline_into(Path(outline), recipe, inputs)
                self._open(Path(outline))
                self._problem = self._filled(Path(outline))
            if self._problem:
                log.warning("%s: every trial is merged to a folder and loaded from there", self._problem)
        if self._weights is not None and self._problem is None:
            engine.merge_into_memory(recipe, inputs, self._weights.put, **limits)
            self._weights.settle()
            return
        if self._spare.exists():  # of a trial that was killed
            remove_tree(self._spare)
        with new_folder(self._spare, overwrite=False) as folder:
            engine.merge_into(folder, recipe, inputs, **limits)
            self._open(folder)
        remove_tree(self._spare)

    def score(self, limit: int | None = None, progress: Progress | None = None) -> ModelScores:
        """The scores of the merge that it holds; ``limit`` overrides the suite's."""
        return self.loaded.score(limit, progress)

    def _filled(self, outline: Path) -> str | None:
        """Why the loaded model cannot take rows in place; None where it can, or there is nothing to load."""
        import torch

        module = self.loaded.module
        if module is not None and not isinstance(module, torch.nn.Module):
            return f"the backend {self._suite.backend.name} keeps its weights to itself"
        self._weights = Weights(module) if module is not None else None
        return self._weights.problem(outline) if self._weights else None

    def _open(self, folder: Path) -> None:
        self._stack.close()
        self.loaded = self._stack.enter_context(self._load(folder))


@contextmanager
def few_threads(model: Path) -> Iterator[None]:
    """One thread for torch while small models like the one in this folder are merged and scored, as many as before afterwards."""
    import torch

    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    before = torch.get_num_threads()
    if 0 < size < SMALL_BYTES:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
