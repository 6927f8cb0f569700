"""What is kept and what goes, on both kinds of root, with artifacts of the real stages and a real MLflow database."""

import os
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ota_core.artifact import RECORD, ArtifactRef
from ota_core.errors import StorageError
from tasks.artifacts.store import BuildResult
from tasks.registry.retention.listing import list_root
from tasks.registry.retention.plan import Plan
from tasks.registry.retention.references import Tracking
from tasks.storage import models as storage
from tasks.storage import s3
from tasks.tracking.names import REGISTERED_MODEL
from tasks.tracking.registered import TAG_WEIGHTS_DELETED
from tasks.tracking.run import TAG_LOGGED
from tests.fixtures.retention import Shop, keys, names, why

pytestmark = pytest.mark.usefixtures("quick")


def old(shop: Shop) -> set[tuple[str, str]]:
    """What the usual past leaves unreferenced."""
    return keys(shop.made["grey ota"].values())


def test_lists_what_nothing_refers_to_and_deletes_that_alone_when_told_to(either: Shop) -> None:
    shop = either
    everything = {one.uri for one in list_root(shop.where.artifacts)}
    plan = shop.retention().plan()

    assert names(plan, going=True) == old(shop)
    assert len(old(shop)) == 8, "a merge, two moments, two masks, three scores"
    reasons = why(plan)
    for label, reason in {
        "red ota": "champion", "red linear": "challenger", "blue ota": "replaced by the champion", "green ota": "run of the last 14 days",
    }.items():  # fmt: skip
        own = shop.made[label]
        assert reasons["merged", own["merged"].fingerprint] == reason
        parts = keys(ref for name, ref in own.items() if name != "merged")
        assert {reasons[key] for key in parts} == {"belongs to a kept merge"}
    assert shop.base_scores and reasons["scores", shop.base_scores.fingerprint] == "belongs to a kept merge"
    assert plan.frees == sum(item.stored.size for item in plan.going) > 10_000
    sizes = [item.stored.size for item in plan.items]
    assert sizes == sorted(sizes, reverse=True) and plan.going[0].stored.kind == "merged"
    assert {one.uri for one in list_root(shop.where.artifacts)} == everything, "planning deletes nothing"
    assert plan.notes == ()

    outcome = shop.retention().collect(plan)
    gone = {item.stored.uri for item in plan.going}
    assert {one.uri for one in list_root(shop.where.artifacts)} == everything - gone
    assert {item.stored.uri for item in outcome.deleted} == gone and not outcome.spared and outcome.frees == plan.frees
    if not storage.is_s3(shop.where.artifacts):
        assert not list(Path(shop.where.artifacts).glob("*/.*")), "no trash stays"
    assert outcome.versions == [shop.versions["grey ota"]]
    tags = {one.version: one.tags for one in shop.client.search_model_versions(f"name='{REGISTERED_MODEL}'")}
    marked = {str(number): t[TAG_WEIGHTS_DELETED] for number, t in tags.items() if TAG_WEIGHTS_DELETED in t}
    assert set(marked) == {shop.versions["grey ota"]}
    assert abs(datetime.fromisoformat(marked[shop.versions["grey ota"]]) - datetime.now(UTC)) < timedelta(minutes=5)
    assert not shop.retention().plan().going, "a second look finds nothing"


