"""The commands that talk to S3 and MLflow: push, promote, publish, gc, sync."""

import json
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from ota_core.artifact import read_record
from tasks.storage import models as storage
from tasks.storage import s3
from tests.chaos.facts import RECORD, Facts, in_mlflow, of_folder, of_prefix
from tests.chaos.scene import LIGHT, TRACKED, Scene, whole_artifacts

BUCKET = "s3://chaos"
REGISTERED = "ota-merged"
OLD_DAYS = 30


class Served(Scene):
    """A scene with a prefix of its own in S3."""

    @property
    def prefix(self) -> str:
        return f"{BUCKET}/{self.name.replace(' ', '-')}"

    @property
    def database(self) -> Path:
        return self.folder / "home" / "tracking" / "mlflow.db"

    def lay(self) -> None:
        super().lay()
        if s3.objects_below(self.prefix):
            s3.delete_prefix(self.prefix)


class Push(Served):
    """An expert into S3, of which one file goes in parts.

    Parts of an upload that was killed stay for a day: nobody can tell it from one under way. The next push ends it after that.
    """

    name = "push"
    share = 3
    preload = (*LIGHT, "prefect.events", "tasks.orchestration.events")

    @property
    def target(self) -> str:
        return self.prefix

    @property
    def words(self) -> list[str]:
        options = [
            "--capability",
            "math",
            "--base-model",
            "base",
            "--name",
            "one",
            "--trained-at",
            "2026-11-20",
            "--without-moments",
        ]
        return ["push", str(self.inputs / "large"), self.target, *options]

    def facts(self) -> Facts:
        return of_prefix(self.target)

    def half(self) -> Iterator[str]:
        found = self.facts()
        if "math/one/expert.json" in found:
            yield from (f"expert.json is there: {problem}" for problem in self.differs())
        wrong = [name for name, value in found.items() if self.reference.get(name) != value]
        yield from (f"{name} can be read and is not whole" for name in wrong)


class PushToFolder(Push):
    """The same into a folder."""

    name = "push to a folder"
    share = 3

    @property
    def target(self) -> str:
        return str(self.folder / "experts")

    def facts(self) -> Facts:
        return of_folder(Path(self.target))

    def half(self) -> Iterator[str]:
        if self.facts():
            yield from self.differs()


class Promote(Served):
    """Version 2 becomes champion in the place of version 1."""

    name = "promote"
    share = 3
    preload = TRACKED

    @property
    def words(self) -> list[str]:
        return ["promote", "2", "--reason", "by chaos", "--home", str(self.folder / "home")]

    @property
    def env(self) -> dict[str, str]:
        return {"OTA_HOME": str(self.folder / "home")}

    @property
    def model(self) -> Path:
        """A merged model, which every version is of."""
        return self.root / "model" / "work" / "out"

    def source(self, number: int) -> str:
        """Where the weights of a version lie."""
        return str(self.folder / f"model-{number}")

    def make(self) -> None:
        """Two versions by the tracking's own functions in a process of its own; the first is champion."""
        for number in (1, 2):
            shutil.copytree(self.model, self.folder / f"model-{number}")
        in_child(_two_versions, str(self.database.parent), self.source(1), self.source(2))

    def facts(self) -> Facts:
        return in_mlflow(self.database)

    def half(self) -> Iterator[str]:
        champion = self.facts().get(f"alias champion of {REGISTERED}")
        if champion not in ("1", "2"):
            yield f"the champion is version {champion}"


