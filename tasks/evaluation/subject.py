"""A model to be benchmarked: what it is known by, and where whoever benchmarks it finds it."""

from collections.abc import Sequence
from pathlib import Path

from ota_core.artifact import ArtifactRef
from ota_core.errors import StorageError
from ota_core.frozen import Frozen
from ota_core.plan.inputs import ExpertInput, MergeInputs
from tasks.artifacts.store import store_of
from tasks.settings import Places, allow_path
from tasks.storage import models as storage
from tasks.storage.models import Fetched, digest_folder, is_s3


class Subject(Frozen):
    """A model to be benchmarked."""

    name: str
    role: str
    capability: str | None = None
    path: Path | None
    """Its folder on this machine; None for one that lies elsewhere, and is brought here when it is to be scored."""
    digest: str
    location: str | None = None
    """Where another machine finds it: ``s3://…``, ``org/name@commit`` or a folder that both see."""
    artifact: ArtifactRef | None = None
    """A model that this tool merged."""


def subjects_of(inputs: MergeInputs, fetched: Sequence[Fetched]) -> dict[str, Subject]:
    """Base and experts of a merge, by ``base`` and ``expert/<name>``. fetched: base first, what the inputs were assembled from."""
    models = inputs.models
    found = {}
    for model, one in zip(models, fetched, strict=True):
        role, capability = ("expert", model.capability) if isinstance(model, ExpertInput) else ("base", None)
        key = f"expert/{model.name}" if role == "expert" else "base"
        found[key] = fetched_subject(model.name, role, one, capability)
    return found


def fetched_subject(name: str, role: str, fetched: Fetched, capability: str | None = None) -> Subject:
    """A checkpoint that was fetched as something to benchmark."""
    return Subject(
        name=name, role=role, capability=capability, path=fetched.path, digest=fetched.digest, location=fetched.resolved
    )  # fmt: skip


def bring_model(subject: Subject, places: Places) -> Path:
    """The model on this machine, the same that whoever asks for its scores means. Raises ArtifactError, StorageError."""
    if subject.artifact is not None:
        return store_of(places).local_path(subject.artifact)
    if subject.location is None:
        raise StorageError(f"{subject.name}: the model lies in a folder of another machine; keep it in s3://…")
    fetched = storage.fetch(subject.location, cache=places.cache)
    if fetched.digest != subject.digest:
        raise StorageError(
            f"{subject.location} ({subject.name}) is not what it was when the run began: its digest is {fetched.digest}, expected "
            f"{subject.digest}; run again"
        )
    return fetched.path


def bring_data(data: str | None, places: Places) -> Path | None:
    """A suite's data as a folder of this machine. Raises StorageError."""
    if data is None or not is_s3(data):
        if data:
            allow_path(data, "data_dir")
        return Path(data).expanduser() if data else None
    return storage.download_folder(data, cache=places.cache)[0]


def merged_subject(places: Places, name: str, merged: ArtifactRef, *, benchmark: bool = True) -> Subject:
    """A merged model as something to benchmark; its digest is of its weights, configuration and tokenizer.

    Without a ``benchmark`` on this machine a model in S3 stays there if its record tells the digest: it was hashed where it was made.
    """
    store = store_of(places)
    known = store.read_record(merged).provenance.get("digest")
    if known and is_s3(merged.uri) and not benchmark:
        return Subject(name=name, role="merge", path=None, digest=known, artifact=merged)
    folder = store.local_path(merged)
    digest = known or digest_folder(folder, cache=places.cache)[0]
    return Subject(name=name, role="merge", path=folder, digest=digest, artifact=merged)
