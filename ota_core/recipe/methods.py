"""The merge methods, and what each needs."""

from typing import Literal, get_args

Method = Literal[
    "ota",
    "linear",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "fisher",
    "slerp",
    "rowspace",
    "ffg",
    "passthrough",
    "nearswap",
    "arcee_fusion",
    "ram",
    "ramplus_tl",
    "sce",
    "della",
    "della_linear",
    "multislerp",
    "nuslerp",
    "karcher",
    "model_stock",
]
DType = Literal["float32", "float16", "bfloat16"]
NEEDS_BASE = {
    "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "rowspace", "slerp", "nearswap", "arcee_fusion",
    "ram", "ramplus_tl", "sce", "della", "della_linear", "model_stock", "ffg",
}  # fmt: skip
WITHOUT_BASE = {"linear", "karcher", "passthrough"}
"""Methods in which a base takes no part, even where one is named."""
NEEDS_MOMENTS = {"ota", "fisher", "ffg"}
FFG = {"ota", "ffg"}
"""Methods with Fast Fisher Grafting: ``ffg`` grafts a single expert's masked edit onto the base."""
KEEPS_BASE = {"fisher", "slerp", "nearswap", "arcee_fusion"} | WITHOUT_BASE
"""Methods in which the base counts when it is listed among the models; all others work on edits of it, and it has none."""
RESERVED_NAMES = ("base", "merged")
OF_REFINE = ("ridge", "input_curvature")
"""Parameters of the row-space regression."""
OF_MERGEKIT = set(get_args(Method)) - {"ota", "ffg", "fisher", "rowspace"}
"""Methods that mergekit has, too."""
