"""What there is after a command: files and objects by their content, and what MLflow holds. Each fact has a name and a value, so that two states compare.

Of a record what does not decide the bytes is left out (when, where, how long). MLflow's database is read as it lies: a client keeps
connections to a file that the next trial replaces.
"""

import hashlib
import json
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

from tasks.storage import s3

Facts = dict[str, str]
RECORD = "record.json"


def of_content(name: str, content: bytes) -> str:
    """The digest of a file's content, without what says when it was made and how long that took."""
    file = name.rpartition("/")[2]
    if file in (RECORD, "scores.json"):
        known = json.loads(content)
        known.pop("provenance" if file == RECORD else "seconds", None)
        if known.get("kind") == "scores":  # the size of a file with seconds in it
            known.pop("files")
        content = json.dumps(known, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def of_folder(folder: Path, label: str = "") -> Facts:
    """Every file below the folder, or the one file, but hidden ones."""
    if folder.is_file():
        return {label or folder.name: of_content(folder.name, folder.read_bytes())}
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        f"{label}{name}": of_content(name, path.read_bytes())
        for name, path in names.items()
        if not any(part.startswith(".") for part in name.split("/"))
    }


def of_prefix(uri: str) -> Facts:
    """Every object below a prefix of S3."""
    return {name: of_content(name, s3.read_bytes(one.uri)) for name, one in s3.objects_below(uri).items()}


def hidden(folder: Path) -> list[str]:
    """Temporaries of any kind below a folder."""
    ends = (".tmp", ".old", ".trash", ".part")
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name.startswith(".") or path.suffix in ends
    )


def in_mlflow(database: Path) -> Facts:
    """Runs by their names and roles with params, metrics (number of points and last value), inputs and outputs; models, versions, aliases."""
    if not database.is_file():
        return {}
    found: Facts = {}
    with closing(sqlite3.connect(database)) as base:
        base.row_factory = sqlite3.Row

        def rows(query: str, *values: Any) -> list[sqlite3.Row]:
            return base.execute(query, values).fetchall()

        count: Counter[str] = Counter()
        for run in rows("SELECT run_uuid, name, status FROM runs WHERE lifecycle_stage = 'active' ORDER BY start_time, run_uuid"):
            own = run["run_uuid"]
            tags = {row["key"]: row["value"] for row in rows("SELECT key, value FROM tags WHERE run_uuid = ?", own)}
            label = f"run {tags.get('role', 'merge')} {run['name']}"
            count[label] += 1
            found[f"{label}: status"] = run["status"]
            found |= {
                f"{label}: param {row['key']}": row["value"]
                for row in rows("SELECT key, value FROM params WHERE run_uuid = ?", own)
            }
            found |= {f"{label}: tag {key}": "there" for key in tags}
            points = rows("SELECT key, step, count(*) AS n FROM metrics WHERE run_uuid = ? GROUP BY key, step", own)
            found |= {f"{label}: points of {row['key']} at {row['step']}": str(row["n"]) for row in points}
            latest = rows("SELECT key, value FROM latest_metrics WHERE run_uuid = ?", own)
            # Two runs that were not killed may take the same time by chance: seconds are never compared.
            found |= {
                f"{label}: metric {row['key']}": "there" if row["key"].startswith("seconds/") else str(row["value"])
                for row in latest
            }
            (inputs,) = rows("SELECT count(*) AS n FROM inputs WHERE destination_id = ?", own)
            found[f"{label}: inputs"] = str(inputs["n"])
        found |= {f"{label}: so many": str(n) for label, n in count.items()}
        models = Counter(f"{row['name']} {row['status']}" for row in rows("SELECT name, status FROM logged_models"))
        found |= {f"model {label}: so many": str(n) for label, n in models.items()}
        for row in rows("SELECT name, version FROM model_versions ORDER BY version"):
            label, where = f"version {row['version']} of {row['name']}", (row["name"], row["version"])
            tags = {
                one["key"]: one["value"]
                for one in rows("SELECT key, value FROM model_version_tags WHERE name = ? AND version = ?", *where)
            }
            found |= {f"{label}: digest": tags.get("model_digest", "")} | {f"{label}: tag {key}": "there" for key in tags}
        found |= {
            f"alias {row['alias']} of {row['name']}": str(row["version"])
            for row in rows("SELECT * FROM registered_model_aliases")
        }
        moves = rows("SELECT value FROM registered_model_tags WHERE key LIKE 'history/%'")
        found |= {
            f"move {i}": f"{move['from']} to {move['to']}" for i, move in enumerate(json.loads(row["value"]) for row in moves)
        }
    return found


def differences(got: Facts, expected: Facts, volatile: set[str]) -> list[str]:
    """What two states differ in. What two whole runs differ in needs to be there only."""
    problems = [f"{name} is missing" for name in expected if name not in got]
    problems += [f"{name} is too much" for name in got if name not in expected and name not in volatile]
    return problems + [
        f"{name} is {got[name]} instead of {expected[name]}"
        for name in expected
        if name in got and name not in volatile and got[name] != expected[name]
    ]
