"""Which version of the registered model is the champion: promotion, rejection and rollback by moving aliases.

MLflow offers no transaction over several calls. So the alias ``champion`` moves by one call, and all that must be known
of the move is written on the version before; what follows (history, tidying up) can be done again, and the next call does it where
one was interrupted. There is always exactly one champion once there was one.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from ota_core.errors import OtaError, StorageError
from ota_core.frozen import Frozen
from tasks.artifacts.store import record_at
from tasks.evaluation.gate import GateDecision, GateError
from tasks.pages.gate import to_markdown
from tasks.registry.history import Move, champions, history_tag, moves_of, next_time
from tasks.tracking.names import EXPERIMENT, REGISTERED_MODEL
from tasks.tracking.registered import (
    CHALLENGER,
    CHAMPION,
    TAG_DECISION,
    TAG_DIGEST,
    TAG_REPLACED,
    TAG_SOURCE,
    set_announced,
)
from tasks.tracking.run import GATE_JSON, REPORT, TAG_FINGERPRINT
from tasks.tracking.store import (
    Store,
    artifact_errors,
    batches,
    clear_errors,
    connect,
    locked,
    mlflow_metrics,
    resolve_store,
    store_errors,
)
from tasks.tracking.write import find

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

log = logging.getLogger(__name__)

_MOVE = "champion_move"
"""Tag of a version: the move that made it champion, or was about to, as JSON. Written before the alias moves."""
_SAFE = "The champion is the old one or the new one, whole."


class PromotionError(OtaError):
    """The registry does not hold what is asked for, or the version cannot become champion."""


class Version(Frozen):
    """A version of the registered model."""

    name: str
    """The registered model's."""
    version: str
    run_id: str | None
    digest: str
    source_uri: str
    """Where the weights lie: ``s3://…`` or a folder."""
    tags: dict[str, str]


class Moved(Frozen):
    """What a promotion or a rollback came to."""

    champion: Version
    replaced: str | None
    """The version that was champion before; None when there was none."""
    moved: bool
    """False: it was the champion already, and at most the trace of an interrupted call was completed."""


def current(
    alias: str, *, tracking_uri: str | None = None, root: Path | None = None, name: str = REGISTERED_MODEL
) -> Version | None:
    """The version that has the alias, None when none has or nothing was registered yet. Raises StorageError when MLflow is away."""
    with _registry(f"reading the alias {alias!r} of {name!r}", tracking_uri, root) as client:
        model = _find_model(client, name)
        number = _alias(model, alias) if model else None
        return _version(client, name, number) if number else None


def history(*, tracking_uri: str | None = None, root: Path | None = None, name: str = REGISTERED_MODEL) -> list[Move]:
    """Every move of the alias ``champion``, oldest first, the last one also where its call was interrupted before it was noted."""
    with _registry(f"reading the history of {name!r}", tracking_uri, root) as client:
        model = _find_model(client, name)
        if model is None:
            return []
        unnoted = _unnoted(client, model)
        return [*moves_of(model.tags), *([unnoted] if unnoted else [])]


def rolled_back(
    number: str, *, tracking_uri: str | None = None, root: Path | None = None, name: str = REGISTERED_MODEL
) -> Move | None:
    """The rollback that took the alias ``champion`` from this version, also one that was interrupted before it was noted.

    None where there was none, or the version was made champion again since. Raises StorageError.
    """
    for move in reversed(history(tracking_uri=tracking_uri, root=root, name=name)):
        if move.to == number:
            return None
        if move.action == "rollback" and move.from_version == number:
            return move
    return None


def promote(
    version: str, *, by: str, reason: str, decision: GateDecision | None = None, tracking_uri: str | None = None,
    root: Path | None = None, name: str = REGISTERED_MODEL,
) -> Moved:  # fmt: skip
    """Make a version the champion, by the gate's ``decision`` or by hand.

    After an interruption calling again finishes the job; for the version that is champion already nothing changes. The version's
    tags tell who, when, why, the gate's numbers and the version replaced; the history of the registered model gains an entry. The alias
    ``challenger`` is taken from it. Raises PromotionError for a version that is not there or has lost its weights, GateError
    for a decision against it, StorageError when MLflow is away.
    """
    if decision is not None and not decision.promoted:
        raise GateError(
            f"the gate kept '{decision.candidate}' as challenger ({' '.join(decision.reasons)}); "
            "promote it by hand, without the decision, if it shall be champion all the same"
        )
    with _registry(f"promoting version {version} of {name!r}", tracking_uri, root) as client:
        target = _version(client, name, version)
        _check_weights(target)
        model = _model(client, name)  # after the weights, which may lie far away: the less passes between looking and moving
        _finish(client, model)
        before = _alias(model, CHAMPION)
        if before == target.version:
            return Moved(champion=target, replaced=target.tags.get(TAG_REPLACED) or None, moved=False)
        move = Move.model_validate(
            {"action": "promote", "from": before, "to": target.version, "by": by, "reason": reason, "at": next_time(model.tags)}
        )
        tags = {TAG_REPLACED: before or "", "promoted_at": move.at, "promoted_by": by, "promoted_reason": reason}
        target = _tag(client, target, tags | (_gate_tags(decision) if decision else {}))
        return Moved(champion=_move(client, target, move), replaced=before, moved=True)