class Publish(Promote):
    """The same, and it is copied within S3, with a pointer to it."""

    name = "publish"
    share = 3

    @property
    def words(self) -> list[str]:
        return [*super().words, "--publish", f"{self.prefix}/published"]

    def source(self, number: int) -> str:
        return f"{BUCKET}/models/{number}"

    def make(self) -> None:
        for number in (1, 2):
            if not storage.exists(storage.join(self.source(number), RECORD)):
                storage.upload_folder(self.model, self.source(number), last=RECORD)
        in_child(_two_versions, str(self.database.parent), self.source(1), self.source(2))

    def facts(self) -> Facts:
        return super().facts() | {f"published/{name}": value for name, value in of_prefix(f"{self.prefix}/published").items()}

    def half(self) -> Iterator[str]:
        yield from super().half()
        found = of_prefix(f"{self.prefix}/published")
        version = {name: value for name, value in found.items() if "/2/" in name}
        wanted = {name.removeprefix("published/"): value for name, value in self.reference.items() if "/2/" in name}
        if any(name.endswith(RECORD) for name in version) and version != wanted:
            yield f"the record is there, and {sorted(set(wanted) ^ set(version))} differ"
        if any(name.endswith("latest.json") for name in found) and version != wanted:
            yield "latest.json points to what is not whole"


class PublishToFolder(Publish):
    """The same from and to folders."""

    name = "publish to a folder"
    share = 2
    source = Promote.source
    make = Promote.make

    @property
    def words(self) -> list[str]:
        return [*Promote.words.fget(self), "--publish", str(self.folder / "published")]  # type: ignore[attr-defined]

    def facts(self) -> Facts:
        return Promote.facts(self) | of_folder(self.folder / "published", "published/")

    def half(self) -> Iterator[str]:
        yield from Promote.half(self)
        found = of_folder(self.folder / "published", "published/")
        if any("/2/" in name for name in found):
            wanted = {name for name in self.reference if "/2/" in name}
            if {name for name in found if "/2/" in name} != wanted:
                yield "a published version can be found and is not whole"
        elif found:
            yield "latest.json points to nothing"


class Collect(Served):
    """``ota gc --delete``: of five old merges one is the champion's and stays."""

    name = "gc"
    share = 3
    preload = TRACKED

    @property
    def words(self) -> list[str]:
        return ["gc", "--delete", "--days", "7", "--home", str(self.folder / "home")]

    @property
    def artifacts(self) -> Path:
        return self.folder / "home" / "artifacts"

    def make(self) -> None:
        merged = self.artifacts / "merged"
        merged.mkdir(parents=True)
        for number in range(1, 6):
            identity = f"{number:032x}"
            shutil.copytree(self.root / "model" / "work" / "out", merged / identity)
            _age(merged / identity, identity)
        in_child(_two_versions, str(self.database.parent), str(merged / f"{1:032x}"), str(merged / f"{2:032x}"))
        with closing(sqlite3.connect(self.database)) as base, base:
            old = int((time.time() - OLD_DAYS * 86400) * 1000)
            base.execute("UPDATE runs SET start_time = ?, end_time = ?", (old, old))
            base.execute("DELETE FROM tags WHERE key = 'last_logged'")
            base.execute("DELETE FROM registered_model_aliases WHERE alias = 'challenger'")

    def facts(self) -> Facts:
        return in_mlflow(self.database) | of_folder(self.artifacts, "artifacts/")

    def half(self) -> Iterator[str]:
        yield from whole_artifacts(self.artifacts, self.reference, self.volatile)
        gone = [number for number in (1, 2) if not (self.artifacts / "merged" / f"{number:032x}").is_dir()]
        for number in gone:
            if f"version {number} of {REGISTERED}: tag weights_deleted" not in self.facts():
                yield f"version {number} lost its weights, and MLflow does not say so"


class Sync(Served):
    """``ota sync`` of a merge that an earlier run could not log."""

    name = "sync"
    share = 2
    preload = TRACKED

    @property
    def words(self) -> list[str]:
        return ["sync", "--home", str(self.folder / "home")]

    def make(self) -> None:
        home = self.folder / "home"
        in_child(_blank, str(self.database.parent))
        in_child(merge_waits, str(home))

    def facts(self) -> Facts:
        return in_mlflow(self.database) | of_folder(self.folder / "home" / "unsent", "unsent/")

    def half(self) -> Iterator[str]:
        yield from half_logged(self.facts(), self.reference, self.volatile)


class SyncAtFirst(Sync):
    """The same where MLflow's database is not there yet."""

    name = "sync into a new database"
    share = 1

    def make(self) -> None:
        in_child(merge_waits, str(self.folder / "home"))


