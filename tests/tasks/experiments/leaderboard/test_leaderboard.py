"""Leaderboards against numpy and scipy: scores, intervals, retention, comparisons in pairs; which runs compare; what old runs still tell."""

from __future__ import annotations

import math
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom, binomtest, norm

from ota_core.errors import OtaError
from tasks.experiments.leaderboard.entries import LeaderboardError
from tasks.experiments.leaderboard.leaderboard import Leaderboard
from tasks.experiments.leaderboard.question import Question, parse_since
from tasks.experiments.leaderboard.stats import Interval, holm, mean_interval, paired_difference, ratio_interval, score_interval
from tasks.experiments.leaderboard.text import CSV, HTML, MARKDOWN, PARQUET, PNG, ranking, write_files
from tasks.pages.markdown import captioned
from tasks.tracking.merge import log_merge
from tasks.tracking.run import Benchmarked
from tasks.tracking.store import resolve_store
from tests.tasks.experiments.leaderboard.leaderboard_fixture import (
    BASE,
    EXPERTS,
    SUITE,
    coins,
    log_some,
    model_scores,
    scored_merge,
    some_merges,
)


def ask(tracking: Path, **question: Any) -> Leaderboard:
    return Question(**question).answer(resolve_store(root=tracking))


def test_numbers_are_those_of_the_documents(tracking: Path) -> None:
    merges = log_some(tracking)
    board = ask(tracking)
    table = board.table.set_index("label")
    assert list(table.index) == ["ota rho=0.40", "ties rho=0.50", "linear", "base"] and table["rank"].tolist()[:3] == [1, 2, 3]
    for label, run in merges.items():
        assert run.benchmarked is not None
        row, documents = table.loc[label], run.benchmarked.merged.samples
        means, kept = [], []
        for name in ("math", "code"):
            values = np.array(list(documents[name][name].values()))
            means.append(values.mean())
            kept.append(values.mean() / EXPERTS[name][name].mean())
            assert row[f"score/{name}"] == pytest.approx(values.mean(), abs=1e-12)
            assert row[f"score_stderr/{name}"] == pytest.approx(values.std(ddof=1) / math.sqrt(200), abs=1e-12)
            assert row[f"retention/{name}"] == pytest.approx(kept[-1], abs=1e-12)
        assert row["score/avg"] == pytest.approx(np.mean(means), abs=1e-12)
        assert row["retention"] == pytest.approx(np.mean(kept), abs=1e-12)
        assert row["retention_low/avg"] < row["retention"] < row["retention_high/avg"]
        for name, value in zip(("math", "code"), kept, strict=True):
            own = float(EXPERTS[name][name].mean())
            expected = ratio_interval(value * own, wilson(value * own), own, wilson(own))
            assert (row[f"retention_low/{name}"], row[f"retention_high/{name}"]) == pytest.approx(expected, abs=2e-3)
        fallen = [name for name, value in zip(("math", "code"), means, strict=True) if value < BASE[name].mean()]
        assert (row["negative_transfer"], row["below_base"]) == (len(fallen), ", ".join(fallen))
        assert row["score_low/avg"] < row["score/avg"] < row["score_high/avg"]
    assert table.loc["linear", "below_base"] == "code"
    assert table.loc["base", "score/math"] == pytest.approx(BASE["math"].mean()) and pd.isna(table.loc["base", "rank"])

    # In pairs with the best: the plain difference of the averages, and the standard error of differences within capabilities.
    best = merges["ota rho=0.40"].benchmarked
    for label in ("ties rho=0.50", "linear"):
        other = merges[label].benchmarked
        assert best is not None and other is not None
        gaps = [
            np.array(list(other.merged.samples[n][n].values())) - np.array(list(best.merged.samples[n][n].values())) for n in BASE
        ]
        error = math.sqrt(sum(gap.var(ddof=1) / len(gap) for gap in gaps)) / 2
        row = table.loc[label]
        assert row["difference"] == pytest.approx(np.mean([gap.mean() for gap in gaps]), abs=1e-12)
        assert row["difference_high"] - row["difference"] == pytest.approx(1.959964 * error, rel=1e-6)
        assert row["documents"] == 400
        # Sign flips of this many documents are nearly normal, with the mean square of the differences as variance; their sums are
        # multiples of 2/400, hence half a step of correction.
        null = math.sqrt(sum((gap**2).mean() / len(gap) for gap in gaps)) / 2
        assert row["p_value"] == pytest.approx(2 * norm.cdf(-(abs(row["difference"]) - 1 / 400) / null), abs=0.02)
    assert table.loc["linear", "p_value"] < 0.001 < table.loc["ties rho=0.50", "p_value"]
    assert table.loc["linear", "p_holm"] == pytest.approx(2 * table.loc["linear", "p_value"])
    assert pd.isna(table.loc["ota rho=0.40", "difference"]) and board.baseline == "ota rho=0.40"


