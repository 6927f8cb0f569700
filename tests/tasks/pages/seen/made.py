"""The pages that this product writes, made by its own code from small results, as files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ota_core.recipe.recipe import MergeRecipe
from tasks.evaluation.smoke import Smoke
from tasks.experiments.leaderboard.leaderboard import Leaderboard
from tasks.experiments.leaderboard.question import Question
from tasks.experiments.leaderboard.text import HTML, write_files
from tasks.experiments.search.result import files as search_files
from tasks.experiments.search.search import Trial, Tuned
from tasks.experiments.search.space import Space, apply
from tasks.experiments.study.report import PAGE, write_study
from tasks.experiments.study.scores import StudyResults
from tasks.experiments.tune.learn import Learned, Step
from tasks.experiments.tune.result import Found
from tasks.experiments.tune.result import files as tune_files
from tasks.pages.documents import documents_html, flip_rows
from tasks.pages.report import report_html
from tasks.tracking.store import resolve_store
from tests.tasks.experiments.leaderboard.leaderboard_fixture import log_some
from tests.tasks.experiments.study.study_results import Read, study
from tests.tasks.experiments.study.test_study_report import GRID
from tests.tasks.pages.analysis_table import EXPERTS, analysis_table, score_rows
from tests.tasks.pages.test_documents_page import documents
from tests.tasks.pages.test_report_page import gate, report

URI = "s3://a-bucket-with-a-long-name/artifacts/merged/8f14e45fceea167a5a36dedd4bea2543"
"""Long, as real ones are: a narrow window must break it."""


FOUR = EXPERTS[:4]


def report_page(folder: Path, experts: Sequence[str] = FOUR, layers: int = 6, name: str = "report") -> Path:
    """A merge of several experts, with all that a report can have."""
    scores = tuple(score_rows(experts))
    losses = tuple(
        {"model": row["model"], "role": row["role"], **{f"loss/{name}": 1.5 + 0.1 * i for i, name in enumerate(experts)}, "loss/average": 1.7}
        for row in scores
    )  # fmt: skip
    made = report(
        name="ota " + "+".join(experts) + " rho=0.40 rank1", scores=scores, losses=losses, suite="demo", documents=dict.fromkeys(experts, 1200),
        analysis=analysis_table(experts, layers), analysis_notes=("Taken over all elements.",), gate=gate(False),
        smoke=Smoke(notes=("the base answers nothing, too",)), flips=tuple(flip_rows(documents(12))), model_uri=URI, model_digest="xxh3:" + 32 * "0",
        links={"the run in the Prefect UI": "http://127.0.0.1:4200/runs/flow-run/1"},
        versions={"ota-merging": "0.1.0", "torch": "2.13.0", "lm_eval": "0.4.13", "python": "3.11.7"},
    )  # fmt: skip
    return written(folder / f"{name}.html", report_html(made))


def small_report_page(folder: Path) -> Path:
    """A merge of one expert with two layers, without a gate."""
    one = EXPERTS[:1]
    return written(
        folder / "report-small.html",
        report_html(report(scores=tuple(score_rows(one)), analysis=analysis_table(one, layers=2), model_uri=URI, limit=5)),
    )


def documents_page(folder: Path) -> Path:
    """Documents that a merge won and lost."""
    return written(folder / "documents.html", documents_html("ota rho=0.40 rank1", documents(12)))


def study_results() -> StudyResults:
    """Every kind of cell that has a picture of its own, three replicates, with losses."""

    def of(label: str, number: int) -> dict[str, float | None]:
        return {"math": len(label) % 7 / 10 + number / 50, "code": len(label) % 5 / 10}

    def read(label: str, number: int) -> Read:
        rate = {"base": 2.0, "math": 1.6, "code": 1.7}.get(label, 1.5 + len(label) % 4 / 100)
        return {
            name: {f"d{i}": (-rate * 1000 * (0.9 + 0.2 * i + number / 100), 1000) for i in range(2)} for name in ("math", "code")
        }

    costs = {"bytes_per_param": 4.0, "sqrt_error": 0.5}
    return study(*GRID, {"merge_method": "ties"}, of=of, read=read, replicates=3, cost=lambda label: costs)


def study_page(folder: Path) -> Path:
    write_study(study_results(), folder / "study", command="ota study deployments/studies/demo.yaml --demo")
    return folder / "study" / PAGE


RECIPE = MergeRecipe.model_validate(
    {"merge_method": "ota", "base_model": "./base", "parameters": {"density": 0.4},
     "models": [{"model": f"s3://bucket/experts/{name}/seed1", "name": name} for name in EXPERTS[:3]]}
)  # fmt: skip


def tuned() -> Tuned:
    """A search of twenty-four trials, of which every third was stopped early."""
    random, dimensions, trials = np.random.default_rng(5), Space().dimensions(RECIPE), []
    for number in range(24):
        values: dict[str, float | int | str] = {f"density/{name}": float(random.uniform(0.05, 1)) for name in EXPERTS[:3]}
        values["lambda"] = float(random.uniform(0.5, 2))
        limits = (50,) if number % 3 == 2 else (50, 100)
        scores = {limit: {name: round(float(random.uniform(0.1, 0.9)), 3) for name in EXPERTS[:3]} for limit in limits}
        recipe = apply(RECIPE, dimensions, values) if number else RECIPE
        trials.append(
            Trial(
                number=number, origin="search" if number else "recipe", values=values, recipe=recipe, scores=scores, floors={"math": 0.3},
                complete=100 in limits,
            )
        )  # fmt: skip
    return Tuned(trials=tuple(trials), evaluations=20.0)


def search_page(folder: Path) -> Path:
    made = search_files(tuned(), Space().dimensions(RECIPE), "merge_method: ota\n", "search from deployments/recipes/ota.yaml")
    return written(folder / "search.html", str(made["search.html"]))


def board(tracking: Path) -> Leaderboard:
    """Three merges beside each other, logged to MLflow as a flow logs them, and read back."""
    log_some(tracking)
    return Question().answer(resolve_store(root=tracking))


def leaderboard_page(folder: Path, tracking: Path) -> Path:
    write_files(board(tracking), folder / "leaderboard")
    return folder / "leaderboard" / HTML


def tune_page(folder: Path) -> Path:
    """Scales of three experts in a model of four layers, learned in twelve steps."""
    names, random = EXPERTS[:3], np.random.default_rng(2)
    steps = tuple(
        Step(
            number=i, train={name: 2.0 - 0.05 * i for name in names}, seconds=1.5 * i, value=2.0 - 0.04 * i,
            held_out={name: 2.1 - 0.04 * i + 0.01 * k for k, name in enumerate(names)} if i % 3 == 0 else None,
        )
        for i in range(13)
    )  # fmt: skip
    inside = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    places = [f"model.layers.{layer}.{name}.weight" for layer in range(4) for name in inside] + ["model.embed_tokens.weight"]
    found = Found(
        learned=Learned(objective="loss", steps=steps, best=12), experts=names, shapes=dict.fromkeys(places, (8, 8)),
        scales={place: [float(value) for value in random.uniform(0.7, 1.3, len(names))] for place in places},
    )  # fmt: skip
    return written(folder / "tune.html", str(tune_files(found, "merge_method: ota\n", "scales of ota.yaml")["tune.html"]))


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


PAGES: dict[str, Callable[[Path], Path]] = {
    "report": report_page, "report-small": small_report_page, "documents": documents_page, "study": study_page, "search": search_page,
    "tune": tune_page,
}  # fmt: skip
"""Name to what makes the page; the leaderboard's is made by itself, from an MLflow."""
