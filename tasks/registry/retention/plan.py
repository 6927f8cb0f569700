"""What a clean-up would do and what it did, in the store of artifacts and in the local cache."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tasks.registry.retention.listing import File, Stored


@dataclass(frozen=True)
class Item:
    """An artifact, something in the cache or a leftover, and why it stays or goes."""

    stored: Stored
    keep: bool
    why: str
    what: str
    """What it is, in a few words."""

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        one = self.stored
        return {
            "kind": one.kind, "name": one.name, "what": self.what, "why": self.why, "bytes": one.size,
            "used": one.used.isoformat(timespec="seconds"), "uri": one.uri,
        }  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What would go and what stays, largest first."""

    root: str
    items: tuple[Item, ...]
    notes: tuple[str, ...] = ()

    @property
    def going(self) -> list[Item]:
        return [item for item in self.items if not item.keep]

    @property
    def kept(self) -> list[Item]:
        return [item for item in self.items if item.keep]

    @property
    def listed(self) -> list[Item]:
        """What goes, without the downloads that a checkpoint in this list is made of."""
        linked = {inode for item in self.going if item.stored.kind == "checkpoint" for inode in item.stored.inodes}
        return [item for item in self.going if item.stored.kind != "download" or not item.stored.inodes & linked]

    @property
    def frees(self) -> int:
        """Bytes that the deletion gives back; files that something kept links to do not count."""
        return freed(self.going)


@dataclass
class Outcome:
    """What a deletion did."""

    deleted: list[Item] = field(default_factory=list)
    spared: list[Item] = field(default_factory=list)
    """In use since they were listed."""
    versions: list[str] = field(default_factory=list)
    """Versions of the registered model that lost their weights."""
    uploads: int = 0
    """Uploads to S3 that were never finished, and were ended."""

    @property
    def frees(self) -> int:
        return freed(self.deleted)


def freed(going: Iterable[Item]) -> int:
    """The bytes that deleting these gives back: a local file's only when its last hard link goes."""
    links: dict[object, list[File]] = defaultdict(list)
    for one in (file for item in going for file in item.stored.files.values()):
        links[one.inode or object()].append(one)
    return sum(same[0].disk for same in links.values() if len(same) >= same[0].links)


def largest_first(items: Iterable[Item]) -> tuple[Item, ...]:
    return tuple(sorted(items, key=lambda item: (-item.stored.size, item.stored.uri)))
