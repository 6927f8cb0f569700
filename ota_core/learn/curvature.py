"""Second moments measured instead of kept: the mean squared gradient of a loss over batches, v = 1/B · Σ_b (s_b·g_b)².

g_b is the gradient of batch b's mean loss, s_b = min(1, c / (‖g_b‖ + 1e-6)) what clipping by the global norm c leaves of it (as
torch.nn.utils.clip_grad_norm_), 1 without clipping. This is what Adam's v averages, taken at the trained weights instead of along the way,
and the diagonal of the empirical Fisher information of batches (Kunstner et al. 2019, arXiv 1905.12558). Legend: B batches.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ota_core.compute.blocks import matrix_shape
from ota_core.errors import MomentsError, OtaError
from ota_core.files.rows import F32
from ota_core.files.writer import SafetensorsWriter, TensorSpec
from ota_core.learn.gradients import each_gradient
from ota_core.moments.base import ESTIMATED

SMALLEST = 1e-6
"""Added to the norm before it divides, as torch does."""


class SquaredGradients:
    """The running sum of squared gradients of some of a network's parameters."""

    def __init__(self, network: torch.nn.Module, parameters: Mapping[str, torch.Tensor], clip: float | None = None) -> None:
        """parameters: name to parameter, each once; all others count as frozen. clip: largest global norm of a batch's gradient."""
        self._network, self._parameters, self._clip = network, parameters, clip
        self.sums = {name: torch.zeros_like(one, dtype=torch.float32, requires_grad=False) for name, one in parameters.items()}
        """Parameter to Σ_b (s_b·g_b)², float32, the parameter's shape and device."""
        self.losses: list[float] = []
        """Of each batch so far."""
        self.norms: list[float] = []
        """‖g_b‖ of each batch so far, before clipping."""

    @property
    def batches(self) -> int:
        """How many were added."""
        return len(self.losses)

    def add(self, loss_of: Callable[[], torch.Tensor]) -> None:
        """Add a batch. ``loss_of`` computes its mean loss, a scalar, with the graph that leads to it.

        Without clipping one backward pass does it. What clipping leaves of a gradient is known when all of it was seen, and nothing is kept
        of it: with clipping the same graph is gone back through twice, first for the norm. That takes 5/3 of the time, and no memory.
        Raises OtaError where loss or gradient is no finite number.
        """
        scale, square, first = 1.0, [0.0], self._clip is not None

        def take(name: str, gradient: torch.Tensor) -> None:
            values = gradient.float()
            if first or self._clip is None:
                square.append(float(torch.linalg.vector_norm(values)) ** 2)
            if not first:
                self.sums[name].addcmul_(values, values, value=scale * scale)

        with each_gradient(self._network, self._parameters, take):
            loss = loss_of()
            if self._clip is not None:
                loss.backward(retain_graph=True)
                first, scale = False, min(1.0, self._clip / (math.sqrt(math.fsum(square)) + SMALLEST))
            loss.backward()
        value, norm = float(loss.detach()), math.sqrt(math.fsum(square))
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise OtaError(
                f"batch {self.batches + 1}: the loss is {value}, the norm of its gradient {norm}; finite numbers were expected. Is this a working "
                "model? With float16 take float32 or bfloat16"
            )
        self.losses.append(value)
        self.norms.append(norm)

    def save(self, path: Path, identity: str) -> None:
        """Keep what was added so far, so that ``load`` goes on from there to the bit. In one step: a reader finds the old file or the new."""
        from safetensors.torch import save_file

        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        said = {"identity": identity, "losses": json.dumps(self.losses), "norms": json.dumps(self.norms)}
        try:
            save_file(self.sums, temporary, metadata=said)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def load(self, path: Path, identity: str) -> None:
        """Take over what ``save`` kept of the same estimate; nothing where there is no such file. Raises MomentsError for another's."""
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            return
        try:
            with safe_open(path, framework="pt") as kept:
                said = kept.metadata() or {}
                shapes = {name: tuple(kept.get_slice(name).get_shape()) for name in kept.keys()}  # noqa: SIM118 - no mapping
                wanted = {name: tuple(one.shape) for name, one in self.sums.items()}
                if said.get("identity") != identity or shapes != wanted:
                    raise MomentsError(f"{path} is the beginning of another estimate; delete it to begin anew")
                for name, one in self.sums.items():
                    one.copy_(kept.get_tensor(name))
        except SafetensorError as error:
            raise MomentsError(f"{path}, the beginning of an estimate, is damaged ({error}); delete it to begin anew") from None
        self.losses, self.norms = json.loads(said["losses"]), json.loads(said["norms"])

    def write(self, path: Path, said: Mapping[str, Any]) -> None:
        """Write v under the parameters' names, float32, as a safetensors file that every reader of second moments takes.

        said: how it was estimated, JSON-able; it makes known that this v is no optimizer's.
        """
        specs = [TensorSpec(name, tuple(one.shape), F32) for name, one in sorted(self.sums.items())]
        metadata = {ESTIMATED: json.dumps(said, sort_keys=True)}
        with SafetensorsWriter(path, specs, metadata) as writer:
            for name, one in self.sums.items():
                mean = (one / self.batches).cpu().numpy()
                writer.write_rows(name, 0, mean.reshape(matrix_shape(mean.shape)))
