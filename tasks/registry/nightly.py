"""What a nightly merge is configured by, and what it remembers: which set of experts it merged last. Prefect is not needed here."""

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ota_core.artifact import ALGORITHM_VERSION, canonical_json, fingerprint
from ota_core.compute.stream import parse_memory
from ota_core.errors import OtaError, RecipeError, StorageError
from ota_core.recipe.methods import DType, Method
from ota_core.recipe.parameters import MergeParameters
from ota_core.recipe.recipe import MergeRecipe, parse_recipe
from tasks.evaluation.gate import GateSettings
from tasks.evaluation.suites import Suite, score_identity
from tasks.merging.recipes import parse_config, read_yaml
from tasks.settings import Device, Places
from tasks.storage import models as storage
from tasks.tracking.names import REGISTERED_MODEL


class NightlyError(OtaError):
    """A nightly merge that cannot be what its configuration asks for."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Candidate(_Strict):
    """One way to merge: a recipe without its models, which the night fills in. A mistake in it is told before anything is fetched."""

    name: str = Field(min_length=1, max_length=60, pattern=r"^[^'`/]+$", description="Its label in tables and in the registry.")
    merge_method: Method = Field(description="How task vectors are combined.")
    parameters: MergeParameters = Field(MergeParameters(), description="Of the method, for all experts.")
    dtype: DType | None = Field(None, description="Data type of the output.")
    tokenizer_source: str = Field("base", description="base, model:<name> or union.")

    def recipe(self, base_model: str, experts: Mapping[str, str]) -> MergeRecipe:
        """The recipe for these experts, capability → address. Raises RecipeError."""
        if self.name == "base" or self.name in experts:
            raise RecipeError(f"candidate '{self.name}': a row of the table of scores has that name already; choose another")
        raw = self.model_dump(mode="json", by_alias=True, exclude={"name"}, exclude_none=True)
        models = [{"model": uri, "capability": capability} for capability, uri in experts.items()]
        return parse_recipe({**raw, "base_model": base_model, "models": models}, f"candidate '{self.name}'", strict=True)

    @model_validator(mode="after")
    def _mergeable(self) -> "Candidate":
        _try(self, ("first expert", "second expert"))
        return self


def _try(candidate: Candidate, capabilities: Sequence[str]) -> None:
    """Raises ValueError for a candidate that cannot merge experts of these capabilities, wherever they lie."""
    try:
        candidate.recipe("s3://any/base", {capability: "s3://any/expert" for capability in capabilities})
    except RecipeError as error:
        raise ValueError("\n".join(error.problems)) from None


class NightlyConfig(_Strict):
    """One nightly merge."""

    name: str = Field(
        REGISTERED_MODEL, pattern=r"^[A-Za-z0-9_.-]+$", description="Name of the registered model and of what is published."
    )
    experts: str = Field(
        description="Where experts arrive: s3://bucket/prefix or a folder, with <capability>/<expert>/ below it."
    )
    base_model: str = Field(description="The base that experts must have been trained from.")
    capabilities: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None, description="The capabilities that are merged; by default all that are found."
    )
    candidates: Annotated[tuple[Candidate, ...], Field(min_length=1)] = Field(description="The merges to try.")
    suite: str = Field(description="Benchmark suite: a name in deployments/suites or a file.")
    data_dir: str | None = Field(None, description="Data of a local suite: a folder or s3://….")
    limit: Annotated[int, Field(ge=1)] | None = Field(None, description="Documents per task.")
    gate: GateSettings = Field(GateSettings(), description="How sure the gate must be.")
    leave_out: Literal["never", "propose", "measured", "each"] = Field(
        "never",
        description="Experts that a preflight expects to hurt; propose: the page names them, measured: the best candidate is also merged without "
        "each of them, and where that is better beyond the noise, it stands before the gate, too; each: the same without every single expert.",
    )
    publish: str | None = Field(None, description="Where champions are copied to: s3://bucket/merged or a folder.")
    device: Device = Field("auto", description="What to compute on; auto: cuda where there is one.")
    memory: str = Field("2GiB", description="Budget of each merge.")
    report: Literal["full", "scores", "none"] = Field(
        "full", description="The page of each candidate; full: with the analysis of the experts, scores: without it."
    )

    @model_validator(mode="after")
    def _consistent(self) -> "NightlyConfig":
        problems = []
        names = [one.name for one in self.candidates]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            problems.append(f"candidates need different names, got twice: {', '.join(twice)}")
        for one in self.candidates if self.capabilities else ():  # once more, now that the experts' number and names are known
            try:
                _try(one, self.capabilities or ())
            except ValueError as error:
                problems.append(str(error))
        try:
            parse_memory(self.memory)
        except OtaError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def tries(self) -> bool:
        """Whether merges without an expert are made."""
        return self.leave_out in {"measured", "each"}

    def digest(self, suite: Suite, data: str | None) -> str:
        """What, beside the experts, decides a night's result: capabilities, candidates, suite with its data, gate, versions of the
        algorithms."""
        scores, inputs = score_identity("", suite, data, limit=self.limit)
        said = self.model_dump(mode="json", include={"name", "base_model", "capabilities", "candidates", "publish"})
        said["gate"] = self.gate.said()
        if self.tries:  # the others decide nothing
            said["leave_out"] = self.leave_out
        return fingerprint("merged", {"night": said, "scores": scores, "versions": ALGORITHM_VERSION}, inputs)


def find_config(given: str | None = None, environment: Mapping[str, str] = os.environ) -> str:
    """Where the configuration lies: as given, else OTA_NIGHTLY, else deployments/nightly.yaml."""
    return given or environment.get("OTA_NIGHTLY") or "deployments/nightly.yaml"


def load_nightly(uri: str) -> NightlyConfig:
    """The configuration at a path or ``s3://…``. Raises RecipeError with every problem, NightlyError where S3 holds no such file."""
    try:
        raw = read_yaml(uri)
    except StorageError as error:
        if error.reason != "missing":
            raise
        raise NightlyError(
            f"{uri}: no nightly configuration lies there yet; name your experts in a copy of deployments/nightly.yaml and upload it to this "
            "address (infra/README.md, The nightly configuration), or name another file with OTA_NIGHTLY or the parameter config"
        ) from None
    return parse_config(NightlyConfig, raw, uri)


