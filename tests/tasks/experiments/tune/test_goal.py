"""Documents as blocks, what they cost a model, and what objectives make of it: against lm-eval and against plain formulas."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.evaluation.gradients.documents import Document, documents_of
from tasks.evaluation.harness import score_model
from tasks.evaluation.suites import SuiteError, load_suite
from tasks.experiments.tune.config import ScalesConfig
from tasks.experiments.tune.documents import Blocks, blocks_of
from tasks.experiments.tune.goal import MEMORY, Goal
from tasks.experiments.tune.network import Teacher, answered, loss_of, teacher_of
from tests.tasks.local.real.test_real_losses import LOSSES, PASSAGES, TEXT
from tests.tiny_models import write_tiny_llama
from tests.tiny_suite import edited, write_rows, write_tiny_suite


def config(**changes: Any) -> ScalesConfig:
    return ScalesConfig.model_validate({"recipe": "r.yaml", "suite": "s", "length": 64} | changes)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(suite with a held-out loss of math, data, model)."""
    root = tmp_path_factory.mktemp("tune")
    suite, data = write_tiny_suite(root)
    (root / "tiny" / "text.yaml").write_text(TEXT)
    write_rows(data / "text.jsonl", [{"text": text} for text in PASSAGES])
    edited(suite, LOSSES)
    return suite, data, write_tiny_llama(root / "model")


def test_documents_are_texts_where_a_loss_is_measured_and_prompts_with_right_answers_elsewhere(
    tiny: tuple[Path, Path, Path],
) -> None:
    found = documents_of(load_suite(str(tiny[0])), tiny[1])
    assert found["math"] == [Document("", text) for text in PASSAGES]
    assert found["knowledge"][:2] == [Document("The code of 00 is ", "ab"), Document("The code of 01 is ", "cd")]


def test_bits_per_byte_are_those_of_lm_eval(tiny: tuple[Path, Path, Path]) -> None:
    suite, data, folder = tiny
    wanted = score_model(folder, load_suite(str(suite)), data_dir=data).losses["math"]
    tokenizer, network = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    documents = {"math": documents_of(load_suite(str(suite)), data)["math"]}
    blocks = blocks_of(documents, tokenizer, config(held_out=2, blocks=99, length=200))["math"]
    every = [*blocks.train, *blocks.held_out]
    assert sum(block.size for block in every) == pytest.approx(sum(len(text.encode()) for text in PASSAGES))
    bits = sum(loss_of(network, block).item() * block.size for block in every)
    assert bits / sum(block.size for block in every) == pytest.approx(wanted, rel=1e-5)


