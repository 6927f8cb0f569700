"""Tables of scores: which columns they have, what is said of them, and that they fit a terminal."""

from __future__ import annotations

import io

import pandas as pd
from rich.console import Console

from tasks.evaluation.comparison import tier_rows
from tasks.evaluation.scores import CapabilityScore, ModelScores, loss_rows, rows_of, scores_table
from tasks.evaluation.subject import Subject
from tasks.pages import markdown, terminal
from tasks.pages.scores import losses, narrow, of_card, of_one, scores, tiers
from tasks.pages.tables import Table
from tests.tasks.experiments.study.study_results import scores as full
from tests.tasks.pages.analysis_table import EXPERTS, score_rows


def model(math: float, code: float | None, **more: object) -> ModelScores:
    capabilities = {
        name: CapabilityScore(
            score=value,
            stderr=None if value is None else 0.01,
            n_samples=1200,
            tasks={},
            skipped=() if value is not None else ("no network",),
        )
        for name, value in (("math", math), ("code", code))
    }
    return ModelScores(
        suite="demo", suite_digest="d", capabilities=capabilities, samples={}, limit=None, lm_eval_version="0", seconds=1.0
    ).model_copy(update=more)


TABLE = scores_table(
    model(0.2, None, losses={"math": 2.0}),
    {"m": ("math", model(0.8, 0.05, losses={"math": 1.0}))},
    {"ota": model(0.1, 0.4, losses={"math": 1.5}, loss_stderr={"math": 0.01})},
)


def by_model(table: Table) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in table.cells().rows}


def test_models_beside_each_other() -> None:
    table = scores(TABLE)
    assert table.cells().header == ["model", "math", "code", "average", "retention", "below base"]
    assert by_model(table)["ota"] == ["10.0 ± 1.0", "40.0 ± 1.0", "10.0 ± 1.0", "12.5", "math"]
    assert by_model(table)["base"] == ["20.0 ± 1.0", "–", "20.0 ± 1.0", "", ""]
    assert table.cells().strong == {2} and any("1 of 2" in said and "code" in said for said in table.caption)
    # Of rows, as MLflow and the report have them, the same.
    rows = pd.DataFrame(rows_of(TABLE)).assign(below_base=["", "", "math"])
    assert scores(rows).cells() == table.cells()
    assert by_model(scores(TABLE.assign(below_base="")))["ota"][-1] == "none"
    without = by_model(scores(TABLE.drop(index="base").assign(below_base="")))
    assert without["ota"][-1] == ""


def test_losses_have_a_table_of_their_own() -> None:
    (table,) = losses(TABLE)
    assert table.cells().header == ["model", "math", "average"]
    assert by_model(table) == {"base": ["2.000", "2.000"], "m": ["1.000", "1.000"], "ota": ["1.500 ± 0.010", "1.500 ± 0.010"]}
    (again,) = losses(pd.DataFrame(loss_rows(TABLE)))
    assert again.cells().rows == table.cells().rows
    assert losses(scores_table({"math": 0.5}, {}, {})) == [] == losses(pd.DataFrame())


def test_one_model() -> None:
    table = of_one("m", model(0.25, None, losses={"math": 2.0}, loss_stderr={"math": 0.01}))
    assert table.cells().rows == [
        ["math", "25.0 ± 1.0", "1,200", "2.000 ± 0.010"], ["code", "–", "1,200", "–"], ["average", "25.0", "", "2.000"],
    ]  # fmt: skip
    assert "code: no network." in table.caption and "loss" not in of_one("m", model(0.2, 0.3)).cells().header


def test_what_a_card_tells() -> None:
    whole, quick = (of_card(rows_of(TABLE), model(0.1, None, limit=limit)) for limit in (None, 5))
    assert whole["measured"] == {"math": 0.1} and quick["measured"] == {} and whole["suite"] == "demo"
    assert "| **ota** | 10.0 ± 1.0 | 40.0 ± 1.0 | 10.0 ± 1.0 | 12.5 |" in whole["scores"]
    assert (
        "math 1,200" in whole["scores"] and "5 documents of each task" in quick["scores"] and "each task" not in whole["scores"]
    )


def test_the_terminal_shows_what_fits_eighty_columns() -> None:
    rows = pd.DataFrame(score_rows(merges=("OTA + FFG",))).set_index("model").assign(negative_transfer=1, below_base="math")
    rows["loss/average"] = 1.5
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(terminal.table(narrow(rows)))
    screen = console.export_text()
    words = set(screen.split())
    assert "…" not in screen and {"knowledge", "retention", "avg", "loss", "below"} <= words
    assert all(f"{100 * rows.loc['OTA + FFG', name]:.1f}" in words for name in EXPERTS) and "±" not in screen
    assert "OTA + FFG: below the base on math" in screen


def test_tiers_and_how_a_model_was_asked() -> None:
    raw = full({"math": 0.5, "toxic": 1.0, "refusal": 0.5}).model_dump()
    raw["capabilities"]["math"]["tasks"] = {
        "sums": {"exact_match.none": 0.5, "answer_characters": 311.6, "answer_characters_stderr": 4.2}
    }
    tiered = ModelScores.model_validate(
        raw | {"tiers": {"toxic": "safety", "refusal": "safety"}, "chat_template": True, "backend": "vllm 0.18.0"}
    )
    text = markdown.table(of_one("m", tiered)) + " ".join(of_one("m", tiered).caption)
    rows = {line.split("|")[1].strip(" *"): line.split("|")[2].strip(" *") for line in text.splitlines() if line.startswith("|")}
    assert rows["average"] == "50.0" and rows["tier development"] == "50.0" and rows["tier safety"] == "75.0"
    for said in ("tier development.", "through its chat template.", "Computed by vllm 0.18.0.", "characters: sums 312 ± 4."):
        assert said in text
    subjects = {key: Subject(name=key, role=role, path=None, digest=key) for key, role in (("base", "base"), ("merged", "merge"))}
    table = tiers(tier_rows({"base": tiered, "merged": tiered}, subjects))
    header, *lines = [
        [cell.strip(" *") for cell in line.split("|")[1:-1]]
        for line in markdown.table(table).splitlines()
        if line.startswith("|")
    ]
    assert header == ["model", "development", "safety"]
    assert [line for line in lines if line[0] in subjects] == [
        ["base", "50.0 ± 1.0", "75.0 ± 0.7"],
        ["merged", "50.0 ± 1.0", "75.0 ± 0.7"],
    ]
    assert "development 1, safety 2" in table.caption[0]