class LastNight(_Strict):
    """What the last night that came to its end saw and merged."""

    seen: str
    """Over everything that lay below the experts' prefix, and the configuration: unchanged means that nothing has to be looked at."""
    merged: str
    """Over the set that was merged, and the configuration."""
    experts: dict[str, str]
    """Capability → address."""
    left_out: tuple[str, ...] = ()
    """Broken experts and what is wrong with them: told every night until they are gone or mended."""
    outcome: str
    at: str


def _memory(where: Places, name: str) -> str:
    return storage.join(storage.absolute(where.artifacts), "nightly", f"{name}.json")


def last_night(where: Places, name: str) -> LastNight | None:
    """What the last finished night of this name left, None before the first. Raises StorageError, and NightlyError for a damaged note."""
    uri = _memory(where, name)
    content = storage.read_note(uri)
    try:
        return LastNight.model_validate_json(content) if content is not None else None
    except ValidationError as error:
        seen = "; ".join(" ".join([*map(str, item["loc"]), item["msg"]]) for item in error.errors())
        raise NightlyError(f"{uri} is damaged ({seen}); delete it, and the next night merges again what is there") from None


def remember(
    where: Places, name: str, *, seen: str, merged: str, experts: Mapping[str, str], left_out: Sequence[str], outcome: str
) -> None:
    """Write down what this night did: the last step, so that a night that was interrupted is done again."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    note = LastNight(seen=seen, merged=merged, experts=dict(experts), left_out=tuple(left_out), outcome=outcome, at=at)
    storage.write_note(_memory(where, name), canonical_json(note) + "\n")
