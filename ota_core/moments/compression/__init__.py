"""Compression of second moments (docs/methods.md section 2) and its file format: a file per method, ``file`` for what is on disk.

| method   | ṽ                                               | bytes a parameter       | held          |
|----------|-------------------------------------------------|-------------------------|---------------|
| `none`   | v                                               | 4                       | mapped file   |
| `rank1`  | (r_i / s) · c_j, row and column sums (AdaFactor) | 4 · (R + C) / RC        | memory        |
| `log8`   | 8-bit code of log v in blocks of 256             | 1 + 8 / 256             | mapped file   |
| `rank_k` | (L·M)², √v at rank k                             | 4 · k · (R + C) / RC    | memory        |
"""

from ota_core.moments.compression.base import (
    DEFAULT_RANK,
    IN_MEMORY,
    CompressedMoments,
    CompressionReport,
    compression_label,
    compression_of,
    is_compressed,
    kept_as_trained,
    label_of,
    rank_of,
)
from ota_core.moments.compression.dispatch import compress, compressed_bytes, passes, write_compressed
from ota_core.moments.compression.file import open_compressed, save_compressed, save_full
from ota_core.moments.compression.header import METHODS, Method
from ota_core.moments.compression.rank1 import RankOneMoments
from ota_core.moments.compression.split import split

__all__ = [
    "DEFAULT_RANK",
    "IN_MEMORY",
    "METHODS",
    "CompressedMoments",
    "CompressionReport",
    "Method",
    "RankOneMoments",
    "compress",
    "compressed_bytes",
    "compression_label",
    "compression_of",
    "is_compressed",
    "kept_as_trained",
    "label_of",
    "open_compressed",
    "passes",
    "rank_of",
    "save_compressed",
    "save_full",
    "split",
    "write_compressed",
]
