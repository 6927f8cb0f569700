"""``ota sync``: what waits is sent and named; what cannot be sent stays, and ends with code 2."""

from pathlib import Path

import pytest

from tasks.tracking import outbox
from tasks.tracking.outbox import kept, tell
from tests.flows.cli.typed import invoke, said
from tests.servers import free_port
from tests.tasks.tracking.made_up import a_merge


def test_what_waits_is_sent_or_stays(tracking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tracking.parent

    def away(*_: object, **__: object) -> None:
        raise outbox.StorageError("MLflow is away")

    assert "nothing waits in" in said("sync", "--home", home)
    with monkeypatch.context() as patch:
        patch.setattr(outbox, "log_merge", away)
        with pytest.raises(outbox.StorageError):
            tell(a_merge("one"), home=home, root=tracking)
    refused = invoke("sync", "--home", home, "--tracking-uri", f"http://127.0.0.1:{free_port()}")
    assert refused.exit_code == 2 and "Error: merge 'one': MLflow at" in refused.stderr and len(kept(home)) == 1
    assert "logged merge 'one': MLflow run" in said("sync", "--home", home) and not kept(home)
