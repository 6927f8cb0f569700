"""The commands that write files alone: merges and compressed second moments."""

from typing import ClassVar

import yaml

from tests.chaos.process import run
from tests.chaos.scene import ToFolder
from tests.flows.merge_fixture import EXPERTS


class Merge(ToFolder):
    """OTA with FFG into a folder that is not there yet."""

    name = "merge"
    share = 8
    parameters: ClassVar[dict[str, object]] = {"density": 0.4}
    options: ClassVar[tuple[str, ...]] = ()

    @property
    def where(self) -> str:
        """Where the models lie, with ``{}`` for their names."""
        return str(self.inputs / "{}")

    @property
    def words(self) -> list[str]:
        return ["merge", "recipe.yaml", str(self.target), "--home", str(self.folder / "home"), *self.options]

    def make(self) -> None:
        models = [{"model": self.where.format(name)} for name in EXPERTS]
        recipe = {"merge_method": "ota", "base_model": self.where.format("base"), "models": models, "parameters": self.parameters}
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


class MergeOver(Merge):
    """The same over an older output."""

    name = "merge over"
    share = 6
    overwrite = True
    options = ("--overwrite",)

    def make(self) -> None:
        older = {"merge_method": "linear", "models": [{"model": str(self.inputs / name)} for name in EXPERTS]}
        (self.folder / "older.yaml").write_text(yaml.safe_dump(older))
        words = ["merge", "older.yaml", str(self.target), "--home", str(self.folder / "home")]
        ended = run(words, self.folder, self.folder.with_name("make.log"))
        assert ended.code == 0, self.folder.with_name("make.log").read_text()
        super().make()


class MergeStages(Merge):
    """Two recipes in one file: the first one's result is a folder of the second one's inputs."""

    name = "merge stages"
    share = 3

    def make(self) -> None:
        models = [{"model": self.where.format(name)} for name in EXPERTS]
        first = {"name": "half", "merge_method": "linear", "models": models}
        second = {
            "merge_method": "task_arithmetic",
            "base_model": self.where.format("base"),
            "models": [{"model": "half"}, models[0]],
            "parameters": {"weight": 0.5},
        }
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump_all([first, second]))


class Compress(ToFolder):
    """Second moments into a file that is not there yet."""

    name = "compress"
    share = 5
    out = "out.safetensors"
    options: ClassVar[tuple[str, ...]] = ()

    @property
    def words(self) -> list[str]:
        source = str(self.inputs / "math")
        return ["compress", source, str(self.target), "--method", "log8", "--home", str(self.folder / "home"), *self.options]


class CompressOver(Compress):
    """The same over an older file."""

    name = "compress over"
    share = 4
    overwrite = True
    options = ("--overwrite",)

    def make(self) -> None:
        source = str(self.inputs / "knowledge")
        words = ["compress", source, str(self.target), "--method", "rank1", "--home", str(self.folder / "home")]
        ended = run(words, self.folder, self.folder.with_name("make.log"))
        assert ended.code == 0, self.folder.with_name("make.log").read_text()
