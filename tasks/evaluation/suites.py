"""Benchmark suites: which lm-eval tasks measure which capability, and what identifies a model's scores on them."""

import hashlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ota_core.artifact import fingerprint
from ota_core.errors import OtaError
from ota_core.frozen import Frozen
from ota_core.recipe.yaml_text import load_yaml, nearest
from tasks.evaluation.backend import CHAT, SERVERS, Backend
from tasks.evaluation.tiers import DEVELOPMENT, Tier
from tasks.merging.recipes import parse_config
from tasks.settings import allow_path

SUITES = Path(__file__).resolve().parents[2] / "deployments" / "suites"

DATA = "{data}"
"""What a local task file writes in ``dataset_kwargs`` for the data folder that is given at run time."""


class SuiteError(OtaError):
    """A suite, one of its task files or its data is missing, malformed, or does not fit lm-eval."""


class TaskEntry(Frozen):
    """One lm-eval task (or group such as ``mmlu``) and the number of it that counts."""

    task: str
    metric: str = Field(description="As lm-eval names it, for example exact_match or acc_norm; higher is better, within 0..1.")
    filter: str = Field("none", description="lm-eval's filter that the metric is taken after, for example strict-match.")
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(1.0, description="Weight in the capability's score.")
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(None, description="Overrides the suite's and the task file's number.")
    executes_code: bool = Field(False, description="The task runs code that the model wrote; off unless the suite allows it.")
    generation_kwargs: dict[str, Any] = Field(
        {}, description="Over the task file's own, for example {do_sample: true, temperature: 0.7, max_gen_toks: 2048}."
    )
    repeats: Annotated[int, Field(ge=1)] = Field(
        1, description="Times that sampled answers are drawn and scored, each with another seed."
    )
    tier: Tier | None = Field(
        None, description="If other than its capability's: it then counts as a capability <capability>-<tier>."
    )


_HOW_ASKED = ("num_fewshot", "generation_kwargs", "repeats")
"""A task is run once, whatever it counts for."""


class LossEntry(Frozen):
    """One lm-eval task over held-out text, and the number of it that counts: less is better, and it has no upper bound."""

    task: str
    metric: Literal["bits_per_byte"] = Field("bits_per_byte", description="As lm-eval names it; in bits.")
    filter: str = Field("none", description="lm-eval's filter that the metric is taken after.")


class Capability(Frozen):
    """The tasks whose weighted mean is the capability's score."""

    tasks: Annotated[tuple[TaskEntry, ...], Field(min_length=1)]
    tier: Tier = Field(DEVELOPMENT, description="What it is measured for; the average is over the tier development.")