class SyncSearch(Sync):
    """``ota sync`` of a search whose server went away after its first trial."""

    name = "sync of a search"
    share = 1

    def make(self) -> None:
        in_child(search_waits, str(self.folder / "home"))


def half_logged(found: Facts, reference: Facts, volatile: set[str]) -> Iterator[str]:
    """Runs that read FINISHED and lack something."""
    for name, value in found.items():
        if name.endswith(": status") and value == "FINISHED":
            label = name.removesuffix("status")
            lacks = [one for one in reference if one.startswith(label) and one not in found]
            if lacks:
                yield f"{name} is FINISHED without {lacks[0]}"


def in_child(function: object, *arguments: str) -> None:
    """Call it in a process of its own: MLflow keeps connections to a database that will be replaced."""
    code = code_of_child(function, *arguments)
    assert code == 0, f"{function} ended with {code}"


def code_of_child(function: object, *arguments: str) -> int | None:
    """The exit code of a process that calls it."""
    import multiprocessing

    process = multiprocessing.get_context("forkserver").Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def _blank(tracking: str) -> None:
    from mlflow import MlflowClient

    Path(tracking).mkdir(parents=True, exist_ok=True)
    MlflowClient(tracking_uri=f"sqlite:///{tracking}/mlflow.db").search_experiments()


def _two_versions(tracking: str, first: str, second: str) -> None:
    from tasks.registry import promotion
    from tasks.tracking.merge import log_merge
    from tests.tasks.tracking.made_up import a_merge

    root = Path(tracking)
    root.mkdir(parents=True)
    for number, place in enumerate((first, second), 1):
        log_merge(a_merge(f"merge-{number}", model_uri=place, children=[], table=[]), root=root)
    promotion.promote("1", by="chaos", reason="the first", root=root)


def merge_waits(home: str) -> None:
    """A merge that is kept for MLflow."""
    from tasks.tracking import outbox
    from tests.tasks.tracking.made_up import a_merge

    os.environ.pop("MLFLOW_TRACKING_URI", None)
    outbox._keep(outbox.Unsent(store=None, what=outbox.KeptMerge(run=a_merge("one"))), Path(home))


def search_waits(home: str) -> None:
    """A search of two trials that is kept for MLflow, which knows the first one already."""
    from tasks.experiments.search.log import search_run, with_trials
    from tasks.tracking import outbox
    from tasks.tracking.kept_run import log_part
    from tasks.tracking.store import embedded
    from tests.tasks.tracking.test_kept_run import PARAMS, TUNED, a_search

    os.environ.pop("MLFLOW_TRACKING_URI", None)
    begun = search_run("a search", "key", PARAMS, None)
    log_part(with_trials(begun, TUNED, TUNED.trials[:1]), embedded(Path(home) / "tracking"))
    outbox._keep(outbox.Unsent(store=None, what=a_search("key")), Path(home))


def next_run(home: str, moment: str) -> None:
    """Another merge is logged to the same database, and this process dies then."""
    import mlflow  # noqa: F401 - points of what is not there are not installed

    from tasks.tracking.outbox import tell
    from tests.chaos.points import Death, dies_at, install
    from tests.tasks.tracking.made_up import a_merge

    os.environ.pop("MLFLOW_TRACKING_URI", None)
    install(dies_at(Death.parse(moment)), Path(home))
    tell(a_merge("next", children=[], table=[]), home=Path(home), root=Path(home) / "tracking")


def _age(folder: Path, identity: str) -> None:
    """As if it had been made, and last used, a month ago."""
    when = time.time() - OLD_DAYS * 86400
    known = json.loads((folder / RECORD).read_text())
    known["fingerprint"], known["kind"] = identity, "merged"
    known["provenance"]["produced_at"] = datetime.fromtimestamp(when, UTC).isoformat(timespec="seconds")
    (folder / RECORD).write_text(json.dumps(known, indent=2) + "\n")
    read_record(folder)
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (when, when))