def test_afterwards_only_what_was_deleted_is_computed_again(either: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = either
    shop.retention().collect(shop.retention().plan())
    built: list[str] = []
    produce = type(shop.store).produce

    def counted(self: Any, kind: Any, fingerprint: str, *, build: Any, **rest: Any) -> ArtifactRef:
        def noted(folder: Path) -> BuildResult:
            built.append(kind)
            return build(folder)

        return produce(self, kind, fingerprint, build=noted, **rest)

    monkeypatch.setattr(type(shop.store), "produce", counted)
    version = shop.versions["grey ota"]
    shop.merge("red")
    shop.merge("blue")
    assert built == []
    shop.merge("grey")
    assert sorted(built) == ["masks"] * 2 + ["merged"] + ["moments"] * 2 + ["scores"] * 3
    assert shop.versions["grey ota"] == version
    assert TAG_WEIGHTS_DELETED not in shop.client.get_model_version(REGISTERED_MODEL, version).tags, "its weights are back"


def test_an_empty_registry_keeps_what_is_recent_and_says_that_it_knows_nothing(shop: Shop) -> None:
    shop.merge("red", log=False)
    shop.merge("blue", log=False)
    shop.age(20)
    for ref in shop.made["blue ota"].values():
        assert shop.store.find(ref.kind, ref.fingerprint), "finding is using"
    plan = shop.retention(later=0).plan()
    red = keys(shop.made["red ota"].values())
    assert names(plan, going=True) == set(red), "the records tell whose scores are whose"
    reasons = why(plan)
    assert {reasons[key] for key in keys(shop.made["blue ota"].values())} == {"used in the last 14 days"}
    assert "knows none of the 2 merged models here" in plan.notes[0]


def test_a_merge_found_by_its_fingerprint_keeps_what_was_not_touched_with_it(shop: Shop) -> None:
    """Nobody logged it; the digests in the records tell its scores from others."""
    shop.merge("red", log=False)
    shop.merge("grey")
    shop.age(20)
    shop.end_run("grey ota", datetime.now(UTC) - timedelta(days=20))
    shop.client.delete_run(shop.runs["grey ota"])
    shop.client.delete_registered_model_alias(REGISTERED_MODEL, "challenger")
    merged = shop.made["red ota"]["merged"]
    assert shop.store.find("merged", merged.fingerprint)
    plan = shop.retention(later=0).plan()
    reasons = why(plan)
    red, grey = shop.made["red ota"], shop.made["grey ota"]
    assert {reasons[key] for key in keys(red[n] for n in ("moments red0", "moments red1", "mask red0", "scores red0"))} == {
        "belongs to a kept merge"
    }
    assert reasons["scores", red["scores red"].fingerprint] == "belongs to a kept merge"
    assert reasons["scores", grey["scores grey"].fingerprint] == "unreferenced"
    assert reasons["scores", grey["scores grey0"].fingerprint] == "unreferenced"
    assert {("merged", grey["merged"].fingerprint), ("moments", grey["moments grey0"].fingerprint)} < names(plan, going=True)


def test_a_recent_run_keeps_what_its_lineage_names_when_its_merge_is_gone(settled: Shop) -> None:
    shop = settled
    shop.store.delete(shop.made["green ota"]["merged"])
    plan = shop.retention().plan()
    assert names(plan, going=True) == old(shop)
    # Without the run it goes like any other.
    shop.client.delete_run(shop.runs["green ota"])
    more = keys(ref for name, ref in shop.made["green ota"].items() if name != "merged")
    assert names(shop.retention().plan(), going=True) == old(shop) | more


def test_a_merge_that_was_logged_again_without_computing_anything_is_in_use(settled: Shop) -> None:
    """Its run reads FINISHED and keeps its times; the day of the last log is a tag."""
    shop = settled
    when = (datetime.now(UTC) + timedelta(days=29)).date()
    run = shop.client.get_run(shop.runs["grey ota"])
    assert run.data.tags[TAG_LOGGED] == datetime.now(UTC).date().isoformat()
    shop.client.set_tag(run.info.run_id, TAG_LOGGED, when.isoformat())
    plan = shop.retention().plan()
    assert not plan.going and why(plan)["merged", shop.made["grey ota"]["merged"].fingerprint] == "run of the last 14 days"


def test_other_aliases_count_and_a_version_that_names_nothing_keeps_every_merge(settled: Shop) -> None:
    shop = settled
    client, version = shop.client, shop.versions["grey ota"]
    client.set_registered_model_alias(REGISTERED_MODEL, "shown-to-customers", version)
    plan = shop.retention().plan()
    assert not plan.going and why(plan)["merged", shop.made["grey ota"]["merged"].fingerprint] == "shown-to-customers"

    client.delete_registered_model_alias(REGISTERED_MODEL, "shown-to-customers")
    # By hand, with an address and no fingerprint: the address tells.
    by_hand = client.create_model_version(REGISTERED_MODEL, source=shop.made["grey ota"]["merged"].uri)
    client.set_registered_model_alias(REGISTERED_MODEL, "by-hand", by_hand.version)
    client.delete_model_version(REGISTERED_MODEL, version)
    plan = shop.retention().plan()
    assert why(plan)["merged", shop.made["grey ota"]["merged"].fingerprint] == "by-hand"
    assert not {"merged", "moments", "masks"} & {kind for kind, _ in names(plan, going=True)}

    lost = client.create_model_version(REGISTERED_MODEL, source=f"runs:/{shop.runs['grey ota']}/model")
    client.set_registered_model_alias(REGISTERED_MODEL, "by-hand", lost.version)
    plan = shop.retention().plan()
    assert why(plan)["merged", shop.made["grey ota"]["merged"].fingerprint] == "reference not resolved"
    assert f"version {lost.version} (by-hand) names neither its recipe nor its weights" in plan.notes[0]


def test_a_champion_under_another_name_counts(settled: Shop) -> None:
    """A nightly merge may have a registered model of its own; what somebody else registered says nothing."""
    shop, client = settled, settled.client
    merged = shop.made["grey ota"]["merged"]
    assert (merged.kind, merged.fingerprint) in names(shop.retention().plan(), going=True)
    client.create_registered_model("theirs")
    client.create_model_version("theirs", source="runs:/0/model")
    client.set_registered_model_alias("theirs", "champion", "1")
    assert (merged.kind, merged.fingerprint) in names(shop.retention().plan(), going=True)
    client.create_registered_model("ota-other")
    client.create_model_version("ota-other", source=merged.uri, tags={"recipe_fingerprint": merged.fingerprint})
    client.set_registered_model_alias("ota-other", "champion", "1")
    assert (merged.kind, merged.fingerprint) not in names(shop.retention().plan(), going=True)


def test_a_replaced_champion_that_is_gone_is_said(settled: Shop) -> None:
    shop = settled
    shop.client.delete_model_version(REGISTERED_MODEL, shop.versions["blue ota"])
    plan = shop.retention().plan()
    assert keys(shop.made["blue ota"].values()) <= names(plan, going=True)
    assert "no rollback is possible" in plan.notes[0]


@pytest.mark.parametrize(("either", "break_after"), [("folder", 0), ("folder", 4), ("s3", 1)], indirect=["either"])
def test_a_break_in_the_middle_leaves_whole_artifacts_and_a_repeat_finishes(
    either: Shop, monkeypatch: pytest.MonkeyPatch, break_after: int
) -> None:
    shop = either
    plan = shop.retention().plan()
    kept = names(plan, going=False)
    count = 0
    real = shutil.rmtree if not storage.is_s3(shop.where.artifacts) else s3.client().delete_objects

    def breaks(*args: Any, **rest: Any) -> Any:
        nonlocal count
        count += 1
        if count > break_after:
            raise KeyboardInterrupt  # the record is gone, the other files are not
        return real(*args, **rest)

    with monkeypatch.context() as patch:
        if storage.is_s3(shop.where.artifacts):
            patch.setattr(s3.client(), "delete_objects", breaks)
        else:
            patch.setattr("tasks.storage.cache.shutil.rmtree", breaks)
        with pytest.raises(KeyboardInterrupt):
            shop.retention().collect(plan)

    left = {(one.kind, one.name) for one in list_root(shop.where.artifacts) if one.complete}
    assert kept <= left and len(left) == len(kept) + len(plan.going) - break_after - 1
    version = shop.client.get_model_version(REGISTERED_MODEL, shop.versions["grey ota"])
    assert TAG_WEIGHTS_DELETED in version.tags, "the merged model is the largest, and so the first"

    # Half-deleted folders are seen as such, by a later look when the deletion itself was long ago.
    again = shop.retention(later=60)
    shop.end_run("green ota", datetime.now(UTC) + timedelta(days=59))
    again.collect(again.plan())
    assert {(one.kind, one.name) for one in list_root(shop.where.artifacts)} == kept


def test_what_is_used_after_the_listing_is_left_alone(either: Shop) -> None:
    shop = either
    plan = shop.retention().plan()
    used = [shop.made["grey ota"]["merged"], shop.made["grey ota"]["mask grey0"]]
    _touch(used, plan)
    outcome = shop.retention().collect(plan)
    assert {item.stored.name for item in outcome.spared} == {ref.fingerprint for ref in used}
    assert len(outcome.deleted) == len(plan.going) - 2
    assert shop.there(used) == {True}
    version = shop.client.get_model_version(REGISTERED_MODEL, shop.versions["grey ota"])
    assert TAG_WEIGHTS_DELETED not in version.tags


def _touch(refs: list[ArtifactRef], plan: Plan) -> None:
    """Use them, until the listing shows it: S3 tells whole seconds."""
    listed = {item.stored.uri: item.stored.touched for item in plan.items}
    for ref in refs:
        if not storage.is_s3(ref.uri):
            os.utime(Path(ref.uri) / RECORD)
            continue
        record = storage.join(ref.uri, RECORD)
        for _ in range(30):
            s3.write_bytes(record, s3.read_bytes(record))
            if next(one.modified for one in s3.list_objects(ref.uri) if one.uri == record) != listed[ref.uri]:
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"{record} shows no later time after it was written 30 times")


