"""Names for the parameters of an optimizer's state.

The file numbers the parameters, or names them. The numbers follow the optimizer's own group order: the Trainer's optimizer holds the decayed
parameters first, then the rest, each in the model's parameter order (transformers ``Trainer.create_optimizer``).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ota_core.errors import MomentsError
from ota_core.moments.match import Layout, match_names
from ota_core.moments.trainer.refusals import some


def names_of(path: Path, groups: list[dict[str, Any]], shapes: Mapping[Any, tuple[int, ...]], layout: Layout) -> dict[Any, str]:
    """Key to parameter name: by the names in the file where it has them, otherwise through the layout.

    shapes: key to the shape of the parameter, for those that have a v. Raises MomentsError.
    """
    keys = [key for group in groups for key in group["params"]]
    # The type is compared exactly: True and False would otherwise pass as the numbers 1 and 0.
    types = {type(key) for key in keys} | {type(key) for key in shapes}
    unknown = [key for key in shapes if key not in set(keys)]
    if len(types) != 1 or not types <= {int, str} or len(set(keys)) != len(keys) or unknown:
        raise MomentsError(
            f"{path}: the parameters of param_groups ({some(keys)}) and of state ({some(list(shapes))}) do not fit together; "
            "unique numbers or unique names, the same in both, were expected: save the optimizer's state_dict again"
        )
    if types == {str}:
        return {key: key for key in shapes}
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
    return match_names(path, groups, shapes, layout() if callable(layout) else layout)
