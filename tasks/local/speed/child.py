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
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - started
    measured = {
        "seconds": seconds,
        "user_seconds": usage.ru_utime,
        "system_seconds": usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }
    with open(result, "w", encoding="utf-8") as stream:
        json.dump(measured, stream)
    return os.waitstatus_to_exitcode(status) % 256


if __name__ == "__main__":
    sys.exit(main())
