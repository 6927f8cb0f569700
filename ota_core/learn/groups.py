"""Which tensors share the coefficients of their experts."""

from typing import Literal

from ota_core.plan.roles import place_of

Per = Literal["tensor", "layer", "role", "expert"]
"""What shares a coefficient of an expert: nothing, the tensors of a transformer block, those of a role (q, k, …, down, norm, …), or all."""


def group_of(name: str, per: Per) -> str:
    """The group whose coefficients a tensor has. A tensor outside of the blocks is, by layer, in the group of its role."""
    if per == "tensor":
        return name
    place = place_of(name)
    if per == "layer":
        return place.role if place.layer is None else f"layer {place.layer}"
    return place.role if per == "role" else "all"
