"""Estimating: the second moments of one model that were not kept, by a job that finds what was estimated alike before."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from ota_core.artifact import ArtifactRef
from ota_core.compute.stream import Progress
from ota_core.engine.engine import environment
from ota_core.errors import OtaError, RecipeError, StorageError, raise_all
from ota_core.files.checkpoint import weight_files
from ota_core.frozen import Frozen
from ota_core.plan.plan import checkpoint_problems
from ota_core.recipe.estimate import EstimateSettings
from ota_core.recipe.recipe import MergeRecipe
from tasks.artifacts.step import Stage, Step
from tasks.artifacts.store import BuildResult, store_of
from tasks.evaluation.gradients.documents import Block
from tasks.evaluation.gradients.estimate import estimate
from tasks.evaluation.gradients.texts import TextError, file_blocks, random_blocks, suite_blocks
from tasks.evaluation.subject import Subject, bring_data, bring_model, fetched_subject
from tasks.evaluation.suites import Suite, digest_data, load_suite, needs_data, suite_digest
from tasks.merging.inputs import Estimate, assemble, estimated_ones, expert_labels
from tasks.settings import Places, allow_path
from tasks.storage import models as storage
from tasks.storage.cache import FileInfo, combined_digest, digest_file
from tasks.storage.models import Fetched

VERSION = 1
"""Raised when a change to the code changes the numbers: estimates from before then count as stale."""
FILE = "exp_avg_sq.safetensors"


_TENSORS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "optimizer*", "exp_avg_sq*")
"""Files beside the weights that hold tensors: second moments, which decide no gradient."""


def weights_digest(model: Fetched) -> str:
    """Of a checkpoint without the second moments beside it: to add some makes no other model."""
    if model.under is not None:
        parts = {"base": weights_digest(model.under), "adapter": weights_digest(model.model_copy(update={"under": None}))}
        return combined_digest({name: FileInfo(size=0, digest=digest) for name, digest in parts.items()})
    weights = {file.relative_to(model.path).as_posix() for file in weight_files(model.path)}
    beside = {name for name in model.files if "/" not in name and not any(fnmatchcase(name, one) for one in _TENSORS)}
    return combined_digest({name: info for name, info in model.files.items() if name in weights | beside})


class Texts(Frozen):
    """What one model's gradients are taken on, found and known by its content."""

    kind: Literal["file", "suite", "random"]
    source: str = ""
    """An absolute path or ``s3://…``; a suite's name or file."""
    data_dir: str | None = None
    capability: str | None = None
    digest: str

    @classmethod
    def of(
        cls, settings: EstimateSettings, where: Places, recipe_dir: Path | None = None, *, name: str = "", capability: str | None = None
    ) -> Self:  # fmt: skip
        """The texts of the expert of this name and capability. Raises OtaError for what is not there."""
        if settings.data is None:
            return cls(kind="random", digest="random tokens")
        if "{capability}" in settings.data and capability is None:
            raise TextError(
                f"estimate: data is '{settings.data}', but the capability of {name or 'the model'} is not known; say it"
            )
        source = settings.data.replace("{capability}", capability or "").replace("{expert}", name)
        if storage.is_s3(source):
            return cls(kind="file", source=source, digest=_file(source, where)[1])
        places = [place / Path(source).expanduser() for place in ([recipe_dir] if recipe_dir else []) + [Path.cwd()]]
        if found := next((path for path in places if path.is_file() and path.suffix not in {".yaml", ".yml"}), None):
            return cls(kind="file", source=str(found.resolve()), digest=_file(str(found.resolve()), where)[1])
        if (len(Path(source).parts) > 1 or Path(source).suffix) and Path(source).suffix not in {".yaml", ".yml"}:
            raise TextError(
                f"{source} is no file (looked in {', '.join(str(path.parent) for path in places)}); expected texts, or a suite"
            )
        suite = next((str(path.resolve()) for path in places if path.is_file()), source)
        texts = cls(kind="suite", source=suite, data_dir=_placed(settings.data_dir), capability=capability, digest="")
        return texts.model_copy(update={"digest": _suite(texts, where)[2]})

    def blocks(self, model: Path, settings: EstimateSettings, where: Places, vocabulary: int, length: int) -> list[Block]:
        """The texts in blocks, as the tokenizer of the model in a folder has them. Raises OtaError, also for texts that have changed."""
        if self.kind == "random":
            return random_blocks(vocabulary, settings, length)
        from tasks.evaluation.gradients.network import tokenizer_of  # with it comes torch

        tokenizer = tokenizer_of(model)
        if self.kind == "file":
            path, digest = _file(self.source, where)
            self._same(digest)
            return file_blocks(path, tokenizer, settings, length)
        suite, data, digest = _suite(self, where)
        self._same(digest)
        return suite_blocks(suite, data, self.capability, tokenizer, settings, length)

    def _same(self, digest: str) -> None:
        if digest != self.digest:
            raise StorageError(f"{self.source}: these texts are not what they were when the estimate was asked for; run it again")


