"""The commands that are flows: ``ota run`` and ``ota search``, with MLflow's embedded database, artifacts in a folder or in S3, and a Prefect server."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import yaml

from tests.chaos.facts import RECORD, Facts, in_mlflow, of_folder, of_prefix
from tests.chaos.scene import FLOWS, whole_artifacts
from tests.chaos.served import BUCKET, Served, _blank, half_logged, in_child
from tests.flows.merge_fixture import EXPERTS

API = "OTA_CHAOS_PREFECT"
"""Variable of the runner itself with the address of its Prefect server."""


class Run(Served):
    """The whole flow without a benchmark; everything in the home folder."""

    name = "run"
    share = 2
    preload = FLOWS
    options: ClassVar[tuple[str, ...]] = ("--suite", "none")

    @property
    def env(self) -> dict[str, str]:
        return {
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_API_URL": os.environ[API],
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        }

    @property
    def artifacts(self) -> str:
        return str(self.folder / "home" / "artifacts")

    @property
    def words(self) -> list[str]:
        home = ["--home", str(self.folder / "home"), "--artifacts", self.artifacts, "--device", "cpu", "--memory", "256MiB"]
        return ["run", "recipe.yaml", *self.options, *home]

    def model(self, name: str) -> str:
        """Where a model lies."""
        return str(self.inputs / name)

    def make(self) -> None:
        in_child(_blank, str(self.database.parent))
        models = [{"model": self.model(name)} for name in EXPERTS]
        parameters = {"density": 0.4, "compression": "rank1"}
        recipe = {"merge_method": "ota", "base_model": self.model("base"), "models": models, "parameters": parameters}
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def facts(self) -> Facts:
        home = self.folder / "home"
        return in_mlflow(self.database) | of_folder(Path(self.artifacts), "artifacts/") | of_folder(home / "unsent", "unsent/")

    def half(self) -> Iterator[str]:
        yield from whole_artifacts(Path(self.artifacts), self.reference, self.volatile)
        yield from half_logged(self.facts(), self.reference, self.volatile)

    def left(self) -> list[str]:
        return [name for name in super().left() if not name.startswith("prefect/")]


class RunBenchmark(Run):
    """The same with the smoke test and a benchmark of four models."""

    name = "run with a benchmark"
    share = 0.4

    @property
    def options(self) -> tuple[str, ...]:  # type: ignore[override]
        suite = self.inputs / "suite"
        return ("--suite", str(suite / "tiny.yaml"), "--data-dir", str(suite / "data"), "--limit", "4")

    def half(self) -> Iterator[str]:
        """The card is written twice: with the model, and again with its scores."""
        root = Path(self.artifacts)
        first = {
            f"artifacts/{card.relative_to(root).as_posix()}"
            for card in root.glob("merged/*/README.md")
            if (text := card.read_text()).startswith("---") and "## Scores" not in text and text.endswith("\n")
        }
        yield from whole_artifacts(root, self.reference, self.volatile | first)
        yield from half_logged(self.facts(), self.reference, self.volatile)


class RunAlone(Run):
    """With Prefect's own temporary server, which the command starts."""

    name = "run without a server"
    share = 0.4

    @property
    def env(self) -> dict[str, str]:
        return super().env | {"PREFECT_API_URL": "", "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true"}

    @property
    def words(self) -> list[str]:
        return [*super().words, "--no-server"]


class RunInS3(Run):
    """Models that are streamed from S3, and artifacts there."""

    name = "run in S3"
    share = 1.4

    @property
    def artifacts(self) -> str:
        return f"{self.prefix}/artifacts"

    def model(self, name: str) -> str:
        return f"{BUCKET}/models/{name}"

    def make(self) -> None:
        from tasks.storage import models as storage

        for name in ("base", *EXPERTS):
            storage.upload_folder(self.inputs / name, self.model(name))
        super().make()

    def facts(self) -> Facts:
        found = {f"artifacts/{name}": value for name, value in of_prefix(self.artifacts).items()}
        return in_mlflow(self.database) | found | of_folder(self.folder / "home" / "unsent", "unsent/")

    def half(self) -> Iterator[str]:
        found = self.facts()
        for record in [name for name in found if name.startswith("artifacts/") and name.endswith(f"/{RECORD}")]:
            place = record.removesuffix(RECORD)
            for name in [one for one in self.reference if one.startswith(place)]:
                beside = not name.endswith((".safetensors", ".json"))  # the card and the page come later
                if not beside and found.get(name) != self.reference[name] and name not in self.volatile:
                    yield f"{record} is there, and {name} is {found.get(name)}"
        yield from half_logged(found, self.reference, self.volatile)

    def left(self) -> list[str]:
        return [name for name in super().left() if not name.startswith("home/cache/")]


class Search(Run):
    """Three trials of a density and λ, each on two numbers of documents."""

    name = "search"
    share = 0.8

    @property
    def words(self) -> list[str]:
        suite = self.inputs / "suite"
        options = [
            "--suite",
            str(suite / "tiny.yaml"),
            "--data-dir",
            str(suite / "data"),
            "--rungs",
            "2,4",
            "--trials",
            "3",
            "--floor",
            "none",
        ]
        home = ["--home", str(self.folder / "home"), "--device", "cpu", "--memory", "256MiB"]
        return ["search", "recipe.yaml", "best.yaml", "--overwrite", *options, *home]

    def facts(self) -> Facts:
        out = self.folder / "best.yaml"
        return super().facts() | (of_folder(out) if out.exists() else {})
