"""Second moments out of a training's checkpoint into a small folder of their own that can be published: the file, and a card.

The file says in its metadata which weights it belongs to (``ota_core.moments.belongs``), and what else is known of the training.
"""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from ota_core.artifact import CARD, EXPERT_JSON
from ota_core.compute.stream import Progress, Stream, parse_memory
from ota_core.engine.licences import card_head, stated_licence
from ota_core.errors import MomentsError, OtaError, StorageError
from ota_core.files.checkpoint import Checkpoint, read_json
from ota_core.files.place import check_free, made_of, new_folder
from ota_core.files.safetensors_io import SafetensorsFile
from ota_core.moments import Moments, find_moments, how_estimated, moments_files, none_found, open_moments
from ota_core.moments.belongs import WEIGHTS, weights_digest
from ota_core.moments.compression import (
    CompressionReport,
    compression_label,
    is_compressed,
    label_of,
    rank_of,
    save_compressed,
    write_compressed,
)
from ota_core.moments.compression.base import FactoredMoments
from tasks.experts.moments_card import Harvested, moments_card
from tasks.merging.architecture import BaseFolder, expert_moments
from tasks.storage import hub
from tasks.storage import models as storage
from tasks.storage.streaming.streams import Streams

FILE = "exp_avg_sq.safetensors"
HARVESTED = made_of(FILE, CARD)
"""Whether a folder was harvested before, and holds nothing else."""
# What training leaves beside the weights, and the optimizer's name in it.
_RECORDS = (EXPERT_JSON, "training.json")


def harvest(
    source: str,
    out: str,
    *,
    cache: Path,
    method: str = "rank1",
    rank: int | None = None,
    weights: str | None = None,
    base: str | None = None,
    data: Sequence[str] = (),
    licence: str | None = None,
    private: bool = False,
    overwrite: bool = False,
    memory: str = "2GiB",
    progress: Progress | None = None,
) -> Harvested:
    """Make a folder of the second moments in a checkpoint, here, in S3 or as a repository of the Hugging Face hub.

    source: a checkpoint's folder, ``s3://…``, ``org/name``, or a file of second moments. weights: where the weights lie that they belong to,
    by default the source itself. base: the model that training began with. out: a folder, ``s3://…``, or ``org/name`` where no folder
    ``org`` is here. Nothing is written before all is known to be right. Raises OtaError.
    """
    repository = hub.publishes_to(out)
    _check_free(out, repository, overwrite)
    with ExitStack() as stack:
        streams = stack.enter_context(Streams(cache=cache, memory=parse_memory(memory)))
        bring = partial(_brought, streams=streams, cache=cache, progress=progress)
        file = Path(source).expanduser()
        folder = bring(source) if not file.is_file() else file.parent
        found = file if file.is_file() else find_moments(folder)
        if found is None:
            raise MomentsError(none_found(source))
        streams.settle(moments_files(found), partial(progress, "fetch") if progress else None)
        owner = bring(weights) if weights else folder
        original = partial(bring, base) if base else None
        moments = stack.enter_context(closing(_opened(found, owner, original, streams)))
        with closing(Checkpoint(owner, streams.source_of)) as checkpoint:
            digest = weights_digest(checkpoint, moments.shapes())
        facts = _facts(found, folder, owner, source, moments) | _told(base, data, licence)
        stream = Stream(memory=parse_memory(memory), progress=progress, droppable=[moments.drop_pages])

        def fill(into: Path) -> Harvested:
            written, report = _write(moments, into / FILE, method, rank, stream, facts | {WEIGHTS: digest})
            streams.verify()
            done = Harvested(
                uri=out, label=written, weights=digest, parameters=sum(map(_size, moments.shapes().values())),
                bytes=(into / FILE).stat().st_size, sqrt_error=report and report.sqrt_error, facts=facts, notes=streams.notes,
            )  # fmt: skip
            card = moments_card(
                done, source=weights or source, licence=_licence(owner, licence), address=_address(out, repository)
            )
            (into / CARD).write_text(card, encoding="utf-8")
            return done

        if repository is None and not storage.is_s3(out):
            with new_folder(Path(out), overwrite=overwrite, is_output=HARVESTED) as new:
                return fill(new).model_copy(update={"uri": str(Path(out))})
        new = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="harvest-")))
        done = fill(new)
        if repository is not None:
            return done.model_copy(update={"uri": hub.publish(new, repository, private=private)})
        storage.upload_folder(new, out.rstrip("/"), last=FILE)
        return done


