"""MLflow's SQLite database, whole before it has its name: MLflow makes its tables in many steps, and cannot open one that a kill left half made."""

import threading
from pathlib import Path

from ota_core.errors import OtaError, StorageError
from ota_core.files.place import new_file

_ONE_AT_A_TIME = threading.Lock()
"""Alembic, which makes the tables, keeps what it works on in variables of its module."""


def make_database(database: Path) -> None:
    """Make the file with all tables, unless there is one; of several processes the first one's stays.

    Raises StorageError where it cannot be written, and what MLflow's own making of a database raises.
    """
    try:
        # Also where there is one: what a killed process left beside it goes.
        with _ONE_AT_A_TIME, new_file(database, overwrite=False) as new:
            from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine_with_retry

            engine = create_sqlalchemy_engine_with_retry(f"sqlite:///{new}")
            try:
                _initialize_tables(engine)
            finally:
                engine.dispose()
    except OtaError as error:
        if not database.exists():
            reason = str(error).partition(";")[0]
            raise StorageError(
                f"MLflow's database {database} could not be made: {reason}. Name another home folder (OTA_HOME), or a server "
                "(MLFLOW_TRACKING_URI)"
            ) from error
