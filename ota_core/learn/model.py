"""A model in memory whose weights are a merge with scales, and the gradient of a loss with respect to the scales.

With θ_n = θ₀ + Σ_m s[m, n]·E[m, n] the gradient is ∂L/∂s[m, n] = ⟨∂L/∂θ_n, E[m, n]⟩: one backward pass of the merged model. The products
are taken as soon as a parameter's gradient is complete, and it is freed, so that at most about one layer's are in memory.
"""

from collections.abc import Mapping
from contextlib import ExitStack

import torch

from ota_core.errors import CheckpointError
from ota_core.learn.edits import Edits
from ota_core.learn.gradients import each_gradient
from ota_core.learn.groups import Per, group_of
from ota_core.plan.expert_scales import some


class ScaledModel:
    """A network whose weights follow ``scales``. A context manager: inside, its parameters have the hooks."""

    def __init__(self, network: torch.nn.Module, edits: Edits, per: Per, start: Mapping[str, list[float]] | None = None) -> None:
        """start: tensor to its first coefficients, 1 without it. Raises CheckpointError where the network lacks merged tensors, or tensors
        that would share coefficients begin with other ones."""
        self.network, self.edits = network, edits
        self._groups = {name: group_of(name, per) for name in edits.jobs}
        names = list(dict.fromkeys(self._groups.values()))
        self._places = {name: names.index(group) for name, group in self._groups.items()}
        self.scales = torch.ones(len(names), len(edits.experts), dtype=torch.float64)
        """The coefficients, float64 (G, M), G groups of tensors."""
        for name, row in (start or {}).items():
            self.scales[self._places[name]] = torch.tensor(row, dtype=torch.float64)
        if start and any(self.scales[self._places[name]].tolist() != row for name, row in start.items()):
            raise CheckpointError(
                f"the recipe's scales differ among tensors that would share them per {per}; learn them per tensor, or begin without the key 'scales'"
            )
        self.gradient = torch.zeros_like(self.scales)
        """∂L/∂s of the backward passes since it was last set to zero, float64 (G, M)."""
        self._targets, self._stack = _targets(network, edits), ExitStack()

    def __enter__(self) -> "ScaledModel":
        self._stack.enter_context(each_gradient(self.network, self._targets, self._take))
        self.write()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def by_tensor(self) -> dict[str, list[float]]:
        """Tensor to its M coefficients."""
        return {name: self.scales[place].tolist() for name, place in self._places.items()}

    def write(self) -> None:
        """Bring the network's weights up to the scales."""
        self.edits.write(self.by_tensor(), self._targets)

    def _take(self, name: str, gradient: torch.Tensor) -> None:
        self.gradient[self._places[name]] += self.edits.products(name, gradient)


def _targets(network: torch.nn.Module, edits: Edits) -> dict[str, torch.Tensor]:
    """Merged tensor to the parameter or buffer of the network that holds it. A tied one is held by its parameter."""
    held = dict(network.named_parameters(remove_duplicate=False)) | dict(network.named_buffers(remove_duplicate=False))
    lacking = [f"'{name}'" for name, job in edits.jobs.items() if name not in held or tuple(held[name].shape) != job.shape]
    unknown = [name for name in network.state_dict() if name not in edits.jobs and not _tied_to_one(held[name], held, edits)]
    if lacking or unknown:
        raise CheckpointError(
            f"the network that config.json describes does not hold the merged tensors as they are named: it lacks {some(lacking) or 'none'}, and has "
            f"{some([repr(one) for one in unknown]) or 'no other'}. Scales are learned for models that transformers loads without converting names"
        )
    return {name: held[name] for name in edits.jobs}


def _tied_to_one(tensor: torch.Tensor, held: Mapping[str, torch.Tensor], edits: Edits) -> bool:
    return any(tensor is held.get(name) for name in edits.jobs) or not tensor.is_floating_point()
