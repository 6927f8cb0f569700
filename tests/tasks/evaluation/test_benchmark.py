"""score_model against decoding and likelihoods computed here through transformers alone, on a tiny real model and local data."""

import functools
import logging
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch

from tasks.evaluation.harness import score_model
from tasks.evaluation.scores import ModelScores
from tasks.evaluation.suites import Suite, SuiteError, load_suite
from tests.tiny_models import perturb
from tests.tiny_suite import edited, read_rows, write_rows

SUMS = "{task: tiny_sums, metric: exact_match}"


@functools.cache
def loaded(model: Path) -> tuple[Any, Any]:
    """The network and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)


def greedy(model: Path, prompt: str, steps: int) -> str:
    """The most likely continuation, token by token without a cache, up to the first newline or end of sequence."""
    net, tokenizer = loaded(model)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(steps):
            best = net(ids).logits[:, -1].argmax(-1, keepdim=True)
            if best.item() == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, best], dim=1)
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True)).split("\n")[0]


def likelihood(model: Path, prompt: str, continuation: str) -> float:
    """log p(continuation | prompt) in float64."""
    net, tokenizer = loaded(model)
    context, answer = tokenizer(prompt).input_ids, tokenizer(continuation).input_ids
    with torch.no_grad():
        logits = net(torch.tensor([context + answer])).logits[0].double().log_softmax(-1)
    return sum(logits[len(context) + i - 1, token].item() for i, token in enumerate(answer))


def test_scores_equal_an_independent_computation(model: Path, tiny: tuple[Path, Path]) -> None:
    suite_file, data = tiny
    sums = read_rows(data / "sums.jsonl")
    for i, row in enumerate(sums):  # two of three answers are what the model says
        row["answer"] = greedy(model, row["prompt"], 4) if i % 3 else "nothing"
    write_rows(data / "sums.jsonl", sums)
    facts = read_rows(data / "facts.jsonl")
    right = [max(range(4), key=lambda k: likelihood(model, row["prompt"], row["choices"][k])) == row["label"] for row in facts]

    scores = score_model(model, load_suite(str(suite_file)), data_dir=data)

    assert list(scores.samples["math"]["tiny_sums"].values()) == [float(i % 3 > 0) for i in range(12)]
    assert list(scores.samples["knowledge"]["tiny_facts"].values()) == [float(value) for value in right]
    math_score, knowledge = scores.capabilities["math"], scores.capabilities["knowledge"]
    assert (math_score.score, math_score.n_samples) == (pytest.approx(8 / 12), 12)
    assert knowledge.score == pytest.approx(sum(right) / 12)
    assert scores.average == pytest.approx((8 + sum(right)) / 24)
    # The standard error of a mean of n zeros and ones: sqrt(p (1 - p) / (n - 1)).
    assert math_score.stderr == pytest.approx((8 / 12 * 4 / 12 / 11) ** 0.5)
    sizes = [float(len(greedy(model, row["prompt"], 4))) for row in sums]
    assert math_score.tasks["tiny_sums"] == {
        "exact_match.none": math_score.score, "exact_match_stderr.none": math_score.stderr,
        "answer_characters": pytest.approx(mean(sizes)), "answer_characters_stderr": pytest.approx(stdev(sizes) / 12**0.5),
    }  # fmt: skip
    assert knowledge.tasks["tiny_facts"].keys() == {"acc.none", "acc_stderr.none"}, "likelihoods have no length"


def test_same_scores_every_time_and_through_json(model: Path, tiny: tuple[Path, Path]) -> None:
    suite_file, data = tiny
    suite = load_suite(str(suite_file))
    first = score_model(model, suite, data_dir=data)
    # As a flow passes it on: the suite as JSON, the call from threads, another model in between.
    again = Suite.model_validate_json(suite.model_dump_json())
    other = perturb(model, suite_file.parent / "expert", seed=3, scale=0.3)
    started = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(lambda folder: score_model(folder, again, data_dir=data), [model, other, model]))
    passed = time.monotonic() - started + 3 * 0.0005  # each is rounded to milliseconds
    assert sum(run.seconds for run in runs) <= passed, "nobody's wait for the others is counted"
    assert {run.model_dump_json(exclude={"seconds"}) for run in (first, runs[0], runs[2])} == {
        first.model_dump_json(exclude={"seconds"})
    }
    assert runs[1].samples["knowledge"]["tiny_facts"].keys() == first.samples["knowledge"]["tiny_facts"].keys()
    assert runs[1].samples != first.samples
    assert ModelScores.model_validate_json(first.model_dump_json()) == first


def test_changed_data_under_the_same_name_and_time_stamp_are_read(model: Path, tiny: tuple[Path, Path]) -> None:
    suite_file, data = tiny
    suite = load_suite(str(suite_file))
    before = score_model(model, suite, data_dir=data)
    stamp = (data / "sums.jsonl").stat()
    rows = read_rows(data / "sums.jsonl")
    write_rows(data / "sums.jsonl", [row | {"answer": greedy(model, row["prompt"], 4)} for row in rows])
    os.utime(data / "sums.jsonl", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    after = score_model(model, suite, data_dir=data)
    assert (before.capabilities["math"].score, after.capabilities["math"].score) == (0.0, 1.0)


def test_local_suites_need_no_network(model: Path, tiny: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"the network was asked for {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(model.parent)  # a relative model path looks like a name on the hub
    assert score_model(Path(model.name), load_suite(str(tiny[0])), data_dir=tiny[1]).average is not None


def test_limit_progress_and_silence(model: Path, tiny: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    suite_file, data = tiny
    suite = load_suite(str(suite_file))
    score_model(model, suite, data_dir=data, limit=1)
    level, seen = logging.getLogger("lm_eval").level, []
    capfd.readouterr()
    scores = score_model(model, suite, data_dir=data, limit=5, progress=lambda *event: seen.append(event))
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("lm_eval").level == level
    assert scores.capabilities["math"].n_samples == 5 and scores.limit == 5
    assert [event for event in seen if event[1] == event[2]] == [("tiny_sums", 5, 5), ("tiny_facts", 20, 20)]
    limited = suite.model_copy(update={"limit": 5})
    assert score_model(model, limited, data_dir=data).suite_digest == scores.suite_digest
    with pytest.raises(SuiteError, match="limit is 0"):
        score_model(model, suite, data_dir=data, limit=0)


def test_weights_standard_error_and_repeated_documents(model: Path, tiny: tuple[Path, Path]) -> None:
    suite_file, data = tiny
    rows = read_rows(data / "facts.jsonl")
    write_rows(data / "facts.jsonl", [*rows, rows[0], rows[0]])
    both = "{task: tiny_sums, metric: exact_match}, {task: tiny_facts, metric: acc, weight: 3}"
    suite = edited(suite_file, (SUMS, both), ("  knowledge: {tasks: [{task: tiny_facts, metric: acc}]}\n", ""))
    math_score = score_model(model, suite, data_dir=data)
    capability = math_score.capabilities["math"]
    sums, facts = capability.tasks["tiny_sums"], capability.tasks["tiny_facts"]
    assert capability.score == pytest.approx((sums["exact_match.none"] + 3 * facts["acc.none"]) / 4)
    expected = (sums["exact_match_stderr.none"] ** 2 + 9 * facts["acc_stderr.none"] ** 2) ** 0.5 / 4
    assert capability.stderr == pytest.approx(expected) and expected > 0
    assert capability.n_samples == 12 + 14
    keys = list(math_score.samples["math"]["tiny_facts"])
    assert len(keys) == 14 and keys[12:] == [f"{keys[0]}#2", f"{keys[0]}#3"]
