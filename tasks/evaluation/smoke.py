"""The smoke test: does a model's folder load, generate and stop as its base's does? Minutes of benchmark are not spent on one that does not.

What a model does is noted by itself (``probe``), and judged beside what its base does (``judge``): of a flaw that the base has too, a merge is
not guilty. Greedy answers, no network, no code from the folder.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ota_core.frozen import Frozen
from tasks.evaluation.quiet import ONE_AT_A_TIME, quiet

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

VERSION = 1
"""Raise it where a change to what is looked at changes what is found."""
CHECKS = ("loads", "vocabulary", "generation_config", "chat_template", "round_trip", "finite", "generates", "ends")
PROMPTS = ("The capital of France is", "Q: What is 2 + 3?\nA:", "Write one short sentence about the sea.")
TEXTS = ("Hello, world! 12 + 34 = 46.", "def add(a, b):\n    return a + b\n")
_TOKENS = 24
_REPEATED = 4


class Probe(Frozen):
    """What one model's folder did."""

    problems: dict[str, str] = Field({})
    """Check to what was seen, of those that went wrong."""
    answers: tuple[str, ...] = ()
    """To ``PROMPTS``, greedy, at most 24 tokens."""
    ended: tuple[bool, ...] = ()
    """Whether each answer ended with an end-of-sequence token."""


class Smoke(Frozen):
    """How a merge stands in the smoke test, beside its base."""

    failures: dict[str, str] = Field({})
    """Check to what was seen: of the merge, and not of its base."""
    notes: tuple[str, ...] = ()
    """What is no failure: the base does the same, or there is none to compare with."""

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def said(self) -> str:
        """In a sentence."""
        if self.passed:
            return "The smoke test passed."
        return f"The smoke test failed: {'; '.join(f'{check}: {seen}' for check, seen in self.failures.items())}."


def judge(probe: Probe, base: Probe | None) -> Smoke:
    """The merge beside its base; without one every problem counts, and ends are not compared."""
    problems = dict(probe.problems)
    notes = [f"{check}: {seen}; the base does the same" for check, seen in problems.items() if base and check in base.problems]
    failures = {check: seen for check, seen in problems.items() if not base or check not in base.problems}
    count, theirs = sum(probe.ended), sum(base.ended) if base else 0
    if probe.ended and not count:
        never = f"none of {len(probe.ended)} answers ends within {_TOKENS} tokens"
        # One answer that is merely longer is no fault: most of the base's have to end.
        if base and 2 * theirs > len(base.ended):
            failures["ends"] = f"{never}, {theirs} of the base's do: the end-of-sequence token is lost"
        else:
            notes.append(f"ends: {never}{f', of the base {theirs}' if base else ''}")
    return Smoke(failures=failures, notes=tuple(notes))


def probe(folder: Path, device: str = "cpu") -> Probe:
    """Load a checkpoint folder with transformers' Auto classes and try it. What goes wrong with it is told, never raised.

    A benchmark of this process waits meanwhile. Raises what a machine without enough memory raises.
    """
    import torch

    with ONE_AT_A_TIME, quiet(None), torch.inference_mode():
        return _probe(folder, device)


def _probe(folder: Path, device: str) -> Probe:
    import torch

    found: dict[str, str] = {}
    answers: list[tuple[str, bool]] = []

    def checked(name: str, look: Callable[[], str]) -> bool:
        """Whether a check went well; what it sees, or raises, is noted otherwise."""
        try:
            seen = look()
        except (MemoryError, torch.OutOfMemoryError):  # the machine's fault
            raise
        except Exception as error:  # a folder can be broken in any way that transformers or its template know of
            log.debug("smoke test of %s: %s", folder, name, exc_info=True)
            seen = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"[:500]
        if seen:
            found[name] = seen
        return not seen

    parts: dict[str, Any] = {}
    if not checked("loads", lambda: _load(folder, device, parts)):
        return Probe(problems=found)
    model, tokenizer = parts["model"], parts["tokenizer"]
    rows = int(model.get_input_embeddings().weight.shape[0])
    checked("vocabulary", lambda: _vocabulary(tokenizer, rows))
    checked("generation_config", lambda: _ids(model.generation_config, rows))
    if getattr(tokenizer, "chat_template", None):
        checked("chat_template", lambda: _renders(tokenizer))
    checked("round_trip", lambda: _round_trip(tokenizer))
    prompts = [_encoded(tokenizer, prompt, plain="chat_template" in found).to(device) for prompt in PROMPTS]
    if checked("finite", lambda: _finite(model, prompts)):
        checked("generates", lambda: _generates(model, tokenizer, prompts, answers))
    return Probe(problems=found, answers=tuple(text for text, _ in answers), ended=tuple(ended for _, ended in answers))


