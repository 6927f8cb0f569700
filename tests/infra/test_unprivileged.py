"""The program as the image runs it, where no engine is: a user without rights, everything read-only but one folder, with the image's environment."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.infra.read import ROOT, dockerfile_environment
from tests.ota_core.engine.test_output import llama_experts

USER = 10001
# A mount namespace of its own: the folder stays writable, all else is not, and the rights to change that are given up.
INSIDE = (
    'mount --bind "$1" "$1" && mount -o remount,bind,ro / && cd "$2" && shift 2 && '
    f'exec setpriv --reuid {USER} --regid {USER} --clear-groups --no-new-privs --bounding-set -all --inh-caps -all "$@"'
)


def inside(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    home, image = folder / "home", dockerfile_environment()
    environment = {
        name: image[name].replace(image["OTA_HOME"], str(home))
        for name in ("OTA_HOME", "HOME", "PREFECT_HOME", "HF_HOME", "NUMBA_CACHE_DIR", "PYTHONDONTWRITEBYTECODE", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK")
    }  # fmt: skip
    environment |= {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(folder / "tmp"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", INSIDE, "sh", str(folder), str(ROOT), *command],
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of that user's, with a recipe. Not one of pytest's, which nobody else may enter."""
    if os.geteuid() != 0 or not all(shutil.which(name) for name in ("unshare", "setpriv", "mount")):
        pytest.skip("only root can make a read-only view of the system and become another user")
    with tempfile.TemporaryDirectory() as made:
        yield _prepared(Path(made))


def _prepared(folder: Path) -> Path:
    for name in ("home", "tmp"):
        (folder / name).mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(llama_experts(folder)))
    for path in (folder, *folder.rglob("*")):
        os.chown(path, USER, USER)
    probe = "import os, torch; print(os.getuid()); open(os.path.join(os.environ['HOME'], 'x'), 'w')"
    done = inside(folder, sys.executable, "-c", probe)
    if done.returncode:
        pytest.skip(f"no such view can be made here: {done.stderr.strip()[-300:]}")
    assert done.stdout.split() == [str(USER)]
    return folder


def test_a_merge_writes_nowhere_but_into_its_folder(folder: Path) -> None:
    seen = inside(folder, "touch", str(ROOT / "written"))
    assert seen.returncode != 0 and "ead-only" in seen.stderr and not (ROOT / "written").exists()
    ota = (sys.executable, "-m", "flows.cli")
    done = inside(folder, *ota, "merge", str(folder / "recipe.yaml"), str(folder / "out"))
    assert done.returncode == 0, done.stderr
    assert (folder / "out" / "record.json").stat().st_uid == USER
    refused = inside(folder, *ota, "merge", str(folder / "recipe.yaml"), "/out-of-it")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr and "ead-only" in refused.stderr, refused.stderr


@pytest.mark.slow
def test_a_whole_run_does_not_either(folder: Path) -> None:
    """With Prefect's temporary server and MLflow's database."""
    done = inside(folder, sys.executable, "-m", "flows.cli", "run", str(folder / "recipe.yaml"), "--suite", "none", "--no-server")
    assert done.returncode == 0, done.stderr
    (merged,) = (folder / "home" / "artifacts" / "merged").iterdir()
    assert (merged / "report.html").is_file() and (folder / "home" / "tracking" / "mlflow.db").is_file()