def _placed(data_dir: str | None) -> str | None:
    return data_dir if data_dir is None or storage.is_s3(data_dir) else str(Path(data_dir).expanduser().resolve())


def _file(source: str, where: Places) -> tuple[Path, str]:
    """(The file on this machine, digest of its content). Raises StorageError."""
    path = Path(source)
    if storage.is_s3(source):
        parent, _, name = source.rpartition("/")
        path = storage.download_folder(parent, cache=where.cache, names=[name])[0] / name
    else:
        allow_path(path, "the texts")
    return path, digest_file(path, cache=where.cache)


def _suite(texts: Texts, where: Places) -> tuple[Suite, Path | None, str]:
    """(The suite, its data on this machine, digest of both). Raises SuiteError, StorageError."""
    suite = load_suite(texts.source)
    if texts.data_dir is None and needs_data(suite):
        raise TextError(f"suite {suite.name} reads data of its own; name their folder (data_dir)")
    data = bring_data(texts.data_dir, where)
    return suite, data, f"{suite_digest(suite)}+{digest_data(data) if data else 'none'}"


class EstimateJob(Stage):
    """Estimate one model's second moments."""

    kind: Literal["estimate"] = "estimate"
    subject: Subject
    base: Subject | None
    settings: EstimateSettings
    texts: Texts

    @classmethod
    def of(
        cls, model: Fetched, base: Fetched | None, settings: EstimateSettings, texts: Texts, *, name: str, capability: str | None = None
    ) -> Self:  # fmt: skip
        """What it will leave follows from the weights, those of the base, the texts and the settings. Raises OtaError."""
        if base is None and settings.points > 1:
            raise OtaError(
                f"estimate: {settings.points} points lie on the way from the base, which is not known; name it, or set points: 1"
            )
        config: dict[str, Any] = {"estimate": VERSION, **settings.decisive(), "capability": texts.capability}
        inputs = {"weights": weights_digest(model), "texts": texts.digest}
        inputs |= {"base": weights_digest(base)} if base else {}
        subject = fetched_subject(name, "expert", model, capability)
        start = fetched_subject("base", "base", base) if base else None
        return cls(step=Step.of("moments", config, inputs), subject=subject, base=start, settings=settings, texts=texts)

    @property
    def name(self) -> str:
        return f"estimate {self.subject.name}"

    def abroad(self) -> Self:
        there = {
            key: one and one.model_copy(update={"path": None}) for key, one in (("subject", self.subject), ("base", self.base))
        }
        return self.model_copy(update=there)

    def run(self, where: Places, device: str = "cpu", progress: Progress | None = None) -> ArtifactRef:
        def build(folder: Path) -> BuildResult:
            model = self.subject.path or bring_model(self.subject, where)
            base = None if self.base is None else self.base.path or bring_model(self.base, where)
            results = estimate(
                model, folder / FILE, self.settings, partial(self.texts.blocks, model, self.settings, where), said=self.said, base=base,
                partial=where.cache / "estimates" / f"{self.step.fingerprint}.safetensors", identity=self.step.fingerprint, device=device,
                progress=progress, what=self.name,
            )  # fmt: skip
            return BuildResult(results=results, provenance=environment(device) | {"expert": self.subject.name, "estimated": True})

        return self.produce(where, build)

    @property
    def said(self) -> dict[str, Any]:
        """How it is estimated, for the file of second moments, and for the records of merges with them."""
        return {**self.settings.decisive(), **{key: self.step.inputs[key] for key in ("texts", "weights")}}

    def located(self, ref: ArtifactRef, where: Places) -> Estimate:
        """What it left, as a merge takes it."""
        path = store_of(where).local_path(ref) / FILE
        return Estimate(path=path, address=storage.join(ref.uri, FILE), digest=f"estimate:{ref.fingerprint}")


def estimate_jobs(
    recipe: MergeRecipe, fetched: Sequence[Fetched], where: Places, recipe_dir: Path | None = None
) -> dict[int, EstimateJob]:
    """By position in the recipe, for the experts whose second moments are to be estimated; fetched: base first. Raises OtaError with everything
    that is wrong with the texts."""
    settings = recipe.estimates
    if settings is None:
        return {}
    models = list(fetched)
    base = models.pop(0) if recipe.base_model is not None else None
    labels, found, problems = expert_labels(recipe, models), dict[int, EstimateJob](), list[str]()
    for i in estimated_ones(recipe, models):
        name, capability = labels[i]
        try:
            texts = Texts.of(settings, where, recipe_dir, name=name, capability=capability)
            found[i] = EstimateJob.of(models[i], base, settings, texts, name=name, capability=capability)
        except OtaError as error:
            problems += [f"expert '{name}': {problem}" for problem in error.problems]
    if found:  # what is wrong with the checkpoints, before gradients are taken of any
        inputs = assemble(recipe, fetched, cache=where.cache, recipe_dir=recipe_dir, estimated=dict.fromkeys(found))
        problems += checkpoint_problems(recipe, inputs)
    raise_all(list(dict.fromkeys(problems)), RecipeError)
    return found
