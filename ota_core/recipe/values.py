"""Types of the values that a recipe may hold."""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


class Strict(BaseModel):
    """Never changed, and nothing unknown in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


def no_switch(value: Any) -> Any:
    """``density: true`` would otherwise pass as 1.0."""
    if isinstance(value, bool):
        raise PydanticCustomError("no_number", "expected a number")
    return value


def _scale(value: Any) -> Any:
    """One error for what is neither a number nor auto; a union would give two, in its own words."""
    try:
        fits = value in AUTO or (not isinstance(value, bool) and math.isfinite(float(value)))
    except (TypeError, ValueError):
        fits = False
    if not fits and value is not None:
        raise PydanticCustomError("no_scale", "expected a finite number, auto or auto_per_tensor")
    return value


AUTO = ("auto", "auto_per_tensor")
"""What λ may be beside a number: the scale that the row spaces of the task vectors tell, one for all tensors or one for each."""
Number = Annotated[float, BeforeValidator(no_switch)]
Finite = Annotated[Number, Field(allow_inf_nan=False)]
NonNegative = Annotated[Number, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0, allow_inf_nan=False)]
Scale = Annotated[float | Literal["auto", "auto_per_tensor"], BeforeValidator(_scale)]
Density = Annotated[Number, Field(gt=0, le=1)]
Compression = Literal["none", "rank1", "log8", "rank_k"]
