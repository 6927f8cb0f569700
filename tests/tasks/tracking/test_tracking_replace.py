"""Files of a run that a repeat replaces: what is no longer made is gone, in a folder and in S3."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from tasks.tracking.artifacts import replace_artifacts
from tests.servers import S3Test


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("kept_in", ["folder", "s3"])
def test_what_is_no_longer_made_is_deleted_and_nothing_else(kept_in: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    root = (tmp_path / "artifacts").as_uri()
    if kept_in == "s3":
        server: S3Test = request.getfixturevalue("s3_server")
        root = f"{server.uri}/mlflow"
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs.db'}")
    run = client.create_run(client.create_experiment("e", artifact_location=root)).info.run_id
    first = {"results.md": "1", "tables/a.csv": "1", "tables/a.csv.old": "1", "tables/deep/b.csv": "1", "figures/c.png": "1"}
    replace_artifacts(client, run, write(tmp_path / "first", first))
    client.log_text(run, "somebody else's", "other/note.txt")
    second = write(tmp_path / "second", {"results.md": "2", "tables/a.csv.old": "2"})
    (second / "figures").mkdir()
    replace_artifacts(client, run, second)
    (down := tmp_path / "down").mkdir()
    found = Path(client.download_artifacts(run, "", str(down)))
    files = {path.relative_to(found).as_posix(): path.read_text() for path in found.rglob("*") if path.is_file()}
    assert files == {"results.md": "2", "tables/a.csv.old": "2", "other/note.txt": "somebody else's"}
