"""An adapter folder from a model and its base: ``ota extract-lora``. One matrix at a time; the factors wait in a file until all are known."""

import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from math import prod, sqrt
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from ota_core.artifact import CARD, write_text_atomic
from ota_core.compute.blocks import matrix_shape, row_blocks
from ota_core.compute.stream import Progress
from ota_core.errors import CheckpointError, OtaError, raise_all
from ota_core.extract.factors import Blocks, distance, factors_of, squared_norm
from ota_core.extract.layers import Layer, layers_of
from ota_core.files.checkpoint import ADAPTER_CONFIG, ADAPTERS, TOKENIZER_PATTERNS, Checkpoint, companion_files
from ota_core.files.lora.find_edits import innermost_first
from ota_core.files.rows import NAMED, Dtype, Rows, dtype_of
from ota_core.files.writer import SafetensorsWriter, TensorSpec

Whole = Literal["embeddings", "norms", "biases"]
_FRONT = "base_model.model."
# Of the budget, for blocks of the difference; the factors and their directions take the rest.
_SHARE = 4

_EXPERTS = (
    "experts are held one by one, as the model stores them: this tool reads them so, PEFT does with a class that has a module for each expert, as "
    "transformers' own had before version 5"
)
_STACKS = "edits of experts are of whole stacks (target_parameters): PEFT loads them from 0.17 on, with transformers from 5 on"


class ExtractOptions(BaseModel):
    """What decides an adapter's bytes."""

    model_config = ConfigDict(frozen=True)

    rank: int = 32
    max_error: float | None = None
    """Take no more ranks than leave this share of a matrix's difference."""
    exact: bool = False
    """Singular values by LAPACK, rather than by a randomised iteration."""
    whole: tuple[Whole, ...] = ()
    """What is stored whole where it changed."""
    dtype: str = "float32"

    def check(self) -> None:
        """Raises OtaError for values out of range."""
        problems = [] if self.rank >= 1 else [f"--rank: got {self.rank}, expected at least 1"]
        if self.max_error is not None and not 0 <= self.max_error < 1:
            problems.append(f"--max-error: got {self.max_error}, expected a share of the difference, at least 0 and below 1")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            problems.append(f"--dtype: got '{self.dtype}', expected float32, bfloat16 or float16")
        raise_all(problems)


class TensorError(BaseModel):
    """How well the adapter holds one tensor's difference."""

    model_config = ConfigDict(frozen=True)

    name: str
    how: Literal["factors", "whole", "left out"]
    rank: int | None
    error: float
    """‖difference − what the adapter holds of it‖ over ‖difference‖."""
    norm: float
    """‖difference‖ (Frobenius)."""
    why: str = ""


class ExtractReport(BaseModel):
    """What an extraction did: each tensor that differs, largest error first, and all of them together."""

    model_config = ConfigDict(frozen=True)

    tensors: list[TensorError]
    error: float
    """Over all tensors, as for one."""
    parameters: int
    unchanged: int
    exact: bool
    notes: list[str] = []


@dataclass
class _Kept:
    """Tensors of the adapter, in one file behind each other until the header can be written."""

    path: Path
    specs: list[TensorSpec] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, shape: tuple[int, ...], dtype: Dtype, parts: Iterable[torch.Tensor]) -> None:
        """A tensor from its rows, in their order."""
        with open(self.path, "ab") as file:
            self.places[name] = file.tell()
            for part in parts:
                Rows.of(part).held.tofile(file)
        self.specs.append(TensorSpec(name, shape, dtype))

    def rename(self, names: dict[str, str]) -> None:
        """Call tensors otherwise from now on."""
        self.specs = [replace(spec, name=names.get(spec.name, spec.name)) for spec in self.specs]
        self.places = {names.get(name, name): place for name, place in self.places.items()}


