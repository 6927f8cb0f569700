"""The chat templates that a recipe may name: what they make of a conversation, and that mergekit's of these names say the same."""

from importlib.resources import files
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ota_core.recipe.chat_templates import TEMPLATES

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "More?"},
]
MADE = {
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    "<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nMore?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "alpaca": "Be kind.\n\n### Instruction:\nHi\n\n### Response:\nHello\n\n### Instruction:\nMore?\n\n### Response:\n",
    "mistral": "<s>[INST] Be kind.\n\nHi [/INST] Hello</s>[INST] More? [/INST]",
    "exaone": "[|system|]Be kind.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n[|user|]More?\n[|assistant|]",
}


def render(template: str, messages: list[dict[str, str]]) -> str:
    """As transformers renders a tokenizer's template."""

    def refuse(why: str) -> Any:
        raise AssertionError(why)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    known = {"bos_token": "<s>", "eos_token": "</s>", "raise_exception": refuse, "add_generation_prompt": True}
    return environment.from_string(template).render(messages=messages, **known)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation(name: str) -> None:
    assert render(TEMPLATES[name], TALK) == MADE[name]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", [TALK, TALK[1:2]], ids=["with a system message", "a question"])
def test_mergekits_template_says_the_same_but_for_spaces(name: str, messages: list[dict[str, str]]) -> None:
    known = pytest.importorskip("mergekit._data.chat_templates", reason="the oracle is a development dependency")
    theirs = files(known).joinpath(f"{name}.jinja").read_text(encoding="utf-8")
    ours, other = ("".join(render(template, messages).split()) for template in (TEMPLATES[name], theirs))
    assert ours == other