def test_a_promotion_after_the_listing_is_seen(settled: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = settled
    rule = shop.retention()
    plan = rule.plan()
    shop.client.set_registered_model_alias(REGISTERED_MODEL, "challenger", shop.versions["grey ota"])
    outcome = rule.collect(plan)
    assert not outcome.deleted and len(outcome.spared) == 8
    assert shop.there(shop.made["grey ota"].values()) == {True}


def test_without_mlflow_nothing_is_deleted(settled: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = settled
    everything = {one.uri for one in list_root(shop.where.artifacts)}
    plan = shop.retention().plan()
    database = shop.where.tracking / "mlflow.db"
    database.rename(database.with_suffix(".away"))
    with pytest.raises(StorageError, match=r"there is no MLflow database .*mlflow\.db"):
        shop.retention()
    assert not database.exists(), "looking must not make one"

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = Tracking(tracking_uri="http://127.0.0.1:9", root=shop.where.tracking)
    database.with_suffix(".away").rename(database)
    rule = shop.retention()
    lost = type(rule)(rule.store, away, 14, now=rule.now)
    with pytest.raises(StorageError, match=r"MLflow at http://127\.0\.0\.1:9 failed while reading what is in use"):
        lost.plan()
    with pytest.raises(StorageError, match="No artifact is deleted while MLflow does not say what is in use"):
        lost.collect(plan)
    assert {one.uri for one in list_root(shop.where.artifacts)} == everything


def test_a_damaged_database_is_no_empty_one(shop: Shop) -> None:
    (shop.where.tracking / "mlflow.db").write_bytes(b"no database" * 100)
    with pytest.raises(StorageError, match="failed while reading what is in use"):
        shop.retention().plan()


def test_other_roots_are_not_this_ones_versions(settled: Shop, ground: Path, tmp_path: Path) -> None:
    """The same fingerprint below another root: kept here as there, but deletion there marks nothing here."""
    shop = settled
    copy = shutil.copytree(shop.where.artifacts, tmp_path / "copy")
    other = Shop(shop.models, shop.where.model_copy(update={"artifacts": str(copy)}))
    plan = other.retention().plan()
    assert names(plan, going=True) == old(shop)
    assert other.retention().collect(plan).versions == []
    assert shop.there(shop.made["grey ota"].values()) == {True}