def extract_into(
    folder: Path, merged: Checkpoint, base: Checkpoint, options: ExtractOptions, *, memory: int, device: str = "cpu", progress: Progress | None = None,
    base_name: str = "", bare: Collection[str] = (),
) -> ExtractReport:  # fmt: skip
    """Write the adapter of ``merged`` over ``base`` into an empty folder, all but its record. Raises OtaError before a number is read.

    bare: parameters that no layer of torch's holds (``Loaded.bare``): of those, PEFT wants ``target_parameters``.
    """
    options.check()
    layers = _checked(merged, base, options, bare)
    kept = _Kept(folder / ".factors")
    found: list[TensorError] = []
    exact, unchanged = True, 0
    factored: dict[str, tuple[Layer, int]] = {}
    saved: list[Layer] = []
    for done, layer in enumerate(layers):
        if progress:
            progress("extract", done, len(layers))
        one = _one(layer, merged, base, options, kept, memory, device)
        merged.drop_pages()
        base.drop_pages()
        if one is None:
            unchanged += 1
            if layer.keep == "bias":
                saved.append(layer)  # all biases of a model are stored, or none
            continue
        result, was_exact = one
        found.append(result)
        exact = exact and was_exact
        if result.how == "factors":
            factored[layer.name] = (layer, result.rank or 0)
        elif result.how == "whole":
            saved.append(layer)
    if progress:
        progress("extract", len(layers), len(layers))
    if not factored and not saved:
        raise OtaError(
            f"{merged.path} and {base.path} differ in nothing that an adapter could hold"
            + (f" ({', '.join(one.name for one in found[:4])} differ; see --whole)" if found else ": they are the same model")
        )
    _write(folder, kept, factored, saved, merged, base, options, base_name)
    norm2 = sum(one.norm**2 for one in found)
    report = ExtractReport(
        tensors=sorted(found, key=lambda one: (-one.error, one.name)),
        error=sqrt(sum((one.error * one.norm) ** 2 for one in found) / norm2) if norm2 else 0.0,
        parameters=sum(prod(spec.shape) for spec in kept.specs), unchanged=unchanged, exact=exact, notes=_notes(layer for layer, _ in factored.values()),
    )  # fmt: skip
    write_text_atomic(folder / CARD, _card(report, options, base_name or str(base.path)))
    return report


def _notes(layers: Iterable[Layer]) -> list[str]:
    held = [layer for layer in layers if ".experts." in layer.name]
    return [text for text, kind in ((_STACKS, "stack"), (_EXPERTS, "matrix")) if any(layer.kind == kind for layer in held)]


def _checked(merged: Checkpoint, base: Checkpoint, options: ExtractOptions, bare: Collection[str]) -> list[Layer]:
    """The tensors of both, and what an adapter can do for each. Raises CheckpointError for models of different forms."""
    layers, problems = layers_of(merged, options.whole, bare), []
    names = set(merged.names())
    missing = sorted(set(base.names()) - names)
    for name in missing[:4]:
        problems.append(f"{merged.path} lacks '{name}', which {base.path} holds")
    for layer in layers:
        if layer.name not in base:
            problems.append(f"{base.path} lacks '{layer.name}', which {merged.path} holds")
            continue
        seen, expected = merged.info(layer.name).shape, base.info(layer.name).shape
        if seen != expected and not (layer.keep == "embedding" and seen[1:] == expected[1:]):
            hint = "; store it with --whole embeddings" if layer.kind == "embedding" and seen[1:] == expected[1:] else ""
            problems.append(
                f"tensor '{layer.name}' has the shape {list(seen)} in {merged.path}, {list(expected)} in {base.path}{hint}"
            )
    raise_all(problems[:8], CheckpointError)
    return layers


def _one(
    layer: Layer, merged: Checkpoint, base: Checkpoint, options: ExtractOptions, kept: _Kept, memory: int, device: str
) -> tuple[TensorError, bool] | None:
    """What the adapter holds of one tensor, and whether singular values are exact; None where the tensor is the base's."""
    info, dtype = merged.info(layer.name), getattr(torch, options.dtype)
    shape = matrix_shape(info.shape)
    if info.shape != base.info(layer.name).shape:
        _keep_whole(layer, merged, kept, dtype, memory)
        return TensorError(name=layer.name, how="whole", rank=None, error=0.0, norm=0.0, why="another number of rows"), True
    blocks = _difference(layer, merged, base, memory, device)
    if layer.why or layer.keep:
        norm = sqrt(squared_norm(blocks))
        if layer.keep and (norm or layer.keep == "bias"):
            _keep_whole(layer, merged, kept, dtype, memory)
        if not norm:
            return None
        how: Literal["whole", "left out"] = "whole" if layer.keep else "left out"
        error = 0.0 if layer.keep else 1.0
        return TensorError(name=layer.name, how=how, rank=None, error=error, norm=norm, why=layer.why), True
    needed = 4 * 4 * prod(info.shape[-2:] if layer.kind == "stack" else shape)
    if options.exact and needed > memory:
        raise OtaError(
            f"--exact: '{layer.name}' takes about {needed / 2**30:.1f} GiB, --memory allows {memory / 2**30:.1f} GiB; give more, or leave --exact away"
        )
    if layer.kind == "stack":
        return _stack(layer, merged, base, options, kept, memory, device)
    found = factors_of(blocks, shape, options.rank, exact=options.exact, largest_error=options.max_error, device=device)
    if found is None:
        return None
    b, a = found.b.to(dtype), found.a.to(dtype)
    error = distance(blocks, b, a, device) / found.norm
    if layer.turned:
        a, b = b.T.contiguous(), a.T.contiguous()
    for part, factor in (("A", a), ("B", b)):
        kept.add(f"{_FRONT}{layer.module}.lora_{part}.weight", tuple(factor.shape), NAMED[options.dtype], [factor])
    rank = a.shape[0]
    return TensorError(name=layer.name, how="factors", rank=rank, error=error, norm=found.norm), found.exact