def reject(
    version: str,
    decision: GateDecision,
    *,
    tracking_uri: str | None = None,
    root: Path | None = None,
    name: str = REGISTERED_MODEL,
) -> Version:
    """Make a version the challenger, with the gate's reasons and numbers as tags. The champion is left as it is.

    Raises PromotionError for a version that is not there, GateError for a decision that promotes it, StorageError.
    """
    if decision.promoted:
        raise GateError(f"the gate decided to promote '{decision.candidate}'; promote it, or decide again")
    with _registry(f"rejecting version {version} of {name!r}", tracking_uri, root) as client:
        target = _version(client, name, version)
        if _alias(_model(client, name), CHAMPION) == target.version:
            return target
        target = _tag(client, target, _gate_tags(decision))
        client.set_registered_model_alias(name, CHALLENGER, target.version)
        return target


def rollback(
    *, by: str, reason: str, to: str | None = None, tracking_uri: str | None = None, root: Path | None = None,
    name: str = REGISTERED_MODEL,
) -> Moved:  # fmt: skip
    """Give the alias ``champion`` back to the version that the champion replaced, or to an earlier champion ``to``.

    Each call goes one promotion further back, never forth. A call without ``to`` that finds an interrupted rollback finishes
    that one. The version left is tagged with who, when and why. Raises PromotionError when there is nothing to go back to, ``to`` was
    never champion before this one, or the weights are gone; StorageError when MLflow is away.
    """
    with _registry(f"rolling {name!r} back", tracking_uri, root) as client:
        model = _model(client, name)
        before = _alias(model, CHAMPION)
        if before is None:
            raise PromotionError(f"{name!r} has no champion to roll back from; see its versions with: ota champion")
        finished = _finish(client, model)
        if to == before or (to is None and finished is not None and finished.action == "rollback"):
            return Moved(
                champion=_version(client, name, before), replaced=finished.from_version if finished else None, moved=False
            )
        model = _model(client, name)
        earlier = champions(moves_of(model.tags), before)[:-1]
        if to is not None and to not in earlier:
            known = f"earlier champions: {', '.join(dict.fromkeys(reversed(earlier)))}" if earlier else "there was none"
            raise PromotionError(
                f"version {to} was not champion before version {before} ({known}); make it so with: ota promote {to}"
            )
        if not earlier:
            raise PromotionError(
                f"version {before} of {name!r} replaced no champion, there is nothing to roll back to; promote another one"
            )
        target = _version(client, name, to or earlier[-1])
        _check_weights(target)
        move = Move.model_validate(
            {"action": "rollback", "from": before, "to": target.version, "by": by, "reason": reason, "at": next_time(model.tags)}
        )
        return Moved(champion=_move(client, target, move), replaced=before, moved=True)


def log_decision(
    run_id: str, decision: GateDecision, *, report: str | None = None, tracking_uri: str | None = None, root: Path | None = None
) -> None:
    """Log the gate's numbers to the candidate's run, with ``gate.json`` and ``gate.md``. Again is fine: nothing doubles.

    ``report``: the merge's page with the decision, which takes the place of the one that the run holds.

    Raises StorageError.
    """
    from mlflow.entities import Metric

    with _registry(f"logging the gate's decision to the run {run_id}", tracking_uri, root) as client:
        run = client.get_run(run_id)
        now = int(time.time() * 1000)
        # What is there already would become a second point of a curve.
        new = [
            Metric(key, value, now, 0)
            for key, value in mlflow_metrics(decision.metrics()).items()
            if run.data.metrics.get(key) != value
        ]
        for some in batches(new, 500):
            client.log_batch(run_id, metrics=some)
        files = {GATE_JSON: decision.model_dump_json(indent=2) + "\n", "gate.md": to_markdown(decision)}
        files |= {} if report is None else {REPORT: report}
        with artifact_errors(", ".join(files), run.info.artifact_uri, _SAFE):
            for path, text in files.items():
                client.log_text(run_id, text, path)


def logged_decision(
    fingerprint: str, digest: str, *, tracking_uri: str | None = None, root: Path | None = None
) -> GateDecision | None:
    """What ``log_decision`` noted last of the merge with this recipe's fingerprint and model's digest; None where no gate has seen it.

    Raises StorageError.
    """
    with _registry("reading the gate's decision", tracking_uri, root) as client:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        identity = {TAG_FINGERPRINT: fingerprint, TAG_DIGEST: digest}
        run = find(client, experiment.experiment_id, identity) if experiment else None
        if run is None or "gate/promoted" not in run.data.metrics:
            return None
        with tempfile.TemporaryDirectory() as folder:
            try:
                if all(one.path != GATE_JSON for one in client.list_artifacts(run.info.run_id)):
                    return None  # somebody ended the night between the numbers and the file: its next try decides again
                text = Path(client.download_artifacts(run.info.run_id, GATE_JSON, folder)).read_text(encoding="utf-8")
            except Exception as error:  # each kind of artifact store raises its own exceptions
                raise StorageError(
                    f"{GATE_JSON} of the run {run.info.run_id} could not be read ({error}); check access to the artifact store, then run "
                    "the same again"
                ) from error
        try:
            return GateDecision.model_validate_json(text)
        except ValidationError as error:  # of another version of this package: the page can do without
            log.warning("%s of the run %s is left out of the report: %s", GATE_JSON, run.info.run_id, error)
            return None


