"""Trainers with names and layouts of their own: their second moments under the names and in the order of rows of Hugging Face."""

from ota_core.moments.foreign.translate import renamed, translated

__all__ = ["renamed", "translated"]
