"""Real text for the study on a real language model: five domains of documents from Debian packages, split without leakage.

A package is pinned by version and sha256, so that the same documents come out on every machine. A document lies in one split,
chosen by its digest alone. Held-out documents that repeat text of another split, word for word, are left out.
"""

import gzip
import hashlib
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from ota_core.errors import OtaError
from ota_core.frozen import Frozen
from tasks.local.demo.data import write_jsonl
from tasks.local.real import text as real_text
from tasks.storage.layout import sha256_file

Split = Literal["train", "test", "validation"]
SPLITS: tuple[Split, ...] = ("train", "test", "validation")
"""In the order in which they are filled: each leaves out what repeats the ones before it."""
MANIFEST = "manifest.json"


class CorpusError(OtaError):
    """A package that the corpora are made of is not at hand, is another one, or holds too little text."""


class Package(Frozen):
    """One Debian package, exactly."""

    name: str
    version: str
    sha256: str
    licence: str
    """Of the texts that are read from it."""

    @property
    def file(self) -> str:
        """As ``apt-get download`` names it."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_all.deb"


class Domain(NamedTuple):
    """Where a domain's documents come from."""

    package: Package
    pattern: str
    """Of the paths in the package."""
    read: Callable[[str], Iterator[str]]
    """The documents of one file's text."""
    what: str


DOMAINS: Mapping[str, Domain] = {
    "code": Domain(
        Package(
            name="tcllib",
            version="1.21+dfsg-1",
            sha256="6bf4cbb66b52d47dcf02e8de4469597d25dc475668d49f8b7f3f3135e3eb2d08",
            licence="BSD-style (Tcl)",
        ),
        "*.tcl", real_text.tcl, "source of the Tcl standard library",
    ),
    "maths": Domain(
        Package(
            name="metamath-databases",
            version="0.0.0~20210101.git55fe226-2",
            sha256="c72523c221db6c1039fa909150f9c53fb9175809792f2e80e55e1baa965445a1",
            licence="CC0-1.0",
        ),
        "*/set.mm", real_text.metamath, "theorems of set theory in Metamath's notation, without their proofs",
    ),
    "german": Domain(
        Package(
            name="manpages-de",
            version="4.18.1-1",
            sha256="37d2e7ee51f22952aecec3af93647ff59194a3c74bb7a694560f49c7f7ab3978",
            licence="GPL-3.0-or-later and others",
        ),
        "*/man/de/man*/*.gz", real_text.man_as_text, "German manual pages as running text",
    ),
    "dictionary": Domain(
        Package(
            name="dict-wn",
            version="1:3.0-37",
            sha256="ed99e0bf162815dc1cc69de3727eedd7112ddf170badf83dbde26209e0724a8c",
            licence="WordNet-3.0",
        ),
        "*/wn.dict.dz", real_text.dictd, "WordNet's definitions",
    ),
    "manual": Domain(
        Package(
            name="manpages-dev",
            version="6.03-2",
            sha256="96f55cb5e26231d5567c89b692bced63825a14a2d5bd18fdf16ea2ed44eb9838",
            licence="Linux-man-pages-copyleft and others",
        ),
        "*/man/man*/*.gz", real_text.man_source, "English manual pages in the markup of troff",
    ),
}  # fmt: skip


class CorpusSettings(Frozen):
    """What decides the corpora besides the packages."""

    version: int = 1
    """Raised when the reading changes, so that everything made of the corpora counts as stale."""
    shortest: int = Field(default=200, ge=1)
    """Characters that a document has at least."""
    longest: int = Field(default=4000, ge=1)
    """Longer documents end at the last line before."""
    characters: int = Field(default=450_000, ge=1)
    """Of a domain's training documents together, about."""
    held_out: int = Field(default=200, ge=1)
    """Documents of the test and of the validation split, each."""
    words: int = Field(default=12, ge=1)
    """Length of the runs of words by which repeated text is known."""
    repeated: float = Field(default=0.15, ge=0, le=1)
    """Share of a held-out document's runs that may also stand in another split's documents, of whatever domain."""


class Document(NamedTuple):
    """One document, and the digest that it is known and split by."""

    text: str
    source: str
    digest: str