def test_long_texts_become_several_blocks_of_one_side_and_an_answer_alone_is_predicted(tiny: tuple[Path, Path, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny[2])
    documents = {"a": [Document("", letter * 100) for letter in "abcdef"], "b": [Document(f"{i}? ", "yes") for i in range(9)]}
    blocks = blocks_of(documents, tokenizer, config(held_out=3, blocks=4, length=31))
    texts = {
        side: [tokenizer.decode(one.ids[one.first :]) for one in getattr(blocks["a"], side)] for side in ("train", "held_out")
    }
    assert [len(text) for text in texts["train"]] == [30, 30, 30, 10] and len(texts["held_out"]) == 3
    assert not {text[0] for text in texts["train"]} & {text[0] for text in texts["held_out"]}
    assert all(len(one.ids) <= 31 for one in blocks["a"].train)
    (first, *_), prefix = blocks["b"].train, tokenizer.bos_token_id
    assert tokenizer.decode(first.ids[first.first :]) == "yes" and first.ids[0] == prefix and first.size == 3
    # Without answers: the expert gives its own.
    first = blocks_of(documents, tokenizer, config(objective="kl", held_out=3, blocks=4))["b"].train[0]
    assert "yes" not in tokenizer.decode(first.ids) and first.first == len(first.ids)
    network = AutoModelForCausalLM.from_pretrained(tiny[2])
    whole = answered(network, first, 5)
    assert whole.ids[: first.first] == first.ids and first.first < len(whole.ids) <= first.first + 5
    for at in range(first.first, len(whole.ids)):
        assert int(network(input_ids=torch.tensor([whole.ids[:at]])).logits[0, -1].argmax()) == whole.ids[at]
    assert answered(network, blocks["a"].train[0], 5) == blocks["a"].train[0]


def test_too_few_documents_are_named_with_what_to_do(tiny: tuple[Path, Path, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny[2])
    with pytest.raises(SuiteError, match="capability 'a': its 1 documents give 1 blocks that are held out and 0 to learn from"):
        blocks_of({"a": [Document("", "abc")]}, tokenizer, config())
    with pytest.raises(SuiteError, match="no chat template"):
        blocks_of({"a": [Document("", "abc")]}, tokenizer, config(), chat=True)


def test_the_distance_to_a_teacher_is_the_kl_divergence(tiny: tuple[Path, Path, Path], tmp_path: Path) -> None:
    tokenizer, one = AutoTokenizer.from_pretrained(tiny[2]), AutoModelForCausalLM.from_pretrained(tiny[2])
    other = AutoModelForCausalLM.from_pretrained(write_tiny_llama(tmp_path / "other", seed=5))
    documents = {"a": [Document("", text) for text in PASSAGES]}
    block = blocks_of(documents, tokenizer, config(objective="kl", held_out=1))["a"].train[0]
    ids = torch.tensor([block.ids])
    with torch.no_grad():
        p, q = (torch.log_softmax(model(input_ids=ids).logits[0, block.first - 1 : -1], -1) for model in (one, other))
    wanted = float((p.exp() * (p - q)).sum(1).mean()) / math.log(2)
    whole: Teacher = teacher_of(one, block, 10_000)
    assert float(loss_of(other, block, whole)) == pytest.approx(wanted, rel=1e-4)
    assert float(loss_of(one, block, teacher_of(one, block, 8))) == pytest.approx(0, abs=1e-5)
    # With the rest as one token it is less, never more: the data processing inequality.
    assert 0 < float(loss_of(other, block, teacher_of(one, block, 8))) < wanted


def goal(objective: str, limits: dict[str, list[float]], **changes: Any) -> Goal:
    block: Any = None
    blocks = {name: Blocks(train=(block, block), held_out=(block,)) for name in ("a", "b")}
    return Goal(config(objective=objective, **changes), blocks, limits)


def test_worst_weighs_by_how_far_a_capability_lies_above_its_expert() -> None:
    found = goal("worst", {"a": [1.0, 2.0, 3.0], "b": [1.0, 1.0, 1.0]})
    assert found.weights() == {"a": 0.5, "b": 0.5}
    found.saw("a", [1], [2.1])
    found.saw("b", [0, 1], [1.0, 1.1])
    assert found.weights()["a"] == pytest.approx(1 / (1 + math.exp(-50 * 0.05)))
    found.saw("a", [0], [1.0])
    assert found.weights()["a"] == pytest.approx(1 / (1 + math.exp(-50 * (MEMORY * 0.1 - 0.05))))
    assert found.value({"a": 3.2, "b": 1.7}) == pytest.approx(0.7)


def test_floors_add_a_penalty_for_what_lies_above_the_limit() -> None:
    found = goal("floors", {"a": [1.0, 1.0, 2.0]}, floor_weight=4.0)
    found.saw("a", [0], [1.5])
    found.saw("b", [0], [9.0])
    assert found.weights() == {"a": 4.5, "b": 0.5}
    assert found.value({"a": 2.5, "b": 1.0}) == pytest.approx(1.75 + 4 * 0.5) and found.value({"a": 1.5, "b": 1.0}) == 1.25
    found.saw("a", [0], [-9.0])
    assert found.weights() == {"a": 0.5, "b": 0.5}
