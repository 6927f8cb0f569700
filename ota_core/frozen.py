"""What is only read: the base of configurations, records and results."""

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Never changed once it is made; a field that is not known is a mistake."""

    model_config = ConfigDict(frozen=True, extra="forbid")