def _load(folder: Path, device: str, parts: dict[str, Any]) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parts["tokenizer"] = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True, dtype="auto", output_loading_info=True)
    model, told = loaded
    parts["model"] = model.to(device).eval()
    wrong = {
        kind: sorted(map(str, told[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if told.get(kind)
    }
    return "; ".join(f"{kind.replace('_', ' ')}: {', '.join(names[:3])} ({len(names)})" for kind, names in wrong.items())


def _vocabulary(tokenizer: Any, rows: int) -> str:
    largest = max(tokenizer.get_vocab().values(), default=-1)
    return "" if largest < rows else f"the tokenizer's largest id is {largest}, the embedding has {rows} rows"


def _ids(config: Any, rows: int) -> str:
    """Ids of the generation config that no row of the embedding belongs to."""
    ids = {
        name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    }
    listed = [(name, one) for name, value in ids.items() if value is not None for one in _listed(value)]
    wrong = [f"{name} is {one}" for name, one in listed if not 0 <= one < rows]
    return f"{', '.join(wrong)}; ids go from 0 to {rows - 1}" if wrong else ""


def _listed(value: int | Sequence[int]) -> Sequence[int]:
    return [value] if isinstance(value, int) else value


def _renders(tokenizer: Any) -> str:
    said = [
        {"role": "user", "content": PROMPTS[0]},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "Why?"},
    ]
    text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    lost = [one["content"] for one in said if one["content"] not in text]
    return f"the chat template leaves out {lost[0]!r}" if lost else ""


def _round_trip(tokenizer: Any) -> str:
    for text in TEXTS:
        back = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"], clean_up_tokenization_spaces=False)
        if back.strip() != text.strip():
            return f"{text!r} comes back as {back!r}"
    return ""


def _encoded(tokenizer: Any, prompt: str, *, plain: bool) -> "torch.Tensor":
    """(1, n) ids of a prompt, in the chat template where there is one that renders."""
    if getattr(tokenizer, "chat_template", None) and not plain:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        ids: torch.Tensor = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    else:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return ids


def _finite(model: Any, prompts: Sequence["torch.Tensor"]) -> str:
    bad = [text for text, ids in zip(PROMPTS, prompts, strict=True) if not bool(model(input_ids=ids).logits.isfinite().all())]
    return f"logits after {bad[0]!r} are not finite" if bad else ""


def _generates(model: Any, tokenizer: Any, prompts: Sequence["torch.Tensor"], answers: list[tuple[str, bool]]) -> str:
    ends = set(_ends(model, tokenizer))
    made = [_answer(model, ids, _TOKENS) for ids in prompts]
    answers += [(tokenizer.decode(ids, skip_special_tokens=True), bool(ids) and ids[-1] in ends) for ids in made]
    again = _answer(model, prompts[0], _REPEATED)
    if again != made[0][: len(again)]:
        return "the same prompt gives other tokens a second time"
    return "" if all(made) else "a prompt gives no token"


def _ends(model: Any, tokenizer: Any) -> Iterator[int]:
    for value in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        yield from [] if value is None else _listed(value)


def _answer(model: Any, ids: "torch.Tensor", tokens: int) -> list[int]:
    """Greedy continuation, as ids. Sampling settings of the folder's generation config do not count."""
    options: Mapping[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1}
    pad = model.generation_config.pad_token_id
    fill = next(iter(_listed(model.generation_config.eos_token_id or 0))) if pad is None else pad
    mask = ids.new_ones(ids.shape)
    made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, pad_token_id=fill, **options)
    found: list[int] = made[0, ids.shape[1] :].tolist()
    return found
