"""The study of the real experts, with all that it needs: base, texts and experts are made first, then merged and compared."""

from pathlib import Path
from typing import Any

from flows.real import real_experts_flow, real_folder
from flows.study import study_flow
from tasks.settings import places
from tasks.study import StudyConfig, load_study

STUDY = Path(__file__).resolve().parents[1] / "deployments" / "studies" / "real.yaml"
HOME = "../../.ota/"
"""How the study file writes the home folder of this repository's make targets."""


def make_models(home: Path | None = None) -> dict[str, Path]:
    """Base, experts and data of the real study by their names, made where they are not there yet."""
    where = places(home)
    real_experts_flow(where)
    names = ("data", "models")
    return {name: real_folder(where) / name for name in names}


def real_study(file: Path, *, home: Path | None = None, **options: Any) -> list[Any]:
    """Run a study of the real experts; what to print at the end. ``options``: those of ``study_flow``.

    Raises RecipeError for what is wrong with the study, before anything is made.
    """
    config, folder = load_study(str(file))
    config = at_home(config, places(home).tracking.parent)
    make_models(home)
    write = options.get("write")
    command = f"ota study-real{'' if file == STUDY else f' {file}'}{f' --write {write}' if write else ''}"
    outcome = study_flow(config, recipe_dir=folder, home=home, command=command, **options)
    from tasks.study_report import render

    return list(render(outcome.folder, write))


def at_home(config: StudyConfig, home: Path) -> StudyConfig:
    """The study with its addresses below ``../../.ota/`` in this home folder instead."""

    def moved(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(HOME):
            return str(home / value.removeprefix(HOME))
        if isinstance(value, dict):
            return {key: moved(item) for key, item in value.items()}
        return [moved(item) for item in value] if isinstance(value, list) else value

    return StudyConfig.model_validate(moved(config.model_dump(mode="json", by_alias=True, exclude_unset=True)))
