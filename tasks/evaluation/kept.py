"""Scores and smoke tests as their artifacts keep them."""

from collections.abc import Mapping

from ota_core.artifact import ArtifactRef
from tasks.artifacts.store import store_of
from tasks.evaluation.answers import ANSWERS_FILE, Answers, read_answers
from tasks.evaluation.scores import ModelScores
from tasks.evaluation.smoke import Probe
from tasks.settings import Places

SCORES_FILE = "scores.json"
SMOKE_FILE = "smoke.json"


def read_scores(places: Places, ref: ArtifactRef) -> ModelScores:
    """The scores that an artifact holds."""
    folder = store_of(places).local_path(ref)
    return ModelScores.model_validate_json((folder / SCORES_FILE).read_text(encoding="utf-8"))


def read_smoke(places: Places, ref: ArtifactRef) -> Probe:
    """What a model did when it was tried."""
    return Probe.model_validate_json((store_of(places).local_path(ref) / SMOKE_FILE).read_text(encoding="utf-8"))


def read_documents(places: Places, ref: ArtifactRef) -> Answers | None:
    """What the model answered, document by document; None where that was not kept."""
    return read_answers(store_of(places).local_path(ref) / ANSWERS_FILE)


def read_all(where: Places, refs: Mapping[str, ArtifactRef]) -> dict[str, ModelScores]:
    """The scores that these artifacts hold."""
    return {key: read_scores(where, ref) for key, ref in refs.items()}
