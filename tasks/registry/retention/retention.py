"""Which artifacts may go, and their deletion. What nobody can say to be unused stays.

An artifact is kept when one of these holds:

1. Version of a registered model with an alias, or the one that its champion replaced (its tag ``replaced_champion``): the merged model
   of that recipe fingerprint, or at that address. A version that names neither keeps every merged model.
2. Run in MLflow that was started or ended within the days: the merged model of its tag ``recipe_fingerprint``.
3. Written, produced (the record's ``produced_at``) or found by a run (``ArtifactStore.find`` notes it) within the days; temporaries of
   running processes. For surveys, facts and shards the last sign of any part of the same merge counts.
4. What belongs to a merge that 1 to 3 keep, by the digests in the records:
       moments, masks   all their inputs are inputs of that one merge: base, experts, and second moments that lie elsewhere
       scores           of that merge, of its base, or of one of its experts
       data, checkpoint what a kept checkpoint was trained on and from
   A merge's own digest is in its record (merges in parts) or in MLflow (its version, its run). Where the merged model itself lies
   elsewhere or is gone, runs still name the digests of base and experts.
5. Unresolved: scores while a kept merge has no known digest or streamed inputs, whose digests are of listings and not of contents, unless
   they are known to be of a merge that goes; inputs called ``unknown``; records that this version cannot read.

Of the rest, complete artifacts go as unreferenced, parts of merges as left over, folders without a whole record and temporaries as
interrupted work. Kinds checkpoint and data take minutes of training and are collected only where they are asked for.
"""

import shutil
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ota_core.artifact import ArtifactRef, Kind, Record
from ota_core.errors import OtaError
from tasks.artifacts.store import ArtifactStore
from tasks.registry.retention.listing import KINDS, Stored, freed, is_as_listed, is_temporary_of_live_process, list_root
from tasks.registry.retention.references import References, Run, Tracking, Version
from tasks.storage import models as storage
from tasks.storage.cache import USE_NOTED_SECONDS

