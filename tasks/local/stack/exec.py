"""``python -m tasks.local.stack.exec NAME``: what supervisord starts. Ends what a crashed predecessor left, then becomes the process.

A server that was killed may leave a child that holds its port, a worker the flow runs that it had started; supervisord knows only
the process that it started itself. MLflow's server could not open a database whose making was killed.
"""

import json
import os
import sys
from pathlib import Path

from tasks.local.stack.processes import end, marked
from tasks.local.stack.programs import NAME, OURS, programs_file
from tasks.tracking.database import make_database

GRACE_SECONDS = 5.0


def main(name: str) -> None:
    """Replace this process by the one of this name."""
    folder = Path(os.environ[OURS])
    program = json.loads(programs_file(folder).read_text(encoding="utf-8"))[name]
    left = end(lambda: marked(folder, name), grace=GRACE_SECONDS)
    if left:
        print(f"ended {left} processes that the last {name} had left", flush=True)
    if name == "mlflow":
        make_database(folder / "mlflow" / "mlflow.db")
    environ = {**os.environ, **program["env"], NAME: name}
    os.execvpe(program["command"][0], program["command"], environ)


if __name__ == "__main__":
    main(sys.argv[1])
