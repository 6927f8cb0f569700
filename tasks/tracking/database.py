"""MLflow's embedded database, whole before it has its name: MLflow makes its tables in many steps, and cannot open one that a kill left half made."""

from pathlib import Path

from ota_core.errors import OtaError, StorageError
from ota_core.files.place import new_file


def make_database(uri: str) -> None:
    """Make the SQLite file of this address with all tables, unless there is one; of several processes the first one's stays.

    Raises StorageError where it cannot be written, and what MLflow's own making of a database raises.
    """
    from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine_with_retry
    from sqlalchemy import make_url

    name = make_url(uri).database
    if not name or name == ":memory:":
        return
    database = Path(name)
    try:
        with new_file(database, overwrite=False) as new:  # also where there is one: what a killed process left beside it goes
            engine = create_sqlalchemy_engine_with_retry(f"sqlite:///{new}")
            try:
                _initialize_tables(engine)
            finally:
                engine.dispose()
    except OtaError as error:
        if not database.exists():
            raise StorageError(f"MLflow's database could not be made: {error}") from error
