"""ota promote, rollback and champion as a person types them."""

import getpass
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.registry.promotion import current, history, promote, reject
from tasks.registry.publish import read_latest
from tests.flows.cli.typed import refused, said
from tests.tasks.registry.registry_fixture import Registry, a_decision
from tests.tasks.registry.registry_fixture import registry as registry
from tests.tasks.registry.registry_fixture import registry_template as registry_template

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _home(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry's folder is the home's."""
    monkeypatch.setenv("OTA_HOME", str(registry.root.parent))


def test_promote_and_rollback_say_what_they_did_and_who(registry: Registry) -> None:
    assert said("promote", "1") == "champion: version 1 of ota-merged, the first one\n"
    assert said("promote", "challenger", "--reason", "asked for") == "champion: version 3 of ota-merged, in place of version 1\n"
    assert said("promote", 3) == "champion: version 3 of ota-merged, as before\n"
    assert said("rollback", "--reason", "worse on code") == "champion: version 1 of ota-merged, in place of version 3\n"
    moves = history(root=registry.root)
    assert [(m.action, m.to, m.reason) for m in moves] == [
        ("promote", "1", "promoted by hand"),
        ("promote", "3", "asked for"),
        ("rollback", "1", "worse on code"),
    ]
    assert {m.by for m in moves} == {getpass.getuser()}


def test_champion_shows_both_and_the_history(registry: Registry) -> None:
    assert said("champion").splitlines()[0] == "champion: none"
    promote("1", by="anna", reason="first", root=registry.root)
    promote("3", by="nightly", reason="beats 1", root=registry.root)
    reject("2", a_decision(promoted=False, reasons=("code falls.",)), root=registry.root)
    lines = said("champion").splitlines()
    assert lines[0] == "champion: version 3 of ota-merged"
    assert lines[1] == f"  weights {registry.tags('3')['source_uri']}"
    assert "challenger: version 2 of ota-merged" in lines and "  gate    challenger: code falls." in lines
    assert [line.split("Z  ")[1] for line in lines if "Z  " in line] == [
        "promote   – → 1  anna: first",
        "promote   1 → 3  nightly: beats 1",
    ]


def test_publishing_follows_promotion_and_rollback(registry: Registry, tmp_path: Path) -> None:
    root = str(tmp_path / "merged")
    for command, expected in ((("promote", 1), "1"), (("promote", 2), "2"), (("rollback",), "1")):
        text = said(*command, "--publish", root)
        latest = read_latest(root, "ota-merged")
        assert latest is not None and latest.version == expected
        assert text.splitlines()[1] == f"published: {root}/ota-merged/{expected}, latest.json points to it"
    # A publication that was interrupted is finished by the same command.
    (tmp_path / "merged" / "ota-merged" / "latest.json").unlink()
    said("promote", 1, "--publish", root)
    assert read_latest(root, "ota-merged") is not None


def test_options_name_another_home_server_and_model(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTA_HOME")
    said("promote", 2, "--home", registry.root.parent)
    found = current("champion", root=registry.root)
    assert found is not None and found.version == "2"
    assert "champion: version 2" in said("champion", "--tracking-uri", f"sqlite:///{registry.root / 'mlflow.db'}")
    assert "no registered model 'other'" in refused("promote", 2, "--home", registry.root.parent, "--name", "other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("promote", "9"), "Error: 'ota-merged' has no version 9; it has 1, 2, 3"),
        (("promote", "newest"), "Error: version 'newest' is no number"),
        (("rollback",), "Error: 'ota-merged' has no champion to roll back from"),
        (("champion", "--tracking-uri", "http://127.0.0.1:9"), "Error: MLflow at http://127.0.0.1:9 failed while reading"),
    ],
)
def test_a_mistake_ends_with_its_message(arguments: tuple[str, ...], message: str) -> None:
    assert refused(*arguments).startswith(message)


def test_no_challenger_to_promote(registry: Registry) -> None:
    registry.client.delete_registered_model_alias("ota-merged", "challenger")
    assert "has no challenger" in refused("promote", "challenger")


def test_as_a_module(registry: Registry) -> None:
    done = subprocess.run([sys.executable, "-m", "flows.cli", "rollback"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("Error: 'ota-merged' has no champion to roll back from")
