"""From a suite's names to lm-eval's loaded tasks, with every problem found before the first request."""

import glob
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ota_core.errors import raise_all
from ota_core.recipe.yaml_text import nearest
from tasks.evaluation.backend import CHAT
from tasks.evaluation.suites import DATA, SUITES, Suite, SuiteError, TaskEntry

log = logging.getLogger(__name__)


def load_tasks(suite: Suite, data_dir: Path | None, cache: Path) -> dict[str, dict[str, Any]]:
    """Name to lm-eval's loaded {tasks, groups} of every task that may run, each once.

    ``data_dir`` stands for ``{data}`` in local task files; ``cache`` is a folder for the data sets made of them. All that can be
    known before a request is checked: names, code execution, data files, filters, metrics. Raises SuiteError with all problems.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=suite.include_path, include_defaults=suite.include_defaults)
    entries = {entry.task: entry for entry in suite.all_tasks()}
    losses = {loss.task for loss in suite.losses.values()}
    problems: list[str] = []
    for name, entry in entries.items():
        problems += index_problems(suite, name, entry, manager)
    raise_all(problems, SuiteError)

    specs = {}
    for name, entry in entries.items():
        if not suite.runs(entry):
            log.warning("suite %s: %s", suite.name, skip_reason(entry))
            continue
        try:
            specs[name] = _spec(suite, name, manager.task_index[name], data_dir, cache)
        except SuiteError as error:
            problems.append(str(error))
    raise_all(problems, SuiteError)

    loaded = {}
    for name, spec in specs.items():
        try:
            with task_code(suite):
                found = manager.load([spec])
        except SuiteError:
            raise
        except Exception as error:
            # Task code and data sets raise whatever they like; the message of lm-eval's own says what is missing.
            raise SuiteError(f"suite {suite.name}: lm-eval cannot load task '{name}': {type(error).__name__}: {error}") from error
        groups = {key: group for key, group in found["groups"].items() if key != f"run of {name}"}  # the inline one of _spec
        loaded[name] = {"tasks": found["tasks"], "groups": groups}
        for task in loaded[name]["tasks"].values():
            _set_fewshot(suite, entries[name], task)
            problems += _generation_problems(suite, entries[name], task)
    for entry in suite.all_tasks():
        if entry.task in loaded:
            problems += _metric_problems(suite, entry, loaded[entry.task], is_loss=entry.task in losses)
    raise_all(problems, SuiteError)
    return loaded


@contextmanager
def task_code(suite: Suite) -> Iterator[None]:
    """While lm-eval loads tasks: ``!function`` in a task file is followed in its own files and in those of deployments/suites, elsewhere only
    with the suite's ``allow_code_execution``. Loading a task would otherwise run whatever its file names."""
    from lm_eval.tasks import _yaml_loader as loader

    follow = loader._import_func_in_yml
    trusted = (Path(loader.__file__).parent, SUITES)

    def checked(name: str, folder: Path) -> Any:
        if not suite.allow_code_execution and not any(folder.resolve().is_relative_to(place) for place in trusted):
            raise SuiteError(
                f"suite {suite.name}: a task file in {folder} names the function {name[:80]}; code in task files runs only with "
                "allow_code_execution: true in the suite"
            )
        return follow(name, folder)

    loader._import_func_in_yml = checked
    try:
        yield
    finally:
        loader._import_func_in_yml = follow


def index_problems(suite: Suite, name: str, entry: TaskEntry, manager: Any) -> Iterator[str]:
    """What lm-eval's index says against an entry, without importing the task's code (humaneval's runs a program on import)."""
    found = manager.task_index.get(name)
    if found is None:
        where = "lm-eval's index" if suite.include_defaults else f"{suite.include_path}"
        yield f"suite {suite.name}: there is no task '{name}' in {where}; {nearest(name, manager.all_tasks)}"
    elif found.kind.name == "TAG":
        yield f"suite {suite.name}: '{name}' is a tag of {len(found.tags)} tasks without a common score; list tasks or a group"
    elif found.kind.name == "GROUP" and _is_local(suite, found):
        yield f"suite {suite.name}: '{name}' is a local group; list its tasks one by one, with weights"
    else:
        unsafe = sorted(member for member in members(name, manager.task_index) if is_unsafe(manager.task_index[member]))
        if unsafe and not entry.executes_code:
            yield (
                f"suite {suite.name}: task '{name}' executes code that the model wrote ({', '.join(unsafe[:3])}); "
                "mark it executes_code: true (it then runs only with allow_code_execution: true) or take it out"
            )


def members(name: str, index: Mapping[str, Any]) -> Iterator[str]:
    """The registered leaf tasks below a task, group or tag."""
    found = index.get(name)
    if found is None:
        return
    if found.kind.name == "TAG":
        for child in found.tags:
            yield from members(child, index)
    elif found.kind.name == "GROUP":
        for child in found.cfg.get("task") or []:
            child_name = child if isinstance(child, str) else child.get("group") or child.get("task")
            if isinstance(child_name, str) and child_name != name:
                yield from members(child_name, index)
    else:
        yield name


