"""Runs one command and writes what it cost as JSON: ``python child.py RESULT COMMAND…``.

A program of its own, on the standard library alone, because Linux counts the memory of whoever starts a process into that
process's peak: the benchmark itself, with torch loaded, would be the floor of every measurement.
"""

import json
import os
import sys
import time


def main() -> int:
    result, command = sys.argv[1], sys.argv[2:]
    started = time.perf_counter()
    pid = os.posix_spawnp(command[0], command, os.environ)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    seconds = time.perf_counter() - started
    io = _io(pid)  # as long as it is not waited for, its counters can be read
    _, status, usage = os.wait4(pid, 0)
    measured = {
        "seconds": seconds,
        "user_seconds": usage.ru_utime,
        "system_seconds": usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        **io,
    }
    with open(result, "w", encoding="utf-8") as stream:
        json.dump(measured, stream)
    return os.waitstatus_to_exitcode(status) % 256


def _io(pid: int) -> dict[str, int | None]:
    """Bytes through read() and write(), and to and from the disk, of a process of Linux that has ended."""
    names = {
        "rchar": "call_read_bytes",
        "wchar": "call_written_bytes",
        "read_bytes": "disk_read_bytes",
        "write_bytes": "disk_written_bytes",
    }
    try:
        with open(f"/proc/{pid}/io", encoding="ascii") as stream:
            lines = dict(line.split(": ") for line in stream.read().splitlines())
    except OSError:
        return dict.fromkeys(names.values())
    return {ours: int(lines[theirs]) for theirs, ours in names.items()}


if __name__ == "__main__":
    sys.exit(main())