class Suite(Frozen):
    """A suite file. ``load_suite`` makes ``include_path`` absolute, so that a suite can be passed on as JSON."""

    name: str
    include_path: Path | None = Field(None, description="Folder of local lm-eval task files, relative to the suite file.")
    include_defaults: bool = Field(False, description="Index the tasks that lm-eval ships (takes seconds).")
    allow_code_execution: bool = Field(
        False,
        description="Run tasks that execute code written by the model, and functions that local task files name. Use a sandbox.",
    )
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(None, description="For every task whose own file does not say 0.")
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 64
    limit: Annotated[int, Field(ge=1)] | None = Field(None, description="Documents per task, of a group per member.")
    seed: Annotated[int, Field(ge=0)] = 0
    apply_chat_template: bool | Literal["auto"] = Field(
        False,
        description="Wrap prompts in the model's chat template. auto: where all models of a comparison have one, else for none.",
    )
    backend: Backend = Backend()
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Data type that every model is loaded in; without it each model's own."
    )
    capabilities: Annotated[dict[str, Capability], Field(min_length=1)]
    losses: dict[str, LossEntry] = Field({}, description="Held-out loss of capabilities, beside their scores.")
    documents: bool = Field(
        True, description="Keep what models were asked and answered beside their scores, and show it. False: scores alone."
    )

    @field_validator("capabilities")
    @classmethod
    def _one_tier_each(cls, raw: dict[str, Capability]) -> dict[str, Capability]:
        found: dict[str, tuple[Tier, list[TaskEntry]]] = {}
        for name, capability in raw.items():
            for entry in capability.tasks:
                tier = entry.tier or capability.tier
                own = name if tier == capability.tier else f"{name}-{tier}"
                if own != name and own in raw:
                    raise ValueError(f"{name}: the tasks of tier {tier} become the capability '{own}', which is listed as well")
                found.setdefault(own, (tier, []))[1].append(entry.model_copy(update={"tier": None}))
        return {name: Capability(tier=tier, tasks=tuple(entries)) for name, (tier, entries) in found.items()}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        if self.include_path is None and not self.include_defaults:
            problems.append("no task can be found: set include_path (local task files) or include_defaults: true (lm-eval's own)")
        first: dict[str, TaskEntry] = {}
        for capability, entry in self.entries():
            before = first.setdefault(entry.task, entry)
            differing = [name for name in _HOW_ASKED if getattr(entry, name) != getattr(before, name)]
            if differing:
                problems.append(
                    f"capabilities.{capability}: task '{entry.task}' is listed twice, with different {', '.join(differing)}"
                )
        listed = {entry.task for _, entry in self.entries()}
        for name, loss in self.losses.items():
            if name not in self.capabilities:
                problems.append(f"losses.{name}: there is no such capability; {nearest(name, self.capabilities)}")
            if loss.task in listed:
                problems.append(
                    f"losses.{name}: task '{loss.task}' is listed twice; a task is run once, for a score or for a loss"
                )
            listed.add(loss.task)
        if self.backend.is_server and self.dtype:
            problems.append(f"dtype: {self.backend.name} asks a server, which decides the data type by itself; take dtype out")
        if self.backend.name == CHAT and not self.apply_chat_template:
            problems.append(f"apply_chat_template: {CHAT} always asks through the server's chat template; write true")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def entries(self) -> Iterator[tuple[str, TaskEntry]]:
        """(capability, entry) of every listed task, in the file's order."""
        for name, capability in self.capabilities.items():
            for entry in capability.tasks:
                yield name, entry

    @property
    def tiers(self) -> dict[str, Tier]:
        """Capability to its tier, of those that are not for development."""
        return {name: one.tier for name, one in self.capabilities.items() if one.tier != DEVELOPMENT}

    def asked(self, chat_template: bool) -> Self:
        """The same, with it decided whether models are asked through their chat templates."""
        return self.model_copy(update={"apply_chat_template": chat_template})

    def all_tasks(self) -> list[TaskEntry]:
        """The tasks of scores and losses, as what is run."""
        losses = [TaskEntry(task=loss.task, metric=loss.metric, filter=loss.filter) for loss in self.losses.values()]
        return [entry for _, entry in self.entries()] + losses

    def runs(self, entry: TaskEntry) -> bool:
        """False for a task that executes generated code in a suite that does not allow it."""
        return self.allow_code_execution or not entry.executes_code


def load_suite(path_or_name: str) -> Suite:
    """Read a suite file, or by its bare name one of ``deployments/suites``. Raises SuiteError that lists every problem."""
    path = Path(path_or_name)
    if path.suffix not in {".yaml", ".yml"} and len(path.parts) == 1:
        known = sorted(p.stem for p in SUITES.glob("*.yaml"))
        if path_or_name not in known:
            raise SuiteError(
                f"there is no suite '{path_or_name}' in {SUITES}, and it is no .yaml file; {nearest(path_or_name, known)}"
            )
        path = SUITES / f"{path_or_name}.yaml"
    allow_path(path, "the suite")
    suite = parse_config(Suite, load_yaml(path), str(path), SuiteError)
    if suite.include_path is None:
        return suite
    folder = (path.parent / suite.include_path).resolve()
    if not folder.is_dir():
        raise SuiteError(f"{path}: include_path {suite.include_path} is not a folder beside the suite file ({folder})")
    return suite.model_copy(update={"include_path": folder})


