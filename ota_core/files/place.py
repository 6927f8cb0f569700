"""Where an output is written: it appears complete or not at all, and ``--overwrite`` replaces nothing that is not such an output."""

import contextlib
import ctypes
import errno
import glob
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from ota_core.artifact import RECORD
from ota_core.errors import CheckpointError, OtaError
from ota_core.held import held_folder, hold, is_abandoned, remove_abandoned
from ota_core.reading import json_value, read_file

IsOutput = Callable[[Path], bool]
"""Whether a folder is an earlier output, which may be replaced."""
_NOREPLACE, _EXCHANGE = 1, 2
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}


def recorded(folder: Path) -> bool:
    """Whether a folder holds a record."""
    try:
        record = json_value(read_file(folder / RECORD))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and {"kind", "fingerprint", "files"} <= set(record)


def made_of(needed: str, *others: str) -> IsOutput:
    """Whether a folder holds the file ``needed``, and beside it only what these patterns match: for outputs without a record."""

    def fits(folder: Path) -> bool:
        names = [path.name for path in folder.iterdir()]
        return needed in names and all(any(fnmatch(name, pattern) for pattern in (needed, *others)) for name in names)

    return fits


@contextmanager
def new_folder(out: Path, *, overwrite: bool, is_output: IsOutput = recorded) -> Iterator[Path]:
    """A temporary sibling that takes the name ``out`` when the body ends well, and vanishes when it does not.

    Raises OtaError for what ``check_free`` refuses, before and after the body, and when the parent cannot be written to.
    """
    check_free(out, overwrite=overwrite, is_output=is_output)
    with scratch_folder(out.absolute()) as folder:
        yield folder
        _take_place(folder, out.absolute(), overwrite=overwrite, is_output=is_output)


@contextmanager
def new_file(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """The same for a file. Without ``overwrite`` a file that somebody else has written meanwhile stays: OtaError."""
    check_file(out, overwrite=overwrite)
    with scratch_folder(out.absolute()) as folder:
        yield folder / out.name
        if overwrite:
            os.replace(folder / out.name, out)
        else:
            _rename_new(folder / out.name, out)


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out``, on its disk, that goes when the block ends; after a kill the next one for the same ``out`` removes it.

    Raises OtaError when the parent cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            _tidy(out, None)
            folder = stack.enter_context(held_folder(lambda: _sibling(out, "tmp")))
        except OSError as error:
            raise OtaError(f"{out.parent} cannot be written to ({error}); choose another output") from None
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def check_free(out: Path, *, overwrite: bool, is_output: IsOutput = recorded, keep: Iterable[Path] = ()) -> None:
    """Raise OtaError unless a folder can take the name ``out``.

    An empty folder may be replaced, and with ``overwrite`` an earlier output. Never what is, or holds, the working directory, the home folder
    or what ``keep`` names. What a crash has renamed gets its name back first, and what else it left goes.
    """
    if not os.path.lexists(out):
        _restore(out, is_output)
    _tidy(out, is_output)
    if not out.exists():
        return
    if os.path.ismount(out):
        raise OtaError(f"{out} is where a volume is mounted, which cannot be replaced; choose a folder inside it")
    target = out.resolve()
    with contextlib.suppress(RuntimeError):  # no home folder
        keep = (*keep, Path.home())
    for path in (*keep, Path.cwd()):
        if path.resolve().is_relative_to(target):
            raise OtaError(f"{out} is, or holds, {path}; choose another output folder")
    if out.is_dir() and not any(out.iterdir()):
        return
    if not overwrite:
        raise OtaError(f"{out} exists already; choose another output or pass --overwrite")
    if not (out.is_dir() and is_output(out)):
        raise OtaError(
            f"{out} is {'a folder that holds other things than an earlier output' if out.is_dir() else 'a file'}: --overwrite does not replace "
            "it. Remove it yourself, or choose another output folder"
        )


def check_file(out: Path, *, overwrite: bool) -> None:
    """Raise OtaError unless a file can take the name ``out``. It may replace only a file of second moments or an empty one."""
    _tidy(out, None)
    if out.is_dir():
        raise OtaError(f"{out} is a folder; name a file such as {out / 'exp_avg_sq.safetensors'}")
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise OtaError(f"{out} exists already; choose another output or pass --overwrite")
    if not out.is_file():
        raise OtaError(f"{out} is no regular file; choose another output")
    if out.stat().st_size and not _has_format(out):
        raise OtaError(
            f"{out} is no file of second moments that this program wrote: --overwrite does not replace it. Remove it yourself, or choose "
            "another output"
        )


def _has_format(file: Path) -> bool:
    from ota_core.files.safetensors_io import FORMAT_KEY, SafetensorsFile

    try:
        with SafetensorsFile(file) as held:
            return FORMAT_KEY in held.metadata
    except CheckpointError:
        return False


def _sibling(out: Path, suffix: str) -> Path:
    return out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.{suffix}")


def _restore(out: Path, is_output: IsOutput) -> None:
    """An output that a process was about to replace when it was killed, where names cannot be exchanged in one step."""
    for old in out.parent.glob(f".{glob.escape(out.name)}.*.old"):
        if is_output(old) and is_abandoned(old):
            os.rename(old, out)
            return


def _tidy(out: Path, is_output: IsOutput | None) -> None:
    """Remove what killed processes have left beside ``out``."""
    for path in out.parent.glob(f".{glob.escape(out.name)}.*"):
        if path.suffix == ".tmp" or (path.suffix == ".old" and is_output is not None and is_output(path)):
            remove_abandoned(path)


def _take_place(new: Path, out: Path, *, overwrite: bool, is_output: IsOutput) -> None:
    """Give ``new`` the name ``out``. What had it has the name ``new`` then, or is gone."""
    if not overwrite or not os.path.lexists(out) or (out.is_dir() and not out.is_symlink() and not any(out.iterdir())):
        # Takes the place of nothing or of an empty folder, and of nothing else, in one step.
        try:
            os.rename(new, out)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                raise
            raise OtaError(f"{out} was written by somebody else meanwhile; it stays as it is. Choose another output") from None
        return
    check_free(out, overwrite=True, is_output=is_output)
    if not _renameat2(new, out, _EXCHANGE):
        _rename_twice(new, out)
    elif not new.is_dir() or new.is_symlink():
        new.unlink()


def _rename_twice(new: Path, out: Path) -> None:
    """Where the file system cannot exchange two names. What had the name comes back when the second step fails, by ``_tidy`` after a crash."""
    old = _sibling(out, "old")
    held = os.open(out, os.O_RDONLY)
    try:
        hold(held, out)
        os.rename(out, old)
        try:
            os.rename(new, out)
        except BaseException:
            os.rename(old, out)
            raise
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)
    finally:
        os.close(held)


def _rename_new(new: Path, out: Path) -> None:
    """Give a file the name ``out``, which nobody has. Raises OtaError when somebody has it."""
    taken = f"{out} was written by somebody else meanwhile; it stays as it is. Choose another output"
    try:
        if not _renameat2(new, out, _NOREPLACE):
            if os.path.lexists(out):  # not in one step, where the system has none
                raise OtaError(taken)
            os.rename(new, out)
    except FileExistsError:
        raise OtaError(taken) from None


def _renameat2(old: Path, new: Path, flags: int) -> bool:
    """Linux's call of that name; False where the system or the file system lacks it. Raises OSError."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here = -100  # AT_FDCWD
    if call is None:
        return False
    if call(here, os.fsencode(old), here, os.fsencode(new), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(old), None, str(new))