def _check_free(out: str, repository: str | None, overwrite: bool) -> None:
    if repository is not None:
        hub.check_publishable(repository, overwrite=overwrite)
    elif not storage.is_s3(out):
        check_free(Path(out), overwrite=overwrite, is_output=HARVESTED)
    elif not overwrite and (there := storage.list_objects(out.rstrip("/"))):
        raise StorageError(
            f"{out} holds {len(there)} objects already, such as {there[0].uri}; choose another prefix or pass --overwrite"
        )


def _brought(source: str, *, streams: Streams, cache: Path, progress: Progress | None) -> Path:
    """The folder of a model on this machine; of one in S3 the outlines."""
    if storage.is_s3(source):
        return streams.model(source).path
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    return storage.fetch(source, cache=cache, progress=partial(progress, "fetch") if progress else None).path


def _opened(found: Path, owner: Path, base: BaseFolder, streams: Streams) -> Moments:
    """Under the names of the weights. What is compressed has them already."""
    moments = open_moments(found, source_of=streams.source_of) if found.suffix == ".safetensors" else None
    if moments is not None and is_compressed(moments):
        return moments
    if moments is not None:
        moments.close()
    return expert_moments(found, owner, base, streams.source_of)


def _write(
    moments: Moments, path: Path, method: str, rank: int | None, stream: Stream, facts: dict[str, str]
) -> tuple[str, CompressionReport | None]:
    """The method as messages name it, and what it lost. Factors that were kept in training are written as they are."""
    if not is_compressed(moments):
        report = write_compressed(moments, path, method=method, rank=rank, stream=stream, facts=facts)
        return compression_label(report.method, report.rank), report
    wanted = compression_label(method, rank)
    if not isinstance(moments, FactoredMoments) or label_of(moments) != wanted:
        raise OtaError(
            f"{moments.path} is compressed with {label_of(moments)} already, and {wanted} was asked for; harvest the full second moments"
            + (", or ask for the same" if isinstance(moments, FactoredMoments) and rank_of(moments) != rank else "")
        )
    save_compressed(moments, path, facts)
    return wanted, None


def _size(shape: tuple[int, ...]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total


def _facts(found: Path, folder: Path, owner: Path, source: str, moments: Moments) -> dict[str, str]:
    """What the file of second moments and the records beside the weights say of the training, as text."""
    said: dict[str, Any] = {}
    if found.suffix == ".safetensors":
        with SafetensorsFile(found) as file:
            said["optimizer"] = file.metadata.get("optimizer")
    for place in dict.fromkeys((folder, owner)):
        for name in _RECORDS:
            record = read_json(place / name) if (place / name).is_file() else {}
            for key in ("optimizer", "base_model", "trained_at", "capability"):
                said[key] = said.get(key) or record.get(key)
    head = card_head(owner)
    said["base_model"] = said.get("base_model") or _listed(head.get("base_model"))
    said["data"] = _listed(head.get("datasets"))
    steps = sorted({step for name in moments.shapes() if (step := moments.step(name)) is not None})
    said["step"] = " to ".join(map(str, dict.fromkeys((steps[0], steps[-1])))) if steps else None
    said["beta2"] = moments.beta2
    if moments.estimated is not None:
        said["origin"] = how_estimated(moments.estimated)
    return {key: str(value) for key, value in said.items() if value not in (None, "")}


def _told(base: str | None, data: Sequence[str], licence: str | None) -> dict[str, str]:
    """What the user says goes before what was found."""
    given = {"base_model": base, "data": ", ".join(data), "license": licence}
    return {key: value for key, value in given.items() if value}


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")


def _licence(owner: Path, given: str | None) -> dict[str, Any]:
    return {"license": given} if given else dict(stated_licence(owner))


def _address(out: str, repository: str | None) -> str:
    """As a recipe names it."""
    return repository or (out if storage.is_s3(out) else Path(out).name)
