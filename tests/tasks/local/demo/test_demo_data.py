"""The demo's data: disjoint splits, same bytes for the same seed, and answers recomputed by other means."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

from ota_core.errors import OtaError
from tasks.local.demo.data import CAPABILITIES, DataSettings, read_jsonl, write_data
from tasks.local.demo.questions import knowledge

SETTINGS = DataSettings(train=800, validation=30, test=120, base=1500, places=30)
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    write_data(folder, seed=3, settings=SETTINGS)
    return folder


def rows(data: Path, capability: str) -> list[dict[str, str]]:
    return [row for split in SPLITS for row in read_jsonl(data / capability / f"{split}.jsonl")]


def parse(row: dict[str, str]) -> str:
    """The prompt without the shared ending."""
    text, _, ending = row["prompt"].rpartition("\n")
    assert ending == "Answer:"
    return text


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_prompt_lies_in_two_splits(data: Path, capability: str) -> None:
    prompts = {split: [row["prompt"] for row in read_jsonl(data / capability / f"{split}.jsonl")] for split in SPLITS}
    everything = [prompt for split in SPLITS for prompt in prompts[split]]
    assert all(prompts.values()) and len(everything) == len(set(everything))


@pytest.mark.parametrize("capability", [c for c in CAPABILITIES if c != "knowledge"])
def test_what_a_test_asks_about_is_never_trained_in_any_wording(data: Path, capability: str) -> None:
    about = {
        split: {frozenset(_content(capability, parse(row))) for row in read_jsonl(data / capability / f"{split}.jsonl")}
        for split in SPLITS
    }
    assert (
        not about["test"] & about["train"]
        and not about["validation"] & about["train"]
        and not about["test"] & about["validation"]
    )


def _content(capability: str, text: str) -> list[object]:
    """The operands, list or words of a prompt, found without the generators' keys, with the wording taken away."""
    if capability == "math":
        a, b = (int(n) for n in re.findall(r"\d+", text))
        return [a, b] if "+" in text or "plus" in text else [a - b, b]
    if capability == "code":
        return [re.findall(r"\[[^]]*\]", text)[0]]
    if capability == "general_if":
        return [text.rpartition(": ")[2]]
    return re.findall(r"^Write (\w+) .*?(?:and|before) (\w+)", text)[0]


def test_asked_facts_are_trained_in_other_wordings_only(data: Path) -> None:
    train, test = (read_jsonl(data / "knowledge" / f"{split}.jsonl") for split in ("train", "test"))
    answers = {row["key"]: row["answer"] for row in train}
    held_out = re.compile(r"^Which \w+ belongs to (\w+)\?")
    trained_held_out = {row["key"] for row in train if held_out.match(row["prompt"])}
    wordings = {key: 0 for key in answers}
    for row in train:
        wordings[row["key"]] += 1
    for row in test:
        assert held_out.match(row["prompt"]), row
        assert answers[row["key"]] == row["answer"] and row["key"] not in trained_held_out and wordings[row["key"]] >= 3
    assert trained_held_out, "the wording itself is trained, on other facts"


def test_the_base_sees_no_test_question_and_no_fact_of_the_expert(data: Path) -> None:
    base = "\n".join(row["text"] for row in read_jsonl(data / "base" / "train.jsonl"))
    for capability in CAPABILITIES:
        for split in ("validation", "test"):
            assert not [row for row in read_jsonl(data / capability / f"{split}.jsonl") if row["prompt"] in base]
    places = {row["key"].partition("/")[0] for row in rows(data, "knowledge")}
    assert len(places) == 2 * SETTINGS.places and not places & set(re.findall(r"\w+", base))


def test_math_answers(data: Path) -> None:
    for row in rows(data, "math"):
        a, sign, b = re.fullmatch(r"(?:Compute|What is) (\d+) (\S+) (\d+)[.?]", parse(row)).groups()  # type: ignore[union-attr]
        assert int(row["answer"]) == int(a) + (int(b) if sign in ("+", "plus") else -int(b)), row


