"""Second moments from a torch optimizer's state, as the Hugging Face Trainer leaves it in ``optimizer.pt``.

The file numbers the parameters. The numbers follow the optimizer's own group order: the Trainer's optimizer holds the decayed
parameters first, then the rest, each in the model's parameter order (transformers ``Trainer.create_optimizer``).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ota_core.errors import MomentsError, OtaError
from ota_core.files.byte_source import SourceOf
from ota_core.files.torch_file import TorchFile
from ota_core.moments.base import Moments
from ota_core.moments.check import checked
from ota_core.moments.match import Layout, match_names
from ota_core.moments.safetensors_file import DROP_BYTES, as_beta2, as_step

V = "exp_avg_sq"


class TrainerMoments(Moments):
    """v by parameter name from ``optimizer.pt``. Tensors are read by ranges (torch's old format is loaded whole)."""

    def __init__(self, path: Path, layout: Layout = None, source_of: SourceOf | None = None) -> None:
        """``layout``, or a function that builds it, is needed for numbered parameters only. Raises MomentsError."""
        self.path = path
        self._file = _load(path, source_of)
        groups, state = _groups_and_state(path, self._file.saved)
        v = _second_moments(path, state)
        try:
            self._file.check(v.values())
        except ValueError as error:
            raise MomentsError(f"{path}: {error}. Save the optimizer's state_dict again") from None
        names = _names(path, groups, v, layout)
        self._v = {names[key]: tensor for key, tensor in v.items()}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self._v.items()}
        self._steps = {names[key]: _raw_step(key, state[key], groups) for key in v}
        self.beta2 = _beta2(path, groups)
        self._unreleased = 0

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def step(self, name: str) -> int | None:
        value = self._steps[name]
        if isinstance(value, torch.Tensor):
            value = self._file.read(value)
            value = value.item() if value.numel() == 1 else value.tolist()
        return None if value is None else as_step(value, f"{self.path}: the step of {name!r}")

    def read(self, name: str, start: int, stop: int, *, check: bool = True) -> NDArray[np.float32]:
        tensor = self._v[name]
        if self._unreleased > DROP_BYTES:
            self._unreleased = 0
            self._file.drop_pages()
        block = self._file.read_rows(tensor, start, stop)
        self._unreleased += block.nbytes
        values: NDArray[np.float32] = block.to(torch.float32).contiguous().numpy()
        return checked(values, path=self.path, name=name, shape=tensor.shape, start=start) if check else values

    def prefetch(self, name: str, start: int, stop: int) -> None:
        self._file.prefetch(self._v[name], start, stop)

    def close(self) -> None:
        self._v, self._steps = {}, {}
        self._file.close()


def _load(path: Path, source_of: SourceOf | None) -> TorchFile:
    """The file, opened. Only tensors and plain containers are unpickled."""
    if path.suffix == ".safetensors":  # torch.load goes by this ending and would not even try
        raise MomentsError(f"{path} is a file of torch.save, its name says safetensors: rename it to end in .pt")
    try:
        return TorchFile(path, source_of)
    except Exception as error:  # a damaged or hostile pickle can raise anything; nothing of it has been executed
        if isinstance(error, OtaError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise MomentsError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as an optimizer state: {type(error).__name__}: {reason:.300} "
            "It is truncated, damaged, or holds more than tensors and plain containers, which is refused because loading it "
            "could run code. Fetch it again, or save the second moments by name as exp_avg_sq.safetensors"
        ) from None


def _groups_and_state(path: Path, saved: Any) -> tuple[list[dict[str, Any]], dict[Any, dict[str, Any]]]:
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
        seen = f"the keys {_some(list(saved))}" if isinstance(saved, dict) else f"a {type(saved).__name__}"
        raise MomentsError(f"{path} holds {seen}; an optimizer's state_dict with state and param_groups was expected")
    groups, state = saved["param_groups"], saved["state"]
    good = isinstance(groups, list) and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups)
    if not good or not isinstance(state, dict) or not all(isinstance(entry, dict) for entry in state.values()):
        raise MomentsError(f"{path}: param_groups or state is not built as torch builds them; save the state_dict again")
    return groups, state


