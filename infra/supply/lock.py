"""Writes the locks anew: every version, with the SHA-256 of every file that the package index has of it, for all platforms.

    make lock                                       what is locked stays, what pyproject.toml asks for anew is added
    make lock ARGS="--upgrade-package mlflow"       a newer version; --upgrade: of all packages
    make lock ARGS="--wheel torch-….whl"            a file of torch without CUDA, which is in PyTorch's index alone, for one more Python or processor

One resolution by uv, laid down in three files that nothing stands in twice: what runs, which the image installs; what development adds; and the
libraries of torch's CUDA build, which a machine without a GPU spares. torch without CUDA has a file of its own: pip prefers a file whose hash it
knows from the index to any other, so that among the hashes of the index's own torch it would never be chosen. The tools of this folder have a lock of their own, and an environment.
"""

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUN, DEV = ROOT / "requirements.lock", ROOT / "requirements-dev.lock"
CUDA, TOOLS = ROOT / "infra" / "requirements-cuda.lock", ROOT / "infra" / "supply" / "requirements.lock"
TORCH = ROOT / "infra" / "requirements-torch-cpu.lock"
HEADS = {
    RUN: "What runs, and the image with the extras kubernetes and postgres.",
    DEV: "What the extras dev, demo and docs add to requirements.lock.",
    CUDA: "What the extra gpu and torch's CUDA build add to requirements.lock, on Linux.",
    TORCH: "torch without CUDA, which is not in the package index but in PyTorch's own: the files for Linux that were given with --wheel.",
    TOOLS: "The tools that lock, list and audit: the extra supply, in an environment of its own.",
}
WRITTEN = "# Written by `make lock`; infra/supply/lock.py says how."
IMAGE = ("kubernetes", "postgres")
# Python and platform decide which packages are needed, not which files of them are allowed: those are of all platforms.
UV = (
    "--python-version",
    "3.11.5",
    "--python-platform",
    "x86_64-manylinux_2_28",
    "--generate-hashes",
    "--no-annotate",
    "--no-header",
)

Lock = dict[str, tuple[str, set[str]]]
"""Package to its version and the SHA-256 of its files."""


def read_lock(text: str) -> Lock:
    """The packages of a lock. Raises ValueError for a line that is no pinned version with hashes."""
    found: Lock = {}
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            pin, *hashes = line.split()
            name, _, version = pin.partition("==")
            sums = {one.removeprefix("--hash=sha256:") for one in hashes}
            if not version or not sums or any(not re.fullmatch("[0-9a-f]{64}", one) for one in sums):
                raise ValueError(f"expected NAME==VERSION and --hash=sha256:… after it, got: {line[:120]}")
            found[re.sub(r"[-_.]+", "-", name).lower()] = version, sums
    return found


def written(lock: Lock, head: str) -> str:
    lines = [f"# {head}", WRITTEN]
    for name, (version, sums) in sorted(lock.items()):
        lines += [" \\\n".join([f"{name}=={version}", *(f"    --hash=sha256:{one}" for one in sorted(sums))])]
    return "\n".join(lines) + "\n"


def resolved(requirements: Iterable[str], known: Lock, arguments: Iterable[str] = ()) -> Lock:
    """What uv finds for these, nearest to what is known. Ends with uv's words where it finds nothing."""
    uv = Path(sys.executable).with_name("uv")
    with tempfile.TemporaryDirectory() as folder:
        asked, out = Path(folder) / "asked.in", Path(folder) / "out.lock"
        asked.write_text("\n".join(requirements))
        out.write_text(written(known, "What is known."))
        if subprocess.run([uv, "pip", "compile", "--quiet", *UV, *arguments, asked, "-o", out]).returncode:
            raise SystemExit(1)
        return read_lock(out.read_text())


def is_cuda(name: str) -> bool:
    return name.startswith(("nvidia-", "cuda-")) or name == "triton"


def without_cuda(torch: str, wheels: Iterable[Path]) -> Lock:
    """torch without CUDA, of this version: the files that are known of it, and these wheels."""
    known = read_lock(TORCH.read_text()).get("torch") if TORCH.exists() else None
    sums = set(known[1]) if known and known[0] == f"{torch}+cpu" else set()
    for wheel in wheels:
        if not wheel.name.startswith(f"torch-{torch}+cpu-"):
            raise SystemExit(f"{wheel}: expected a file torch-{torch}+cpu-….whl")
        sums.add(hashlib.sha256(wheel.read_bytes()).hexdigest())
    if not sums:
        raise SystemExit(
            f"the lock has torch {torch} now: give its wheel without CUDA with --wheel, one for each Python and processor"
        )
    return {"torch": (f"{torch}+cpu", sums)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the locks anew; other options are uv's.")
    parser.add_argument("--wheel", type=Path, action="append", default=[], metavar="FILE")
    options, given = parser.parse_known_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    runs_on = [*project["project"]["dependencies"], *extras["gpu"], *(one for extra in IMAGE for one in extras[extra])]
    develops = [*project["build-system"]["requires"], *(one for extra in ("dev", "demo", "docs") for one in extras[extra])]
    before: Lock = {}
    for path in (RUN, DEV, CUDA):
        before |= read_lock(path.read_text())
    everything = resolved([*runs_on, *develops], before, given)
    runs = set(resolved([*runs_on, *project["build-system"]["requires"]], everything))
    locks: Mapping[Path, Lock] = {
        RUN: {name: one for name, one in everything.items() if name in runs and not is_cuda(name)},
        DEV: {name: one for name, one in everything.items() if name not in runs},
        CUDA: {name: one for name, one in everything.items() if name in runs and is_cuda(name)},
        TORCH: without_cuda(everything["torch"][0], options.wheel),
        TOOLS: resolved(extras["supply"], read_lock(TOOLS.read_text()) if TOOLS.exists() else {}, given),
    }
    for path, lock in locks.items():
        path.write_text(written(lock, HEADS[path]))
        print(f"{path.relative_to(ROOT)}: {len(lock)} packages, {sum(len(sums) for _, sums in lock.values()):,} files")


if __name__ == "__main__":
    main()
