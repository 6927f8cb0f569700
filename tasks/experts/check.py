"""The stage that looks into an expert's weights and second moments. Its verdicts are artifacts: nothing is read twice."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from ota_core.analysis.health import check_expert
from ota_core.artifact import canonical_json, fingerprint
from ota_core.compute.stream import Progress, Stream, parse_memory
from ota_core.errors import CheckpointError, MomentsError, StorageError
from ota_core.files.checkpoint import Checkpoint, adapter_of
from ota_core.moments import Moments, find_moments
from ota_core.plan.inputs import ModelInput, optimizer_facts
from tasks.artifacts.store import BuildResult, store_of
from tasks.merging.architecture import expert_moments
from tasks.merging.inputs import MOMENTS_OF_WEIGHTS
from tasks.settings import Places
from tasks.storage import models as storage
from tasks.storage.cache import HASH_THREADS
from tasks.storage.layout import manifest_sha256, sha256_file
from tasks.storage.models import EXPERT_JSON, Fetched

PROBLEMS_FILE = "problems.json"


def check(
    places: Places, expert: str | Fetched, base: str | Fetched, *, needs_moments: bool = True, missing_curvature: str = "error",
    memory: str = "2GiB", progress: Progress | None = None,
) -> list[str]:  # fmt: skip
    """What is wrong with an expert's weights and second moments (``ota_core.analysis.health.check_expert``); an empty list for a healthy one.

    expert, base: where they lie, or as they were fetched already. What was read once is an artifact of the kind ``checks`` and is not read
    again. What cannot be fetched or opened is found anew each time: it may be there tomorrow. Raises OtaError where not the expert is at
    fault: when the base cannot be read, nobody answers, or access is denied to more than some of the expert's files.
    """
    trusted = _whole(base, places)
    try:
        fetched = _whole(expert, places, manifest=True)
    except StorageError as error:
        _raise_unless_own(error, expert if isinstance(expert, str) else expert.resolved)
        return [str(error)]
    sums = _sums_to_verify(fetched)
    config: dict[str, Any] = {"needs_moments": needs_moments}
    config |= {"optimizer": json.dumps(optimizer_facts(fetched.path), sort_keys=True)}
    config |= {"missing_curvature": missing_curvature} if needs_moments else {}
    config |= {"sha256": hashlib.sha256(canonical_json(sums).encode()).hexdigest()} if sums else {}
    placeless = partial(_placeless, {fetched.path: "expert", trusted.path: "base"})
    inputs = {"base": trusted.digest, "expert": fetched.digest}
    identity, store = fingerprint("checks", config, inputs), store_of(places)
    ref = store.find("checks", identity)
    if ref is None:
        with ExitStack() as stack:
            base_tensors = stack.enter_context(closing(Checkpoint(trusted.path)))
            try:
                tensors, moments = _opened(fetched, trusted.path, stack)
            except (CheckpointError, MomentsError) as error:
                return [placeless(problem) for problem in error.problems]

            def build(folder: Path) -> BuildResult:
                stream = Stream(memory=parse_memory(memory), progress=progress)
                found = check_expert(
                    base_tensors,
                    tensors,
                    moments,
                    stream=stream,
                    needs_moments=needs_moments,
                    missing_curvature=missing_curvature,
                )
                problems = [placeless(problem) for problem in [*_damaged(fetched.path, sums), *found]]
                (folder / PROBLEMS_FILE).write_text(json.dumps(problems, indent=1) + "\n", encoding="utf-8")
                sources = {"expert": fetched.resolved, "base": trusted.resolved}
                return BuildResult(results={"problems": problems}, provenance=sources)

            ref = store.produce("checks", identity, config=config, inputs=inputs, build=build)
    return list(json.loads((store.local_path(ref) / PROBLEMS_FILE).read_text(encoding="utf-8")))


def _placeless(names: Mapping[Path, str], problem: str) -> str:
    """A problem without the folders where the models lie now: a verdict is about contents, which may lie elsewhere the next time."""
    for path, name in names.items():
        problem = problem.replace(f"{path} ({name})", f"the {name}").replace(f"{path}/", "").replace(str(path), f"the {name}")
    return problem


def _whole(model: str | Fetched, places: Places, *, manifest: bool = False) -> Fetched:
    """A model with all of its bytes on this machine: of one that is streamed from S3, only outlines are here. Raises StorageError."""
    if isinstance(model, Fetched) and model.digest.startswith("xxh3:"):
        return model
    source = model if isinstance(model, str) else model.resolved
    return storage.fetch(source, cache=places.cache, require_expert_json=manifest)


def _raise_unless_own(error: StorageError, expert: str) -> None:
    """Raise what is not the expert's own fault. Denied are files of its own only where its manifest, which was found before, can be read."""
    if error.reason == "unavailable":
        raise error
    if error.reason == "denied" and storage.is_s3(expert):
        try:
            storage.read_bytes(storage.join(expert, EXPERT_JSON))
        except StorageError:
            raise error from None


def _sums_to_verify(fetched: Fetched) -> dict[str, str]:
    """SHA-256 by name that nobody has compared yet: a download is verified on its way, a folder of this machine is not."""
    if storage.is_s3(fetched.resolved) or fetched.expert is None:
        return {}
    return manifest_sha256(fetched.expert, EXPERT_JSON)


def _damaged(folder: Path, sums: Mapping[str, str]) -> list[str]:
    def look(name: str) -> str | None:
        return sha256_file(folder / name) if (folder / name).is_file() else None

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        seen = dict(zip(sums, pool.map(look, sums), strict=True))
    return [
        f"{name} is damaged or was replaced: {EXPERT_JSON} says sha256 {expected}, its content has {seen[name] or 'gone'}; copy it again"
        for name, expected in sums.items()
        if seen[name] != expected
    ]


def _opened(fetched: Fetched, base: Path, stack: ExitStack) -> tuple[Checkpoint, Moments | None]:
    """Raises CheckpointError or MomentsError."""
    if adapter_of(fetched.path) is not None:
        model = ModelInput(name="expert", path=fetched.path, under=ModelInput(name="base", path=base))
        path = fetched.path / MOMENTS_OF_WEIGHTS  # a trainer's state there is of the factors
        path_of_v = path if path.is_file() else None
    else:
        model, path_of_v = ModelInput(name="expert", path=fetched.path), find_moments(fetched.path)
    tensors = stack.enter_context(closing(model.opened()))
    if path_of_v is None:
        return tensors, None
    return tensors, stack.enter_context(closing(expert_moments(path_of_v, fetched.path, base)))
