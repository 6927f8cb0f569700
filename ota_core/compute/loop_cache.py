"""Where numba keeps compiled loops: beside the code, else in the user's cache, else in a folder for temporary files.

numba itself tries the first two, and refuses to load a loop where neither can be written to: a read-only install in a container whose user has no
home. What it keeps are pickles, so that a shared temporary folder counts only if it is this user's alone.
"""

import atexit
import os
import shutil
import stat
import tempfile
from pathlib import Path

SETTING = "NUMBA_CACHE_DIR"


def find_cache() -> None:
    """Set ``NUMBA_CACHE_DIR`` for this process and its children where numba would find no place. Call it before numba is imported."""
    if os.environ.get(SETTING):
        return
    package = Path(__file__).resolve().parent.parent
    if all(_can_write(folder / "__pycache__") for folder in (package / "compute", package / "fused")) or _can_write(
        _home_cache()
    ):
        return
    os.environ[SETTING] = str(_temporary())


def _home_cache() -> Path:
    """The folder that numba uses in a user's home (XDG base directory specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "numba"


def _can_write(folder: Path) -> bool:
    """Whether a file can be made in a folder, which is made where it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _temporary() -> Path:
    """A folder that keeps its loops for the next process; one for this process alone where somebody else has taken the name."""
    shared = Path(tempfile.gettempdir()) / f"ota-numba-{os.getuid()}"
    try:
        shared.mkdir(mode=0o700, exist_ok=True)
        facts = shared.lstat()
        if stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o077 and _can_write(shared):
            return shared
    except OSError:
        pass  # a file of that name, or a folder that cannot be looked into
    own = Path(tempfile.mkdtemp(prefix="ota-numba-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own
