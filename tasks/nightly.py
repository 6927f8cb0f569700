"""What a nightly merge is configured by, and what it remembers: which set of experts it merged last. Prefect is not needed here."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ota_core.artifact import ALGORITHM_VERSION, canonical_json, fingerprint, write_text_atomic
from ota_core.errors import OtaError, RecipeError, raise_all
from ota_core.recipe import DType, MergeParameters, MergeRecipe, Method
from tasks import storage
from tasks.gate import GateSettings
from tasks.recipes import read_yaml
from tasks.settings import Device, Places
from tasks.suites import Suite, score_identity


class NightlyError(OtaError):
    """A nightly merge that cannot be what its configuration asks for."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Candidate(_Strict):
    """One way to merge: a recipe without its models, which the night fills in."""

    name: str = Field(min_length=1, max_length=60, pattern=r"^[^'`/]+$", description="Its label in tables and in the registry.")
    merge_method: Method = Field(description="How task vectors are combined.")
    parameters: MergeParameters = Field(MergeParameters(), description="Of the method, for all experts.")
    dtype: DType | None = Field(None, description="Data type of the output.")
    tokenizer_source: str = Field("base", description="base, model:<name> or union.")

    def recipe(self, base_model: str, experts: Mapping[str, str]) -> MergeRecipe:
        """The recipe for these experts, capability → address. Raises RecipeError."""
        from ota_core.recipe import parse_recipe

        raw = self.model_dump(mode="json", by_alias=True, exclude={"name"}, exclude_none=True)
        models = [{"model": uri, "capability": capability} for capability, uri in experts.items()]
        return parse_recipe({**raw, "base_model": base_model, "models": models}, f"candidate '{self.name}'")


class NightlyConfig(_Strict):
    """One nightly merge."""

    name: str = Field(
        "ota-merged", pattern=r"^[A-Za-z0-9_.-]+$", description="Name of the registered model and of what is published."
    )
    experts: str = Field(
        description="Where experts arrive: s3://bucket/prefix or a folder, with <capability>/<expert>/ below it."
    )
    base_model: str = Field(description="The base that experts must have been trained from.")
    capabilities: tuple[str, ...] | None = Field(
        None, description="The capabilities that are merged; by default all that are found."
    )
    candidates: Annotated[tuple[Candidate, ...], Field(min_length=1)] = Field(description="The merges to try.")
    suite: str = Field(description="Benchmark suite: a name in deployments/suites or a file.")
    data_dir: str | None = Field(None, description="Data of a local suite: a folder or s3://….")
    limit: Annotated[int, Field(ge=1)] | None = Field(None, description="Documents per task.")
    gate: GateSettings = Field(GateSettings(), description="How sure the gate must be.")
    publish: str | None = Field(None, description="Where champions are copied to: s3://bucket/merged or a folder.")
    device: Device = Field("auto", description="What to compute on; auto: cuda where there is one.")
    memory: str = Field("2GiB", description="Budget of each merge.")

    @model_validator(mode="after")
    def _consistent(self) -> "NightlyConfig":
        names = [one.name for one in self.candidates]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"candidates need different names, got twice: {', '.join(twice)}")
        for one in self.candidates:  # a mistake in a recipe is told now, not after the experts were fetched
            one.recipe(self.base_model, {capability: "s3://any/expert" for capability in self.capabilities or ("one", "two")})
        return self

    def digest(self, suite: Suite, data: str | None) -> str:
        """What, beside the experts, decides a night's result: candidates, suite with its data, gate, versions of the algorithms."""
        scores, inputs = score_identity("", suite, data, limit=self.limit)
        said = self.model_dump(mode="json", include={"name", "base_model", "candidates", "gate", "publish"})
        return fingerprint("merged", {"night": said, "scores": scores, "versions": ALGORITHM_VERSION}, inputs)


def load_nightly(uri: str) -> NightlyConfig:
    """The configuration at a path or ``s3://…``. Raises RecipeError with every problem."""
    raw = read_yaml(uri)
    if not isinstance(raw, dict):
        raise RecipeError(f"{uri}: expected a mapping with experts, base_model, candidates and suite, got {type(raw).__name__}")
    try:
        return NightlyConfig.model_validate(raw)
    except ValidationError as error:
        raise_all([f"{uri}: {line}" for item in error.errors() for line in _explain(dict(item))], RecipeError)
        raise


def _explain(item: dict[str, Any]) -> list[str]:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "value_error":
        return [f"{where}: {line}".lstrip(": ") for line in str(item["ctx"]["error"]).split("\n")]
    if item["type"] == "missing":
        return [f"the key '{where}' is missing"]
    if item["type"] == "extra_forbidden":
        return [f"unknown key '{where}'; known are {', '.join(NightlyConfig.model_fields)}"]
    return [f"{where}: {item['msg']}, got {item['input']!r}"]


class LastNight(_Strict):
    """What the last night that came to its end saw and merged."""

    seen: str
    """Over everything that lay below the experts' prefix, and the configuration: unchanged means that nothing has to be looked at."""
    merged: str
    """Over the set that was merged, and the configuration."""
    experts: dict[str, str]
    """Capability → address."""
    outcome: str
    at: str


def _memory(where: Places, name: str) -> str:
    return storage.join(where.artifacts, "nightly", f"{name}.json")


def last_night(where: Places, name: str) -> LastNight | None:
    """What the last finished night of this name left, None before the first. Raises StorageError, and NightlyError for a damaged note."""
    uri = _memory(where, name)
    if storage.is_s3(uri):
        text = storage.read_bytes(uri).decode() if storage.exists(uri) else None
    else:
        text = Path(uri).read_text(encoding="utf-8") if Path(uri).is_file() else None
    try:
        return LastNight.model_validate_json(text) if text is not None else None
    except ValueError as error:
        raise NightlyError(f"{uri} is damaged ({error}); delete it, and the next night merges again what is there") from None


def remember(where: Places, name: str, *, seen: str, merged: str, experts: Mapping[str, str], outcome: str) -> None:
    """Write down what this night did: the last step, so that a night that was interrupted is done again."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    text = canonical_json(LastNight(seen=seen, merged=merged, experts=dict(experts), outcome=outcome, at=at)) + "\n"
    uri = _memory(where, name)
    if storage.is_s3(uri):
        storage.write_bytes(uri, text.encode())
    else:
        Path(uri).parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(Path(uri), text)
