"""The smoke test on folders that are broken in one way each, made on the spot."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.evaluation.smoke import CHECKS, PROMPTS, Probe, judge, probe
from tests.tiny_models import SPECIAL, perturb, write_tiny_llama

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("smoke") / "base")


@pytest.fixture(scope="module")
def of_base(base: Path) -> Probe:
    return probe(base)


@pytest.fixture
def merge(base: Path, tmp_path: Path) -> Iterator[Path]:
    yield perturb(base, tmp_path / "merge", seed=1)


def with_weights(folder: Path, **changes: torch.Tensor) -> Path:
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {name.replace("__", "."): value for name, value in changes.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


def edited_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_sound_merge_passes_and_says_the_same_twice(merge: Path, of_base: Probe) -> None:
    found = probe(merge)
    assert found.problems == {} and len(found.answers) == len(found.ended) == len(PROMPTS) and found == probe(merge)
    assert judge(found, of_base).passed and judge(found, of_base).said == "The smoke test passed."


def test_answers_are_the_greedy_ones(base: Path, of_base: Probe) -> None:
    """By hand: one forward pass a token, the largest logit, until the end-of-sequence token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    for prompt, answer, ended in zip(PROMPTS, of_base.answers, of_base.ended, strict=True):
        ids, made = tokenizer(prompt, return_tensors="pt")["input_ids"], []
        while len(made) < 24 and (not made or made[-1] != 2):
            with torch.no_grad():
                made.append(int(model(ids).logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([[made[-1]]])], dim=1)
        assert (answer, ended) == (tokenizer.decode(made, skip_special_tokens=True), made[-1] == 2)


def test_each_flaw_is_named(merge: Path, of_base: Probe, tmp_path: Path) -> None:
    def failing(name: str) -> Path:
        return Path(shutil.copytree(merge, tmp_path / name))

    weights = load_file(merge / "model.safetensors")
    nan = with_weights(failing("nan"), model__norm__weight=weights["model.norm.weight"] * float("nan"))
    found = judge(probe(nan), of_base)
    assert (
        set(found.failures) == {"finite"}
        and "are not finite" in found.said
        and found.said.startswith("The smoke test failed: finite: ")
    )

    torn = failing("torn")
    (torn / "model.safetensors").write_bytes(b"torn")
    assert set(judge(probe(torn), of_base).failures) == {"loads"}

    lacking = failing("lacking")
    save_file({k: v for k, v in weights.items() if k != "lm_head.weight"}, lacking / "model.safetensors", {"format": "pt"})
    assert "missing keys: lm_head.weight" in judge(probe(lacking), of_base).failures["loads"]

    strange = failing("strange")
    edited_json(strange / "generation_config.json", eos_token_id=[2, 128])
    assert judge(probe(strange), of_base).failures == {"generation_config": "eos_token_id is 128; ids go from 0 to 127"}

    template = failing("template")
    (template / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    assert set(judge(probe(template), of_base).failures) == {"chat_template"}
    (template / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert judge(probe(template), of_base).failures == {"chat_template": "the chat template leaves out 'Paris.'"}
    (template / "chat_template.jinja").write_text(TEMPLATE)
    assert judge(probe(template), of_base).passed

    small = failing("small")
    edited_json(small / "config.json", vocab_size=120)
    save_file(
        weights | {name: weights[name][:120].clone() for name in ("model.embed_tokens.weight", "lm_head.weight")},
        small / "model.safetensors", {"format": "pt"},
    )  # fmt: skip
    found = judge(probe(small), of_base)
    assert found.failures["vocabulary"] == "the tokenizer's largest id is 127, the embedding has 120 rows"

    deaf = failing("deaf")
    tokens = json.loads((deaf / "tokenizer.json").read_text())
    tokens["normalizer"] = {"type": "Lowercase"}
    (deaf / "tokenizer.json").write_text(json.dumps(tokens))
    assert "comes back as 'hello, world! 12 + 34 = 46.'" in judge(probe(deaf), of_base).failures["round_trip"]
    # The base's own flaw is not the merge's.
    shared = judge(probe(deaf), probe(deaf))
    assert shared.passed and any(
        note.startswith("round_trip: ") and note.endswith("the base does the same") for note in shared.notes
    )


def test_a_merge_that_never_ends_where_its_base_does(base: Path, merge: Path, tmp_path: Path) -> None:
    """The head's row of the end-of-sequence token decides; with tiny models that is easily set."""
    ends = Path(shutil.copytree(base, tmp_path / "ends"))
    weights = load_file(base / "model.safetensors")
    # A final norm of zero makes all logits equal, and the first token the greedy one: ids are made so that it ends.
    zero = with_weights(ends, model__norm__weight=torch.zeros_like(weights["model.norm.weight"]))
    edited_json(zero / "generation_config.json", eos_token_id=0, pad_token_id=0)
    of_ends = probe(zero)
    assert of_ends.ended == (True,) * len(PROMPTS)
    never = Path(shutil.copytree(zero, tmp_path / "never"))
    edited_json(never / "generation_config.json", eos_token_id=2)
    found = judge(probe(never), of_ends)
    assert found.failures == {
        "ends": "none of 3 answers ends within 24 tokens, 3 of the base's do: the end-of-sequence token is lost"
    }
    both = judge(probe(never), probe(never))
    assert both.passed and both.notes == ("ends: none of 3 answers ends within 24 tokens, of the base 0",)
    alone = judge(probe(never), None)
    assert alone.passed and alone.notes == ("ends: none of 3 answers ends within 24 tokens",)


def test_without_a_base_every_problem_counts() -> None:
    assert judge(Probe(problems={"round_trip": "x"}), None).failures == {"round_trip": "x"}
    assert len(set(CHECKS)) == 8 and SPECIAL[2] == "</s>"
