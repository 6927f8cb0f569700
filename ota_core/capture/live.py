"""The second moments of a training that runs: one v per parameter of the saved checkpoint, gathered one parameter at a time."""

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ota_core.capture.states import INSTEAD, beta2_of, has_second_moment, second_moment, why_not
from ota_core.errors import MomentsError

Tensors = dict[str, torch.Tensor]
Convert = Callable[[Tensors], Tensors]
"""From a model's own tensors by name to those of its checkpoint, as saving does it."""
# What wrappers put into a parameter's name and saving takes out again.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
# Modules that hold the model as ``module``.
_AROUND = {"DistributedDataParallel", "FullyShardedDataParallel", "DataParallel", "DeepSpeedEngine"}


class LiveMoments:
    """v of every parameter that has one. ``names`` are those of the checkpoint without wrappers, tied parameters once.

    ``read`` is a collective operation where ``gathered``: every process calls it for the same parameters in the same order.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        """Raises MomentsError where the optimizer keeps no second moments, or none yet."""
        self.gathered = False
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.steps: dict[str, int | None] = {}
        self.beta2: float | None = None
        self._read: Callable[[str], torch.Tensor]
        self.optimizer = _innermost(optimizer)
        parameters = _parameters(model)
        flat = [module for module in model.modules() if type(module).__name__ == "FullyShardedDataParallel"]
        if any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in parameters.values()):
            self._open_deepspeed(parameters, optimizer)
        elif flat:
            self._open_flat(model)
        else:
            self._open_plain(parameters)
        if not self.shapes:
            raise MomentsError(f"{self.name}: it keeps no second moments yet; save them after the first step")
        if any(".lora_" in name for name in self.shapes):
            raise MomentsError(
                "the trained parameters are those of LoRA adapters, and from v of A and B does not follow v of the weights: "
                + INSTEAD.partition(", or")[0]
            )

    @property
    def name(self) -> str:
        """The optimizer's, such as AdamW."""
        return type(self.optimizer).__name__

    def read(self, name: str) -> torch.Tensor:
        """v of a parameter, float32, on whatever device it is. Raises MomentsError where it has another shape than the parameter."""
        v = self._read(name)
        if tuple(v.shape) != self.shapes[name]:
            raise MomentsError(
                f"{self.name}: v of {name} has the shape {list(v.shape)}, the parameter {list(self.shapes[name])}; optimizers such as GaLore "
                f"and APOLLO keep a projection of it: {INSTEAD}"
            )
        return v

    def _open_plain(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """torch and what follows it; FSDP2, tensor parallelism (parameters are DTensors); DDP, where every process holds all."""
        states = {name: self.optimizer.state[p] for name, p in parameters.items() if self.optimizer.state.get(p)}
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        self._check(states)
        self.shapes = {name: tuple(parameters[name].shape) for name in states}
        self.gathered = any(hasattr(parameters[name], "full_tensor") for name in states)
        self.steps = {name: _step(state, groups.get(id(parameters[name]), {})) for name, state in states.items()}
        self.beta2 = self._beta2()
        self._read = lambda name: second_moment(states[name], _whole)

    def _open_flat(self, model: nn.Module) -> None:
        """FSDP1: torch's own walk through its flat parameters gives a part of each parameter's state, by name."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        if not self.optimizer.state:
            raise MomentsError(f"{self.name}: it keeps no second moments yet; save them after the first step")
        found: dict[str, Any] = get_optimizer_state_dict(model, self.optimizer)
        states = {clean_name(name): state for name, state in found["state"].items() if state}
        self._check(states)
        if any("state2" in state and state["state2"].dtype == torch.uint8 for state in states.values()):
            raise MomentsError(
                f"{self.name}: an 8-bit state in FSDP's flat parameters has no place for its scales; use fsdp_version 2"
            )
        self.shapes = {name: tuple(next(t for t in state.values() if _ranked(t)).size()) for name, state in states.items()}
        self.gathered = True
        self.steps = {name: _step(state, self.optimizer.param_groups[0]) for name, state in states.items()}
        self.beta2 = self._beta2()
        self._read = lambda name: second_moment(states[name], _whole)

    def _open_deepspeed(self, parameters: Mapping[str, nn.Parameter], optimizer: Any) -> None:
        """ZeRO 1 to 3, also its bf16 optimizer without ZeRO: DeepSpeed itself joins the parts of a parameter."""
        full = importlib.import_module("deepspeed.utils").safe_get_full_optimizer_state
        inner = _innermost(optimizer, deepspeed=True)
        states = list(inner.state.values())
        if states:
            self._check({"the first part": states[0]})
            if not any("exp_avg_sq" in state for state in states):
                raise MomentsError(f"{type(inner).__name__} under DeepSpeed: {why_not(states[0])}: {INSTEAD}")
        self.optimizer = inner
        held = {name: p for name, p in parameters.items() if p.requires_grad} if states else {}
        self.shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in held.items()}
        self.gathered = True
        steps = [step for state in states for group in inner.param_groups[:1] if (step := _step(state, group)) is not None]
        self.steps = dict.fromkeys(held, max(steps, default=None))
        self.beta2 = self._beta2()
        self._read = lambda name: full(held[name], "exp_avg_sq").float().reshape(self.shapes[name])

    def _check(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        bad = next((name for name, state in states.items() if not has_second_moment(state)), None)
        if bad is not None:
            raise MomentsError(f"{self.name} keeps no second moment of {bad}: {why_not(states[bad])}: {INSTEAD}")

    def _beta2(self) -> float | None:
        step = max((step for step in self.steps.values() if step is not None), default=None)
        groups = self.optimizer.param_groups
        # Groups without parameters decide nothing; DeepSpeed leaves no group any.
        found = {beta2_of(group, step) for group in [group for group in groups if group["params"]] or groups}
        if len(found) > 1:
            raise MomentsError(f"{self.name}: the parameter groups have different β₂ ({found}); one for all was expected")
        return found.pop() if found else None


def clean_name(name: str) -> str:
    """A parameter's name as saving writes it: without what compiling, sharding and other wrappers put into it."""
    for part in _WRAPPERS:
        name = name.replace(part, "")
    return name


def checkpoint_names(model: nn.Module) -> Convert | None:
    """How the model's library renames, splits and joins tensors when it saves; None where it leaves them as they are.

    transformers does so for mixtures of experts and models of images and text; a model of it has loaded it, so that it is not imported here.
    """
    base = _unwrapped(model)
    library, loading = sys.modules.get("transformers"), sys.modules.get("transformers.core_model_loading")
    if library is None or loading is None or not isinstance(base, library.PreTrainedModel):
        return None
    return lambda tensors: dict(loading.revert_weight_conversion(base, tensors))


def units(
    shapes: Mapping[str, tuple[int, ...]], convert: Convert | None
) -> Iterator[tuple[list[str], dict[str, tuple[int, ...]]]]:
    """(the model's tensors, the checkpoint's tensors with shapes) of the smallest parts that can be converted by themselves.

    One parameter each, unless the conversion makes one tensor of several: then everything is one part.
    """
    if convert is None:
        yield from (([name], {name: shape}) for name, shape in shapes.items())
        return
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    together = {name: tuple(tensor.shape) for name, tensor in convert(dict(empty)).items()}
    alone: list[tuple[list[str], dict[str, tuple[int, ...]]]] = []
    try:
        for name, tensor in empty.items():
            alone.append(([name], {key: tuple(part.shape) for key, part in convert({name: tensor}).items()}))
    except Exception:  # what needs its partners fails in ways of its own
        alone = []
    separate: dict[str, tuple[int, ...]] = {}
    for _, made in alone:
        separate |= made
    if separate == together and sum(len(made) for _, made in alone) == len(together):
        yield from alone
    else:
        yield list(shapes), together


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By their names in the checkpoint, tied ones once, in the model's order."""
    return {clean_name(name): parameter for name, parameter in _unwrapped(model).named_parameters()}


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, DeepSpeed's engine, FSDP1 and torch.compile."""
    while True:
        inner = getattr(model, "module" if type(model).__name__ in _AROUND else "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _innermost(optimizer: Any, *, deepspeed: bool = False) -> Any:
    """The optimizer inside accelerate's wrapper and, with ``deepspeed``, inside that of ZeRO, whose states are of joined parameters."""
    while type(optimizer).__name__ in {"AcceleratedOptimizer", "DeepSpeedOptimizerWrapper"} or (
        deepspeed and hasattr(optimizer, "optimizer")
    ):
        optimizer = optimizer.optimizer
    return optimizer


def _ranked(value: Any) -> bool:
    """Whether a value of a state is a tensor of the parameter's shape, not a count."""
    return hasattr(value, "size") and callable(value.size) and len(value.size()) > 0


def _whole(tensor: Any) -> torch.Tensor:
    """A tensor of which every process may hold a part, on all of them."""
    if hasattr(tensor, "full_tensor"):
        whole: torch.Tensor = tensor.full_tensor()
        return whole
    if hasattr(tensor, "local_shards"):  # FSDP1's ShardedTensor, whose own gather fills one process alone
        from torch import distributed

        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        shards = tensor.local_shards()
        whole = torch.zeros(tensor.size(), dtype=tensor.dtype, device=shards[0].tensor.device if shards else device)
        for shard in shards:
            place = tuple(
                slice(at, at + size) for at, size in zip(shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True)
            )
            whole[place] = shard.tensor
        distributed.all_reduce(whole, group=tensor._process_group)
        return whole
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _step(state: Mapping[str, Any], group: Mapping[str, Any]) -> int | None:
    """t of one parameter; fused optimizers of other libraries keep it in the group."""
    value = state.get("step", group.get("step"))
    return None if value is None else int(value.item() if isinstance(value, torch.Tensor) else value)
