"""Names that libraries promise nobody, each used in one file of ours: a version that changes one fails here, by its name."""

import ast
import importlib
import inspect
from pathlib import Path

import mlflow
import pytest
from mlflow.store.db.utils import _initialize_tables
from prefect import flow_engine
from prefect._internal import control_listener
from transformers import Trainer

from tasks.evaluation.quiet import MODULES
from tasks.tracking.view import VIEW_KEY, VIEW_TAG


@pytest.mark.parametrize("module", MODULES)
def test_lm_eval_draws_its_bars_with_the_tqdm_that_is_replaced(module: str) -> None:
    found = importlib.import_module(module)
    assert hasattr(found, "tqdm"), f"{module} has no tqdm any more: tasks/evaluation/quiet.py neither hides nor reports its bars"


def test_no_other_module_of_lm_eval_that_runs_here_draws_bars() -> None:
    """Of those that take part in scoring: the evaluator, its tasks and models, filters and metrics of ours."""
    import lm_eval

    folder = Path(lm_eval.__file__).parent
    drawing = {
        ".".join(path.relative_to(folder.parent).with_suffix("").parts)
        for path in [
            *(folder / "api").glob("*.py"),
            folder / "evaluator.py",
            *(folder / "models" / f"{name}.py" for name in ("huggingface", "api_models")),
        ]
        if _imports_tqdm(ast.parse(path.read_text(encoding="utf-8")).body)
    }
    assert drawing == set(MODULES)


def _imports_tqdm(body: list[ast.stmt]) -> bool:
    """Whether a module does so as it is imported; what a function imports for itself is out of reach, and draws for no benchmark of ours."""
    tried = [statement for one in body if isinstance(one, ast.Try) for statement in one.body]
    return any(isinstance(one, ast.ImportFrom) and one.module == "tqdm" for one in [*body, *tried])


@pytest.mark.parametrize("name", [VIEW_TAG, VIEW_KEY])
def test_mlflows_pages_know_the_shared_view(name: str) -> None:
    scripts = (Path(mlflow.__file__).parent / "server" / "js" / "build" / "static" / "js").glob("*.js")
    assert any(name in script.read_text(encoding="utf-8", errors="ignore") for script in scripts), (
        f"MLflow {mlflow.__version__} does not name {name}: tasks/tracking/view.py sets columns that no page shows"
    )


def test_the_trainers_rule_of_decay_reads_the_model_alone() -> None:
    names = inspect.signature(Trainer.get_decay_parameter_names).parameters
    assert list(names) == ["self", "model"]


def test_mlflow_makes_its_tables_with_an_engine_alone() -> None:
    assert list(inspect.signature(_initialize_tables).parameters) == ["engine"], "tasks/tracking/database.py calls it"


def test_prefects_engine_tells_a_cancelled_run_by_what_its_worker_noted() -> None:
    """What tasks/orchestration/ending.py notes in its place, where no worker listens any more."""
    try:
        control_listener._set_intent("cancel")
        assert flow_engine._termination_intent() == "cancel"
    finally:
        control_listener.clear_intent()
