"""Second moments in checkpoints of nanotron: ZeRO 0 and 1, tensor and pipeline parallelism. Written by hand from its source, never run."""

from ota_core.moments.nanotron.folder import find_nanotron, is_nanotron, nanotron_files, open_nanotron

__all__ = ["find_nanotron", "is_nanotron", "nanotron_files", "open_nanotron"]
