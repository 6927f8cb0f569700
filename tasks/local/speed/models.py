"""Synthetic Llama checkpoints of a wanted size for the benchmark: a base, experts in bfloat16, second moments in float32.

Complete Hugging Face folders but for a tokenizer, written as a stream. Random numbers are drawn once into a pool, of which every
block takes a slice: building is then a matter of the disk's speed.
"""

import json
import math
import shutil
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ota_core.artifact import write_text_atomic
from ota_core.compute.blocks import matrix_shape, row_blocks
from ota_core.errors import OtaError
from ota_core.files.rows import BF16, F32, Rows
from ota_core.files.writer import SafetensorsWriter, TensorSpec, plan_shards, write_index

if TYPE_CHECKING:
    from transformers import LlamaConfig

VERSION = 2
MOMENTS = "exp_avg_sq.safetensors"
NOTE = "bench-models.json"

HEAD = 64  # width of an attention head
OWN_TOKENS = 64  # of a model with a vocabulary of its own
BLOCK = 1 << 21  # elements of a block: 8 MiB in float32
POOL = (1 << 23) + 1  # normals drawn once
# A bfloat16 keeps 8 bits: with edits this much smaller than the weights, about a quarter of the elements round back to the base.
WEIGHT_SPREAD = 0.02
EDIT_SPREAD = 2e-4
MOMENT_SCALE = 1e-14
STRUCTURE = 1.0  # standard deviation of the logarithms of v's row and column factors
# v is a factor times the square of a normal z, and exactly 0 where |z| is below this: of 5 % of the elements.
ZERO_BELOW = 0.062707


@dataclass(frozen=True)
class Shape:
    """A Llama: hidden width h, a vocabulary of 64 h, feed-forward width 4 h, half as many key-value heads as heads, untied."""

    hidden: int
    layers: int

    @property
    def kv_heads(self) -> int:
        heads = self.hidden // HEAD
        return heads // 2 if heads % 2 == 0 else heads

    def config(self) -> "LlamaConfig":
        """What transformers builds the model from."""
        from transformers import LlamaConfig

        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            hidden_size=self.hidden,
            intermediate_size=4 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // HEAD,
            num_key_value_heads=self.kv_heads,
            head_dim=HEAD,
            vocab_size=64 * self.hidden,
            max_position_embeddings=2048,
            rms_norm_eps=1e-5,
            dtype="bfloat16",
        )

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameters, in the model's order."""
        from transformers import LlamaForCausalLM

        with torch.device("meta"):
            return {name: tuple(one.shape) for name, one in LlamaForCausalLM(self.config()).named_parameters()}

    @property
    def parameters(self) -> int:
        h = self.hidden
        layer = 2 * h * h + 2 * h * HEAD * self.kv_heads + 3 * h * 4 * h + 2 * h
        return 2 * 64 * h * h + self.layers * layer + h


def shape_of(billions: float) -> Shape:
    """The Llama with about that many billion parameters: 20 layers, or however many make up for a width in steps of 64.

    0.45 is hidden 1024, 20 layers, vocabulary 65,536. Raises OtaError below 0.0006, where not one layer would be left.
    """
    if not 0.0006 <= billions < math.inf:
        raise OtaError(f"size: got {billions:g} billion parameters, expected at least 0.0006")
    wanted = billions * 1e9
    hidden = HEAD * max(1, round(math.sqrt(wanted / 428) / HEAD))  # at 20 layers: (128 + 15 · 20) h² parameters
    ends, one = Shape(hidden, 0).parameters, Shape(hidden, 1).parameters
    return Shape(hidden, round((wanted - ends) / (one - ends)))


