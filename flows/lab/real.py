"""The study on a real language model: SmolLM2-135M, experts on five domains of real text, and what merging makes of them.

What was fetched, converted, cut and trained is kept in the home folder and made only once; ``real/`` in it holds links by name.
"""

import os
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from tasks.artifacts.store import store_of
from tasks.local.demo.progress import training_bars
from tasks.local.real import steps
from tasks.local.real.base import BaseSettings, HubSettings
from tasks.local.real.corpus import DOMAINS
from tasks.local.real.steps import CORPORA, DATA, MODEL, RealSettings, Source, real_folder
from tasks.local.real.train import SETTINGS, Setting, models_folder
from tasks.settings import Places
from tasks.storage.cache import link_name

SEED = 1
AT_ONCE = 2
"""Trainings side by side, each on one thread and with about 4 GB of memory."""
SIDE_BY_SIDE: TaskRunner[Any] = ThreadPoolTaskRunner(max_workers=min(os.cpu_count() or 1, AT_ONCE))


@flow(name="real experts", flow_run_name="real experts", task_runner=SIDE_BY_SIDE, persist_result=False)
def real_experts_flow(
    where: Places, seed: int = SEED, settings: RealSettings | None = None, source: Source = "package", setting: Setting = "short"
) -> dict[str, Path]:
    """Base, corpora, questions, and one expert a domain, made where they are not there yet. ``setting``: how the experts are trained.

    Returns names in the home folder's ``real`` (``real-hub`` with the hub's base): ``data``, ``corpora``, ``models/base`` and ``models/<domain>``, or
    ``models-<setting>/…``. Models of ``settings`` or a seed of the caller's get no such name. Raises BaseError, StorageError and CorpusError for what cannot be fetched, before the training.
    """
    named = settings is None and seed == SEED
    settings = settings or RealSettings(base=BaseSettings() if source == "package" else HubSettings(), training=SETTINGS[setting])
    base = steps.make_base(where, settings.base)
    corpora = steps.make_corpora(where, settings.corpora)
    questions = steps.make_questions(where, settings.questions, corpora)
    with training_bars():
        futures = {domain: steps.train.submit(where, settings, seed, corpora, base, domain) for domain in DOMAINS}
        models = {"base": base} | {domain: future.result() for domain, future in futures.items()}
    store = store_of(where)
    found = {f"{models_folder(setting)}/{name}": store.local_path(model) / MODEL for name, model in models.items()}
    found |= {"corpora": store.local_path(corpora) / CORPORA, "data": store.local_path(questions) / DATA}
    if named:
        for name, folder in found.items():
            link_name(real_folder(where, source) / name, folder)
    return found
