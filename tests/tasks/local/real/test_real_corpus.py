"""Corpora out of small Debian packages that are made here: what is read, that splits share nothing, what is said when something lacks."""

import gzip
import hashlib
import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from tasks.local.real import text as real_text
from tasks.local.real.corpus import (
    DOMAINS,
    SPLITS,
    CorpusError,
    CorpusSettings,
    Domain,
    Package,
    find_packages,
    read_documents,
    runs_of,
    split_of,
    write_corpora,
)

SMALL = CorpusSettings(shortest=40, longest=400, characters=20_000, held_out=10, words=6)
WORDS = [f"{first}{second}" for first in "bdfgk" for second in ("a", "e", "i", "o")]

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")


def sentence(rng: random.Random, words: int = 40) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def write_package(folder: Path, name: str, files: dict[str, bytes]) -> Package:
    """A real .deb in ``folder``."""
    tree = folder / f"{name}.tree"
    for path, content in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(content)
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN" / "control").write_text(
        f"Package: {name}\nVersion: 1:2.0-1\nArchitecture: all\nMaintainer: nobody <nobody@localhost>\nDescription: for a test\n"
    )
    package = Package(name=name, version="1:2.0-1", sha256="", licence="MIT")
    subprocess.run(["dpkg-deb", "--build", tree, folder / package.file], check=True, capture_output=True)
    shutil.rmtree(tree)
    digest = hashlib.sha256((folder / package.file).read_bytes()).hexdigest()
    return package.model_copy(update={"sha256": digest})


def domains(folder: Path) -> dict[str, Domain]:
    """Two domains of which the second quotes the first: every fourth of its documents holds one of the first's."""
    rng = random.Random(0)
    pages = [f"# licence\n{sentence(rng)}\n{sentence(rng)}" for _ in range(120)]
    entries = [sentence(rng) for _ in range(120)]
    entries = [pages[i].split("\n", 1)[1].replace("\n", "\n  ") if i % 4 == 0 else text for i, text in enumerate(entries)]
    dictionary = "".join(f"head{i}\n  {text}\n" for i, text in enumerate([*entries, *entries[:30]]))
    first = write_package(folder, "first", {f"usr/lib/{i}.tcl": text.encode() for i, text in enumerate(pages)})
    second = write_package(folder, "second", {"usr/dict.dz": gzip.compress(dictionary.encode()), "usr/other": b"no"})
    return {
        "pages": Domain(first, "*.tcl", real_text.tcl, "pages"),
        "entries": Domain(second, "*/dict.dz", real_text.dictd, "entries"),
    }


def texts(folder: Path, domain: str, split: str) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / domain / f"{split}.jsonl").read_text().splitlines()]


@needs_dpkg
def test_splits_share_no_text_within_and_across_domains(tmp_path: Path) -> None:
    known = domains(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    counts = write_corpora(out, find_packages(tmp_path, known), SMALL, known)
    runs = {split: [runs_of(text, SMALL.words) for domain in known for text in texts(out, domain, split)] for split in SPLITS}
    for i, split in enumerate(SPLITS):
        earlier = set().union(*(found for other in SPLITS[:i] for found in runs[other])) if i else set()
        assert runs[split]
        assert all(len(found & earlier) <= SMALL.repeated * len(found) for found in runs[split])
    # The quotes are real: without the rule they would be there.
    careless = SMALL.model_copy(update={"repeated": 1.0})
    (tmp_path / "careless").mkdir()
    write_corpora(tmp_path / "careless", find_packages(tmp_path, known), careless, known)
    train = set().union(*(runs_of(text, 6) for domain in known for text in texts(tmp_path / "careless", domain, "train")))
    assert any(len(runs_of(text, 6) & train) > 30 for text in texts(tmp_path / "careless", "entries", "test"))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["domains"]["entries"]["package"]["licence"] == "MIT"
    assert counts["pages"]["train"] == len(texts(out, "pages", "train"))


@needs_dpkg
def test_the_same_packages_give_the_same_bytes(tmp_path: Path) -> None:
    known = domains(tmp_path)
    packages = find_packages(tmp_path, known)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_corpora(tmp_path / name, packages, SMALL, known)
    files = [path.relative_to(tmp_path / "a") for path in sorted((tmp_path / "a").rglob("*")) if path.is_file()]
    assert len(files) == 7
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in files)


@needs_dpkg
def test_documents_are_read_once_and_within_their_lengths(tmp_path: Path) -> None:
    known = domains(tmp_path)
    packages = find_packages(tmp_path, known)
    pages = read_documents(packages["pages"], known["pages"], SMALL)
    assert len(pages) == 120
    assert all(40 <= len(page.text) <= 400 and "licence" not in page.text for page in pages)
    assert [page.digest for page in pages] == sorted(page.digest for page in pages)
    shares = [sum(split_of(page.digest) == split for page in pages) for split in SPLITS]
    assert all(count > 10 for count in shares)


