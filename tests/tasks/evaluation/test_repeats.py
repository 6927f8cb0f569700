"""Sampled answers, drawn several times: scores, errors and lengths against what they are by hand; and what asks for no sampling."""

from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from tasks.evaluation.gate import decide
from tasks.evaluation.harness import score_model
from tasks.evaluation.results import capability_score
from tasks.evaluation.suites import Suite, SuiteError, load_suite, suite_digest
from tests.tasks.evaluation.openai_server import serving
from tests.tiny_models import perturb
from tests.tiny_suite import edited

SUMS = "{task: tiny_sums, metric: exact_match}"
SAMPLED = "{task: tiny_sums, metric: text, repeats: 3, generation_kwargs: {do_sample: true, temperature: 1.0}}"
HELPER = """
import zlib
def text(doc, results):
    return {"text": zlib.crc32(results[0].encode()) / 2**32, "length": len(results[0])}
"""
METRICS = "process_results: !function helper.text\nmetric_list: [{metric: text, aggregation: mean, higher_is_better: true}]\n"


@pytest.fixture
def sampled(tiny: tuple[Path, Path]) -> Suite:
    """The score of an answer is a number that only an equal text has."""
    task = tiny[0].parent / "tiny" / "sums.yaml"
    task.write_text(task.read_text().split("metric_list")[0] + METRICS)
    (task.parent / "helper.py").write_text(HELPER)
    return edited(tiny[0], (SUMS, SAMPLED), ("name: tiny", "name: tiny\nallow_code_execution: true"))


def once(suite: Suite, seed: int) -> Suite:
    """The suite with one answer to each question, drawn with this seed."""
    return Suite.model_validate(suite.model_dump() | {"seed": seed}).model_copy(
        update={
            "capabilities": {
                name: one.model_copy(update={"tasks": tuple(entry.model_copy(update={"repeats": 1}) for entry in one.tasks)})
                for name, one in suite.capabilities.items()
            }
        }
    )


def test_repeats_are_runs_with_other_seeds_and_errors_cluster_by_document(
    model: Path, tiny: tuple[Path, Path], sampled: Suite
) -> None:
    together = score_model(model, sampled, data_dir=tiny[1])
    runs = [score_model(model, once(sampled, seed), data_dir=tiny[1]) for seed in range(3)]
    each = [list(run.samples["math"]["tiny_sums"].values()) for run in runs]
    assert all(a != b for a, b in pairwise(each)), "other seeds draw other answers"
    means = [mean(values) for values in zip(*each, strict=True)]
    assert list(together.samples["math"]["tiny_sums"].values()) == pytest.approx(means)
    capability = together.capabilities["math"]
    assert (capability.score, capability.n_samples) == (pytest.approx(mean(means)), 12)
    assert capability.stderr == pytest.approx(stdev(means) / 12**0.5)
    assert capability.stderr < mean(run.capabilities["math"].stderr or 0.0 for run in runs), "three answers are surer than one"
    lengths = [run.capabilities["math"].tasks["tiny_sums"]["answer_characters"] for run in runs]
    assert capability.tasks["tiny_sums"]["answer_characters"] == pytest.approx(mean(lengths))
    assert together.capabilities["knowledge"] == runs[0].capabilities["knowledge"], "what is not sampled is asked once"
    assert score_model(model, sampled, data_dir=tiny[1]).samples == together.samples
    assert suite_digest(sampled) != suite_digest(once(sampled, 0))


def test_repeated_tasks_go_through_the_gate(model: Path, tiny: tuple[Path, Path], sampled: Suite) -> None:
    """Whose paired test checks that documents give the reported score."""
    other = perturb(model, tiny[1] / "other", seed=3, scale=0.3)
    mine, theirs = (score_model(path, sampled, data_dir=tiny[1]) for path in (other, model))
    decision = decide("other", mine, champion=None, base=theirs, suite=sampled)
    assert {check.n for check in decision.checks} == {12}


def test_a_server_is_sent_the_seed_of_each_repeat(model: Path, tiny: tuple[Path, Path], sampled: Suite) -> None:
    from tasks.evaluation.suites import at_server

    with serving({"tiny": model}) as (url, seen):
        scores = score_model(model, at_server(sampled, url), data_dir=tiny[1], served_as=["tiny"])
    assert {one["seed"] for one in seen if not one.get("echo")} == {0, 1, 2}
    assert scores.capabilities["math"].stderr


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (SUMS.replace("}", ", repeats: 2}"), "'tiny_sums' answers greedily, so that 2 repeats would all be the same"),
        (SUMS.replace("}", ", repeats: 2, generation_kwargs: {do_sample: true}}"), "answers greedily"),
        (
            f"{SUMS}, {{task: tiny_facts, metric: acc, repeats: 2}}",
            r"(?s)'tiny_facts' is listed twice, with different repeats",
        ),
    ],
)
def test_repeats_need_sampled_answers(model: Path, tiny: tuple[Path, Path], entry: str, message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        score_model(model, edited(tiny[0], (SUMS, entry)), data_dir=tiny[1])


def test_tasks_that_generate_nothing_have_no_repeats(model: Path, tiny: tuple[Path, Path]) -> None:
    suite = edited(tiny[0], ("{task: tiny_facts, metric: acc}", "{task: tiny_facts, metric: acc, repeats: 2}"))
    with pytest.raises(SuiteError, match=r"'tiny_facts' generates nothing \(multiple_choice\)"):
        score_model(model, suite, data_dir=tiny[1])


@pytest.mark.parametrize(("pooled", "expected"), [(True, (1 + 0.5 + 0.5 + 0) / 4), (False, (2 / 3 + 0) / 2)])
def test_errors_of_a_repeated_group(tiny: tuple[Path, Path], pooled: bool, expected: float) -> None:
    """lm-eval pools a group's documents or takes the mean of its tasks' means; the error follows the number that it gave."""

    def run(first: list[float]) -> dict[str, Any]:
        rows = {"a": first, "b": [0.0]} if pooled else {"a": first, "b": [0.0, 0.0]}
        samples = {
            task: [{"filter": "none", "text": value, "doc_hash": f"{task}{i:02d}" * 8, "resps": [["x" * (i + 1)]]} for i, value in enumerate(values)]
            for task, values in rows.items()
        }  # fmt: skip
        means = [mean(values) for values in rows.values()]
        score = mean([value for values in rows.values() for value in values]) if pooled else mean(means)
        counts = {task: {"effective": len(values)} for task, values in rows.items()}
        return {"results": {"group": {"text,none": score, "text_stderr,none": 9.0}}, "samples": samples, "n-samples": counts}

    raw = load_suite(str(tiny[0])).model_dump() | {"capabilities": {"math": {"tasks": [{"task": "group", "metric": "text"}]}}}
    found, samples = capability_score(Suite.model_validate(raw), "math", {"group": [run([1, 0, 1]), run([1, 1, 0])]})
    assert found.score == pytest.approx(expected)
    assert list(samples["a"].values()) == [1.0, 0.5, 0.5]
    documents = [1.0, 0.5, 0.5, 0.0]
    a = stdev(documents[:3]) ** 2 / 3
    assert found.stderr == pytest.approx(stdev(documents) / 2 if pooled else (a / 4) ** 0.5)
    assert found.tasks["group"]["answer_characters"] == pytest.approx(mean([1, 2, 3, 1]) if pooled else mean([1, 2, 3, 1, 2]))