@pytest.mark.parametrize(("right", "n"), [(0, 200), (200, 200), (1, 50), (37, 189), (100, 200)])
def test_the_interval_of_right_and_wrong_answers_is_wilsons(right: int, n: int) -> None:
    expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
    score = right / n
    found = score_interval(score, math.sqrt(score * (1 - score) / n), n)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)
    # lm-eval divides by n - 1: one trial less.
    if 0 < right < n:
        expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
        assert score_interval(score, math.sqrt(score * (1 - score) / (n - 1)), n) == pytest.approx(
            (expected.low, expected.high), abs=2 / n**1.5
        )


def test_the_interval_of_a_ratio_holds_the_truth_as_often_as_it_says() -> None:
    """200 documents each, a merge that is right in 45 % and an expert in 80 %; and with an expert that is surely right it is the merge's own."""
    rng, held, trials = np.random.default_rng(3), 0, 2000
    for merge, expert in zip(rng.binomial(200, 0.45, trials) / 200, rng.binomial(200, 0.8, trials) / 200, strict=True):
        found = ratio_interval(merge, wilson(merge), expert, wilson(expert))
        assert found is not None and found[0] <= merge / expert <= found[1]
        held += found[0] <= 0.45 / 0.8 <= found[1]
    assert held / trials == pytest.approx(0.95, abs=0.015)
    assert ratio_interval(0.4, (0.3, 0.5), 0.5, (0.5, 0.5)) == pytest.approx((0.6, 1.0))
    assert ratio_interval(0.0, (0.0, 0.1), 0.5, (0.5, 0.5)) == pytest.approx((0.0, 0.2))
    assert ratio_interval(0.4, None, 0.5, (0.4, 0.6)) is None and ratio_interval(0.4, (0.3, 0.5), 0.1, (0.0, 0.3)) is None


def wilson(score: float) -> Interval | None:
    return score_interval(score, math.sqrt(score * (1 - score) / 200), 200)


def test_no_interval_where_nothing_tells_its_width() -> None:
    assert score_interval(0.5, None, 100) is None and score_interval(0.0, 0.0, None) is None
    assert mean_interval([0.5, 0.0], [(0.4, 0.6), None]) is None
    assert mean_interval([0.5], [(0.4, 0.61)]) == pytest.approx((0.4, 0.61))


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Scores near 0 and 1, where intervals from standard errors alone fail, and partial credit."""
    rng = np.random.default_rng(7)
    chances, n, rounds = [0.01, 0.5, 0.98], 150, 1500
    truth = [*chances, 0.4]
    held_mean, held = 0, np.zeros(4)
    for _ in range(rounds):
        columns = [(rng.random(n) < chance).astype(float) for chance in chances]
        columns.append(rng.binomial(4, 0.4, n) / 4)  # four instructions a document
        scores = [float(values.mean()) for values in columns]
        intervals = [score_interval(float(v.mean()), float(v.std(ddof=1) / math.sqrt(n)), n) for v in columns]
        held += [low <= t <= high for (low, high), t in zip(filter(None, intervals), truth, strict=True)]
        interval = mean_interval(scores, intervals)
        assert interval is not None
        held_mean += interval[0] <= np.mean(truth) <= interval[1]
    # 95 %, give or take four standard errors of 1500 rounds, and Wilson's own waves at the ends.
    assert 0.93 <= held_mean / rounds <= 0.98
    assert np.all((held / rounds >= 0.91) & (held / rounds <= 0.995)), held / rounds


def test_p_values_are_mcnemars() -> None:
    """One capability of right and wrong answers, few that differ: the sign-flip test is exact, and is McNemar's."""
    for wins, losses in ((1, 9), (5, 4), (0, 6), (3, 3)):
        first = np.array([1.0] * wins + [0.0] * losses + [1.0] * 40)
        second = np.array([0.0] * wins + [1.0] * losses + [1.0] * 40)
        pair = [
            Benchmarked(suite=SUITE, data_digest=None, models={"merged": model_scores({"math": values})})
            for values in (first, second)
        ]
        found = paired_difference(*pair, ["math"])
        expected = min(1.0, 2 * binom.cdf(min(wins, losses), wins + losses, 0.5))
        assert found.p_value == pytest.approx(expected, abs=1e-12), (wins, losses)
        assert found.value == pytest.approx((wins - losses) / len(first))


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.6, 0.7]) == [1.0, 1.0]