def is_unsafe(found: Any) -> bool:
    return bool((found.cfg or {}).get("unsafe_code"))


def _is_local(suite: Suite, found: Any) -> bool:
    return suite.include_path is not None and found.yaml_path is not None and found.yaml_path.is_relative_to(suite.include_path)


def _spec(suite: Suite, name: str, found: Any, data_dir: Path | None, cache: Path) -> str | dict[str, Any]:
    """What to hand to lm-eval: the name, or for a task on local data an inline group of one that overrides its dataset_kwargs.

    A group, because lm-eval then resolves the task file itself (includes and !function), which a bare dictionary would bypass.
    """
    kwargs = (found.cfg or {}).get("dataset_kwargs") or {}
    if DATA not in str(kwargs):
        return name
    if data_dir is None:
        raise SuiteError(f"suite {suite.name}: task '{name}' reads {DATA}, but no data folder was given (data_dir)")
    filled = _fill(kwargs, str(data_dir.resolve()))
    files = filled.get("data_files", {})
    listed = files.values() if isinstance(files, dict) else [files]
    flat = [path for item in listed for path in ([item] if isinstance(item, str) else item)]
    missing = [path for path in flat if not Path(path).is_file() and not glob.glob(path)]
    if missing:
        raise SuiteError(f"suite {suite.name}: task '{name}' reads {', '.join(missing)}: no such file; generate or fetch it")
    # A cache of this run's own: the one in the home folder goes by path and time stamp, and never shrinks.
    return {"group": f"run of {name}", "task": [{"task": name, "dataset_kwargs": {"cache_dir": str(cache), **filled}}]}


def _fill(value: Any, folder: str) -> Any:
    if isinstance(value, str):
        return value.replace(DATA, folder)
    if isinstance(value, dict):
        return {key: _fill(item, folder) for key, item in value.items()}
    return [_fill(item, folder) for item in value] if isinstance(value, list) else value


def _set_fewshot(suite: Suite, entry: TaskEntry, task: Any) -> None:
    """The entry's number, else the suite's unless the task file says 0 (as lm-eval does), else the task file's, else 0."""
    own = task.get_config("num_fewshot")
    wanted = entry.num_fewshot
    if wanted is None:
        wanted = own if suite.num_fewshot is None or own == 0 else suite.num_fewshot
    task.set_config(key="num_fewshot", value=wanted or 0)
    task.set_fewshot_seed(seed=suite.seed)


def _generation_problems(suite: Suite, entry: TaskEntry, task: Any) -> Iterator[str]:
    """Sets how answers are generated; yields what a task, or a server that only chats, cannot do of it."""
    where, name = f"suite {suite.name}: task '{entry.task}'", suite.backend.name
    if task.OUTPUT_TYPE != "generate_until":
        if name == CHAT:
            yield f"{where} compares likelihoods ({task.OUTPUT_TYPE}), which {name} does not give; take local-completions"
        if entry.generation_kwargs or entry.repeats > 1:
            yield f"{where} generates nothing ({task.OUTPUT_TYPE}), so that generation_kwargs and repeats mean nothing; take them out"
        return
    if entry.generation_kwargs:
        task.set_config(key="generation_kwargs", value=entry.generation_kwargs, update=True)
    settings = task.config.generation_kwargs
    sampled = settings.get("do_sample") is not False and float(settings.get("temperature") or 0) > 0
    if entry.repeats > 1 and not sampled:
        yield (
            f"{where} answers greedily, so that {entry.repeats} repeats would all be the same; take repeats out, or sample: "
            "generation_kwargs: {do_sample: true, temperature: 0.7}"
        )


def _metric_problems(suite: Suite, entry: TaskEntry, loaded: Mapping[str, Any], *, is_loss: bool) -> Iterator[str]:
    """Filters and metrics that a task cannot give, and metrics of which less is better (of a loss: more)."""
    where = f"suite {suite.name}: task '{entry.task}'"
    for task in loaded["tasks"].values():
        filters = [item["name"] for item in task.config.filter_list or []] or ["none"]
        if entry.filter not in filters:
            yield f"{where} has no filter '{entry.filter}'; {nearest(entry.filter, filters)}"
            return
        known = task.higher_is_better()
        # A task with code of its own, or a metric that returns several (pass@1), names its numbers only when it runs.
        own_names = task.config.process_results is not None or "@" in entry.metric
        if entry.metric not in known and not own_names:
            yield f"{where} has no metric '{entry.metric}'; {nearest(entry.metric, known)}"
            return
        if known.get(entry.metric) is False and not is_loss:
            yield f"{where}: of {entry.metric} less is better; a capability's score needs a metric of which more is better"
            return
        if known.get(entry.metric) is not False and is_loss:
            yield f"{where}: of {entry.metric} more is better; a loss needs a metric of which less is better"
            return


def skip_reason(entry: TaskEntry) -> str:
    return f"{entry.task} is off: it executes code that the model wrote, and the suite does not set allow_code_execution"
