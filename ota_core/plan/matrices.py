"""Which tensors hold matrices W that multiply activations, y = W x, and how they lie in them (docs/methods.md section 8).

Embeddings, position tables, norms, biases and convolutions are none: their rows do not see the inputs that a training saw.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ota_core.plan.plan import MergePlan
from ota_core.plan.roles import place_of
from ota_core.plan.views import Block, TensorJob

# Whose linear layers are stored (in, out): transformers' Conv1D.
_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
_CONV1D_NAMES = ("c_attn.weight", "c_proj.weight", "c_fc.weight", "q_attn.weight")
# Whose stacks of a mixture's experts are stored (experts, in, out) where their shape does not tell.
_INPUT_FIRST = {
    "llama4",
    "llama4_text",
    "gpt_oss",
    "aria",
    "aria_text",
    "openai_privacy_filter",
    "qwen3_vl_moe",
    "qwen3_vl_moe_text",
}


@dataclass(frozen=True)
class Matrices:
    """The matrices of one tensor: one, or a stack of them, of a mixture's experts."""

    job: TensorJob
    count: int
    rows: int
    """Rows of one matrix as it is stored."""
    columns: int
    input_first: bool
    """Stored as Wᵀ, (in, out)."""

    @property
    def outputs(self) -> int:
        return self.columns if self.input_first else self.rows

    @property
    def inputs(self) -> int:
        return self.rows if self.input_first else self.columns

    def block(self, index: int) -> Block:
        """One matrix as a block of the tensor's rows."""
        return self.job, index * self.rows, (index + 1) * self.rows

    def blocks(self) -> list[Block]:
        """All of them."""
        return [self.block(i) for i in range(self.count)]


def matrices_of(job: TensorJob, config: Mapping[str, Any]) -> Matrices | None:
    """The matrices of a tensor of the model with this configuration (config.json); None where it holds none."""
    if job.copy or min(job.shape, default=0) == 0 or not _multiplies(job):
        return None
    kind = str(config.get("model_type", ""))
    if len(job.shape) == 2:
        return Matrices(job, 1, job.shape[0], job.shape[1], kind in _CONV1D and job.name.endswith(_CONV1D_NAMES))
    count, rows, columns = job.shape
    return Matrices(job, count, rows, columns, _stack_input_first(job, config))


def _multiplies(job: TensorJob) -> bool:
    if len(job.shape) == 3:
        return ".experts." in job.name
    if len(job.shape) != 2 or not job.name.endswith(".weight"):
        return False
    if place_of(job.canonical).role == "head":
        return True
    # A head that is tied to the embedding goes with it.
    return not any(word in part for part in job.canonical.split(".") for word in ("embed", "wte", "wpe"))


def _stack_input_first(job: TensorJob, config: Mapping[str, Any]) -> bool:
    """The side of the model's width tells; where both sides are as wide, the family of the model."""
    text = config.get("text_config")
    width = config.get("hidden_size", text.get("hidden_size") if isinstance(text, dict) else None)
    _, rows, columns = job.shape
    if rows != columns and width in (rows, columns):
        reads_width = place_of(job.name).role != "down"
        return bool((width == rows) == reads_width)
    return str(config.get("model_type", "")) in _INPUT_FIRST


def all_matrices(plan: MergePlan) -> list[Matrices]:
    """The matrices of all tensors that are merged here."""
    config = plan.models[0].checkpoint.config
    return [found for job in plan.merged_jobs() if (found := matrices_of(job, config))]


def at_once(plan: MergePlan, matrices: Sequence[Matrices]) -> int:
    """How many regressions of whole matrices fit the budget of memory at once; one even where that does not."""
    return max(1, min(plan.stream.threads, plan.stream.memory // max(map(bytes_of, matrices), default=1)))


def bytes_of(matrices: Matrices) -> int:
    """Memory that the regression of one matrix takes at most: Gram and factor in float64, and five matrices of the weights' shape."""
    return 16 * matrices.inputs**2 + 20 * matrices.inputs * matrices.outputs


def operations(matrices: Matrices, experts: int) -> float:
    """Multiplications and additions of a tensor's regressions."""
    rows, columns = matrices.outputs, matrices.inputs
    products = min(4 * rows * rows * columns, 2 * rows * columns * columns) + 2 * rows * columns * columns
    return matrices.count * (experts * products + columns**3 / 3 + 6 * rows * columns * columns)