def test_only_what_was_scored_alike_compares(tracking: Path) -> None:
    log_some(tracking)
    quick = scored_merge("ota quick", coins(8, math=0.9, code=0.9), base=BASE, experts=EXPERTS, limit=50)
    log_merge(quick, root=tracking)
    with pytest.raises(LeaderboardError, match=r"2 different suites.*--suite") as caught:
        ask(tracking)
    assert "limit 50: 1 merge" in str(caught.value) and "limit none: 3 merges" in str(caught.value)
    assert quick.benchmarked is not None
    key = quick.benchmarked.key()
    assert key in str(caught.value)
    board = ask(tracking, suite=key)
    assert list(board.merges["label"]) == ["ota quick"] and board.notes[0].startswith("3 runs left out: scored on another suite")
    with pytest.raises(LeaderboardError, match="'s' names 2 of them"):
        ask(tracking, suite="s")
    with pytest.raises(LeaderboardError, match="'other' names 0 of them"):
        ask(tracking, suite="other")
    assert len(ask(tracking, filter="tags.limit = 'none'").merges) == 3


def test_other_data_is_another_group_with_the_same_suite() -> None:
    run = some_merges()["linear"].benchmarked
    assert run is not None
    assert run.key() != run.model_copy(update={"data_digest": "other"}).key()
    assert Benchmarked.from_bytes(run.to_bytes()) == run and run.to_bytes() == run.to_bytes()
    with pytest.raises(OtaError, match="no table of document scores"):
        Benchmarked.from_bytes(b"{}")


def test_runs_of_older_versions_are_ranked_without_intervals(tracking: Path) -> None:
    old = {
        label: scored_merge(label, coins(i, math=0.5, code=0.1 * i), base=BASE, experts=EXPERTS, detailed=False)
        for i, label in enumerate(["linear", "ties", "ota"], start=2)
    }
    for run in old.values():
        log_merge(run, root=tracking)
    board = ask(tracking)
    assert board.suite == "unknown" and list(board.merges["label"]) == ["ota", "ties", "linear"]
    assert board.table["score_low/avg"].isna().all() and board.table["difference"].isna().all()
    assert any("No interval" in note for note in board.notes) and any("No paired comparison" in note for note in board.notes)
    assert all(" to " not in cell for row in ranking(board).cells().rows for cell in row)
    # Another base, and so other documents for all that can be known, is another group; the newer version's merges are one, too.
    other = coins(9, math=0.2, code=0.4)
    log_merge(scored_merge("ota", other, base=other, experts=EXPERTS, inputs="2", detailed=False), root=tracking)
    log_merge(
        some_merges()["linear"].model_copy(update={"tags": {"recipe_fingerprint": "new"}, "model_digest": "n"}), root=tracking
    )
    with pytest.raises(LeaderboardError, match="3 different suites"):
        ask(tracking)


def test_logging_an_old_run_again_gives_it_its_intervals(tracking: Path) -> None:
    for label in ("linear", "ota"):
        log_merge(scored_merge(label, coins(4, math=0.5, code=0.5), base=BASE, experts=EXPERTS, detailed=False), root=tracking)
    for label in ("linear", "ota"):
        log_merge(scored_merge(label, coins(4, math=0.5, code=0.5), base=BASE, experts=EXPERTS), root=tracking)
    board = ask(tracking)
    assert len(board.merges) == 2 and board.merges["score_low/avg"].notna().all() and board.suite == "s"


def test_equal_names_stay_apart_by_their_experts(tracking: Path) -> None:
    merged = coins(4, math=0.5, code=0.5)
    runs = [
        scored_merge("ota", merged, base=BASE, experts=EXPERTS),
        scored_merge("ota", merged, base=BASE, experts={"math": EXPERTS["math"]}),
        scored_merge("ota", merged, base=BASE, experts=EXPERTS, inputs="2"),
    ]
    for run in runs:
        log_merge(run, root=tracking)
    board = ask(tracking)
    assert sorted(board.merges["label"]) == ["ota · math · seed1", "ota · math+code · seed1", "ota · math+code · seed2"]
    assert board.table["label"].is_unique and list(board.table["kind"]) == ["merge"] * 3 + ["base"] * 2
    with pytest.raises(LeaderboardError, match="'ota' fits 3 merges"):
        ask(tracking, baseline="ota")
    run_id = str(board.merges["run_id"].iloc[2])
    assert ask(tracking, baseline=run_id[:8]).baseline == board.merges["label"].iloc[2]
    with pytest.raises(LeaderboardError, match="none of the merges compared"):
        ask(tracking, baseline="fisher")