@contextmanager
def _registry(doing: str, tracking_uri: str | None, root: Path | None) -> Iterator[MlflowClient]:
    store: Store = resolve_store(tracking_uri=tracking_uri, root=root)
    with clear_errors(store, doing, _SAFE), locked(store):
        yield connect(store)


def _find_model(client: MlflowClient, name: str) -> RegisteredModel | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _model(client: MlflowClient, name: str) -> RegisteredModel:
    model = _find_model(client, name)
    if model is None:
        raise PromotionError(f"MLflow has no registered model {name!r}; a merge registers it (ota run), --name names another one")
    return model


def _alias(model: RegisteredModel, alias: str) -> str | None:
    number = model.aliases.get(alias)
    return None if number is None else str(number)


def _version(client: MlflowClient, name: str, version: str) -> Version:
    """Raises PromotionError when it is not there."""
    from mlflow.exceptions import MlflowException

    try:
        if not version.isdecimal():
            raise PromotionError(f"version {version!r} is no number; expected one such as 3")
        found = client.get_model_version(name, version)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        _model(client, name)
        there = sorted(int(v.version) for v in client.search_model_versions(f"name='{name}'"))
        raise PromotionError(f"{name!r} has no version {version}; it has {', '.join(map(str, there)) or 'none'}") from None
    tags = dict(found.tags)
    return Version(
        name=name, version=str(found.version), run_id=found.run_id, digest=tags.get(TAG_DIGEST, ""),
        source_uri=tags.get(TAG_SOURCE) or str(found.source), tags=tags,
    )  # fmt: skip


def _check_weights(version: Version) -> None:
    if record_at(version.source_uri) is None:
        raise PromotionError(
            f"version {version.version} of {version.name!r} cannot become champion: its weights are not complete at {version.source_uri} "
            "any more (record.json or a file that it lists is missing); merge its recipe again, or choose another version"
        )


def _gate_tags(decision: GateDecision) -> dict[str, str]:
    return {
        TAG_DECISION: CHAMPION if decision.promoted else CHALLENGER,
        "gate/reason": " ".join(decision.reasons),
        "gate/confidence": f"{decision.confidence:g}",
        "gate/numbers": json.dumps(mlflow_metrics(decision.metrics())),
    }


def _tag(client: MlflowClient, version: Version, tags: dict[str, str]) -> Version:
    """Set these tags on a version whose alias is decided; returns the version with them."""
    for key, value in tags.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(version.name, version.version, key, value)
    set_announced(client, version.version, name=version.name)
    return _version(client, version.name, version.version)


def _move(client: MlflowClient, target: Version, move: Move) -> Version:
    """Make the target champion, and note it."""
    client.set_model_version_tag(target.name, target.version, _MOVE, move.to_json())
    client.set_registered_model_alias(target.name, CHAMPION, target.version)
    try:
        _note(client, target.name, move)
    except store_errors() as error:
        # The move stands. An error would have the caller do it again, and a rollback done again goes one step further.
        log.warning("version %s is champion, but its trace is not complete (%s); the next move completes it", move.to, error)
    return target.model_copy(update={"tags": {**target.tags, _MOVE: move.to_json()}})


def _note(client: MlflowClient, name: str, move: Move) -> None:
    """What follows a move. The history's entry comes last: as long as it is missing, all of this is done again."""
    if move.action == "rollback" and move.from_version is not None:
        for key, value in {"rolled_back_at": move.at, "rolled_back_by": move.by, "rolled_back_reason": move.reason}.items():
            client.set_model_version_tag(name, move.from_version, key, value)
    model = _model(client, name)
    if _alias(model, CHALLENGER) in {move.to, _alias(model, CHAMPION)}:
        client.delete_registered_model_alias(name, CHALLENGER)
    client.set_registered_model_tag(name, *history_tag(move))


def _unnoted(client: MlflowClient, model: RegisteredModel) -> Move | None:
    """The move that made the champion what it is, where an interrupted call did not get to note it."""
    champion = _alias(model, CHAMPION)
    if champion is None:
        return None
    noted = _version(client, model.name, champion).tags.get(_MOVE)
    move = Move.model_validate_json(noted) if noted else None
    return None if move is None or history_tag(move)[0] in model.tags else move


def _finish(client: MlflowClient, model: RegisteredModel) -> Move | None:
    """Complete the trace of an interrupted move; returns it, None when there was none."""
    move = _unnoted(client, model)
    if move is not None:
        _note(client, model.name, move)
    return move
