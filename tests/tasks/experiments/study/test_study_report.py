"""The files of a study: the same results give the same bytes; numbers read back in full; the page needs no network."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tasks.experiments.study.report import render, summary, write_results, write_study
from tasks.experiments.study.scores import StudyResults
from tasks.experiments.study.tables import all_tables
from tasks.pages import markdown
from tasks.pages.tables import Table
from tests.tasks.experiments.study.study_results import Read, study

GRID: list[dict[str, Any]] = [
    {"merge_method": "linear"},
    {
        "merge_method": "ota",
        "parameters": {"density": [0.2, 0.6], "metric": ["curvature", "magnitude"]},
        "experts": ["all", "each"],
    },
    {"merge_method": "ota", "parameters": {"lambda": [1, 1.5], "density": 1}},
    {"merge_method": "ota", "parameters": {"density": 0.2, "compression": ["rank1"]}},
]


def made(replicates: int = 3) -> StudyResults:
    def of(label: str, i: int) -> dict[str, float | None]:
        return {"math": len(label) % 7 / 10 + i / 50, "code": len(label) % 5 / 10}

    return study(*GRID, of=of, replicates=replicates, cost=lambda label: {"bytes_per_param": 4.0, "sqrt_error": 0.5})


def cells_of(table: Table) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in table.cells().rows}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_results_give_the_same_bytes_and_leave_nothing_old(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    write_study(made(), first, command="ota study x.yaml")
    (second / "figures").mkdir(parents=True)
    (second / "figures" / "old.png").write_bytes(b"x")
    write_study(made(), second, command="ota study x.yaml")
    found = files(first)
    assert found == files(second)
    names = {Path(name).stem for name in found if name.startswith("figures/")}
    assert names == {"methods", "density", "grafting", "compression", "lambda"}
    assert {"study.html", "results.md", "tables/methods.csv", "tables/methods.parquet", "tables/scores.parquet"} <= set(found)
    for name, content in found.items():
        assert name.endswith(".png") == content.startswith(b"\x89PNG")


def test_numbers_are_kept_in_full(tmp_path: Path) -> None:
    results = made()
    write_study(results, tmp_path, command="c")
    scores = pd.read_parquet(tmp_path / "tables" / "scores.parquet")
    assert set(scores["kind"]) == {"base", "expert", "merge"}
    assert len(scores) == 2 * 3 * (1 + 2 + len(results.cells))
    row = scores[(scores["model"] == "linear") & (scores["replicate"] == "seed=3") & (scores["capability"] == "math")].iloc[0]
    assert row["score"] == len("linear") % 7 / 10 + 2 / 50 and row["stderr"] == 0.01 and row["documents"] == 100
    cells = pd.read_csv(tmp_path / "tables" / "cells.csv")
    assert set(cells[cells["model"].str.startswith("ota density=0.2 metric=magnitude on")]["experts"]) == {"math", "code"}


def test_results_say_what_was_run_and_how(tmp_path: Path) -> None:
    write_study(made(), tmp_path, command="ota study x.yaml")
    text = (tmp_path / "results.md").read_text()
    assert text.startswith("# Results of the study byhand\n")
    for said in ("seed=1, seed=2, seed=3", "`ota study x.yaml`", "math 100, code 100"):
        assert said in text
    for figure in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (tmp_path / figure).is_file()
    assert all(f"## {table.title}\n\n{markdown.captioned(table)}" in text for table in all_tables(made()))
    assert cells_of(all_tables(made())[0])["base"] == ["10.0 ± 0.0", "30.0 ± 0.0", "20.0 ± 0.0", "", ""]


def test_losses_are_a_table_and_a_figure_where_the_suite_has_them(tmp_path: Path) -> None:
    known = {"base": (2.0, 3.0), "math": (1.0, 3.2), "code": (2.2, 2.0)}
    rates = known | {"linear": (1.5, 2.75), "ties": (1.5, 2.7)}

    def read(label: str, i: int) -> Read:
        """Two texts a capability, of which the first takes a tenth more and the second a tenth less."""
        spread = {"first": 1.1, "second": 0.9}
        return {
            name: {text: (-100 * rate * by * math.log(2), 100) for text, by in spread.items()}
            for name, rate in zip(("math", "code"), rates[label], strict=True)
        }

    results = study(
        {"merge_method": "linear"}, {"merge_method": "ties"}, of=lambda label, i: {"math": 0.5, "code": 0.5}, replicates=1, read=read
    )  # fmt: skip
    found = next(one for one in write_study(results, tmp_path, command="c") if one.key == "losses")
    lines, cells = (tmp_path / "results.md").read_text().splitlines(), cells_of(found)
    assert cells["base"] == ["2.000 ± 0.020", "3.000 ± 0.020", "2.500 ± 0.014", "", ""]
    # code: 2.75 less 2.7, a tenth of it more or less; its half. Base, expert and merge differ by the same factor, which cancels.
    assert cells["linear"] == ["1.500 ± 0.020", "2.750 ± 0.020", "2.125 ± 0.014", "+0.0250 ± 0.0025", "37.5 ± 0.0"]
    assert cells["ties"] == ["1.500 ± 0.020", "2.700 ± 0.020", "2.100 ± 0.014", "", "40.0 ± 0.0"]
    assert "![Loss on held-out text](figures/losses.png)" in lines and (tmp_path / "figures" / "losses.png").is_file()
    row = pd.read_parquet(tmp_path / "tables" / "scores.parquet").set_index(["model", "capability"]).loc[("linear", "code")]
    assert row["loss"] == pytest.approx(2.75) and row["loss_stderr"] == 0.02
    table = pd.read_csv(tmp_path / "tables" / "losses.csv").set_index("model")
    assert table.loc["linear", "difference_se"] == pytest.approx(0.0025) and math.isnan(table.loc["ties", "difference"])
    (printed,) = summary(tmp_path)
    assert printed.cells().header == ["model", "average", "retention", "loss, bits/byte", "to the best"]
    assert cells_of(printed)["linear"][2:] == cells["linear"][2:4] and cells_of(printed)["linear"][0] == "50.0 ± 0.7"


def test_one_merge_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    loss = {"base": {"math": 2.0}, "math": {"math": 1.0}, "code": {"math": 2.0}, "linear": {"math": 1.5}}
    results = study(
        {"merge_method": "linear"}, of=lambda *_: {"math": 0.5, "code": 0.5}, replicates=1, loss=lambda label, i: loss[label]
    )
    tables = {one.key: one for one in write_study(results, tmp_path, command="c")}
    assert cells_of(tables["losses"])["linear"] == ["1.500 ± 0.020", "1.500 ± 0.020", "50.0"]
    assert not (tmp_path / "figures" / "losses.png").exists()
    assert summary(tmp_path)[0].cells().header == ["model", "average", "retention", "loss, bits/byte"]


def test_one_loss_is_drawn_once(tmp_path: Path) -> None:
    loss = {"base": 2.0, "math": 1.0, "code": 2.0, "linear": 1.5, "ties": 1.25}
    results = study(
        {"merge_method": "linear"}, {"merge_method": "ties"}, of=lambda *_: {"math": 0.5, "code": 0.5},
        loss=lambda label, i: {"math": loss[label] + i / 8},
    )  # fmt: skip
    tables = {one.key: one for one in write_study(results, tmp_path, command="c")}
    assert (tmp_path / "figures" / "losses.png").is_file()
    assert cells_of(tables["losses"])["linear"] == ["1.562 ± 0.062", "1.562 ± 0.062", "+0.2500 ± 0.0000", "50.0 ± 0.0"]


def test_failures_and_equal_cells_are_named(tmp_path: Path) -> None:
    results = study(
        {"merge_method": "linear"},
        {"merge_method": "linear", "parameters": {"normalize": True}},
        of=lambda *_: {"math": 0.1, "code": 0.1},
    )
    failed = StudyResults(**{**results.__dict__, "failed": ("ties (seed=2): no such tensor",)})
    write_study(failed, tmp_path, command="c")
    text = (tmp_path / "results.md").read_text()
    assert "ties (seed=2): no such tensor" in text and "linear normalize=true" in text


def test_the_page_holds_everything(tmp_path: Path) -> None:
    write_study(made(), tmp_path, command="c")
    page = (tmp_path / "study.html").read_text()
    markup = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "Content-Security-Policy" in page and not re.search(r"<(script|link|img)[^>]+(src|href)=", markup)
    assert page.count('class="chart"') == 5


def test_results_elsewhere_have_their_figures_beside_them(tmp_path: Path) -> None:
    results = made()
    tables = write_study(results, tmp_path / "study", command="c")
    file = tmp_path / "docs" / "results.md"
    file.parent.mkdir()
    for _ in range(2):
        write_results(tmp_path / "study", results, tables, file, command="c")
    figures = re.findall(r"!\[.*\]\((.*)\)", file.read_text())
    assert len(figures) == 5 and all(figure.startswith("results/") and (file.parent / figure).is_file() for figure in figures)


def test_experts_with_a_density_of_their_own_and_lost_moments_end_in_files(tmp_path: Path) -> None:
    """Densities that differ between the experts, and second moments that are no longer among the artifacts."""
    models = [
        {"model": "math{seed}", "capability": "math", "parameters": {"density": 0.3}},
        {"model": "code{seed}", "capability": "code"},
    ]
    grid: list[dict[str, Any]] = [
        {"merge_method": "ota", "parameters": {"density": [0.3, 0.2, 0.6], "metric": ["curvature", "magnitude"]}, "experts": ["all", "each"]},
        {"merge_method": "ota", "parameters": {"density": 0.3, "compression": ["rank1", "log8"]}},
        {"merge_method": "ties", "parameters": {"density": [0.1, 0.3, 0.9]}},
    ]  # fmt: skip

    def costs(known: str) -> Any:
        return lambda label: {"bytes_per_param": 4.0, "sqrt_error": 0.5} if known in label else {}

    flat = {"math": 0.5, "code": 0.25}
    some = study(*grid, of=lambda *_: flat, models=models, cost=costs("rank1"))
    tables = {one.key: one for one in write_study(some, tmp_path / "some", command="c")}
    assert set(cells_of(tables["sweep-density"])) == {"0.3", "0.3/0.1", "0.3/0.9"}
    assert tables["compression"].frame["bytes/parameter"].isna().tolist() == [True, False, True]
    assert "second moments are no longer among the artifacts: full, log8." in (tmp_path / "some" / "results.md").read_text()
    assert {path.stem for path in (tmp_path / "some" / "figures").iterdir()} >= {"compression", "sweep-density", "grafting"}
    cells = pd.read_parquet(tmp_path / "some" / "tables" / "cells.parquet").set_index("model")
    assert set(cells.loc["ties density=0.9", "density"]) == {"0.3/0.9"} and set(cells.loc["ties density=0.3", "density"]) == {
        "0.3"
    }
    none = study(*grid, of=lambda *_: flat, models=models)
    write_study(none, tmp_path / "none", command="c")
    assert "figures/compression.png" not in (tmp_path / "none" / "results.md").read_text()
    assert not (tmp_path / "none" / "figures" / "compression.png").exists()


def test_documents_are_counted_on_every_replicate(tmp_path: Path) -> None:
    results = made()
    last = results.base["seed=3"]
    fewer = last.capabilities | {"code": last.capabilities["code"].model_copy(update={"n_samples": 98})}
    base = results.base | {"seed=3": last.model_copy(update={"capabilities": fewer})}
    write_study(replace(results, base=base), tmp_path, command="c")
    assert "math 100, code 100/100/98" in (tmp_path / "results.md").read_text()


def test_one_replicate_draws_the_same_pictures(tmp_path: Path) -> None:
    results = made(replicates=1)
    assert results.over == "documents"
    write_study(results, tmp_path, command="c")
    assert "± one standard error over documents" in (tmp_path / "results.md").read_text()


def test_without_any_error_nothing_is_said_to_have_one(tmp_path: Path) -> None:
    results = study({"merge_method": "linear"}, of=lambda *_: {"math": 0.25, "code": None}, replicates=1, stderr=None)
    (table,) = write_study(results, tmp_path, command="c")
    assert math.isnan(table.frame.iloc[-1]["math_se"]) and cells_of(table)["linear"][:3] == ["25.0", "–", "25.0"]


def test_the_command_prints_averages_and_where_everything_is(tmp_path: Path) -> None:
    write_study(made(), tmp_path, command="c")
    (printed,) = summary(tmp_path)
    assert re.fullmatch(r"\d+\.\d ± \d\.\d", cells_of(printed)["ota density=0.2"][0])
    assert [item for item in render(tmp_path, None) if isinstance(item, str)] == [
        f"results: {tmp_path / 'results.md'}", f"page: {tmp_path / 'study.html'}",
    ]  # fmt: skip


def test_lambda_in_words_stands_beside_numbers(tmp_path: Path) -> None:
    grid = {"merge_method": "ties", "parameters": {"density": 0.5, "lambda": [1, 2, "auto"]}}
    results = study(
        grid, {"merge_method": "ties", "parameters": {"refine": "rowspace"}}, of=lambda label, number: {"math": 0.5, "code": 0.4}
    )
    write_study(results, tmp_path, command="ota study x.yaml")
    cells = pd.read_parquet(tmp_path / "tables" / "cells.parquet")
    assert cells["lambda"].tolist() == ["1", "1", "2", "2", *["auto"] * 4]
    sweep = pd.read_parquet(tmp_path / "tables" / "lambda.parquet")
    assert set(sweep["lambda"]) == {"1", "2", "auto"}


def test_the_losses_of_a_sweep_are_all_told_lowest_first(tmp_path: Path) -> None:
    loss = {"base": {"math": 2.0}, "math": {"math": 1.0}, "code": {"math": 2.0}}
    rates = {"ties density=0.2": 1.5, "ties density=0.5": 1.25, "ties density=0.9": 1.75}
    results = study(
        {"merge_method": "ties", "parameters": {"density": [0.2, 0.5, 0.9]}}, of=lambda *_: {"math": 0.5, "code": 0.5}, replicates=1,
        loss=lambda label, i: loss.get(label) or {"math": rates[label]},
    )  # fmt: skip
    tables = {one.key: one for one in write_study(results, tmp_path, command="c")}
    assert list(cells_of(tables["losses"]))[-1] == "ties density=0.2"
    assert cells_of(tables["every_loss"]) == {
        "ties density=0.5": ["1.250 ± 0.020", "75.0"], "ties density=0.2": ["1.500 ± 0.020", "50.0"], "ties density=0.9": ["1.750 ± 0.020", "25.0"],
    }  # fmt: skip
    assert list(cells_of(tables["every_loss"])) == ["ties density=0.5", "ties density=0.2", "ties density=0.9"]