def test_which_runs(tracking: Path) -> None:
    merges = log_some(tracking)
    bare = merges["linear"].model_copy(
        update={
            "tags": {"recipe_fingerprint": "bare"},
            "model_digest": "bare",
            "metrics": {},
            "children": [],
            "benchmarked": None,
        }
    )
    log_merge(bare, root=tracking)
    board = ask(tracking, baseline="linear")
    assert board.notes == ["1 run left out: no scores."] and board.baseline == "linear"
    row = board.table.set_index("label").loc["ota rho=0.40"]
    assert row["difference"] > 0 and row["p_holm"] < 0.001
    assert list(ask(tracking, filter="params.density = '0.5'").merges["label"]) == ["ties rho=0.50"]
    assert list(ask(tracking, last=2).merges["label"]) == ["linear"]  # the newest two are the bare one and this
    with pytest.raises(LeaderboardError, match="no merge with scores"):
        ask(tracking, since="2100-01-01")
    with pytest.raises(OtaError, match=r"filter 'metrics.score > = 1'.*MLflow's filters look like"):
        ask(tracking, filter="metrics.score > = 1")
    with pytest.raises(OtaError, match=r"no experiment 'ota-mergin'; did you mean 'ota-merging'"):
        ask(tracking, experiment="ota-mergin")
    with pytest.raises(LeaderboardError, match="at least one"):
        ask(tracking, last=0)


def test_reading_leaves_the_process_with_its_own_store(tracking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    log_merge(some_merges()["linear"], root=tracking)
    ask(tracking)
    assert "MLFLOW_TRACKING_URI" not in os.environ
    mine = f"sqlite:///{tmp_path}/mine.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mine)
    ask_store = resolve_store(tracking_uri=f"sqlite:///{tracking}/mlflow.db")
    Question().answer(ask_store)
    assert os.environ["MLFLOW_TRACKING_URI"] == mine and mlflow.get_tracking_uri() == mine


def test_since_is_a_date_or_an_age() -> None:
    now = datetime(2026, 11, 24, 12, tzinfo=UTC)
    day = 24 * 3600 * 1000
    at = int(now.timestamp() * 1000)
    assert [parse_since(text, now) for text in ("7d", "36h", "2w")] == [at - 7 * day, at - day * 3 // 2, at - 14 * day]
    assert parse_since("2026-11-24") == at - day // 2 and parse_since("2026-11-24T13:00+01:00") == at
    with pytest.raises(LeaderboardError, match="expected a date"):
        parse_since("yesterday")


def test_files_and_text(tracking: Path, tmp_path: Path) -> None:
    log_some(tracking)
    board = ask(tracking)
    out = tmp_path / "out"
    assert [path.name for path in write_files(board, out)] == [CSV, PARQUET, MARKDOWN, PNG, HTML]
    pd.testing.assert_frame_equal(pd.read_parquet(out / PARQUET), board.table, check_dtype=False)
    read = pd.read_csv(out / CSV)
    assert list(read.columns) == list(board.table.columns)
    np.testing.assert_allclose(read["score/avg"], board.table["score/avg"], rtol=0, atol=1e-15)
    assert (out / PNG).read_bytes().startswith(b"\x89PNG")
    page = (out / HTML).read_text()
    assert "default-src 'none'" in page and "ota rho=0.40" in page
    table, best = ranking(board), board.best
    assert (out / MARKDOWN).read_text() == captioned(table)
    rows = {row[1]: dict(zip(table.cells().header, row, strict=True)) for row in table.cells().rows}
    first, last = rows["ota rho=0.40"], rows["linear"]
    assert (first["#"], first["math"], first["below base"]) == ("1", f"{100 * best['score/math']:.1f}", "none")
    assert first["average"] == "{:.1f} ({:.1f} to {:.1f})".format(
        *(100 * best[f"{name}/avg"] for name in ("score", "score_low", "score_high"))
    )
    assert (
        first["difference"] == ""
        and last["difference"].startswith("−")
        and last["p (Holm)"] == "< 0.001"
        and last["below base"] == "code"
    )
    narrow = ranking(board, narrow=True).cells().header
    assert narrow == ["#", "merge", "math", "code", "avg", "kept", "below", "diff", "p (Holm)"]
    write_files(board, out)  # again, over the first
