"""Held-out losses in suites: identities that stay, values equal to a computation apart from lm-eval, tables and what is logged."""

import importlib.metadata
import json
import math
from pathlib import Path

import pytest
import torch

from ota_core.artifact import fingerprint
from tasks.benchmark import Benchmark
from tasks.evaluation.harness import score_model
from tasks.evaluation.scores import ModelScores
from tasks.evaluation.suites import Suite, SuiteError, digest_data, load_suite, score_identity, suite_digest
from tests.tiny_models import write_tiny_llama
from tests.tiny_suite import edited, write_rows, write_tiny_suite

TEXT = """
task: tiny_text
dataset_path: json
dataset_kwargs: {data_files: {test: "{data}/text.jsonl"}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
"""
LOSSES = ("\ncapabilities:", "\nlosses: {math: {task: tiny_text}}\ncapabilities:")
PASSAGES = ["one two three", "{{braces}} and\n[1, 2]", "4 + 4 = 8, she said", "x" * 40]


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, Path]:
    path, data = write_tiny_suite(tmp_path)
    (tmp_path / "tiny" / "text.yaml").write_text(TEXT)
    write_rows(data / "text.jsonl", [{"text": text} for text in PASSAGES])
    return path, data


def identity(suite: Suite) -> str:
    return fingerprint("scores", *score_identity("m", suite.model_copy(update={"include_path": None}), "d"))


