"""Why a merge works (docs/methods.md section 6): where FFG's masks lie, how alike the experts' curvature and edits are, what compression loses.

``analyse`` streams over the models as a merge does: within a budget of memory, the same bits for every cut into blocks and every number
of threads. ``table.Row`` is what all results are made of.
"""

from ota_core.analysis.run import Analysis, analyse
from ota_core.analysis.subject import AnalysisOptions
from ota_core.analysis.table import BINS, Row

__all__ = ["BINS", "Analysis", "AnalysisOptions", "Row", "analyse"]
