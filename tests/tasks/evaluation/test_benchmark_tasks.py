"""What is checked before a model is asked anything: names, code execution, data, filters, metrics, few-shot numbers."""

import logging
import os
from pathlib import Path

import pytest

from ota_core.errors import CheckpointError
from tasks.evaluation.harness import score_model
from tasks.evaluation.harness_tasks import load_tasks
from tasks.evaluation.suites import SuiteError, load_suite
from tests.tiny_models import perturb
from tests.tiny_suite import edited

CODE = """
include: sums.yaml
task: tiny_code
unsafe_code: true
process_results: !function helper.allowed
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: true, temperature: 1.0}
metric_list:
  - {metric: allowed, aggregation: mean, higher_is_better: true}
  - {metric: text, aggregation: mean, higher_is_better: true}
"""

HELPER = """
import os, zlib
def allowed(doc, results):
    return {"allowed": float(os.environ.get("HF_ALLOW_CODE_EVAL") == "1"), "text": zlib.crc32(results[0].encode()) / 2**32}
"""


@pytest.fixture
def coding(tiny: tuple[Path, Path]) -> tuple[Path, Path]:
    (tiny[0].parent / "tiny" / "code.yaml").write_text(CODE)
    (tiny[0].parent / "tiny" / "helper.py").write_text(HELPER)
    edited(
        tiny[0], ("capabilities:\n", "capabilities:\n  code: {tasks: [{task: tiny_code, metric: text, executes_code: true}]}\n")
    )
    return tiny


def test_tasks_that_execute_code_stay_off(model: Path, coding: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="tasks"):
        scores = score_model(model, load_suite(str(coding[0])), data_dir=coding[1])
    code = scores.capabilities["code"]
    assert (code.score, code.stderr, code.n_samples, code.tasks) == (None, None, 0, {})
    assert code.skipped == (
        "tiny_code is off: it executes code that the model wrote, and the suite does not set allow_code_execution",
    )
    assert code.skipped[0] in caplog.text
    assert scores.measured == ("math", "knowledge")
    rest = [scores.capabilities[name].score for name in scores.measured]
    assert scores.average == pytest.approx(sum(value for value in rest if value is not None) / 2)


def test_code_runs_only_when_the_suite_allows_it(model: Path, coding: tuple[Path, Path]) -> None:
    suite = edited(coding[0], ("name: tiny", "name: tiny\nallow_code_execution: true"))
    scores = score_model(model, suite, data_dir=coding[1])
    assert scores.capabilities["code"].tasks["tiny_code"]["allowed.none"] == 1.0
    assert scores.capabilities["code"].skipped == ()
    assert "HF_ALLOW_CODE_EVAL" not in os.environ
    # The task samples its answers: equal seeds give equal texts, another seed others.
    assert score_model(model, suite, data_dir=coding[1]).samples == scores.samples
    reseeded = suite.model_copy(update={"seed": 1})
    assert score_model(model, reseeded, data_dir=coding[1]).samples["code"] != scores.samples["code"]


def test_code_execution_that_the_suite_does_not_mention_is_refused(model: Path, coding: tuple[Path, Path]) -> None:
    suite = edited(coding[0], (", executes_code: true", ""), ("name: tiny", "name: tiny\nallow_code_execution: true"))
    with pytest.raises(SuiteError, match=r"'tiny_code' executes code that the model wrote.*mark it executes_code: true"):
        score_model(model, suite, data_dir=coding[1])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("task: tiny_sums,", "task: tiny_sum,", "there is no task 'tiny_sum' in .*tiny; did you mean 'tiny_sums'?"),
        ("metric: exact_match", "metric: exactmatch", "'tiny_sums' has no metric 'exactmatch'; did you mean 'exact_match'?"),
        ("metric: exact_match", "metric: exact_match, filter: strict", "'tiny_sums' has no filter 'strict'; known here: none"),
        ("task: tiny_sums,", "task: some_tag,", "'some_tag' is a tag of 1 tasks"),
        ("task: tiny_sums,", "task: some_group,", "'some_group' is a local group; list its tasks one by one"),
        ("name: tiny", "name: tiny\napply_chat_template: true", "has no chat template"),
    ],
)
def test_wrong_suites_name_what_is_wrong(model: Path, tiny: tuple[Path, Path], old: str, new: str, message: str) -> None:
    folder = tiny[0].parent / "tiny"
    (folder / "sums.yaml").write_text((folder / "sums.yaml").read_text() + "tag: some_tag\n")
    (folder / "group.yaml").write_text("group: some_group\ntask: [tiny_sums]\n")
    with pytest.raises(SuiteError, match=message):
        score_model(model, edited(tiny[0], (old, new)), data_dir=tiny[1])


