"""What ``ota inspect`` says. Nothing here reads weights."""

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from ota_core.artifact import RECORD, read_record
from ota_core.errors import ArtifactError, CheckpointError, OtaError
from ota_core.files.byte_source import SourceOf
from ota_core.files.checkpoint import Checkpoint, adapter_of, weight_files
from ota_core.files.safetensors_io import FORMAT_KEY, SafetensorsFile
from ota_core.moments import choice_in, find_moments, how_estimated, moments_files, steps_in_words
from ota_core.moments.compression import compression_of, kept_as_trained, label_of
from ota_core.plan.masks import MaskFile
from ota_core.reading import quoted
from tasks.merging.architecture import expert_moments
from tasks.merging.composed import parts_of
from tasks.settings import places
from tasks.storage.models import fetch, is_s3
from tasks.storage.streaming.streams import Streams

# What may be read of models in S3 to describe them: headers, steps, compressed second moments.
LITTLE = 256 * 2**20


def counted(number: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def binary_size(count: float) -> str:
    """Bytes with two decimals of the largest unit that fits, up to GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    raise AssertionError


def describe_source(source: str, home: Path | None) -> list[str]:
    """What a checkpoint (a folder, ``s3://…`` or a Hugging Face id), a file of second moments or masks, or an artifact holds.

    Of a checkpoint in S3 only the headers are read. Raises OtaError when it is none of these.
    """
    path = Path(source).expanduser()
    if path.exists():
        return describe_path(path)
    if len(parts := parts_of(source, None)) > 1:
        return [line for part in parts for line in describe_source(part, home)]
    if not is_s3(source) and (path.is_absolute() or source.count("/") != 1 or source.startswith(".")):
        raise CheckpointError(
            f"{source} does not exist; expected a checkpoint, a file of second moments or masks, or an artifact"
        )
    cache = places(home).cache
    if not is_s3(source):
        return _describe_checkpoint(fetch(source, cache=cache).path)
    with Streams(cache=cache, memory=LITTLE, may_download=False) as streams:
        return _describe_checkpoint(streams.model(source).path, streams)


def describe_path(path: Path) -> list[str]:
    """The same for what lies on this machine."""
    if path.is_file():
        return _describe_file(path)
    lines = _describe_record(path) if (path / RECORD).exists() else []
    ours = [file for file in sorted(path.glob("*.safetensors")) if _format(file)]
    if ours:
        return lines + [line for file in ours for line in _describe_file(file)]
    return lines if lines and not _has_weights(path) else lines + _describe_checkpoint(path)


def _format(path: Path) -> str:
    """The format that this project gave a safetensors file; empty for others'."""
    with SafetensorsFile(path) as file:
        return file.metadata.get(FORMAT_KEY, "")


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def _describe_record(folder: Path) -> list[str]:
    record = read_record(folder)
    lines = [f"artifact: {record.kind} {record.fingerprint}, complete"]
    lines += [f"  {key}: {_plain(value)}" for key, value in record.config.items()]
    lines += [f"  input {name}: {digest}" for name, digest in record.inputs.items()]
    try:
        densities = _DENSITIES.validate_python(record.results.get("densities", {}))
    except ValidationError as error:
        place = ".".join(map(str, ("results", "densities", *error.errors()[0]["loc"])))
        raise ArtifactError(
            f"{folder / RECORD}: {quoted(place, 80)} is none of the densities that a merge writes; run its stage again"
        ) from None
    return lines + [f"  density {name}: {one.density:.6f} ({one.kept:,} of {one.total:,})" for name, one in densities.items()]


class _Density(BaseModel):
    """What a mask keeps of an expert."""

    density: float
    kept: int
    total: int


_DENSITIES = TypeAdapter(dict[str, _Density])


def _plain(value: Any) -> str:
    """A parameter, or several, without the marks of a programming language; what is not set is left out."""
    if isinstance(value, dict):
        return ", ".join(f"{key}={_plain(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list):
        return "; ".join(_plain(item) for item in value)
    return "not set" if value is None else str(value)


def _describe_checkpoint(folder: Path, streams: Streams | None = None) -> list[str]:
    source_of = streams.source_of if streams else None
    if adapter_of(folder) is not None:
        from tasks.merging.describe_adapter import describe_adapter

        return describe_adapter(folder, source_of)
    checkpoint = Checkpoint(folder, source_of)
    infos = [checkpoint.info(name) for name in checkpoint.names()]
    dtypes = Counter(info.dtype.name for info in infos)
    size = sum(prod(info.shape) * info.dtype.itemsize for info in infos)
    lines = [
        f"checkpoint: {checkpoint.config.get('model_type', 'unknown model type')}, {sum(prod(info.shape) for info in infos):,} parameters "
        f"in {counted(len(infos), 'tensor')} and {counted(len(checkpoint.files), 'file')}, {binary_size(size)}",
        "  data types: " + ", ".join(f"{dtype} ({counted(count, 'tensor')})" for dtype, count in dtypes.items()),
    ]
    if checkpoint.quantised is not None:
        lines.append(f"  quantised: {checkpoint.quantised.label}, counted as dequantised")
    lines += [f"  note: {note}" for note in checkpoint.notes]
    if "tie_word_embeddings" in checkpoint.config:
        lines.append(f"  tied embeddings: {'yes' if checkpoint.config['tie_word_embeddings'] else 'no'}")
    checkpoint.close()
    found = find_moments(folder)
    if found is None:
        return lines
    if streams is not None:
        streams.settle(moments_files(found))
        if streams.unread:
            return [*lines, *(f"  {note}" for note in streams.notes)]
    choice = choice_in(folder)
    return lines + [f"  {line}" for line in [*([choice.note] if choice else []), *_describe_moments(found, folder, source_of)]]


def _describe_file(path: Path) -> list[str]:
    if path.suffix == ".safetensors" and _format(path).startswith("masks/"):
        masks = MaskFile(path)
        total = sum(prod(shape) for shape in masks.shapes.values())
        kept = sum(masks.density(name) * prod(shape) for name, shape in masks.shapes.items())
        share = kept / max(total, 1)
        return [
            f"{path.name}: FFG mask of {masks.header['expert']}: keeps {kept:,.0f} of {total:,} elements (density {share:.6f})"
        ]
    ours = path.suffix == ".safetensors" and bool(_format(path))
    if not ours and _is_weights(path):
        return [f"{path.name} holds weights; the checkpoint that it belongs to:", *_describe_checkpoint(path.parent)]
    return _describe_moments(path, path.parent)


def _is_weights(path: Path) -> bool:
    try:
        return path in weight_files(path.parent)
    except OtaError:
        return False


def _describe_moments(path: Path, folder: Path, source_of: SourceOf | None = None) -> list[str]:
    try:
        moments = expert_moments(path, folder, source_of=source_of)
    except OtaError as error:
        raise type(error)(f"{path} is neither a mask file nor second moments that can be read: {error}") from None
    shapes = moments.shapes()
    steps = steps_in_words(step for name in shapes if (step := moments.step(name)) is not None)
    total = sum(prod(shape) for shape in shapes.values())
    how = label_of(moments) if compression_of(moments) else "in full" if moments.estimated else "as the trainer left them"
    if kept_as_trained(moments):
        how = f"as the trainer left them: row and column means alone ({label_of(moments)})"
    size = path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())
    known = f"β₂ {'unknown' if moments.beta2 is None else format(moments.beta2, '.6g')}, {steps}"
    known += ", needs no bias correction" if moments.unbiased else ""
    known = how_estimated(moments.estimated) if moments.estimated else known
    line = f"{path.name}: second moments of {total:,} parameters in {counted(len(shapes), 'tensor')}, {how}, {binary_size(size)}, {known}"
    moments.close()
    return [line]
