"""The places where state becomes visible, and how a process is made to die exactly before or after one of them.

A name stands for a function of this project or of a library below it. The function is wrapped in the process that is to die; the product
knows nothing of it. Of ``os`` only what happens in the trial's own folder counts.
"""

import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

POINTS = {
    # A name on the disk.
    "rename": "os:rename",
    "replace": "os:replace",
    "link": "os:link",
    "unlink": "os:unlink",
    "remove tree": "shutil:rmtree",
    "exchange": "ota_core.files.place:_renameat2",
    "take place": "ota_core.files.place:_take_place",
    "record": "ota_core.artifact:write_record",
    "text": "ota_core.artifact:write_text_atomic",
    # The store of artifacts, what is published, what is sent.
    "publish artifact": "tasks.artifacts.store:ArtifactStore._publish_local",
    "publish artifact in S3": "tasks.artifacts.store:ArtifactStore._publish_remote",
    "note beside the model": "tasks.artifacts.store:ArtifactStore.annotate",
    "delete artifact": "tasks.artifacts.store:ArtifactStore.delete",
    "publish": "tasks.registry.publish:publish",
    "latest.json": "tasks.registry.publish:point_latest",
    "keep for MLflow": "tasks.tracking.outbox:_keep",
    # Every request that changes something in S3 (see _request).
    "S3": "botocore.client:BaseClient._make_api_call",
    # What changes MLflow.
    **{
        f"MLflow {name}": f"mlflow:MlflowClient.{name}"
        for name in (
            "create_experiment", "create_run", "update_run", "set_terminated", "log_batch", "log_inputs", "log_artifacts", "log_text",
            "log_dict", "create_registered_model", "create_model_version", "set_model_version_tag", "delete_model_version_tag",
            "set_registered_model_alias", "delete_registered_model_alias", "set_registered_model_tag", "create_logged_model",
            "log_model_artifacts", "finalize_logged_model", "set_logged_model_tags", "log_outputs", "set_tag", "set_experiment_tag",
        )
    },
    # One of many steps in which MLflow and Optuna make the tables of their databases.
    "tables": "alembic.runtime.migration:HeadMaintainer.update_to_step",
    # A search's memory.
    **{f"Optuna {name}": f"optuna.storages:RDBStorage.{name}" for name in ("create_new_study", "create_new_trial", "set_trial_user_attr",
       "set_trial_param", "set_trial_intermediate_value", "set_trial_system_attr", "set_trial_state_values")},
}  # fmt: skip
_WRITES = ("Put", "Copy", "Delete", "Create", "Upload", "Complete", "Abort")
_OF_FILES = ("os", "shutil")
_OURS = ("ota_core", "tasks", "flows")


@dataclass(frozen=True)
class Death:
    """Before or after the ``nth`` call, from 1, of the point of this name."""

    when: Literal["before", "after"]
    name: str
    nth: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of ``str(death)``: ``before rename 2``. Raises ValueError."""
        when, _, rest = text.partition(" ")
        name, _, nth = rest.rpartition(" ")
        if when not in ("before", "after") or not name:
            raise ValueError(text)
        return cls(when, name, int(nth))  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.when} {self.name} {self.nth}"


Hook = Callable[[str, str], None]
"""Told "before" or "after", and the point's name."""


def dies_at(death: Death) -> Hook:
    """Ends this process at once there."""
    calls: Counter[str] = Counter()
    lock = threading.Lock()

    def hook(when: str, name: str) -> None:
        if (when, name) != (death.when, death.name):
            return
        with lock:
            calls[name] += 1
            if calls[name] == death.nth:
                os.kill(os.getpid(), signal.SIGKILL)
                threading.Event().wait()

    return hook


def counts_into(file: Path) -> Hook:
    """Writes the name of every point that is passed, a line each."""
    stream = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def hook(when: str, name: str) -> None:
        if when == "before":
            os.write(stream, f"{name}\n".encode())

    return hook


def install(hook: Hook, folder: Path) -> None:
    """Have the hook called around every point of the modules that are loaded, in this process. folder: where files count."""
    for name, place in POINTS.items():
        module, _, path = place.partition(":")
        owner: Any = sys.modules.get(module)
        if owner is None:
            continue
        *parents, attribute = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        original = getattr(owner, attribute)
        wrapped = _wrapped(original, _namer(name, module, folder), hook)
        setattr(owner, attribute, wrapped)
        if not parents:
            _replace(original, wrapped)


def _wrapped(original: Callable[..., Any], named: Callable[..., str | None], hook: Hook) -> Callable[..., Any]:
    def around(*args: Any, **kwargs: Any) -> Any:
        name = named(*args)
        if name is None:
            return original(*args, **kwargs)
        hook("before", name)
        found = original(*args, **kwargs)
        hook("after", name)
        return found

    return around


def _namer(name: str, module: str, folder: Path) -> Callable[..., str | None]:
    """The point's name for a call with these arguments; None where the call does not count."""
    if name == "S3":
        return lambda client, operation, *_: f"S3 {operation}" if operation.startswith(_WRITES) else None
    if module in _OF_FILES:
        inside = f"{folder}{os.sep}"
        return lambda path, *_: name if str(path).startswith(inside) else None
    return lambda *_: name


def _replace(original: Any, wrapped: Any) -> None:
    """In every module of ours that has taken the function by its name."""
    for label, module in list(sys.modules.items()):
        if label.partition(".")[0] in _OURS and module is not None:
            for key, value in list(vars(module).items()):
                if value is original:
                    setattr(module, key, wrapped)
