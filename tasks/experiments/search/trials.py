"""A search's trials in Optuna: where they are kept, how points are chosen, and which trials are stopped early.

What was decided is read back from the study alone, never from a state in memory: a search that was killed goes on as if it had not been.
"""

from __future__ import annotations

import hashlib
import sqlite3
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ota_core.errors import OtaError
from tasks.experiments.search.space import Choose, Dimension, Range, Value, Values

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

RANDOM_TRIALS = 10
"""Trials before TPE has enough to go by, starting points included."""


class SearchError(OtaError):
    """A search that cannot run: a budget that pays for no trial, scores that do not compare, two processes at once."""


def open_study(storage: Path | None, name: str, reduction: int, stack: ExitStack) -> optuna.Study:
    """The study of this name, made when it is missing: in an SQLite file, or in memory. ``stack`` closes it and lets go of its lock.

    Raises SearchError when another process has it open.
    """
    import optuna
    from filelock import FileLock, Timeout
    from sqlalchemy import NullPool

    stack.callback(optuna.logging.set_verbosity, optuna.logging.get_verbosity())
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kept: Any = optuna.storages.InMemoryStorage()
    if storage is not None:
        storage.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(storage.with_name(f"{storage.name}.lock"), timeout=0)
        try:
            stack.enter_context(lock)
        except Timeout:
            raise SearchError(f"another process runs a search that is kept in {storage}; wait until it ends") from None
        connected = {"creator": partial(_connect, storage.resolve()), "poolclass": NullPool}
        kept = optuna.storages.RDBStorage(f"sqlite:///{storage.resolve()}", engine_kwargs=connected)
        stack.callback(kept.remove_session)
    return optuna.create_study(
        storage=kept, study_name=name, direction="maximize", load_if_exists=True, pruner=_halving(reduction)
    )  # fmt: skip


def _connect(storage: Path) -> sqlite3.Connection:
    """A trial is 25 transactions: no wait for the disk at each. A kill loses nothing; a power failure may lose the last trials, no more."""
    connection = sqlite3.connect(storage, check_same_thread=False)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    return connection


def _halving(reduction: int) -> optuna.pruners.BasePruner:
    import optuna

    class Halving(optuna.pruners.BasePruner):
        """Asynchronous successive halving (Li et al. 2020): of the trials that reached a rung so far, one in ``reduction`` goes on.

        Optuna's SuccessiveHalvingPruner also counts trials that were killed, so that a search that was interrupted would decide
        otherwise than one that was not.
        """

        def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
            step = trial.last_step
            assert step is not None
            others = [one.intermediate_values[step] for one in finished(study) if step in one.intermediate_values]
            better = sum(value > trial.intermediate_values[step] for value in others)
            return better >= max(1, (len(others) + 1) // reduction)

    return Halving()


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that ended, in the order in which they began: with all documents, or stopped before."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def give_up_running(study: optuna.Study) -> None:
    """Mark the trials of a process that was killed as failed. They are asked for again; what they measured stays readable."""
    from optuna.trial import TrialState

    for one in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(one.number, state=TrialState.FAIL)
    while study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.tell(study.ask(), state=TrialState.FAIL)


def ask(study: optuna.Study, number: int, seed: int, fixed: Values | None) -> tuple[optuna.Trial, Choose]:
    """A new trial, and what chooses its values: at a ``fixed`` point, or where TPE expects the most of it. It depends on the finished trials,
    the seed and the number.

    Each trial has a sampler of its own: one that goes on counting random numbers would choose otherwise after an interruption.
    """
    import optuna

    state = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    study.sampler = optuna.samplers.TPESampler(seed=state, n_startup_trials=RANDOM_TRIALS, constant_liar=False)
    if fixed is not None:
        study.enqueue_trial(dict(fixed))
    trial = study.ask()

    def choose(one: Dimension) -> Value:
        if isinstance(one.within, Range):
            return trial.suggest_float(one.name, one.within.low, one.within.high, log=one.within.log)
        return str(trial.suggest_categorical(one.name, one.within.words))

    return trial, choose


def study_name(identity: str) -> str:
    """A study's name in its file: what decides its trials, as a digest."""
    return f"search-{hashlib.sha256(identity.encode()).hexdigest()[:24]}"
