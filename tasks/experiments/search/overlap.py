"""Whether two suites share documents. What was chosen on a document says nothing when it is judged on it."""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from tasks.evaluation.harness_tasks import load_tasks
from tasks.evaluation.quiet import quiet
from tasks.evaluation.suites import Suite
from tasks.experiments.search.search import SearchError

SHOWN = 3


def check_apart(validation: Suite, data: Path | None, test: Suite, test_data: Path | None) -> int:
    """The number of documents that were compared. Raises SearchError when the suites share some, and SuiteError for what cannot be loaded."""
    chosen, judged = documents(validation, data), documents(test, test_data)
    shared = sorted(chosen.keys() & judged.keys(), key=lambda key: chosen[key])
    if shared:
        examples = "; ".join(f"{chosen[key]} is {judged[key]}" for key in shared[:SHOWN])
        raise SearchError(
            f"the suites {validation.name} and {test.name} share {len(shared)} of {len(judged)} documents ({examples}): a recipe that was chosen "
            "on them cannot be judged on them; give two splits of the data"
        )
    return len(chosen) + len(judged)


def documents(suite: Suite, data: Path | None) -> dict[str, str]:
    """Digest of what a model is asked and what counts as right, to ``task[position]``, of every document of a suite. Names of columns,
    and columns that no model sees, do not count."""
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="ota-documents-") as cache, quiet(None):
        for loaded in load_tasks(suite, data, Path(cache)).values():
            for name, task in loaded["tasks"].items():
                for position, document in enumerate(task.eval_docs):
                    found.setdefault(_digest(task, document), f"{name}[{position}]")
    return found


def _digest(task: Any, document: Any) -> str:
    seen = [task.doc_to_text(document), task.doc_to_target(document)]
    if task.OUTPUT_TYPE == "multiple_choice":
        seen.append(task.doc_to_choice(document))
    return hashlib.sha256(json.dumps(seen, default=str).encode()).hexdigest()