def test_code_answers(data: Path) -> None:
    """Python itself is the reference. The programs come from our generator, and nothing but the names below can be reached."""
    for row in rows(data, "code"):
        assert re.fullmatch(r"x = \[[\d, ]+\]; print\([a-z\[\]():\d-]+\)", parse(row)), row
        printed: list[object] = []
        exec(parse(row), {"__builtins__": {"len": len, "max": max, "min": min, "sorted": sorted, "print": printed.append}})
        assert [str(value) for value in printed] == [row["answer"]], row


def test_general_if_answers(data: Path) -> None:
    for row in rows(data, "general_if"):
        order, _, listed = parse(row).partition(": ")
        words = listed.split()
        number = {"first": 0, "second": 1, "last": len(words) - 1}
        if match := re.fullmatch(r"Name the (first|second|last) word of this list", order):
            expected = words[number[match[1]]]
        elif match := re.fullmatch(r"Name the word after (\w+) in this list", order):
            expected = dict(pairwise(words))[match[1]]
        elif match := re.fullmatch(r"Drop the word (\w+) from this list", order):
            expected = re.sub(rf"\b{match[1]}\b ?", "", listed).strip()
        elif order == "Drop the first word of this list":
            expected = listed.partition(" ")[2]
        elif order == "How many words are in this list":
            expected = str(listed.count(" ") + 1)
        elif order == "Put this list in reverse order":
            expected = " ".join(words[::-1])
        else:
            assert order == "Sort this list by the alphabet"
            expected = _selection_sort(words)
        assert row["answer"] == expected, row


def _selection_sort(words: list[str]) -> str:
    left, found = list(words), []
    while left:
        least = min(left)
        left.remove(least)
        found.append(least)
    return " ".join(found)


def test_precise_if_answers(data: Path) -> None:
    for row in rows(data, "precise_if"):
        text = parse(row)
        a, b = _content("precise_if", text)
        up, low = str(a).upper(), str(a)
        expected = {
            f"Write {a} and {b} in capital letters.": f"{up} {str(b).upper()}",
            f"Write {a} and {b} with a comma between them.": f"{a}, {b}",
            f"Write {a} and {b} with a dash between them.": f"{a} - {b}",
            f"Write {a} two times and {b} three times.": " ".join([low] * 2 + [str(b)] * 3),
            f"Write {a} and {b} and end with an exclamation mark.": f"{a} {b} !",
            f"Write {a} and {b} in brackets.": f"( {a} {b} )",
            f"Write {a} in capital letters and {b} in brackets.": f"{up} ( {b} )",
            f"Write {a} before {b} with a comma between them.": f"{a}, {b}",
        }
        assert row["answer"] == expected[text], row


def test_same_seed_same_bytes_other_seed_other_questions(data: Path, tmp_path: Path) -> None:
    def contents(folder: Path) -> dict[str, bytes]:
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.jsonl"))}

    write_data(tmp_path / "again", seed=3, settings=SETTINGS)
    write_data(tmp_path / "other", seed=4, settings=SETTINGS)
    assert contents(tmp_path / "again") == contents(data)
    assert all(a != b for a, b in zip(contents(tmp_path / "other").values(), contents(data).values(), strict=True))


def test_an_existing_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    small = DataSettings(train=10, validation=2, test=3, base=10, places=3)
    folder = tmp_path / "data"
    write_data(folder, seed=0, settings=small)
    (folder / "old.jsonl").write_text("{}")
    write_data(folder, seed=0, settings=small)
    assert not (folder / "old.jsonl").exists() and len(read_jsonl(folder / "math" / "test.jsonl")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_more_than_there_is_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(OtaError, match="math has too few distinct questions"):
        write_data(tmp_path / "data", seed=0, settings=DataSettings(train=10, validation=2, test=3000))
    with pytest.raises(OtaError, match=f"there are {len(knowledge.STARTS) * len(knowledge.ENDS)} names"):
        write_data(tmp_path / "data", seed=0, settings=DataSettings(train=10, validation=2, test=3, places=200))
    assert not list(tmp_path.iterdir())
