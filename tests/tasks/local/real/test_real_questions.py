"""Questions and passages out of small corpora, and the real suites on a tiny model."""

import json
from pathlib import Path

import pytest

from ota_core.errors import OtaError
from tasks.evaluation.harness import score_model
from tasks.evaluation.suites import load_suite, needs_data
from tasks.local.real.corpus import DOMAINS
from tasks.local.real.questions import QuestionSettings, write_questions
from tests.tiny_models import write_tiny_llama
from tests.tiny_real import write_real_corpora

SMALL = QuestionSettings(
    context=40, continuation=30, questions={"validation": 4, "test": 6}, passage=60, passages={"validation": 3, "test": 5}
)


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_questions_are_about_their_own_document(tmp_path: Path) -> None:
    corpora = write_real_corpora(tmp_path / "corpora")
    counts = write_questions(corpora, tmp_path / "data", SMALL)
    assert counts["code"] == {"validation_questions": 4, "validation_passages": 3, "test_questions": 6, "test_passages": 5}
    for domain in DOMAINS:
        documents = [str(row["text"]) for row in rows_of(corpora / domain / "test.jsonl")]
        answers = set()
        for row in rows_of(tmp_path / "data" / domain / "test-questions.jsonl"):
            choices, context = row["choices"], row["context"]
            assert isinstance(choices, list) and isinstance(row["answer"], int)
            true = choices[row["answer"]]
            source = [text for text in documents if f"{context} {true}" in text]
            assert len(source) == 1
            assert len(set(choices)) == 4
            assert all(
                choice not in source[0] and any(choice in text for text in documents) for choice in choices if choice != true
            )
            assert all(20 <= len(choice) <= 30 for choice in choices)
            answers.add(row["answer"])
        assert len(answers) > 1
        passages = [str(row["text"]) for row in rows_of(tmp_path / "data" / domain / "test-passages.jsonl")]
        assert all(0 < len(passage) <= 60 and any(passage in text for text in documents) for passage in passages)


def test_the_same_corpora_give_the_same_questions(tmp_path: Path) -> None:
    corpora = write_real_corpora(tmp_path / "corpora")
    for name in ("a", "b"):
        write_questions(corpora, tmp_path / name, SMALL)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.jsonl"))
    assert len(files) == 4 * len(DOMAINS)
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_too_few_documents(tmp_path: Path) -> None:
    with pytest.raises(OtaError, match=r"code/validation.jsonl gives \d questions; expected at least two"):
        write_questions(write_real_corpora(tmp_path / "corpora", documents=1), tmp_path / "data", SMALL)


@pytest.mark.parametrize("name, questions, passages", [("real", 6, 5), ("real-validation", 4, 3)])
def test_the_real_suites_run(name: str, questions: int, passages: int, tmp_path: Path) -> None:
    write_questions(write_real_corpora(tmp_path / "corpora"), tmp_path / "data", SMALL)
    suite = load_suite(name)
    assert needs_data(suite)
    found = score_model(write_tiny_llama(tmp_path / "model"), suite, data_dir=tmp_path / "data")
    assert set(found.capabilities) == set(found.losses) == set(found.loss_stderr) == set(DOMAINS)
    assert all(one.n_samples == questions for one in found.capabilities.values())
    assert all(0 < value < 20 for value in found.losses.values())


def test_the_real_suites_ask_different_documents() -> None:
    """No file of one suite is a file of the other, and every domain is asked by both."""
    named = []
    for name in ("real", "real-validation"):
        folder = load_suite(name).include_path
        assert folder is not None
        texts = [path.read_text() for path in folder.glob("*.yaml")]
        named.append({line.split("{data}/")[1].split('"')[0] for text in texts for line in text.splitlines() if "{data}" in line})
    assert not named[0] & named[1]
    for files in named:
        assert {file.split("/")[0] for file in files} == set(DOMAINS)
        assert len(files) == 2 * len(DOMAINS)
