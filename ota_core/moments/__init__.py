"""Second moments from what trainers leave behind: one v per parameter name, a reader per format."""

from ota_core.moments.base import Moments, ParameterLayout, how_estimated, steps_in_words
from ota_core.moments.find import choice_in, find_moments, moments_files, none_found, open_moments

__all__ = [
    "Moments", "ParameterLayout", "choice_in", "find_moments", "how_estimated", "moments_files", "none_found", "open_moments", "steps_in_words",
]  # fmt: skip