def at_server(suite: Suite, url: str) -> Suite:
    """The suite with its questions put to a server: with the suite's own backend if that asks one, else ``local-completions``."""
    name = suite.backend.name if suite.backend.is_server else SERVERS[0]
    backend = {"name": name, "server": url, "args": suite.backend.args if suite.backend.is_server else {}}
    return parse_config(Suite, suite.model_dump() | {"backend": backend}, f"suite {suite.name} at a server", SuiteError)


def digest_data(folder: Path) -> str:
    """sha256 over the relative names and the bytes of every file below a folder; Python's caches do not count."""
    if not folder.is_dir():
        raise SuiteError(f"{folder} is not a folder; expected the data or the task files of a suite")
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        with open(path, "rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{content} {path.relative_to(folder).as_posix()}\n".encode())
    return total.hexdigest()


def needs_data(suite: Suite) -> bool:
    """Whether a local task file refers to the data folder of the run."""
    # "*yaml" and not "*.yaml": lm-eval's templates, which task files include, are called such as _template_yaml.
    files = suite.include_path.rglob("*yaml") if suite.include_path else ()
    return any(DATA in path.read_text(encoding="utf-8") for path in files if path.is_file())


def score_identity(
    model_digest: str, suite: Suite, data_digest: str | None, *, limit: int | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """(params, inputs) of ``fingerprint("scores", params, inputs)``: what decides a model's scores on a suite.

    The task files count with their contents; paths, device and batch size do not. ``limit`` overrides the suite's, as in
    ``score_model``. Public data sets are named by lm-eval's version alone: what the hub serves under a name is not seen.
    Raises SuiteError when the task files refer to a data folder and its digest is not given.
    """
    if data_digest is None and needs_data(suite):
        raise SuiteError(f"the task files of suite '{suite.name}' read {DATA}: its scores depend on data, give their digest")
    params = _without_unset(suite.model_dump(mode="json", exclude={"include_path", "batch_size", "backend", "documents"}), Suite)
    for capability in params["capabilities"].values():
        _without_unset(capability, Capability)["tasks"] = [_without_unset(entry, TaskEntry) for entry in capability["tasks"]]
    params |= {"limit": limit or suite.limit, "lm_eval": importlib.metadata.version("lm_eval")}
    try:
        params |= suite.backend.identity()
    except importlib.metadata.PackageNotFoundError:
        raise SuiteError(f"suite {suite.name}: {suite.backend.not_installed()}") from None
    # JSON objects have no order, but the order of capabilities and tasks changes no score either.
    inputs = {"model": model_digest}
    if suite.include_path is not None:
        inputs["tasks"] = digest_data(suite.include_path)
    if data_digest is not None:
        inputs["data"] = data_digest
    return params, inputs


_LATER: dict[type[Frozen], tuple[str, ...]] = {
    Suite: ("losses", "dtype"),
    Capability: ("tier",),
    TaskEntry: ("generation_kwargs", "repeats", "tier"),
}
"""What came to suites later: where it is not set, it leaves their identity as it was, and with it the scores that were kept."""


def _without_unset(raw: dict[str, Any], kind: type[Frozen]) -> dict[str, Any]:
    for name in _LATER[kind]:
        if raw[name] == kind.model_fields[name].default:
            del raw[name]
    return raw


def kept_identity(
    model_digest: str, suite: Suite, data_digest: str | None, *, limit: int | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """``score_identity`` and what besides the scores their artifact holds: what an artifact is found by.

    Losses of single documents came later; an artifact without them is not found, and its model is scored again. The scores themselves are
    the same, so that what compares them or follows from them (``suite_digest``, nights, searches) goes by ``score_identity``.
    """
    params, inputs = score_identity(model_digest, suite, data_digest, limit=limit)
    return params | ({"loss_samples": True} if suite.losses else {}), inputs


def suite_digest(suite: Suite, *, limit: int | None = None) -> str:
    """What two scores must share to be comparable: settings and task files. The data show in the hashes of the documents."""
    params, inputs = score_identity("", suite, "", limit=limit)
    return fingerprint("scores", params, inputs)