def _second_moments(path: Path, state: Mapping[Any, Mapping[str, Any]]) -> dict[Any, torch.Tensor]:
    """Key to v; parameters that were never updated have no state and are left out."""
    v: dict[Any, torch.Tensor] = {}
    problems = []
    for key, entry in state.items():
        tensor = entry.get(V)
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.layout == torch.strided:
            v[key] = tensor
        elif isinstance(tensor, torch.Tensor):
            problems.append(f"{path}: {V} of {key!r} is {tensor.layout} {tensor.dtype}, not a dense float tensor")
        elif entry:
            problems.append(f"{path}: {_other_optimizer(key, entry)}")
    if problems:
        more = f" ({len(problems) - 1} more parameters like it)" if len(problems) > 1 else ""
        raise MomentsError(f"{problems[0]}{more}. Train with torch's AdamW (adamw_torch), or supply exp_avg_sq.safetensors")
    if not v:
        raise MomentsError(f"{path} holds no second moments: it was saved before the first step; use a later checkpoint's")
    return v


def _other_optimizer(key: Any, entry: Mapping[str, Any]) -> str:
    keys = {str(name) for name in entry}
    hint = ""
    if keys & {"qmap2", "state2", "absmax2"}:
        hint = ", as an 8-bit optimizer leaves it"
    elif keys & {"exp_avg_sq_row", "exp_avg_sq_col"}:
        hint = ", as Adafactor leaves it"
    return f"the state of parameter {key!r} lacks the key {V}; it has the keys {_some(sorted(keys))}{hint}"


def _names(path: Path, groups: list[dict[str, Any]], v: Mapping[Any, torch.Tensor], layout: Layout) -> dict[Any, str]:
    """Key to parameter name: by the names in the file where it has them, otherwise through the layout."""
    keys = [key for group in groups for key in group["params"]]
    # The type is compared exactly: True and False would otherwise pass as the numbers 1 and 0.
    types = {type(key) for key in keys} | {type(key) for key in v}
    unknown = [key for key in v if key not in set(keys)]
    if len(types) != 1 or not types <= {int, str} or len(set(keys)) != len(keys) or unknown:
        raise MomentsError(
            f"{path}: the parameters of param_groups ({_some(keys)}) and of state ({_some(list(v))}) do not fit together; "
            "unique numbers or unique names, the same in both, were expected: save the optimizer's state_dict again"
        )
    if types == {str}:
        return {key: key for key in v}
    if all(isinstance(group.get("param_names"), list) and len(group["param_names"]) == len(group["params"]) for group in groups):
        names = {key: name for group in groups for key, name in zip(group["params"], group["param_names"], strict=True)}
        if len(set(names.values())) == len(names) and all(isinstance(name, str) for name in names.values()):
            return names
        raise MomentsError(f"{path}: param_names of the groups are not unique strings; save the optimizer's state_dict again")
    if layout is None:
        raise MomentsError(
            f"{path} numbers its parameters (0 to {max(keys)}), and without the model's configuration the numbers cannot be "
            "matched to names: put the expert's config.json into its folder, or save the second moments by name as "
            "exp_avg_sq.safetensors"
        )
    shapes = {key: tuple(tensor.shape) for key, tensor in v.items()}
    return match_names(path, groups, shapes, layout() if callable(layout) else layout)


def _raw_step(key: Any, entry: Mapping[str, Any], groups: list[dict[str, Any]]) -> Any:
    """t of one parameter, a tensor or a number; fused optimizers of other libraries keep it in the group."""
    if "step" in entry:
        return entry["step"]
    return next((group.get("step") for group in groups if key in group["params"]), None)


def _beta2(path: Path, groups: list[dict[str, Any]]) -> float | None:
    found = {as_beta2(g["betas"][1], f"{path}: β₂ in betas") for g in groups if g["params"] and len(g.get("betas") or ()) == 2}
    if len(found) > 1:
        raise MomentsError(f"{path}: the parameter groups have different β₂ ({_some(sorted(found))}); one for all was expected")
    return found.pop() if found else None


def _some(items: list[Any]) -> str:
    return ", ".join(f"{item!r:.80}" for item in items[:8]) + (", …" if len(items) > 8 else "") if items else "none"
