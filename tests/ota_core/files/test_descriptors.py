"""Files that are open at a time: few, whatever the number of inputs and outputs, and never blamed on a good file."""

import contextlib
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from ota_core.compute.descriptors import AT_ONCE, Written, check_limit, raise_limit
from ota_core.errors import OtaError
from ota_core.files.byte_source import MappedFile


def _open_files(folder: Path) -> int:
    """Descriptors of files below ``folder``: others may be closed by the collector at any time."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one of this very listing
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    return sum(link.startswith(f"{folder}/") for link in links)


def test_a_mapped_file_is_not_open(tmp_path: Path) -> None:
    """huggingface/datasets#6877: models of 170 shards, base and experts, pass a limit of 1024 with Python's own maps."""
    (tmp_path / "x").write_bytes(bytes(range(256)) * 64)
    maps = [MappedFile(tmp_path / "x") for _ in range(200)]
    assert _open_files(tmp_path) == 0
    view = np.frombuffer(maps[0].read(1, 5), np.uint8)
    for one in maps:
        one.prefetch(0, 4096)
        one.drop()
        one.close()
    maps.clear()
    assert view.tolist() == [1, 2, 3, 4]  # valid as long as it lives


def test_outputs_share_descriptors(tmp_path: Path) -> None:
    files = [Written(tmp_path / str(i), 8) for i in range(3 * AT_ONCE)]

    def write(part: int) -> None:
        for i, file in enumerate(files):
            with file.descriptor() as fd:
                os.pwrite(fd, bytes([i % 256, part]), 2 * part)
                assert _open_files(tmp_path) <= AT_ONCE + 8

    threads = [threading.Thread(target=write, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for file in files:
        file.sync()
    assert _open_files(tmp_path) == 0
    assert all(
        (tmp_path / str(i)).read_bytes() == bytes([i % 256, 0, i % 256, 1, i % 256, 2, i % 256, 3]) for i in range(len(files))
    )


def test_the_soft_limit_is_raised() -> None:
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 2048))\n"
        "from ota_core.compute.descriptors import raise_limit; raise_limit()\nprint(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(2048, 2048)"
    raise_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 256


def test_too_many_open_files_are_not_the_files_fault() -> None:
    with pytest.raises(OtaError, match=r"nothing is wrong with the file. Raise the limit \(ulimit -n 65536\)"):
        check_limit(OSError(24, "Too many open files", "model.safetensors"))
    check_limit(OSError(2, "No such file", "model.safetensors"))