NOT_UNASKED: frozenset[Kind] = frozenset({"checkpoint", "data"})
DEFAULT_KINDS: frozenset[Kind] = frozenset(KINDS) - NOT_UNASKED
LEAST_DAYS = 1
REFERENCES_SECONDS = 10.0
_PARTS = ("surveys", "facts", "shards")
_TRAINED = ("checkpoint", "data")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Item:
    """An artifact or leftover, and why it stays or goes."""

    stored: Stored
    keep: bool
    why: str

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        one = self.stored
        return {
            "kind": one.kind, "name": one.name, "what": describe(one), "why": self.why, "bytes": one.size,
            "used": one.used.isoformat(timespec="seconds"), "uri": one.uri,
        }  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What would go and what stays, largest first."""

    root: str
    tracking: str
    days: int
    now: datetime
    items: tuple[Item, ...]
    references: References
    notes: tuple[str, ...] = ()

    @property
    def going(self) -> list[Item]:
        return [item for item in self.items if not item.keep]

    @property
    def kept(self) -> list[Item]:
        return [item for item in self.items if item.keep]

    @property
    def frees(self) -> int:
        """Bytes that the deletion gives back; files that something kept links to do not count."""
        return freed(item.stored for item in self.going)


@dataclass
class Outcome:
    """What a deletion did."""

    deleted: list[Item] = field(default_factory=list)
    spared: list[Item] = field(default_factory=list)
    """In use since they were listed."""
    versions: list[str] = field(default_factory=list)
    """Versions of the registered model that lost their weights."""

    @property
    def frees(self) -> int:
        return freed(item.stored for item in self.deleted)


@dataclass(frozen=True)
class Retention:
    """The rule of this module over one store."""

    store: ArtifactStore
    tracking: Tracking
    days: int
    kinds: Collection[Kind] = DEFAULT_KINDS
    now: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __post_init__(self) -> None:
        if self.days < LEAST_DAYS:
            raise OtaError(f"days is {self.days}; expected at least {LEAST_DAYS}: what a run uses now must not be taken from it")

    @property
    def since(self) -> datetime:
        """What was used after this is kept. Last use is noted to the hour, so the hour is added."""
        return self.now - timedelta(days=self.days, seconds=USE_NOTED_SECONDS)

    def plan(self) -> Plan:
        """Judge everything below the root. Deletes nothing. Raises StorageError when MLflow or the root cannot be read."""
        references = self.tracking.references(self.since)  # before the listing: what is made in between is new, and so kept
        stored = list_root(self.store.root)
        items = sorted(self._judge(stored, references), key=lambda item: (-item.stored.size, item.stored.uri))
        return Plan(
            root=self.store.root, tracking=self.tracking.shown, days=self.days, now=self.now, items=tuple(items), references=references,
            notes=tuple(_notes(self.tracking.shown, stored, references)),
        )  # fmt: skip

    def collect(self, plan: Plan, progress: Progress | None = None) -> Outcome:
        """Delete what the plan says, one artifact after the other, each whole or not at all.

        Right before each one it is looked at again, and spared when it was used since the listing. MLflow is asked again before each
        merged model, and some seconds after the last time for what can be computed again. What a break leaves, the next call takes.
        Raises StorageError.
        """
        outcome, known, items, asked = Outcome(), plan.references, plan.going, float("-inf")
        self._mend_tags(plan)
        for done in range(len(items)):
            if progress:
                progress("delete", done, len(items))
            # The tag first, then the look at the aliases: whoever promotes the version now sees the one or is seen by the other.
            versions = [v for v in known.versions if items[done].stored.kind == "merged" and _is_at(v, items[done].stored)]
            marked = [v for v in versions if not v.weights_deleted and v.wanted is None]
            for version in marked:
                self.tracking.mark_deleted(version, True)
            fresh = known
            if items[done].stored.kind == "merged" or time.monotonic() - asked > REFERENCES_SECONDS:
                fresh, asked = self.tracking.references(self.since), time.monotonic()
            if fresh != known:
                again = {one.stored.uri: one for one in self._judge([one.stored for one in plan.items], fresh)}
                items, known = [again[one.stored.uri] for one in items], fresh
            if self._delete(items[done]):
                outcome.deleted.append(items[done])
                outcome.versions += [version.number for version in versions]
                continue
            outcome.spared.append(items[done])
            for version in marked:
                self.tracking.mark_deleted(version, False)
        if progress:
            progress("delete", len(items), len(items))
        return outcome

    def _delete(self, item: Item) -> bool:
        """Whether it is gone: not where something speaks for it now, or it is not as it was listed."""
        one = item.stored
        if item.keep:
            return False
        if not one.temporary:
            ref = ArtifactRef(kind=one.kind, fingerprint=one.name, uri=one.uri)
            return self.store.delete(ref, unless=lambda place: not is_as_listed(one, place))
        if is_temporary_of_live_process(one.name) or not is_as_listed(one, one.uri):
            return False
        shutil.rmtree(one.uri)
        return True

    def _mend_tags(self, plan: Plan) -> None:
        """Take back what an interrupted deletion, or one before the weights were made again, said of weights that are there."""
        there = [item.stored for item in plan.kept if item.stored.kind == "merged" and item.stored.complete]
        for version in plan.references.versions:
            if version.weights_deleted and any(_is_at(version, one) for one in there):
                self.tracking.mark_deleted(version, False)

    def _judge(self, stored: Sequence[Stored], references: References) -> Iterable[Item]:
        judged = _Judge(stored, references, self.since, f"last {self.days} days")
        for one in stored:
            keep, why = judged.verdict(one)
            if not keep and one.kind not in self.kinds:
                keep, why = True, "kind not collected"
            yield Item(one, keep, why)


@dataclass(frozen=True)
class _Merge:
    """What belongs to one kept merge."""

    inputs: frozenset[str]
    digest: str | None

    @property
    def resolved(self) -> bool:
        """Whether the scores of its models can be told from others."""
        return self.digest is not None and all(digest.startswith("xxh3:") for digest in self.inputs)


class _Judge:
    """The verdicts over one listing."""

    def __init__(self, stored: Sequence[Stored], references: References, since: datetime, span: str) -> None:
        self._since, self._span = since, span
        self._last: dict[str, datetime] = {}
        for one in stored:
            if merge := _merge_of(one):
                self._last[merge] = max(one.used, self._last.get(merge, one.used))
        merged = [one for one in stored if one.kind == "merged" and not one.temporary]
        self._complete = {one.name for one in merged if one.complete}
        self._why = {one.name: why for one in merged if (why := self._wanted(one, references))}
        self._digests = _digests(references, merged)
        records = {one.name: one.record for one in merged if one.name in self._why}
        kept = {
            name: _Merge(_inputs(record) if record else frozenset(), self._digests.get(name)) for name, record in records.items()
        }
        self._unresolved = any(not one.resolved for one in kept.values())
        self._going = {digest for name, digest in self._digests.items() if name not in kept}
        named = [_Merge(v.inputs, v.digest) for v in references.versions if v.wanted]
        self._merges = [*kept.values(), *named, *(_Merge(run.inputs, run.digest) for run in references.runs)]
        self._models = {digest for one in self._merges for digest in (*one.inputs, one.digest)}
        self._trained = self._made_of([one for one in stored if one.kind in _TRAINED])

    def verdict(self, one: Stored) -> tuple[bool, str]:
        """(whether it stays, why)."""
        if one.temporary:
            busy = is_temporary_of_live_process(one.name) or one.used >= self._since
            return busy, "being written" if busy else "interrupted work"
        if one.kind == "merged" and one.name in self._why:
            return True, self._why[one.name]
        if self._recent(one):
            return True, f"used in the {self._span}"
        if one.unreadable:
            return True, "record not understood"
        if not one.complete or one.record is None:
            return False, "interrupted work" if one.record is None else "damaged"
        if one.kind in _PARTS:
            finished = _merge_of(one) in self._complete
            return False, "parts of a finished merge" if finished else "interrupted work"
        if one.kind in _TRAINED:
            return (True, "trained on or from") if one.name in self._trained else (False, "unreferenced")
        if one.kind == "merged":
            return False, "unreferenced"
        return self._belongs(one.record)

    def _belongs(self, record: Record) -> tuple[bool, str]:
        if record.kind == "scores":
            model = record.inputs.get("model")
            if model in self._models:
                return True, "belongs to a kept merge"
            unknown = self._unresolved and model not in self._going
        else:
            inputs = _inputs(record)
            if any(inputs <= merge.inputs for merge in self._merges):
                return True, "belongs to a kept merge"
            unknown = "unknown" in inputs or any("unknown" in merge.inputs for merge in self._merges)
        return (True, "reference not resolved") if unknown else (False, "unreferenced")

    def _recent(self, one: Stored) -> bool:
        return self._last.get(_merge_of(one) or "", one.used) >= self._since

    def _wanted(self, one: Stored, references: References) -> str | None:
        """Why a merged model is kept, the strongest reason."""
        names = [v.wanted for v in references.versions if v.wanted and (v.fingerprint == one.name or _is_at(v, one))]
        if names:
            return min(names, key=lambda name: (name != "champion", name))
        if any(run.fingerprint == one.name for run in references.runs):
            return f"run of the {self._span}"
        if self._recent(one):
            return f"used in the {self._span}"
        return "reference not resolved" if any(_leads_nowhere(v) for v in references.versions) else None

    def _made_of(self, trained: Sequence[Stored]) -> set[str]:
        """Fingerprints that kept checkpoints name as what they were made of, to the end."""
        records = {one.name: one.record for one in trained if one.record}
        found: set[str] = set()
        ask = [one.name for one in trained if self._recent(one)]
        while ask:
            record = records.get(ask.pop())
            new = set(record.inputs.values()) - found if record else set()
            found |= new
            ask += new
        return found


def _digests(references: References, merged: Iterable[Stored]) -> dict[str, str]:
    """Merged artifact's fingerprint to its model's digest, where it is known."""
    named: Iterable[Version | Run] = (*references.runs, *references.versions)
    known = {one.fingerprint: one.digest for one in named if one.fingerprint and one.digest}
    for one in merged:
        if one.record and (digest := one.record.provenance.get("digest")):
            known[one.name] = str(digest)
    return known


def _merge_of(one: Stored) -> str | None:
    """The merge that a part is of, by its fingerprint."""
    return one.record.inputs.get("merge") if one.kind in _PARTS and one.record else None


def _inputs(record: Record) -> frozenset[str]:
    """Digests of what it was made of; a merge or mask without a base says ``none`` there."""
    return frozenset(record.inputs.values()) - {"none"}


def _is_at(version: Version, one: Stored) -> bool:
    """Whether a version's weights are those in this very place."""
    if version.uri is None or storage.is_s3(version.uri) != storage.is_s3(one.uri):
        return False
    if storage.is_s3(one.uri):
        return version.uri.rstrip("/") == one.uri
    return Path(version.uri.removeprefix("file://")).resolve() == Path(one.uri).resolve()


