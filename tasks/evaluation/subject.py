"""A model to be benchmarked: what it is known by, and where whoever benchmarks it finds it."""

from collections.abc import Sequence
from pathlib import Path

from ota_core.artifact import ArtifactRef
from ota_core.errors import StorageError
from ota_core.files.checkpoint import GGUF
from ota_core.frozen import Frozen
from ota_core.plan.inputs import ExpertInput, MergeInputs, ModelInput
from tasks.artifacts.store import store_of
from tasks.merging.gguf_companions import gguf_companions
from tasks.settings import Places, allow_path
from tasks.storage import models as storage
from tasks.storage.cache import appearing, locked, note_use
from tasks.storage.models import Fetched, digest_folder, is_s3

WRITTEN = "written"
"""Folder of the cache with models that transformers cannot load as they are: adapters merged into their bases, GGUF files."""


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
    under: "Subject | None" = None
    """What it is an adapter of; ``digest`` is then of both, and ``path`` None, as of a GGUF file: it is written when it is to be scored."""
    own_digest: str | None = None
    """Of the adapter alone, where it is one."""


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
    under = fetched.under and fetched_subject("base", "base", fetched.under)
    return Subject(
        name=name, role=role, capability=capability, path=None if under or _is_gguf(fetched.path) else fetched.path, digest=fetched.digest,
        location=fetched.resolved, under=under, own_digest=fetched.own_digest,
    )  # fmt: skip


def bring_model(subject: Subject, places: Places) -> Path:
    """The model on this machine, the same that whoever asks for its scores means. Raises ArtifactError, StorageError."""
    if subject.artifact is not None:
        return store_of(places).local_path(subject.artifact)
    if subject.location is None:
        raise StorageError(f"{subject.name}: the model lies in a folder of another machine; keep it in s3://…")
    fetched = storage.fetch(subject.location, cache=places.cache)
    expected = subject.own_digest or subject.digest
    if fetched.digest != expected:
        raise StorageError(
            f"{subject.location} ({subject.name}) is not what it was when the run began: its digest is {fetched.digest}, expected "
            f"{expected}; run again"
        )
    if subject.under is None and not _is_gguf(fetched.path):
        return fetched.path
    base = None if subject.under is None else subject.under.path or bring_model(subject.under, places)
    return whole_model(fetched.path, base, subject.digest, places)


def _is_gguf(folder: Path) -> bool:
    return not (folder / "model.safetensors").is_file() and any(folder.glob(f"*{GGUF}"))


def whole_model(path: Path, base: Path | None, digest: str, places: Places) -> Path:
    """A base with an adapter on it, or a GGUF file, as a folder of the cache that transformers loads, in the base's own types. digest: of all."""
    from ota_core.engine.engine import merge_into
    from ota_core.recipe.recipe import parse_recipe

    folder = places.cache / WRITTEN / digest.rpartition(":")[2]
    with locked(places.cache, f"written {folder.name}"):
        if not folder.is_dir():
            under = None if base is None else ModelInput(name="base", path=base)
            companions = gguf_companions(path, places.cache) if base is None else None
            model = ExpertInput(name="model", path=path, under=under, companions=companions)
            recipe = parse_recipe({"merge_method": "linear", "models": [{"model": str(path)}]})
            with appearing(folder) as temporary:
                merge_into(temporary, recipe, MergeInputs(base=None, experts=(model,)))
        note_use(folder)
    return folder


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