def with_vocabularies(models: "Models", folder: Path, experts: int) -> list[Path]:
    """The base and the experts once more, each with a tokenizer of its own: the last 64 rows stand for other tokens in every model.

    Links to the weights, so that the disk holds them once. Returns the folders, base first.
    """
    shared = 64 * models.shape.hidden - OWN_TOKENS
    vocabulary = {f"t{row}": row for row in range(shared)}
    found = []
    for source in [models.base, *(models.expert(m) for m in range(experts))]:
        target = folder / source.name
        found.append(target)
        if target.exists():
            continue
        target.mkdir(parents=True)
        for file in source.iterdir():
            (target / file.name).symlink_to(file.resolve())
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        added = [{"id": shared + i, "content": f"<{source.name}-{i}>", **flags} for i in range(OWN_TOKENS)]
        tokenizer = {
            "version": "1.0",
            "added_tokens": added,
            "pre_tokenizer": {"type": "Whitespace"},
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"},
        }
        (target / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0"}
        (target / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return found


def bytes_on_disk(shape: Shape, experts: int) -> int:
    """What ``build`` writes: base and experts in bfloat16, second moments in float32."""
    return shape.parameters * ((1 + experts) * 2 + experts * 4)


@dataclass(frozen=True)
class Models:
    """Models that lie on the disk."""

    folder: Path
    shape: Shape
    experts: int
    threshold: float
    """v·Δ² at which FFG keeps about 40 % of an expert's elements, from a sample of every tensor."""

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def expert(self, index: int) -> Path:
        """Folder of an expert: 0, 1, …"""
        return self.folder / f"expert{index + 1}"


def build(folder: Path, shape: Shape, experts: int, *, seed: int = 0) -> Models:
    """The models below ``folder``, which are kept when they are there already as they would be written, and replaced otherwise.

    The bytes depend on shape and seed alone: more experts leave the first ones as they are. Memory: about 100 MiB.
    """
    note = folder / NOTE
    wanted = {"version": VERSION, "shape": asdict(shape), "seed": seed}
    if note.is_file():
        known = json.loads(note.read_text(encoding="utf-8"))
        if {key: known.get(key) for key in wanted} == wanted and known["experts"] >= experts:
            return Models(folder, shape, known["experts"], known["threshold"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    models = Models(folder, shape, experts, 0.0)
    threshold = _write(models, seed)
    write_text_atomic(note, json.dumps({**wanted, "experts": experts, "threshold": threshold}, indent=1) + "\n")
    return Models(folder, shape, experts, threshold)


def _write(models: Models, seed: int) -> float:
    tensors = models.shape.tensors()
    weights = [TensorSpec(name, shape, BF16) for name, shape in tensors.items()]
    moments = [TensorSpec(name, shape, F32) for name, shape in tensors.items()]
    pool = _Pool(seed)
    scores: list[torch.Tensor] = []  # v·Δ² of every 997th element of each block
    step = slice(None, None, 997)
    with ExitStack() as stack:
        base = _Checkpoint(models.base, models.shape, weights, stack)
        experts = [_Checkpoint(models.expert(m), models.shape, weights, stack) for m in range(models.experts)]
        options = {"format": "pt"}
        files = [
            stack.enter_context(SafetensorsWriter(models.expert(m) / MOMENTS, moments, options)) for m in range(models.experts)
        ]
        for name, shape in tensors.items():
            for start, stop in row_blocks(shape, BLOCK):
                block = _Block(name, shape, start, stop)
                theta = pool.weights(block)
                stored = theta.to(torch.bfloat16)
                base.write(block, stored)
                for m, (expert, file) in enumerate(zip(experts, files, strict=True)):
                    moved = pool.edit(block, m).add_(theta).to(torch.bfloat16)
                    v = pool.moments(block, m)
                    expert.write(block, moved)
                    file.write_rows(name, start, v.numpy())
                    if m == 0:
                        difference = moved.view(-1)[step].double() - stored.view(-1)[step].double()
                        scores.append(v.view(-1)[step].double() * difference**2)
    return float(np.quantile(torch.cat(scores).numpy(), 0.6))


@dataclass(frozen=True)
class _Block:
    name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> tuple[int, int]:
        return self.stop - self.start, matrix_shape(self.shape)[1]


class _Pool:
    """Normals, drawn once; slices of them, scaled, are all that the models are made of."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.normals = torch.from_numpy(np.random.default_rng(seed).standard_normal(POOL, dtype=np.float32))
        self._buffers: dict[str, torch.Tensor] = {}

    def weights(self, block: _Block) -> torch.Tensor:
        """θ₀ of a block before it is rounded: float32 (r, C). Norms lie around 1."""
        z = self._slice(block, "weights").mul_(WEIGHT_SPREAD)
        return z.add_(1.0) if len(block.shape) == 1 else z

    def edit(self, block: _Block, expert: int) -> torch.Tensor:
        """Δ of a block: float32 (r, C). Some rows were trained more than others."""
        scale = torch.from_numpy(self._factors(block.name, f"edit{expert}", matrix_shape(block.shape)[0], 0.5))
        return self._slice(block, f"edit{expert}").mul_(scale[block.start : block.stop, None].mul(EDIT_SPREAD))

    def moments(self, block: _Block, expert: int) -> torch.Tensor:
        """v of a block: float32 (r, C), a factor of its row times one of its column times z², 0 for 5 %."""
        rows, cols = matrix_shape(block.shape)
        row = self._factors(block.name, f"rows{expert}", rows, STRUCTURE)[block.start : block.stop]
        column = self._factors(block.name, f"columns{expert}", cols, STRUCTURE)
        z = self._slice(block, f"moments{expert}")
        z.masked_fill_(z.abs() < ZERO_BELOW, 0.0).square_()
        return z.mul_(torch.from_numpy(row)[:, None].mul(MOMENT_SCALE)).mul_(torch.from_numpy(column))

    def _slice(self, block: _Block, role: str) -> torch.Tensor:
        """Normals of a block's shape, a copy that the next block of this role overwrites.

        The place in the pool differs from tensor to tensor, block to block and role to role.
        """
        rows, cols = block.size
        place = self._number(block.name, f"{role}/{block.start}") % (POOL - rows * cols)
        if role not in self._buffers:
            self._buffers[role] = torch.empty(BLOCK)
        return self._buffers[role][: rows * cols].copy_(self.normals[place : place + rows * cols]).view(rows, cols)

    def _factors(self, name: str, role: str, count: int, spread: float) -> np.ndarray:
        """Log-normal factors, float32 (count,), of a tensor."""
        draws = np.random.default_rng(self._number(name, role)).standard_normal(count)
        return np.exp(spread * draws).astype(np.float32)

    def _number(self, name: str, role: str) -> int:
        return zlib.crc32(f"{self.seed}/{name}/{role}".encode())


class _Checkpoint:
    """A checkpoint folder under way: shards of at most 5 GB, index, configuration."""

    def __init__(self, folder: Path, shape: Shape, specs: Sequence[TensorSpec], stack: ExitStack) -> None:
        folder.mkdir(parents=True)
        shards = plan_shards(specs)
        self._writers: dict[str, SafetensorsWriter] = {}
        for file, part in shards:
            writer = stack.enter_context(SafetensorsWriter(folder / file, part, {"format": "pt"}))
            self._writers |= {spec.name: writer for spec in part}
        write_index(folder, shards)
        shape.config().save_pretrained(folder)

    def write(self, block: _Block, rows: torch.Tensor) -> None:
        self._writers[block.name].write_rows(block.name, block.start, Rows.of(rows).held)
