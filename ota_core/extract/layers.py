"""What an adapter can hold of each tensor of a model, told from its name and shape."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from ota_core.files.checkpoint import Checkpoint
from ota_core.files.lora.find_edits import CONV1D, CONV1D_MODELS, STACKS_BY_INPUT
from ota_core.plan.roles import place_of

Kind = Literal["matrix", "stack", "embedding", "norm", "bias", "other"]
_HEADS = ("lm_head", "embed_out")
_TABLES = ("embed", "wte", "wpe", "shared", "relative_attention_bias", "embed_positions", "position_embeddings")
_KEPT: dict[Kind, str] = {"embedding": "embeddings", "norm": "norms", "bias": "biases"}


@dataclass(frozen=True)
class Layer:
    """One tensor of the model."""

    name: str
    module: str
    kind: Kind
    turned: bool = False
    """Stored as (in, out), or as a stack of such."""
    keep: Literal["", "embedding", "norm", "bias"] = ""
    """Stored whole."""
    why: str = ""
    """Why nothing of it is stored."""


def layers_of(model: Checkpoint, whole: Collection[str], bare: Collection[str] = ()) -> list[Layer]:
    """The floating-point tensors of a model. whole: which kinds are stored whole; bare: parameters that are no layer's of torch."""
    named = str(model.config.get("model_type", ""))
    found = []
    for name in model.names():
        info = model.info(name)
        if not info.dtype.is_floating_point:
            continue
        module, _, last = name.rpartition(".")
        kind, why = _kind(module, last, info.shape)
        if kind == "matrix" and name in bare:
            kind = "stack"  # of one
        keep: Literal["", "embedding", "norm", "bias"] = ""
        if kind in _KEPT:
            wanted = _KEPT[kind]
            if wanted in whole:
                keep = kind  # type: ignore[assignment]  # those of _KEPT
            else:
                why = f"{wanted} are left out; --whole {wanted} stores them"
        turned = kind == "stack" and len(info.shape) == 3 and named in STACKS_BY_INPUT
        turned = turned or (kind == "matrix" and module.rsplit(".", 1)[-1] in CONV1D and named in CONV1D_MODELS)
        found.append(Layer(name, module, kind, turned, keep, "" if keep else why))
    return found


def _kind(module: str, last: str, shape: tuple[int, ...]) -> tuple[Kind, str]:
    own = module.rsplit(".", 1)[-1]
    if last == "bias":
        return "bias", ""
    if (
        last == "weight"
        and len(shape) == 1
        and (place_of(module + ".weight").role == "norm" or "norm" in own or own.startswith("ln"))
    ):
        return "norm", ""
    if (
        last == "weight"
        and len(shape) == 2
        and own not in _HEADS
        and (place_of(module + ".weight").role == "embed" or own.startswith(_TABLES))
    ):
        return "embedding", ""
    if last == "weight" and len(shape) == 2:
        return "matrix", ""
    if last not in ("weight", "bias") and len(shape) == 3 and own == "experts":
        return "stack", ""
    return "other", f"of the shape {list(shape)}: neither a layer's matrix, nor an embedding, a norm or a bias"
