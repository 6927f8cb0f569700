"""``ota gc`` as a person types it."""

import json
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from flows.cli.retention import age_text, size_text
from tasks.registry.retention.listing import list_root
from tasks.tracking.run import TAG_LOGGED
from tests.fixtures.retention import Shop, empty_database, keys, open_shop, quick_scores, write_models
from tests.flows.cli.typed import refused, said


def ota_gc(shop: Shop, *arguments: object, width: int = 100, run: Callable[..., str] = said) -> str:
    screen = {"COLUMNS": str(width), "TERM": "dumb", "NO_COLOR": "1"}
    return run("gc", "--home", shop.where.cache.parent, *arguments, env=screen)


@pytest.fixture(scope="module")
def past(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Of twenty days ago: the champion red, and grey that nothing refers to. Green, the challenger, was made today."""
    folder = tmp_path_factory.mktemp("past")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "OTA_ARTIFACTS", "OTA_HOME"):
            patch.delenv(name, raising=False)
        quick_scores(patch)
        shop = open_shop(folder / "home", None, write_models(folder), empty_database(folder))
        shop.merge("red")
        shop.merge("grey")
        shop.crown("red ota")
        shop.age(20)
        when = int(time.time() - 20 * 86400) * 1000
        with closing(sqlite3.connect(shop.where.tracking / "mlflow.db")) as database, database:
            database.execute("UPDATE runs SET start_time = ?, end_time = ?", (when, when))
            database.execute("UPDATE tags SET value = date(? / 1000, 'unixepoch') WHERE key = ?", (when, TAG_LOGGED))
        shop.merge("green")
    return shop


@pytest.mark.parametrize("width", [80, 120])
def test_without_delete_it_lists_and_changes_nothing(past: Shop, width: int) -> None:
    before = {one.uri: one.touched for one in list_root(past.where.artifacts)}
    text = ota_gc(past, width=width)
    assert {one.uri: one.touched for one in list_root(past.where.artifacts)} == before
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    for ref in past.made["grey ota"].values():
        row = next(line for line in lines if ref.fingerprint[:8] in line)
        assert row.split()[0] == ref.kind and " 20 d" in row and row.split()[-1] in {"B", "KiB"}
    assert not any(ref.fingerprint[:8] in text for label in ("red ota", "green ota") for ref in past.made[label].values())
    for what in ("ota rho=0.4 grey0+grey1", "grey0 rank1", "grey1 rho=0.4", "grey0 on tiny", "8 in all, which frees"):
        assert what in text, what
    kept = text[text.index("Kept") :]
    for reason in ("champion", "challenger", "used in the last 14 days", "belongs to a kept merge"):
        assert reason in kept, reason
    assert "Nothing was deleted. The same with --delete frees " in text


def test_json_holds_everything(past: Shop) -> None:
    facts = json.loads(ota_gc(past, "--json", "--cache"))
    assert {(one["kind"], one["name"]) for one in facts["going"]} == keys(past.made["grey ota"].values())
    assert facts["frees"] == sum(one["bytes"] for one in facts["going"])
    assert facts["days"] == 14 and facts["root"] == past.where.artifacts and "deleted" not in facts
    assert {one["why"] for one in facts["kept"]} == {
        "champion", "challenger", "used in the last 14 days", "belongs to a kept merge",
    }  # fmt: skip
    assert facts["cache"]["going"] == [] and facts["cache"]["root"] == str(past.where.cache)


def test_options_reach_the_rule(past: Shop, tmp_path: Path) -> None:
    assert "Nothing to delete." in ota_gc(past, "--days", 25)
    facts = json.loads(ota_gc(past, "--json", "--kinds", "masks, scores"))
    assert {one["kind"] for one in facts["going"]} == {"masks", "scores"}
    facts = json.loads(ota_gc(past, "--json", "--artifacts", tmp_path / "empty"))
    assert facts["going"] == facts["kept"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kinds", "mask,scores"], "--kinds: got 'mask', expected some of checkpoint, data, moments, masks, merged"),
        (["--days", "0"], "days is 0; expected at least 1"),
        (["--home", "/nowhere"], "there is no MLflow database /nowhere/tracking/mlflow.db"),
    ],
)
def test_mistakes_are_said_in_one_line(past: Shop, arguments: list[str], message: str) -> None:
    text = ota_gc(past, *arguments, "--delete", run=refused)
    assert text.startswith("Error: ") and message in text


def test_a_long_list_is_cut_and_says_so(past: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.cli.retention.ROWS", 3)
    text = ota_gc(past)
    assert "5 smaller ones (--all lists them)" in text and "8 in all" in text
    assert "smaller ones" not in ota_gc(past, "--all")


def test_delete(past: Shop) -> None:
    """Last of the file: it changes what the others look at."""
    old = time.time() - 30 * 86400
    (past.where.cache / "partial").mkdir()
    (past.where.cache / "partial" / f"{'a' * 32}-{'b' * 16}.part").write_bytes(b"p" * 5000)
    os.utime(next((past.where.cache / "partial").iterdir()), (old, old))
    text = ota_gc(past, "--delete", "--cache")
    assert "interrupted download" in text and "Deleted 9 of 9, " in text
    assert f"tagged so in MLflow: versions {past.versions['grey ota']} of the registered model" in text
    assert past.there(past.made["grey ota"].values()) == {False}
    assert past.there(ref for label in ("red ota", "green ota") for ref in past.made[label].values()) == {True}
    assert not list((past.where.cache / "partial").iterdir())
    assert "Nothing to delete." in ota_gc(past, "--cache")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KiB"), (123_456, "121 KiB"), (5 * 2**30, "5.0 GiB"), (2000 * 2**40, "2000 TiB")],
)
def test_sizes(count: int, text: str) -> None:
    assert size_text(count) == text


def test_ages() -> None:
    from datetime import timedelta

    assert [age_text(timedelta(hours=h)) for h in (-1, 0.5, 47, 48, 500)] == ["0 h", "0 h", "47 h", "2 d", "20 d"]