@pytest.mark.parametrize(
    "name, before", [("demo", "9d6c8be9d719f1118075f491f8aba32b"), ("public", "5749206ce86d5ca0880ee0999949ca44")]
)
def test_suites_without_losses_keep_the_identity_that_they_had_before_there_were_any(
    name: str, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0")
    assert identity(load_suite(name)) == before


def test_losses_and_dtype_decide_the_identity(tiny: tuple[Path, Path]) -> None:
    plain = load_suite(str(tiny[0]))
    with_loss = edited(tiny[0], LOSSES)
    typed = edited(tiny[0], ("\ncapabilities:", "\ndtype: bfloat16\ncapabilities:"))
    assert len({suite_digest(plain), suite_digest(with_loss), suite_digest(typed)}) == 3


def test_losses_without_their_documents_are_scored_again_and_what_follows_from_losses_stays(tiny: tuple[Path, Path]) -> None:
    """Artifacts of before do not hold each document's loss. Searches that were kept, nights and comparisons need none."""
    plain, with_loss = load_suite(str(tiny[0])), edited(tiny[0], LOSSES)
    for suite in (plain, with_loss):
        before = fingerprint("scores", *score_identity("m", suite, digest_data(tiny[1])))
        benchmark = Benchmark("tiny", str(tiny[1]), None, suite, tiny[1])
        assert (benchmark.step("m").fingerprint == before) == (suite is plain)
        of_any = fingerprint("scores", *score_identity("", suite, digest_data(tiny[1])))
        assert benchmark.wanted == of_any
        assert suite_digest(suite) == fingerprint("scores", *score_identity("", suite, ""))


@pytest.mark.parametrize(
    "losses, message",
    [
        ("{maths: {task: tiny_text}}", "losses.maths: there is no such capability; did you mean 'math'"),
        ("{math: {task: tiny_sums}}", "task 'tiny_sums' is listed twice"),
        ("{math: {task: tiny_text, metric: acc}}", "losses.math.metric: unknown 'acc'; expected 'bits_per_byte'"),
        ("{math: {task: tiny_text, wait: 1}}", "unknown key 'losses.math.wait'"),
    ],
)
def test_wrong_losses(tiny: tuple[Path, Path], losses: str, message: str) -> None:
    with pytest.raises(SuiteError, match=message.replace("(", r"\(")):
        edited(tiny[0], ("\ncapabilities:", f"\nlosses: {losses}\ncapabilities:"))


def test_a_loss_is_no_score_and_a_score_no_loss(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model")
    as_score = edited(tiny[0], ("{task: tiny_facts, metric: acc}", "{task: tiny_text, metric: bits_per_byte}"))
    with pytest.raises(SuiteError, match="less is better"):
        score_model(model, as_score, data_dir=tiny[1])
    task = tmp_path / "tiny" / "text.yaml"
    task.write_text(TEXT.replace("higher_is_better: false", "higher_is_better: true"))
    as_loss = edited(tiny[0], ("{task: tiny_text, metric: bits_per_byte}", "{task: tiny_facts, metric: acc}"), LOSSES)
    with pytest.raises(SuiteError, match="a loss needs a metric of which less is better"):
        score_model(model, as_loss, data_dir=tiny[1])


def test_losses_equal_a_computation_without_lm_eval(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = write_tiny_llama(tmp_path / "model")
    suite = edited(tiny[0], LOSSES, ("\ncapabilities:", "\nbatch_size: 3\ncapabilities:"))
    found = score_model(model, suite, data_dir=tiny[1])

    net, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    bits = []
    for text in PASSAGES:
        ids = [tokenizer.bos_token_id, *tokenizer(text).input_ids]
        with torch.no_grad():
            logits = net(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
        bits.append(-sum(logits[i, token].item() for i, token in enumerate(ids[1:])) / math.log(2))
    sizes = [len(text.encode()) for text in PASSAGES]
    kept = list(found.loss_samples["math"].values())
    assert [-nats / math.log(2) for nats, _ in kept] == pytest.approx(bits, rel=1e-5) and [size for _, size in kept] == sizes
    assert ModelScores.model_validate_json(found.model_dump_json()) == found
    expected = sum(bits) / sum(sizes)
    assert found.losses == {"math": pytest.approx(expected, rel=1e-5)}
    assert found.average_loss == pytest.approx(expected, rel=1e-5)
    assert set(found.capabilities) == {"math", "knowledge"}

    # The error of the ratio against the spread of the ratio itself, over many samples drawn again with replacement.
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(bits), (20_000, len(bits)), generator=generator)
    ratios = torch.tensor(bits)[drawn].sum(1) / torch.tensor(sizes, dtype=torch.float32)[drawn].sum(1)
    spread = float(ratios.std()) * math.sqrt(len(bits) / (len(bits) - 1))
    assert found.loss_stderr["math"] == pytest.approx(spread, rel=0.25)


def test_the_suites_dtype_is_what_the_model_computes_in(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model")
    exact = score_model(model, edited(tiny[0], LOSSES), data_dir=tiny[1]).losses["math"]
    rounded = score_model(model, edited(tiny[0], ("\ncapabilities:", "\ndtype: bfloat16\ncapabilities:")), data_dir=tiny[1])
    assert rounded.losses["math"] != exact
    assert rounded.losses["math"] == pytest.approx(exact, rel=0.05)


def scores(losses: dict[str, float]) -> ModelScores:
    plain = {"score": 0.5, "stderr": None, "n_samples": 4, "tasks": {}}
    return ModelScores.model_validate(
        {
            "suite": "s", "suite_digest": "d", "capabilities": {"math": plain, "code": plain}, "samples": {}, "limit": None,
            "lm_eval_version": "0", "seconds": 1.0, "losses": losses, "loss_stderr": dict.fromkeys(losses, 0.01),
        }
    )  # fmt: skip


def test_old_scores_are_read_and_have_no_losses() -> None:
    old = scores({}).model_dump(mode="json")
    del old["losses"], old["loss_stderr"], old["loss_samples"]
    read = ModelScores.model_validate_json(json.dumps(old))
    assert (read.losses, read.average_loss, read.loss_samples) == ({}, None, {})
    assert read.metrics() == {"score/math": 0.5, "score/code": 0.5, "score/avg": 0.5}


def test_losses_stand_beside_the_scores() -> None:
    one = scores({"math": 2.0, "code": 1.0})
    assert (one.average, one.average_loss) == (0.5, 1.5)
    assert one.metrics() == {
        "score/math": 0.5,
        "score/code": 0.5,
        "score/avg": 0.5,
        "loss/math": 2.0,
        "loss/code": 1.0,
        "loss/avg": 1.5,
    }
    assert one.objective() == {"math": 0.25, "code": 0.5}
    assert scores({"math": 3.0}).objective() == {"math": 0.125, "code": 0.5}
