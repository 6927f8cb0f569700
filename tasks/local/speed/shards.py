"""The same second moments in one file and in the shards of four ranks, and a program that reads them: what many files cost.

``python -m tasks.local.speed.shards PATH`` reads all of v, in blocks, as a merge does, and prints the seconds of opening
and reading. It is opened once before, so that imports count in the wall time alone: the reader of ZeRO needs torch, the others do not.
"""

import json
import pickle
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ota_core.compute.blocks import matrix_shape, row_blocks
from ota_core.moments import Moments, open_moments

if TYPE_CHECKING:
    import torch

RANKS = 4
BLOCK = 1 << 21  # elements: 8 MiB
STEP = 100


def write_zero3(source: Path, folder: Path) -> Path:
    """v of ``source`` as DeepSpeed writes it under ZeRO 3 from four ranks; the folder of the step."""
    import torch

    folder.mkdir(parents=True)
    with closing(open_moments(source)) as moments:
        shapes = dict(moments.shapes())
        sizes = {name: -(-prod(shape) // RANKS) for name, shape in shapes.items()}
        for rank in range(RANKS):
            flat, start = torch.zeros(sum(sizes.values())), 0
            for name, size in sizes.items():
                part = _elements(moments, name, rank * size, (rank + 1) * size)
                flat[start : start + len(part)] = torch.from_numpy(part)
                start += size
                moments.drop_pages()
            state = {
                "state": {0: {"exp_avg_sq": flat, "step": torch.tensor(float(STEP))}},
                "param_groups": [{"betas": (0.9, 0.999), "params": [0]}],
            }
            saved = {"zero_stage": 3, "partition_count": RANKS, "optimizer_state_dict": state}
            torch.save({"optimizer_state_dict": saved}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    shapes_of = {name: torch.Size(shape) for name, shape in shapes.items()}
    torch.save({"param_shapes": [shapes_of]}, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    return folder


def write_fsdp(source: Path, folder: Path) -> Path:
    """v of ``source`` as torch.distributed.checkpoint writes it under FSDP from four ranks, cut by rows."""
    import torch
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    folder.mkdir(parents=True)
    tensors: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    with closing(open_moments(source)) as moments:
        for name, shape in moments.shapes().items():
            key, height = f"optimizer.state.{name}.exp_avg_sq", -(-shape[0] // RANKS)
            chunks = []
            for rank in range(RANKS):
                start, stop = min(rank * height, shape[0]), min((rank + 1) * height, shape[0])
                if start == stop:
                    continue
                inner = prod(shape[1:])
                part = torch.from_numpy(_elements(moments, name, start * inner, stop * inner)).view(stop - start, *shape[1:])
                offset = (start,) + (0,) * (len(shape) - 1)
                chunks.append(dcp.ChunkStorageMetadata(torch.Size(offset), part.shape))
                places[dcp.MetadataIndex(key, offset, rank)] = _StorageInfo(
                    f"__{rank}_0.distcp", *_append(part, folder / f"__{rank}_0.distcp")
                )
            properties = dcp.TensorProperties(dtype=torch.float32)
            tensors[key] = dcp.TensorStorageMetadata(properties, torch.Size(shape), chunks)
            moments.drop_pages()
    (folder / ".metadata").write_bytes(pickle.dumps(dcp.Metadata(tensors, {}, places)))
    return folder


def _append(part: "torch.Tensor", path: Path) -> tuple[int, int]:
    """A tensor behind what the file holds; where it begins, and its length, in bytes."""
    import torch

    with open(path, "ab") as stream:
        start = stream.tell()
        torch.save(part.clone(), stream)
        return start, stream.tell() - start


def _elements(moments: Moments, name: str, start: int, stop: int) -> Any:
    """Elements start:stop of a flattened parameter, as far as it has them; float32."""
    shape = moments.shapes()[name]
    rows, cols = matrix_shape(shape)
    start, stop = min(start, rows * cols), min(stop, rows * cols)
    first, last = start // cols, -(-stop // cols)
    values = moments.read(name, first, last, check=False).reshape(-1)
    return np.ascontiguousarray(values[start - first * cols : stop - first * cols])


def blocks(moments: Moments) -> Iterator[tuple[str, int, int]]:
    """All blocks of rows, in the order of the parameters."""
    for name, shape in moments.shapes().items():
        for start, stop in row_blocks(shape, BLOCK):
            yield name, start, stop


def main() -> None:
    path = Path(sys.argv[1])
    open_moments(path).close()
    started = time.perf_counter()
    largest = np.float32(0)
    with closing(open_moments(path)) as moments:
        for name, start, stop in blocks(moments):
            moments.prefetch(name, start, stop)
            largest = max(largest, moments.read(name, start, stop).max(initial=0))
    print(json.dumps({"seconds": {"read": time.perf_counter() - started}, "largest": float(largest)}))


if __name__ == "__main__":
    main()