def find_packages(folder: Path, domains: Mapping[str, Domain] = DOMAINS) -> dict[str, Path]:
    """Domain to its package's file in ``folder``, fetched with apt-get where it is not there; digests are checked.

    Raises CorpusError that names every package that is missing or another one, and what to do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {name: domain.package for name, domain in domains.items()}
    missing = [package for package in wanted.values() if not (folder / package.file).is_file()]
    said = ""
    if missing and shutil.which("apt-get"):
        command = ["apt-get", "download", *(f"{package.name}={package.version}" for package in missing)]
        said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stderr.strip()
        missing = [package for package in missing if not (folder / package.file).is_file()]
    problems = []
    if missing:
        names = " ".join(f"{package.name}={package.version}" for package in missing)
        problems.append(
            f"{folder} lacks {', '.join(package.file for package in missing)}. These are packages of Debian 12 (main): run "
            f"'apt-get update' as root and then this again, or 'apt-get download {names}' on another machine and put the files there"
            + (f". apt-get said: {said.splitlines()[-1]}" if said else "")
        )
    for package in wanted.values():
        path = folder / package.file
        if package not in missing and (found := sha256_file(path)) != package.sha256:
            problems.append(f"{path} has the sha256 {found}, expected {package.sha256}; delete it and run again")
    if not shutil.which("dpkg-deb"):
        problems.append("dpkg-deb, which unpacks Debian packages, is not on this machine; install the package dpkg")
    if problems:
        raise CorpusError("\n".join(problems))
    return {name: folder / package.file for name, package in wanted.items()}


def write_corpora(
    out: Path, packages: Mapping[str, Path], settings: CorpusSettings, domains: Mapping[str, Domain] = DOMAINS
) -> dict[str, dict[str, int]]:
    """Write ``<domain>/{train,test,validation}.jsonl`` (fields text, source, digest) and ``manifest.json`` into the folder ``out``.

    ``packages`` is what ``find_packages`` gave. The same packages and settings give the same bytes. Returns the manifest's counts
    by domain. Raises CorpusError before anything is written when a domain has too few held-out documents.
    """
    documents = {name: read_documents(packages[name], domain, settings) for name, domain in domains.items()}
    chosen = _choose(documents, settings)
    short = {name: {split: len(found[split]) for split in SPLITS} for name, found in chosen.items()}
    problems = [f"{name} has {counts}" for name, counts in short.items() if min(counts.values()) < min(settings.held_out, 10)]
    if problems:
        raise CorpusError(f"too few documents are left to hold out: {'; '.join(problems)}; ask for shorter ones or allow repeats")
    counts: dict[str, dict[str, int]] = {}
    for name, splits in chosen.items():
        (out / name).mkdir(parents=True)
        counts[name] = {"found": len(documents[name])}
        for split, found in splits.items():
            write_jsonl(out / name / f"{split}.jsonl", (document._asdict() for document in found))
            counts[name] |= {split: len(found), f"{split}_bytes": sum(len(document.text.encode()) for document in found)}
    manifest = {
        "settings": settings.model_dump(mode="json"),
        "domains": {
            name: {"what": domain.what, "package": domain.package.model_dump(), "pattern": domain.pattern, **counts[name]}
            for name, domain in domains.items()
        },
    }
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return counts


def read_documents(package: Path, domain: Domain, settings: CorpusSettings) -> list[Document]:
    """A domain's documents of allowed length, each text once, in the order of their digests."""
    found: dict[str, Document] = {}
    for path, content in _package_files(package, domain.pattern):
        text = content.decode("utf-8", errors="replace")
        for document in domain.read(text):
            cut = _shorten(document.strip(), settings.longest)
            if len(cut) >= settings.shortest:
                # White space does not tell documents apart.
                digest = hashlib.sha256(" ".join(cut.split()).encode()).hexdigest()
                found.setdefault(digest, Document(cut, path, digest))
    return [found[digest] for digest in sorted(found)]


def split_of(digest: str) -> Split:
    """The split of a document: 50 % train, 28 % test, 22 % validation."""
    # Not the digest's first digits: documents are taken in their order.
    bucket = int(digest[-8:], 16) % 100
    return "train" if bucket < 50 else "test" if bucket < 78 else "validation"


def runs_of(text: str, words: int) -> set[int]:
    """The document's runs of so many words, as numbers of 64 bits; one of all its words where it has fewer."""
    parts = re.findall(r"\w+|[^\w\s]", text.lower())
    starts = range(max(1, len(parts) - words + 1))
    return {
        int.from_bytes(hashlib.blake2b(" ".join(parts[i : i + words]).encode(), digest_size=8).digest(), "big") for i in starts
    }


def _choose(documents: Mapping[str, list[Document]], settings: CorpusSettings) -> dict[str, dict[Split, list[Document]]]:
    chosen: dict[str, dict[Split, list[Document]]] = {name: {split: [] for split in SPLITS} for name in documents}
    others: set[int] = set()
    for split in SPLITS:
        inside: set[int] = set()
        for name, found in documents.items():
            kept, size = chosen[name][split], 0
            for document in found:
                if split_of(document.digest) != split:
                    continue
                if size >= settings.characters if split == "train" else len(kept) >= settings.held_out:
                    break
                runs = runs_of(document.text, settings.words)
                # Within a split half may be repeated: forms recur, but nothing is counted twice.
                if len(runs & others) > settings.repeated * len(runs) or len(runs & inside) > 0.5 * len(runs):
                    continue
                kept.append(document)
                size += len(document.text)
                inside |= runs
        others |= inside
    return chosen


def _package_files(package: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Paths and contents of a package's regular files that match, unpacked where they are compressed."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                if member.isfile() and fnmatch(member.name, pattern):
                    stream = archive.extractfile(member)
                    assert stream is not None
                    content = stream.read()
                    if member.name.endswith((".gz", ".dz")):
                        content = gzip.decompress(content)
                    yield member.name.removeprefix("./"), content
    if process.returncode:
        raise CorpusError(f"dpkg-deb cannot unpack {package} (exit code {process.returncode}); delete it and run again")


def _shorten(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    return text[: text.rfind("\n", 0, longest) + 1 or longest].rstrip()