def _stack(
    layer: Layer, merged: Checkpoint, base: Checkpoint, options: ExtractOptions, kept: _Kept, memory: int, device: str
) -> tuple[TensorError, bool] | None:
    """A stack (E, R, C) of experts' matrices, each by itself: A (E · k, in), expert by expert, and B (out, k · E), whose columns run through the experts
    first, as PEFT's ``ParamWrapper`` has them. All have the largest rank k that one of them needs."""
    dtype, shape = getattr(torch, options.dtype), merged.info(layer.name).shape
    count, rows, cols = shape if len(shape) == 3 else (1, *shape)
    lefts, rights, lost, norm2, exact = [], [], 0.0, 0.0, True
    for expert in range(count):
        blocks = _difference(layer, merged, base, memory, device, rows * expert, rows * (expert + 1))
        found = factors_of(
            blocks, (rows, cols), options.rank, exact=options.exact, largest_error=options.max_error, device=device
        )
        b, a = (torch.zeros(rows, 0), torch.zeros(0, cols)) if found is None else (found.b, found.a)
        b, a = b.to(dtype), a.to(dtype)
        lefts.append(b)
        rights.append(a)
        if found is not None:
            lost += distance(blocks, b, a, device) ** 2
            norm2, exact = norm2 + found.norm**2, exact and found.exact
    rank = max(b.shape[1] for b in lefts)
    if not rank:
        return None
    if layer.turned:
        lefts, rights = [a.T for a in rights], [b.T for b in lefts]
    wide = torch.zeros(lefts[0].shape[0], rank, count, dtype=dtype)
    tall = torch.zeros(count, rank, rights[0].shape[1], dtype=dtype)
    for expert, (b, a) in enumerate(zip(lefts, rights, strict=True)):
        wide[:, : b.shape[1], expert], tall[expert, : a.shape[0]] = b, a
    for part, factor in (("A", tall.reshape(count * rank, -1)), ("B", wide.reshape(-1, rank * count))):
        kept.add(f"{_FRONT}{layer.name}.lora_{part}.weight", tuple(factor.shape), NAMED[options.dtype], [factor])
    norm = sqrt(norm2)
    return TensorError(name=layer.name, how="factors", rank=rank, error=sqrt(lost) / norm, norm=norm), exact


