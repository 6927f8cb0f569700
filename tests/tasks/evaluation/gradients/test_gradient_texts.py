"""Texts of every form as blocks of tokens, and what is said of those that are none."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from ota_core.recipe.estimate import EstimateSettings
from tasks.evaluation.gradients.documents import Block
from tasks.evaluation.gradients.texts import TextError, file_blocks, random_blocks, suite_blocks
from tasks.evaluation.suites import load_suite
from tests.tiny_models import write_tiny_llama
from tests.tiny_suite import write_rows, write_tiny_suite

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(write_tiny_llama(tmp_path_factory.mktemp("texts") / "model"))


def settings(samples: int = 1, **given: Any) -> EstimateSettings:
    return EstimateSettings(data="x", samples=samples, batch=1, **given)


def told(block: Block, tokenizer: Any) -> tuple[str, str]:
    """(what is given, what is predicted)"""
    return tokenizer.decode(block.ids[: block.first]), tokenizer.decode(block.ids[block.first :])


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"text": "one two"}, ("<s>", "one two</s>")),
        ({"text": "one two</s>"}, ("<s>", "one two</s>")),
        ({"prompt": "1+1=", "completion": "2"}, ("<s>1+1=", "2</s>")),
        ({"prompt": "1+1?", "answer": "2", "key": "k"}, ("<s>1+1?", " 2</s>")),
        ({"prompt": "1+1? ", "response": "2"}, ("<s>1+1? ", "2</s>")),
    ],
)
def test_a_line_is_a_text_or_a_prompt_with_the_completion_that_counts(
    tmp_path: Path, tokenizer: Any, row: dict[str, object], wanted: tuple[str, str]
) -> None:
    write_rows(tmp_path / "a.jsonl", [row])
    (block,) = file_blocks(tmp_path / "a.jsonl", tokenizer, settings(), 64)
    assert told(block, tokenizer) == wanted


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]},
        {"prompt": [{"role": "user", "content": "a?"}], "completion": [{"role": "assistant", "content": "b"}]},
    ],
)
def test_of_messages_what_the_assistant_says_last_counts(tmp_path: Path, tokenizer: Any, row: dict[str, object]) -> None:
    write_rows(tmp_path / "a.jsonl", [row])
    with pytest.raises(TextError, match="line 1 holds messages, but the model's tokenizer has no chat template"):
        file_blocks(tmp_path / "a.jsonl", tokenizer, settings(), 64)
    tokenizer.chat_template = TEMPLATE
    try:
        (block,) = file_blocks(tmp_path / "a.jsonl", tokenizer, settings(), 64)
        assert told(block, tokenizer) == ("<s>[user] a?\n[assistant] ", "b\n")
        write_rows(tmp_path / "b.jsonl", [{"messages": [{"role": "user", "content": "a?"}]}])
        with pytest.raises(TextError, match="the last is the assistant's"):
            file_blocks(tmp_path / "b.jsonl", tokenizer, settings(), 64)
    finally:
        tokenizer.chat_template = None


def test_plain_text_is_cut_into_documents_of_the_length(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("".join(chr(97 + i % 26) for i in range(95)))
    blocks = file_blocks(tmp_path / "a.txt", tokenizer, settings(5), 20)
    assert [len(one.ids) for one in sorted(blocks, key=lambda one: -len(one.ids))] == [20] * 5
    assert blocks != file_blocks(tmp_path / "a.txt", tokenizer, settings(5, seed=1), 20)


def test_the_seed_draws_lines_and_long_ones_give_their_beginning(tmp_path: Path, tokenizer: Any) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": f"{i:02d}" + "x" * 90} for i in range(20)])
    found = file_blocks(tmp_path / "a.jsonl", tokenizer, settings(6), 10)
    assert found == file_blocks(tmp_path / "a.jsonl", tokenizer, settings(6), 10)
    texts = {told(one, tokenizer)[1] for one in found}
    assert len(texts) == 6 and all(len(text) == 9 and text[2:] == "x" * 7 for text in texts)
    assert texts != {told(one, tokenizer)[1] for one in file_blocks(tmp_path / "a.jsonl", tokenizer, settings(6, seed=1), 10)}


def test_a_suite_gives_a_capability_s_documents(tmp_path: Path, tokenizer: Any) -> None:
    file, data = write_tiny_suite(tmp_path)
    suite = load_suite(str(file))
    found = suite_blocks(suite, data, "knowledge", tokenizer, settings(12), 64)
    assert {told(one, tokenizer)[1] for one in found} == {"ab</s>", "cd</s>", "ef</s>", "gh</s>"}
    assert len(suite_blocks(suite, data, None, tokenizer, settings(24), 64)) == 24
    with pytest.raises(TextError, match="capability 'knowledge' gives 12 documents, 13 are asked for"):
        suite_blocks(suite, data, "knowledge", tokenizer, settings(13), 64)
    with pytest.raises(TextError, match="no capability 'chess'; expected one of math, knowledge"):
        suite_blocks(suite, data, "chess", tokenizer, settings(), 64)


def test_random_tokens_are_of_the_whole_vocabulary_and_of_the_seed() -> None:
    wanted = EstimateSettings(random_tokens=True, samples=40, batch=8)
    found = random_blocks(7, wanted, 30)
    assert {i for one in found for i in one.ids} == set(range(7)) and {(len(one.ids), one.first) for one in found} == {(30, 1)}
    assert found == random_blocks(7, wanted, 30) != random_blocks(7, wanted.model_copy(update={"seed": 1}), 30)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a"}\n{"txt": "b"}\n', "line 2 has the keys txt; expected text; messages"),
        ('{"text": "a"}\nnot\n', "line 2 is no JSON"),
        ('{"text": "a"}\n[1]\n', "line 2 holds a JSON list"),
        ('{"text": "a"}\n\n', "gives 1 documents, 2 are asked for"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, tokenizer: Any, text: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(TextError, match=message):
        file_blocks(tmp_path / "a.jsonl", tokenizer, settings(2), 64)
    with pytest.raises(TextError, match="cannot be read"):
        file_blocks(tmp_path / "none.jsonl", tokenizer, settings(2), 64)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "either data"),
        ({"data": "a", "random_tokens": True}, "either data"),
        ({"data": "a", "samples": 9}, "no multiple of batch 8"),
    ],
)
def test_settings_that_do_not_go_together(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EstimateSettings(**given)
    assert json.loads(EstimateSettings(data="a", clip="none").model_dump_json())["clip"] is None
