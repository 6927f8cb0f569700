"""What models answered: kept from a real benchmark beside the scores, compared, cut, and left out where the suite says so."""

import gzip
from pathlib import Path

import pandas as pd
import pytest

from tasks.evaluation.answers import ANSWERS_FILE, at_most, documents_table, flipped, read_answers
from tasks.evaluation.harness import score_model
from tasks.evaluation.subject import Subject
from tasks.evaluation.suites import load_suite, suite_digest
from tests.tiny_models import perturb, write_tiny_llama
from tests.tiny_suite import edited, read_rows, write_rows, write_tiny_suite


@pytest.fixture(scope="module")
def benchmarked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("answers")
    write_tiny_suite(folder, n=8)
    base = write_tiny_llama(folder / "base")
    return folder, {"base": base, **{name: perturb(base, folder / name, seed=i) for i, name in enumerate(("math", "merged"))}}


def test_answers_are_kept_as_they_were_given(benchmarked: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    """Against transformers by hand: the greedy continuation, and the likeliest of the choices."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, models = benchmarked
    suite = load_suite(str(folder / "tiny.yaml"))
    scores = score_model(models["base"], suite, data_dir=folder / "data", answers_to=tmp_path / ANSWERS_FILE)
    found = read_answers(tmp_path / ANSWERS_FILE)
    assert found and {key[:2] for key in found} == {("math", "tiny_sums"), ("knowledge", "tiny_facts")}
    for capability, tasks in scores.samples.items():
        for task, documents in tasks.items():
            assert {key[2] for key in found if key[:2] == (capability, task)} == set(documents)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(models["base"]), AutoTokenizer.from_pretrained(models["base"])

    def likelihood(prompt: str, choice: str) -> float:
        ids = tokenizer(prompt + choice, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logs = model(ids).logits.log_softmax(-1)[0, :-1]
        n = len(tokenizer(choice)["input_ids"])
        return float(logs[-n:].gather(1, ids[0, -n:, None]).sum())

    for row in read_rows(folder / "data" / "facts.jsonl"):
        (answer,) = [one for one in found.values() if one.prompt == row["prompt"]]
        assert answer.answer == max(row["choices"], key=lambda choice, prompt=row["prompt"]: likelihood(prompt, choice))
        assert answer.target == row["choices"][row["label"]]
        right = scores.samples["knowledge"]["tiny_facts"][answer.document]
        assert right == float(answer.answer == answer.target)
    for row in read_rows(folder / "data" / "sums.jsonl"):
        (answer,) = [one for one in found.values() if one.prompt == row["prompt"]]
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        made = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        assert answer.answer == tokenizer.decode(made, skip_special_tokens=True).split("\n")[0] and answer.target == row["answer"]


def test_the_suite_may_say_that_nothing_is_kept(benchmarked: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    _, models = benchmarked
    file, data = write_tiny_suite(tmp_path, n=2)
    loud = load_suite(str(file))
    quiet = edited(file, ("name: tiny", "name: tiny\ndocuments: false"))
    score_model(models["base"], quiet, data_dir=data, answers_to=tmp_path / ANSWERS_FILE)
    assert read_answers(tmp_path / ANSWERS_FILE) is None
    assert suite_digest(loud) == suite_digest(quiet), "scores are the same"


def test_base_expert_and_merge_side_by_side(benchmarked: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    folder, models = benchmarked
    suite, keys = load_suite(str(folder / "tiny.yaml")), {"base": "base", "expert/math": "math", "merged": "merged"}
    scores, answers = {}, {}
    for key, name in keys.items():
        scores[key] = score_model(models[name], suite, data_dir=folder / "data", answers_to=tmp_path / name)
        answers[key] = read_answers(tmp_path / name)
    roles = {"base": "base", "expert/math": "expert", "merged": "merge"}
    subjects = {key: Subject(name=name, role=roles[key], path=None, digest=name) for key, name in keys.items()}
    # One document is turned round, to have a flip of each kind at least.
    samples = scores["merged"].samples["math"]["tiny_sums"]
    first, second = list(samples)[:2]
    samples |= {first: 1.0, second: 0.0}
    scores["base"].samples["math"]["tiny_sums"] |= {first: 0.0, second: 1.0}
    scores["expert/math"].samples["math"]["tiny_sums"] |= {first: 1.0, second: 1.0}
    table = documents_table(scores, subjects, answers)
    assert len(table) == 16 and table["prompt"].notna().all()
    by = table.set_index("document")
    assert by.loc[[first, second], ["against_base", "against_expert"]].values.tolist() == [["won", "same"], ["lost", "lost"]]
    assert by.loc[first, ["base", "expert", "merge"]].tolist() == [0.0, 1.0, 1.0] and by.loc[first, "expert_name"] == "math"
    facts = table[table["capability"] == "knowledge"]
    assert set(facts["against_expert"]) == {"none"} and facts["expert"].isna().all(), "nobody's own capability"
    for row in table.to_dict("records"):
        at = (row["capability"], row["task"], row["document"])
        assert row["base_answer"] == answers["base"][at].answer and row["merge_answer"] == answers["merged"][at].answer
    old = documents_table(scores, subjects, answers | {"merged": None, "base": None, "expert/math": None})
    assert old["prompt"].isna().all() and old["merge"].tolist() == table["merge"].tolist()


def test_what_flipped_comes_first_and_capabilities_share() -> None:
    rows = [
        {"capability": c, "against_base": "won" if i < 6 else "same", "against_expert": "none", "i": i}
        for c in "ab"
        for i in range(10)
    ]
    table = pd.DataFrame(rows)
    assert len(flipped(table)) == 12
    some = at_most(table, 8)
    assert some.groupby("capability").size().to_dict() == {"a": 4, "b": 4} and set(some["against_base"]) == {"won"}
    assert len(at_most(table, 14)) == 14 and (at_most(table, 14)["against_base"] == "won").sum() == 12
    assert at_most(table, 20) is table


def test_long_texts_are_cut_and_files_are_the_same_bytes(benchmarked: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    _, models = benchmarked
    file, data = write_tiny_suite(tmp_path, n=2)
    long = "x" * 100 + "START" + "y " * 50
    suite = load_suite(str(file))
    rows = [row | {"prompt": long * 20 + row["prompt"]} for row in read_rows(data / "sums.jsonl")]
    write_rows(data / "sums.jsonl", rows)
    for name in ("one", "two"):
        score_model(models["base"], suite, data_dir=data, answers_to=tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found = read_answers(tmp_path / "one")
    assert found
    prompts = [one.prompt for one in found.values() if one.capability == "math"]
    assert all(len(prompt) == 1200 and prompt.startswith("…") and prompt.endswith("=\nA:") for prompt in prompts)
    assert len(gzip.decompress((tmp_path / "one").read_bytes())) < 4 * 3000
