"""The Dockerfile, read by hadolint and as a graph of stages."""

import re
import subprocess
from functools import cache

from dockerfile_parse import DockerfileParser

from tests.infra.read import INFRA, ROOT, dockerfile_environment, tool

TARGETS = ("cpu", "cuda")
PINNED = re.compile(r"[a-z0-9/.-]+:\d+\.\d+\.\d+[\w.-]*")


@cache
def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Stage to what it starts from and its instructions, in order."""
    with open(INFRA / "Dockerfile", "rb") as file:
        lines = DockerfileParser(fileobj=file, env_replace=False).structure
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    name = ""
    for line in lines:
        if line["instruction"] == "FROM":
            source, _, name = re.split(r"\s+(as|AS)\s+", line["value"])
            found[name] = (source, [])
        elif line["instruction"] != "COMMENT":
            found[name][1].append((line["instruction"], line["value"]))
    return found


def instructions(target: str) -> list[tuple[str, str]]:
    """All that makes up an image, those of the stages that it starts from first."""
    source, own = stages()[target]
    return (instructions(source) if source in stages() else []) + own


def values(target: str, instruction: str) -> list[str]:
    return [value for name, value in instructions(target) if name == instruction]


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([tool("hadolint"), str(INFRA / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_images_start_from_is_pinned_and_the_same() -> None:
    outside = {source for source, _ in stages().values() if source not in stages()}
    assert len(outside) == 1, "the virtual environment is built on another Python than it runs on"
    assert all(PINNED.fullmatch(source) for source in outside)


def test_each_target_runs_as_a_user_without_rights() -> None:
    for target in TARGETS:
        user = values(target, "USER")[-1]
        uid, gid = map(int, user.split(":"))
        assert uid >= 10000 and gid >= 10000
        (created,) = [run for run in values(target, "RUN") if "useradd" in run]
        assert f"--uid {uid} " in created and f"--gid {gid} " in created
        assert not any("--chown" in copy for copy in values(target, "COPY")), "a run cannot change its own code"


def test_images_hold_what_pip_made_and_not_pip() -> None:
    for target in TARGETS:
        environment = f"--from=build-{target} /opt/venv /opt/venv"
        assert [copy for copy in values(target, "COPY") if "--from" in copy] == [environment]
        runs = " ".join(values(target, "RUN"))
        assert not re.search(r"\bpip\b|gcc|g\+\+|build-essential|python3-dev|\bmake\b", runs)
        assert values(target, "ENTRYPOINT") == ['["tini", "--"]'] and "tini" in runs


def test_every_file_comes_from_a_lock_with_its_hash() -> None:
    for target in TARGETS:
        runs = [run for run in values(f"build-{target}", "RUN") if " install " in run]
        commands = [re.sub(r"\s+", " ", part).strip() for run in runs for part in re.split(r"&&", run) if " install " in part]
        *packages, own = commands
        assert own.endswith(" install --no-deps --no-build-isolation ."), "this package itself, with what is there"
        locks = [re.findall(r"--requirement (\S+)", command) for command in packages]
        torch = ["infra/requirements-torch-cpu.lock"]
        last = ["requirements.lock"] if target == "cpu" else ["requirements.lock", "infra/requirements-cuda.lock"]
        assert locks == [["setuptools.lock"], *([torch] if target == "cpu" else []), last]
        for command, some in zip(packages, locks, strict=True):
            assert "--no-deps" in command and "--require-hashes" in command and "--extra-index-url" not in command
            assert ("--index-url" in command) == (some == torch), "only torch may come from elsewhere"
            assert ("--no-build-isolation" in command) == (some == last), "a build would fetch its tools without a hash"
        assert all("--mount=type=cache" in run or "--no-cache-dir" in run for run in runs)


def test_nothing_secret_is_baked_in() -> None:
    named = [value for name in stages() for key in ("ENV", "ARG") for value in values(name, key)]
    assert len(named) > 5
    assert not any(re.search(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY|CREDENTIAL", value, re.IGNORECASE) for value in named)


def test_all_that_is_written_lies_in_one_folder_or_in_tmp() -> None:
    environment = dockerfile_environment()
    home = environment["OTA_HOME"]
    written = {name: environment[name] for name in ("HOME", "PREFECT_HOME", "HF_HOME", "NUMBA_CACHE_DIR")}
    assert all(path == home or path.startswith((f"{home}/", "/tmp/")) for path in written.values()), written


def test_the_image_holds_the_code_its_suites_and_the_templates() -> None:
    lines = (INFRA / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*", "nothing but what is named"
    kept = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    assert all((ROOT / path).exists() for path in kept)
    assert {"flows", "tasks", "ota_core", "deployments", "infra/pools", "requirements.lock", "pyproject.toml"} <= kept
    copied = {path for copy in values("build", "COPY") for path in copy.split()[:-1]}
    assert copied <= kept
    (workdir,) = values("run", "WORKDIR")
    assert dockerfile_environment()["PYTHONPATH"] == workdir
    assert ". ." in values("run", "COPY")