def _leads_nowhere(version: Version) -> bool:
    elsewhere = version.uri is not None and not version.uri.startswith(("runs:", "models:"))
    return version.wanted is not None and version.fingerprint is None and not elsewhere


def _notes(tracking: str, stored: Sequence[Stored], references: References) -> Iterable[str]:
    yield from references.problems
    for version in filter(_leads_nowhere, references.versions):
        yield f"version {version.number} ({version.wanted}) names neither its recipe nor its weights: every merged model is kept"
    merged = {one.name for one in stored if one.kind == "merged" and one.complete}
    known = {version.fingerprint for version in references.versions} | {run.fingerprint for run in references.runs}
    if merged and not merged & known:
        yield f"MLflow at {tracking} knows none of the {len(merged)} merged models here; is it the one that their runs are logged to?"


def describe(one: Stored) -> str:
    """What an artifact is, in a few words, from its record."""
    record = one.record
    if record is None:
        return "record not understood" if one.unreadable else ("temporary folder" if one.temporary else "no record")
    config, known = record.config, record.provenance
    if one.kind == "merged":
        names = "+".join(name for name in known.get("sources", {}) if name != "base")
        densities = sorted({e["density"] for e in config.get("experts", ()) if e.get("density") not in (None, 1.0)})
        rho = f"rho={'/'.join(f'{d:g}' for d in densities)}" if densities else ""
        return " ".join(filter(None, [str(config.get("merge_method", "")), rho, names]))
    if one.kind in _PARTS:
        return " ".join(filter(None, [config.get("part"), config.get("shard"), f"of {record.inputs.get('merge', '')[:8]}"]))
    words: dict[str, list[Any]] = {
        "moments": [known.get("expert"), config.get("method"), config.get("rank") and f"rank {config['rank']}"],
        "masks": [known.get("expert"), config.get("density") and f"rho={config['density']:g}"],
        "scores": [known.get("model"), config.get("name") and f"on {config['name']}"],
    }
    default = [config.get("capability"), "seed" in config and f"seed {config['seed']}"]
    return " ".join(str(word) for word in words.get(one.kind, default) if word)