@needs_dpkg
def test_what_lacks_is_named_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = domains(tmp_path)
    (tmp_path / known["pages"].package.file).unlink()
    with open(tmp_path / known["entries"].package.file, "ab") as stream:
        stream.write(b"more")
    apt = tmp_path / "bin" / "apt-get"
    apt.parent.mkdir()
    apt.write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{apt.parent}:/usr/bin:/bin")
    with pytest.raises(CorpusError) as caught:
        find_packages(tmp_path, known)
    message = str(caught.value)
    assert "lacks first_1%3a2.0-1_all.deb" in message
    assert "'apt-get download first=1:2.0-1' on another machine" in message
    assert "apt-get said: E: Unable to locate package" in message
    assert "second_1%3a2.0-1_all.deb has the sha256" in message


@needs_dpkg
def test_a_package_is_fetched_with_apt_where_it_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = domains(tmp_path)
    away = tmp_path / "away"
    away.mkdir()
    file = known["pages"].package.file
    (tmp_path / file).rename(away / file)
    apt = tmp_path / "bin" / "apt-get"
    apt.parent.mkdir()
    apt.write_text(f'#!/bin/sh\ntest "$1 $2 $3" = "download first=1:2.0-1 " && cp "{away}"/*.deb .\n')
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{apt.parent}:/usr/bin:/bin")
    assert find_packages(tmp_path, known)["pages"] == tmp_path / file


@needs_dpkg
def test_too_little_to_hold_out(tmp_path: Path) -> None:
    known = domains(tmp_path)
    wanted = SMALL.model_copy(update={"shortest": 390})
    (tmp_path / "out").mkdir()
    with pytest.raises(CorpusError, match=r"too few documents are left to hold out: .*entries has"):
        write_corpora(tmp_path / "out", find_packages(tmp_path, known), wanted, known)
    assert not list((tmp_path / "out").iterdir())


def test_runs_of_words() -> None:
    assert len(runs_of("a b c d", 3)) == 2
    assert runs_of("A  b,\nc", 3) < runs_of("x a b, c", 3)
    assert len(runs_of("a b", 3)) == len(runs_of("", 3)) == 1


def test_every_domain_is_pinned() -> None:
    for domain in DOMAINS.values():
        assert len(domain.package.sha256) == 64
        assert domain.package.licence
    assert DOMAINS["dictionary"].package.file == "dict-wn_1%3a3.0-37_all.deb"


def test_tcl_begins_with_its_first_command() -> None:
    assert list(real_text.tcl("# (c) me\n\n# more\nproc a {} {\n}  \n")) == ["proc a {} {\n}"]
    assert not list(real_text.tcl("package ifneeded a 1.0 [list source a.tcl]"))
    assert not list(real_text.tcl("set x {" + "1 " * 300 + "}"))


def test_metamath_without_proofs() -> None:
    database = (
        "$( preface $)\n$(\n" + "=-" * 40 + "\n  Section\n" + "=-" * 40 + "\n$)\n\n"
        "  $( A rule.  (Contributed by NM, 1-Jan-2000.)  (Proof shortened by X, 2-Jan-2001.) $)\n"
        "  a1i $p |- ( ps -> ph ) $=\n    ( wi ax-1 ax-mp ) ABADCABEF $.\n\n\n  ax-1 $a |- ph $.\n"
    )
    assert list(real_text.metamath(database))[1].strip() == "$( A rule. $)\n  a1i $p |- ( ps -> ph ) $.\n  ax-1 $a |- ph $."


def test_manual_pages() -> None:
    page = (
        '.\\" comment\n.TH LS 1\n.SH BEZEICHNUNG\nls \\- zeigt \\fBalles\\fP\n.de XX\nmacro\n..\n.EX\ncode\n.EE\n'
        '.BR "eins zwei" (1)\n.SH ÜBERSETZUNG\nvon mir\n'
    )
    assert list(real_text.man_as_text(page)) == ["\nBEZEICHNUNG\nls - zeigt alles\neins zwei (1)"]
    assert next(real_text.man_source(page)).startswith(".TH LS 1\n.SH")
    assert not list(real_text.man_as_text(".so man1/ls.1"))
    assert not list(real_text.man_source(".so man1/ls.1"))


def test_dictionary_entries() -> None:
    text = "00-database-info\n  about\nable\n    adj 1: fit\n    2: free\nbare\nzoo\n    n 1: beasts\n"
    assert list(real_text.dictd(text)) == ["able\n    adj 1: fit\n    2: free", "zoo\n    n 1: beasts\n"]
