"""What an extracted adapter lacks of each tensor, as a table."""

import pandas as pd

from ota_core.extract.extract import ExtractReport
from tasks.pages.tables import COUNT, NUMBER, Column, Table

HELD = {"factors": "two factors", "whole": "whole", "left out": "left out"}


def errors_table(report: ExtractReport) -> Table:
    """A row for each tensor that differs, the largest error first."""
    rows = [
        {
            "tensor": one.name,
            "held": f"{HELD[one.how]}{f': {one.why}' if one.why else ''}",
            "rank": one.rank,
            "error": one.error,
            "norm": one.norm,
        }
        for one in report.tensors
    ]
    frame = pd.DataFrame(rows, columns=["tensor", "held", "rank", "error", "norm"]).astype({"rank": float})
    columns = (
        Column("tensor"), Column("held", "held as"), Column("rank", unit=COUNT), Column("error", "error / difference", NUMBER),
        Column("norm", "norm of the difference", NUMBER),
    )  # fmt: skip
    return Table("", frame, columns)
