"""What two suites share: the same documents after normalisation, and texts that for the most part stand in the other word for word."""

import logging
from pathlib import Path

import pytest

from tasks.evaluation.suites import Suite, load_suite
from tasks.experiments.search.overlap import COMMON, check_apart, documents, overlap
from tasks.experiments.search.search import SearchError
from tests.tiny_suite import read_rows, write_rows, write_tiny_suite

WORDS = [f"w{i}" for i in range(200)]


@pytest.fixture
def splits(tmp_path: Path) -> tuple[tuple[Suite, Path], tuple[Suite, Path]]:
    """(suite, data) that choose and that judge, and share nothing."""
    chooses, judges = (write_tiny_suite(tmp_path / name) for name in ("validation", "test"))
    for path in judges[1].iterdir():
        write_rows(path, [row | {"prompt": f"Other. {row['prompt']}"} for row in read_rows(path)])
    return (load_suite(str(chooses[0])), chooses[1]), (load_suite(str(judges[0])), judges[1])


def ask(data: Path, *prompts: str) -> None:
    """Further questions, answered alike."""
    rows = read_rows(data / "sums.jsonl")
    write_rows(data / "sums.jsonl", [*rows, *({"prompt": prompt, "answer": "7"} for prompt in prompts)])


def compare(splits: tuple[tuple[Suite, Path], tuple[Suite, Path]]) -> tuple[dict[str, str], dict[str, float]]:
    chooses, judges = splits
    found = overlap(documents(*chooses), documents(*judges))
    return found.same, found.similar


def test_splits_that_share_nothing(splits: tuple[tuple[Suite, Path], tuple[Suite, Path]]) -> None:
    found = check_apart(*splits[0], *splits[1])
    assert (found.chosen, found.judged, found.same, found.similar) == (24, 24, {}, {})
    assert found.sentence("a", "b") == "the suites a and b share none of 24 documents"


def test_case_white_space_and_unicode_forms_tell_no_documents_apart(
    splits: tuple[tuple[Suite, Path], tuple[Suite, Path]], caplog: pytest.LogCaptureFixture
) -> None:
    (_, mine), (_, theirs) = splits
    ask(mine, "What is 3 plus 4?\nSay it.", "Is 3 + 4 more?", "Caf\u00e9")
    ask(theirs, "what is  3 plus\t4? say it.", "Is 3 - 4 more?", "Cafe\u0301")
    same, similar = compare(splits)
    assert same == {"tiny_sums[12]": "tiny_sums[12]", "tiny_sums[14]": "tiny_sums[14]"}, "a sign is no white space"
    assert similar == {}
    with pytest.raises(SearchError, match=r"share 2 of 27 documents \(tiny_sums\[12\] is tiny_sums\[12\]; .*overlap: warn"):
        check_apart(*splits[0], *splits[1])
    with caplog.at_level(logging.WARNING, logger="tasks"):
        assert check_apart(*splits[0], *splits[1], "warn").same == same
    assert "cannot be judged on them" in caplog.text


def test_texts_that_stand_in_the_other_suite_for_the_most_part(splits: tuple[tuple[Suite, Path], tuple[Suite, Path]]) -> None:
    (_, mine), (_, theirs) = splits
    ask(mine, " ".join(WORDS[:100]))
    # 60 words and the answer are 49 runs of 13; all 48 without the answer occur. With 20 words of its own 48 of 69.
    ask(theirs, " ".join(WORDS[:60]).upper(), " ".join([*WORDS[:60], *(f"own{i}" for i in range(19))]),
        " ".join([*WORDS[:60], *(f"else{i}" for i in range(20))]), " ".join(WORDS[:11]))  # fmt: skip
    same, similar = compare(splits)
    assert same == {}
    assert similar == {"tiny_sums[12]": pytest.approx(48 / 49), "tiny_sums[13]": pytest.approx(48 / 68)}
    with pytest.raises(
        SearchError, match=r"share none of 28 documents, and 2 more of tiny .* \(98 % of tiny_sums\[12\]; 71 % of"
    ):
        check_apart(*splits[0], *splits[1])


def test_a_tasks_own_wording_does_not_count(splits: tuple[tuple[Suite, Path], tuple[Suite, Path]]) -> None:
    (_, mine), (_, theirs) = splits
    wording = " ".join(WORDS[:80])
    ask(mine, f"{wording} mine")
    ask(theirs, *(f"{wording} {i}" for i in range(COMMON)))
    assert len(compare(splits)[1]) == COMMON
    ask(theirs, f"{wording} one more")
    assert compare(splits) == ({}, {}), "more than ten questions begin so"
