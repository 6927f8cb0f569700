"""What the order of rows depends on, from the configuration of the Hugging Face model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ota_core.errors import MomentsError
from ota_core.moments.match import Layout

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Model:
    """Numbers of one decoder."""

    kind: str
    """``model_type`` of the configuration."""
    heads: int
    groups: int
    """Heads of keys and values."""
    width: int
    """Of one head."""
    vocabulary: int
    tied: bool

    @property
    def per_group(self) -> int:
        """Heads of queries that share one of keys."""
        return self.heads // self.groups


def model_of(path: Path, trainer: str, layout: Layout) -> Model:
    """Raises MomentsError where the configuration is not known or lacks one of these numbers."""
    found = layout() if callable(layout) else layout
    config: Any = getattr(found, "config", None)
    if not config:
        raise MomentsError(
            f"{path} has the names of {trainer}; which rows belong to which head is said by the model's configuration alone: put the "
            "config.json of the Hugging Face model beside the weights"
        )
    config = config.get("text_config", config)
    try:
        heads = int(config["num_attention_heads"])
        groups = int(config.get("num_key_value_heads") or heads)
        width = int(config.get("head_dim") or config["hidden_size"] // heads)
        return Model(
            str(config["model_type"]), heads, groups, width, int(config["vocab_size"]), bool(config.get("tie_word_embeddings"))
        )
    except (KeyError, TypeError, ValueError) as error:
        raise MomentsError(
            f"{path}: the model's config.json lacks {error}, which says how {trainer} lays out attention; use the one of the model"
        ) from None


def halves_of_pairs(heads: int, width: int) -> Indices:
    """Row in an interleaved layout per row in that of Hugging Face.

    Llama's own code rotates neighbouring rows of a head together, (0, 1), (2, 3), …; Hugging Face's rotates row i with row i + width / 2
    and keeps the first of all pairs before the second of all.
    """
    pairs = np.arange(heads * width, dtype=np.int64).reshape(heads, width // 2, 2)
    return pairs.transpose(0, 2, 1).reshape(-1)


def cut_groups(model: Model) -> dict[str, Indices]:
    """Rows of q, k and v in a matrix that holds, group after group, the group's heads of queries, its keys and its values."""
    count = model.groups * (model.per_group + 2) * model.width
    rows = np.arange(count, dtype=np.int64).reshape(model.groups, model.per_group + 2, model.width)
    return {
        "q": rows[:, : model.per_group].reshape(-1),
        "k": rows[:, model.per_group].reshape(-1),
        "v": rows[:, model.per_group + 1].reshape(-1),
    }