def _difference(
    layer: Layer, merged: Checkpoint, base: Checkpoint, memory: int, device: str, low: int = 0, high: int | None = None
) -> Blocks:
    """The difference of rows low:high block by block; held in memory after the first pass where it takes no more than a quarter of the budget."""
    rows, cols = matrix_shape(merged.info(layer.name).shape)
    shape = ((rows if high is None else high) - low, cols)
    held: list[tuple[int, torch.Tensor]] = []
    small = 4 * prod(shape) * _SHARE <= memory

    def blocks() -> Iterator[tuple[int, torch.Tensor]]:
        if held:
            yield from held
            return
        found = []
        for start, stop in row_blocks(shape, max(1, memory // _SHARE // 32)):
            one = merged.read_rows(layer.name, low + start, low + stop).tensor().to(device).double()
            part = (one - base.read_rows(layer.name, low + start, low + stop).tensor().to(device).double()).float()
            if small:
                found.append((start, part))
            yield start, part
        held.extend(found)

    return blocks


def _keep_whole(layer: Layer, merged: Checkpoint, kept: _Kept, dtype: torch.dtype, memory: int) -> None:
    shape = merged.info(layer.name).shape
    parts = (
        merged.read_rows(layer.name, start, stop).tensor().to(dtype)
        for start, stop in row_blocks(shape, max(1, memory // _SHARE // 8))
    )
    kept.add(f"{_FRONT}{layer.name}", shape, dtype_of(torch.empty(0, dtype=dtype)), parts)


def _write(
    folder: Path, kept: _Kept, factored: dict[str, tuple[Layer, int]], saved: list[Layer], merged: Checkpoint, base: Checkpoint,
    options: ExtractOptions, base_name: str,
) -> None:  # fmt: skip
    kept.rename(_wrapped(layer for layer, _ in factored.values()))
    with SafetensorsWriter(folder / ADAPTERS[0], kept.specs, {"format": "pt"}) as writer, open(kept.path, "rb") as file:
        for spec in kept.specs:
            file.seek(kept.places[spec.name])
            cols = matrix_shape(spec.shape)[1]
            for start, stop in row_blocks(spec.shape, 1 << 20):
                rows = np.fromfile(file, spec.dtype.held, (stop - start) * cols)
                writer.write_rows(spec.name, start, rows.reshape(stop - start, cols))
    kept.path.unlink(missing_ok=True)
    config = adapter_config(factored, saved, merged, options, base_name or str(base.path))
    write_text_atomic(folder / ADAPTER_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    if any(layer.keep == "embedding" for layer in saved):
        held = merged.tokenizer_folder
        for path in companion_files(held, TOKENIZER_PATTERNS):
            target = folder / path.relative_to(held)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())


def _wrapped(layers: Iterable[Layer]) -> dict[str, str]:
    """What factors of stacks are called in the file: PEFT wraps a module once for each of its parameters, the first one innermost."""
    modules: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.kind == "stack":
            modules.setdefault(layer.module, []).append(layer)
    names = {}
    for module, own in modules.items():
        for depth, layer in enumerate(sorted(own, key=lambda one: innermost_first(one.name.rpartition(".")[2]), reverse=True)):
            for part in ("A", "B"):
                names[f"{_FRONT}{layer.name}.lora_{part}.weight"] = f"{_FRONT}{module}{'.base_layer' * depth}.lora_{part}.weight"
    return names


def adapter_config(
    factored: dict[str, tuple[Layer, int]], saved: list[Layer], merged: Checkpoint, options: ExtractOptions, base_name: str
) -> dict[str, Any]:
    """``adapter_config.json`` of PEFT: α is the rank everywhere, so that the factors' product is the edit itself."""
    stacks = sorted(layer.name for layer, _ in factored.values() if layer.kind == "stack")
    ranks = {layer.name if layer.kind == "stack" else layer.module: rank for layer, rank in factored.values()}
    usual = max(ranks.values(), default=options.rank)
    own = {re.escape(module): rank for module, rank in sorted(ranks.items()) if rank != usual}
    tied = bool(merged.config.get("tie_word_embeddings"))
    whole = sorted({layer.module for layer in saved if layer.keep in ("norm", "embedding")})
    architecture = (merged.config.get("architectures") or [""])[0]
    return {
        "peft_type": "LORA", "base_model_name_or_path": base_name, "r": usual, "lora_alpha": usual, "lora_dropout": 0.0, "inference_mode": True,
        "target_modules": sorted(ranks.keys() - set(stacks)), "rank_pattern": own, "alpha_pattern": dict(own), "bias": "all" if any(layer.keep == "bias" for layer in saved) else "none",
        "modules_to_save": whole or None, "fan_in_fan_out": any(layer.turned and layer.kind == "matrix" for layer, _ in factored.values()), "use_rslora": False,
        "use_dora": False, "init_lora_weights": True, "task_type": "CAUSAL_LM" if architecture.endswith("ForCausalLM") else None,
        **({"target_parameters": stacks} if stacks else {}),
        **({"ensure_weight_tying": True} if tied and any(layer.keep == "embedding" for layer in saved) else {}),
    }  # fmt: skip


def _card(report: ExtractReport, options: ExtractOptions, base: str) -> str:
    rows = "\n".join(f"| {one.name} | {one.how} | {one.rank or ''} | {one.error:.4g} |" for one in report.tensors)
    return (
        f"---\nlibrary_name: peft\nbase_model: {base}\n---\n\n# LoRA of rank {options.rank}, extracted\n\nThe difference of a model from {base}, "
        f"by singular value decomposition. What the adapter lacks of the whole difference: {report.error:.4g} of its norm.\n\n"
        f"| tensor | held as | rank | error |\n| --- | --- | --- | --- |\n{rows}\n"
    )