def test_all_problems_come_at_once_and_before_any_request(model: Path, tiny: tuple[Path, Path]) -> None:
    suite = load_suite(str(tiny[0]))
    with pytest.raises(SuiteError, match=r"2 problems found(.|\n)*sums.jsonl: no such file(.|\n)*facts.jsonl: no such file"):
        score_model(model, suite, data_dir=tiny[1] / "elsewhere")
    with pytest.raises(SuiteError, match=r"task 'tiny_sums' reads {data}, but no data folder was given"):
        score_model(model, suite)
    (tiny[1] / "sums.jsonl").write_text("{not json\n")
    with pytest.raises(SuiteError, match="lm-eval cannot load task 'tiny_sums'"):
        score_model(model, suite, data_dir=tiny[1])


def test_a_metric_of_which_less_is_better_or_above_one_is_refused(model: Path, tiny: tuple[Path, Path]) -> None:
    task, suite = tiny[0].parent / "tiny" / "sums.yaml", load_suite(str(tiny[0]))
    text = task.read_text()
    task.write_text(text.replace("higher_is_better: true", "higher_is_better: false"))
    with pytest.raises(SuiteError, match="of exact_match less is better"):
        score_model(model, suite, data_dir=tiny[1])
    (task.parent / "helper.py").write_text("def many(doc, results):\n    return {'exact_match': 3.0}\n")
    task.write_text(text + "process_results: !function helper.many\n")
    with pytest.raises(
        SuiteError, match=r"names the function helper\.many; code in task files runs only with allow_code_execution"
    ):
        score_model(model, suite, data_dir=tiny[1])
    suite = suite.model_copy(update={"allow_code_execution": True})
    with pytest.raises(SuiteError, match=r"expected exact_match,none of task 'tiny_sums' within 0\.\.1; it gave 3\.0"):
        score_model(model, suite, data_dir=tiny[1])


def test_models_that_cannot_be_loaded(model: Path, tiny: tuple[Path, Path], tmp_path: Path) -> None:
    suite = load_suite(str(tiny[0]))
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        score_model(tmp_path / "nowhere", suite, data_dir=tiny[1])
    broken = perturb(model, tmp_path / "broken", seed=0, scale=0)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="broken cannot be loaded for the benchmark"):
        score_model(broken, suite, data_dir=tiny[1])


@pytest.mark.parametrize(
    ("own", "suite_wide", "entry", "expected"),
    [(None, None, None, 0), (2, None, None, 2), (2, 3, None, 3), (0, 3, None, 0), (2, 3, 1, 1), (0, None, 4, 4)],
)
def test_few_shot_numbers(
    tiny: tuple[Path, Path], own: int | None, suite_wide: int | None, entry: int | None, expected: int
) -> None:
    """The entry's number wins, then the suite's unless the task file says 0, then the task file's."""
    task = tiny[0].parent / "tiny" / "sums.yaml"
    task.write_text(task.read_text() + ("" if own is None else f"num_fewshot: {own}\n"))
    shots = "null" if entry is None else entry
    suite = edited(tiny[0], ("metric: exact_match", f"metric: exact_match, num_fewshot: {shots}"))
    suite = suite.model_copy(update={"num_fewshot": suite_wide})
    loaded = load_tasks(suite, tiny[1], tiny[1].parent / "cache")
    assert loaded["tiny_sums"]["tasks"]["tiny_sums"].get_config("num_fewshot") == expected


@pytest.mark.parametrize("where", ["beside", "included", "importable"])
def test_code_in_a_task_file_runs_only_with_the_suites_permission(
    model: Path, tiny: tuple[Path, Path], tmp_path: Path, where: str
) -> None:
    """Wherever the file lies that names it: none of its functions is even imported."""
    task, suite = tiny[0].parent / "tiny" / "sums.yaml", load_suite(str(tiny[0]))
    ran = tmp_path / "ran"
    (task.parent / "trap.py").write_text(f"open({str(ran)!r}, 'w')\ndef run(doc, results):\n    return {{'exact_match': 1.0}}\n")
    line = "process_results: !function trap.run\n"
    if where == "included":
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (task.parent / "trap.py").rename(elsewhere / "trap.py")
        (elsewhere / "_trap_yaml").write_text(line)
        line = f"include: {elsewhere / '_trap_yaml'}\n"
    elif where == "importable":
        line = "process_results: !function os.system\n"
    task.write_text(task.read_text() + line)
    with pytest.raises(SuiteError, match="code in task files runs only with allow_code_execution: true in the suite"):
        score_model(model, suite, data_dir=tiny[1])
    assert not ran.exists()
    if where != "importable":
        score_model(model, suite.model_copy(update={"allow_code_execution": True}), data_dir=tiny[1])
        assert ran.exists()
