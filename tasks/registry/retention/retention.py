"""Which artifacts may go, and their deletion: what MLflow refers to stays, and what was used within so many days.

Used is what was made, or what a run that was logged within the days refers to. A local folder also notes when a stage found an artifact
in it (the record's time of change, to the hour). Reading from S3 leaves no trace there: what a run used is known from what it logged,
also when it was logged again without computing anything. What goes too early can be computed again; nothing of it is anybody's original.

MLflow refers to

1. the merged model of a version with an alias, or of the version that the champion replaced, and of every run within the days;
2. what belongs to these merges, by the digests in the records: moments and masks whose inputs are all inputs of such merges, and scores
   of such a merge, of its base or of its experts.

A version that names neither its recipe nor its weights keeps every merged model. Artifacts with an input called ``unknown`` and records
that this version cannot read stay.

Of the rest, complete artifacts go as unreferenced, parts of merges as left over, folders without a whole record and temporaries as
interrupted work. Kinds checkpoint and data take minutes of training; they are collected only where they are asked for, and not what a
checkpoint in use was trained on or from.
"""

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ota_core.artifact import ArtifactRef, Kind, Record
from ota_core.errors import OtaError
from tasks.artifacts.store import ArtifactStore
from tasks.registry.retention.listing import (
    KINDS,
    Stored,
    is_as_listed,
    is_left_by_the_dead,
    is_temporary_of_live_process,
    list_root,
)
from tasks.registry.retention.plan import Item, Outcome, Plan, largest_first
from tasks.registry.retention.references import References, Tracking, Version
from tasks.storage import models as storage
from tasks.storage.cache import USE_NOTED_SECONDS

NOT_UNASKED: frozenset[Kind] = frozenset({"checkpoint", "data"})
DEFAULT_KINDS: frozenset[Kind] = frozenset(KINDS) - NOT_UNASKED
LEAST_DAYS = 1
_PARTS = ("surveys", "facts", "shards")
_TRAINED = ("checkpoint", "data")
Progress = Callable[[str, int, int], None]


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
        notes = tuple(_notes(self.tracking.shown, stored, references))
        return Plan(self.store.root, largest_first(self._judge(stored, references)), notes)

    def collect(self, plan: Plan, progress: Progress | None = None) -> Outcome:
        """Delete what the plan says, one artifact after the other, each whole or not at all.

        MLflow is asked again first and before each merged model; what it names by then is spared, and so is what is no longer as it
        was listed. What a break leaves, the next call takes. Raises StorageError.
        """
        outcome, going, kept = Outcome(), plan.going, set[str]()
        for done, item in enumerate(going):
            if progress:
                progress("delete", done, len(going))
            versions: list[Version] = []
            if done == 0 or item.stored.kind == "merged":
                references = self.tracking.references(self.since)
                kept = {one.stored.uri for one in self._judge([one.stored for one in plan.items], references) if one.keep}
            if item.stored.kind == "merged" and item.stored.uri not in kept:
                versions = [version for version in references.versions if _is_at(version, item.stored)]
                for version in versions:
                    self.tracking.mark_deleted(version, True)
            if item.stored.uri not in kept and self._delete(item.stored):
                outcome.deleted.append(item)
                outcome.versions += [version.number for version in versions]
            else:
                outcome.spared.append(item)
        if progress:
            progress("delete", len(going), len(going))
        if storage.is_s3(self.store.root):
            outcome.uploads = storage.end_unfinished(self.store.root, before=self.since)
        self._mend_tags([item.stored for item in (*plan.kept, *outcome.spared)])
        return outcome

    def _delete(self, one: Stored) -> bool:
        """Whether it is gone: not where it is not as it was listed."""
        if not one.temporary:
            ref = ArtifactRef.model_validate({"kind": one.kind, "fingerprint": one.name, "uri": one.uri})
            return self.store.delete(ref, unless=lambda place: not is_as_listed(one, place))
        if is_temporary_of_live_process(one.name) or not is_as_listed(one, one.uri):
            return False
        shutil.rmtree(one.uri)
        return True

    def _mend_tags(self, there: Sequence[Stored]) -> None:
        """Take back what this deletion, or an interrupted one, said of weights that are there."""
        for version in self.tracking.references(self.since).versions:
            if version.weights_deleted and any(one.kind == "merged" and one.complete and _is_at(version, one) for one in there):
                self.tracking.mark_deleted(version, False)

    def _judge(self, stored: Sequence[Stored], references: References) -> Iterator[Item]:
        judged = _Judge(stored, references, self.since, f"last {self.days} days")
        for one in stored:
            keep, why = judged.verdict(one)
            if not keep and one.kind not in self.kinds:
                keep, why = True, "kind not collected"
            yield Item(one, keep, why, describe(one))


class _Judge:
    """The verdicts over one listing."""

    def __init__(self, stored: Sequence[Stored], references: References, since: datetime, span: str) -> None:
        self._references, self._since, self._span = references, since, span
        self._last: dict[str, datetime] = {}
        for one in stored:
            if merge := _merge_of(one):  # of the parts of one merge, the last sign of any counts
                self._last[merge] = max(one.used, self._last.get(merge, one.used))
        merged = {one.name: one for one in stored if one.kind == "merged" and not one.temporary}
        self._complete = {name for name, one in merged.items() if one.complete}
        self._why = {name: why for name, one in merged.items() if (why := self._wanted(one))}
        self._named = references.digests.union(*(self._digests(merged[name]) for name in self._why))
        self._trained = self._made_of([one for one in stored if one.kind in _TRAINED])

    def verdict(self, one: Stored) -> tuple[bool, str]:
        """(whether it stays, why)."""
        if one.temporary:
            busy = not is_left_by_the_dead(one) and (is_temporary_of_live_process(one.name) or one.used >= self._since)
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
            return False, "parts of a finished merge" if _merge_of(one) in self._complete else "interrupted work"
        if one.kind in _TRAINED:
            return (True, "trained on or from") if one.name in self._trained else (False, "unreferenced")
        return (False, "unreferenced") if one.kind == "merged" else self._belongs(one.record)

    def _belongs(self, record: Record) -> tuple[bool, str]:
        inputs = {record.inputs.get("model", "")} if record.kind == "scores" else _inputs(record)
        if "unknown" in inputs:
            return True, "reference not resolved"
        return (True, "belongs to a kept merge") if inputs <= self._named else (False, "unreferenced")

    def _recent(self, one: Stored) -> bool:
        return self._last.get(_merge_of(one) or "", one.used) >= self._since

    def _wanted(self, one: Stored) -> str | None:
        """Why a merged model is kept, the strongest reason."""
        versions = [v for v in self._references.versions if v.wanted]
        names = [v.wanted for v in versions if v.wanted and (v.fingerprint == one.name or _is_at(v, one))]
        if names:
            return min(names, key=lambda name: name != "champion")
        if one.name in self._references.merges:
            return f"run of the {self._span}"
        if self._recent(one):
            return f"used in the {self._span}"
        return "reference not resolved" if any(map(_leads_nowhere, versions)) else None

    def _digests(self, one: Stored) -> set[str]:
        """Of what a merge was made of, and of the merged model where it is known: merges in parts note it, others have it in MLflow."""
        known = {self._references.models.get(one.name)}
        known |= {one.record.provenance.get("digest"), *_inputs(one.record)} if one.record else set()
        return {digest for digest in known if digest}

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
    if merged and not merged & (references.models.keys() | {version.fingerprint for version in references.versions}):
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
