"""The study of the real experts, with all that it needs: base, texts and experts are made first, then merged and compared."""

from pathlib import Path
from typing import Any

from flows.lab.real import real_experts_flow
from flows.study import study_flow
from tasks.experiments.study.study import StudyConfig, load_study
from tasks.local.real.steps import Source, real_folder
from tasks.local.real.train import SETTINGS, Setting, models_folder
from tasks.settings import places

STUDY = Path(__file__).resolve().parents[2] / "deployments" / "studies" / "real.yaml"
HOME = "../../.ota/"
"""How the study file writes the home folder of this repository's make targets."""


def make_models(home: Path | None = None, source: Source = "package", setting: Setting = "short") -> dict[str, Path]:
    """Base, experts of one setting and data of the real study by their names, made where they are not there yet."""
    where = places(home)
    real_experts_flow(where, source=source, setting=setting)
    names = ("data", models_folder(setting))
    return {name: real_folder(where, source) / name for name in names}


def real_study(file: Path, *, home: Path | None = None, source: Source = "package", **options: Any) -> list[Any]:
    """Run a study of the real experts; what to print at the end. ``options``: those of ``study_flow``.

    Raises RecipeError for what is wrong with the study, before anything is made.
    """
    config, folder = load_study(str(file))
    config = at_home(config, places(home).home, source)
    for setting in settings_of(config):
        make_models(home, source, setting)
    write = options.get("write")
    words = ["ota study-real", *([] if file == STUDY else [str(file)]), *([] if source == "package" else [f"--base {source}"])]
    command = " ".join([*words, *([f"--write {write}"] if write else [])])
    outcome = study_flow(config, recipe_dir=folder, home=home, command=command, **options)
    from tasks.experiments.study.report import render

    return list(render(outcome.folder, write))


def settings_of(config: StudyConfig) -> list[Setting]:
    """How the experts that the study names were trained, by the folders that they lie in."""
    folders = {Path(one.model).parent.name for one in config.models}
    return [setting for setting in SETTINGS if models_folder(setting) in folders]


def at_home(config: StudyConfig, home: Path, source: Source = "package") -> StudyConfig:
    """The study with its addresses below ``../../.ota/`` in this home folder instead, its models those of this source of the base."""

    def moved(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(HOME):
            inside = value.removeprefix(HOME)
            other = source != "package" and inside.startswith("real/")
            return str(home / (f"real-{source}/{inside.removeprefix('real/')}" if other else inside))
        if isinstance(value, dict):
            return {key: moved(item) for key, item in value.items()}
        return [moved(item) for item in value] if isinstance(value, list) else value

    raw = moved(config.model_dump(mode="json", by_alias=True, exclude_unset=True))
    # Names of their own: neither's results replace the other's.
    return StudyConfig.model_validate(raw if source == "package" else raw | {"name": f"{config.name}-{source}"})
