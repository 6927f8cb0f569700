"""What a merge writes is opened before it takes its name; code, templates and tokens come along; configurations must mean the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from ota_core.engine.companions import set_rows
from ota_core.files.tokens import tokens_of
from ota_core.plan.fit.config import meaning
from tests.tasks.merging.merging import average, check, configure, family, loads, merged, ota, refused, rewrite, weights
from tests.tasks.merging.tiny_architectures import gemma3, llama
from tests.tiny_models import vocabulary, write_tokenizer

EMBED = "model.embed_tokens.weight"
MINE = {
    "configuration_mine.py": "raise SystemExit('configuration code ran')\n",
    "modeling_mine.py": "raise SystemExit('model code ran')\n",
}


def test_code_of_a_model_is_copied_and_never_run(tmp_path: Path) -> None:
    """arcee-ai/mergekit#105: auto_map in the output without the files that it names."""
    family(tmp_path, llama())
    for folder in ("base", "e1", "e2"):
        for name, text in MINE.items():
            (tmp_path / folder / name).write_text(text)
        auto = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
        configure(tmp_path / folder, model_type="mine", architectures=["MineForCausalLM"], auto_map=auto)
    _, said = merged(tmp_path)
    assert {name: (tmp_path / "out" / name).read_text() for name in MINE} == MINE
    assert "copied and not run" in said


def test_a_folder_that_would_not_load_never_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the merge itself: the configuration of the output says another size than its weights have."""
    from ota_core.engine import output

    family(tmp_path, llama())
    monkeypatch.setattr(output, "write_json", lambda path, value: path.write_text(json.dumps(value | {"intermediate_size": 13})))
    said = refused(tmp_path)
    assert "the merged model would not load" in said and "contradict config.json" in said


def test_what_is_wrong_with_the_base_already_is_said(tmp_path: Path) -> None:
    """Where the output is the base but for its numbers, it opens where the base opens, and is not tried."""
    family(tmp_path, llama(vocab_size=120))
    grown(tmp_path, ["<|im_start|>", "<|im_end|>"])
    for folder in ("base", "e1", "e2"):
        configure(tmp_path / folder, intermediate_size=13)
    _, said = merged(tmp_path, tokenizer_source="union")
    assert "was not checked" in said
    shutil.rmtree(tmp_path / "out")
    _, said = merged(tmp_path)
    assert "was not checked" not in said


def grown(root: Path, tokens: list[str], *, slow: bool = False, template: bool = True) -> None:
    """``base`` with 120 tokens, ``e1`` with these more: in its tokenizer.json, or in added_tokens.json alone."""
    known = vocabulary(120)
    for name in ("base", "e2"):
        write_tokenizer(root / name, known)
    rewrite(
        root / "e1",
        lambda s: {
            n: torch.cat([x, torch.full((len(tokens), x.shape[1]), 2.0)]) if n in (EMBED, "lm_head.weight") else x
            for n, x in s.items()
        },
    )
    write_tokenizer(root / "e1", known)
    if slow:
        table = {token: i for i, token in enumerate(known)}
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (root / "e1" / file).unlink()
        (root / "e1" / "vocab.json").write_text(json.dumps(table))
        (root / "e1" / "added_tokens.json").write_text(json.dumps({token: 120 + i for i, token in enumerate(tokens)}))
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(root / "e1")
        tokenizer.add_special_tokens({"additional_special_tokens": tokens})
        if template:
            tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
        tokenizer.save_pretrained(root / "e1")
    configure(root / "e1", vocab_size=120 + len(tokens))


@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
def test_tokens_that_one_expert_added(tmp_path: Path, slow: bool) -> None:
    """arcee-ai/mergekit#139, #169: an expert with special tokens of its own, in added_tokens.json where its tokenizer is a slow one."""
    family(tmp_path, llama(vocab_size=120))
    grown(tmp_path, ["<|im_start|>", "<|im_end|>"], slow=slow)
    got, said = merged(tmp_path, tokenizer_source="union")
    assert got[EMBED].shape[0] == 122 and torch.equal(got[EMBED][120:], torch.full((2, 8), 2.0))
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 122
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"] == [121]
    loads(tmp_path / "out", transformers.LlamaForCausalLM)
    if not slow:
        assert "chat template is that of e1" in said
        assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "<|im_start|>a<|im_end|>"


TEMPLATES = {
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "tojson": "{{ messages | tojson(indent=2, ensure_ascii=False) }}{{ strftime_now('%d %b %Y') }}",
    "system first": "{% if messages[0].role != 'system' %}{{ raise_exception('begin with a system message') }}{% endif %}{{ messages[1].content }}",
    "parts": "{% for m in messages %}{% for part in m.content %}{{ part.text + '' }}{% endfor %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_transformers_takes_is_taken(tmp_path: Path, template: str) -> None:
    """axolotl-ai-cloud/axolotl#2762, abetlen/llama-cpp-python#2225: tags and functions that jinja has in transformers alone."""
    family(tmp_path, llama(vocab_size=120))
    grown(tmp_path, ["<|im_start|>"])
    (tmp_path / "e1" / "chat_template.jinja").write_text(TEMPLATES[template])
    _, said = merged(tmp_path, tokenizer_source="union")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATES[template]
    assert "renders none" not in said and "cannot be" not in said


def test_templates_that_want_more_than_a_check_has_are_noted(tmp_path: Path) -> None:
    """Only what transformers cannot read ends a merge."""
    family(tmp_path, llama(vocab_size=120))
    grown(tmp_path, ["<|im_start|>"])
    template = tmp_path / "e1" / "chat_template.jinja"
    template.write_text(
        "{% if not documents %}{{ raise_exception('documents are missing') }}{% endif %}{{ messages[0].content }}"
    )
    _, said = merged(tmp_path, tokenizer_source="union")
    assert (
        "its chat template can be read, but renders none of 7 short conversations (TemplateError: documents are missing)" in said
    )
    template.write_text("{% for m in messages %}{% unheard_of %}{% endfor %}")
    shutil.rmtree(tmp_path / "out")
    assert "its chat template cannot be read (line 1: Encountered unknown tag 'unheard_of'" in refused(
        tmp_path, tokenizer_source="union"
    )


def test_what_is_dropped_is_said_with_the_norm_of_its_edit(tmp_path: Path) -> None:
    """hiyouga/LlamaFactory#4408: trained special tokens that do not reach the merged model."""
    family(tmp_path, llama(vocab_size=120))
    grown(tmp_path, ["<|im_start|>", "<|im_end|>"])
    got, said = merged(tmp_path)
    assert got[EMBED].shape[0] == 120
    norm = np.sqrt(2 * 2 * 8 * 4.0)  # two tokens in two tensors of eight columns, all 2
    assert (
        f"2 of its tokens are not in the output's tokenizer and left out ('<|im_start|>', '<|im_end|>'); what their rows hold has the norm {norm:.3g}"
        in said
    )
    told = " ".join(ota("plan", tmp_path, "linear").output.split())
    assert (
        "2 of its tokens are not in the output's tokenizer and left out ('<|im_start|>', '<|im_end|>'). tokenizer_source: union"
        in told
    )


def test_the_vocabulary_of_a_nested_configuration(tmp_path: Path) -> None:
    """arcee-ai/mergekit#47 of an image-text model: the language model's part of config.json says how many rows there are."""
    family(tmp_path, gemma3())
    known = [*vocabulary(4), *(f"t{i}" for i in range(44))]
    for name in ("base", "e1", "e2"):
        write_tokenizer(tmp_path / name, known)
    name = next(n for n in weights(tmp_path / "e1") if n.endswith("embed_tokens.weight"))
    rewrite(tmp_path / "e1", lambda s: s | {name: torch.cat([s[name], torch.ones(1, 8)])})
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "e1")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "e1")
    merged(tmp_path, tokenizer_source="union")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["text_config"]["vocab_size"] == 49 and "vocab_size" not in config
    loads(tmp_path / "out", transformers.Gemma3ForConditionalGeneration)


def test_set_rows() -> None:
    for config, wanted in (
        ({}, {"vocab_size": 9}),
        ({"vocab_size": 5}, {"vocab_size": 9}),
        ({"text_config": {"vocab_size": 5}}, {"text_config": {"vocab_size": 9}}),
        ({"text_config": {}}, {"text_config": {"vocab_size": 9}}),
        ({"text_config": {"vocab_size": 5}, "vocab_size": 5}, {"text_config": {"vocab_size": 9}, "vocab_size": 9}),
        ({"text_config": {}, "vocab_size": 5}, {"text_config": {}, "vocab_size": 9}),
    ):
        set_rows(config, 9)
        assert config == wanted


@pytest.mark.parametrize(
    ("key", "value"),
    [("rms_norm_eps", 1e-3), ("num_attention_heads", 1), ("hidden_act", "gelu"), ("sliding_window", 4), ("tie_word_embeddings", True),
     ("model_type", "mistral")],
)  # fmt: skip
def test_a_configuration_that_means_something_else_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    """arcee-ai/mergekit#325: the same shapes, other mathematics."""
    family(tmp_path, llama())
    configure(tmp_path / "base", sliding_window=None)
    was = json.loads((tmp_path / "e1/config.json").read_text()).get(key)
    configure(tmp_path / "e1", **{key: value})
    for name in ("e1", "e2"):
        if key != "sliding_window":
            configure(tmp_path / name, ("sliding_window",))
    said = refused(tmp_path)
    assert f"e1: config.json has {key}: {value!r}" in said and (was is None or str(was) in said)
    result = ota("plan", tmp_path)
    assert result.exit_code == 2 and key in result.output
    if key not in {"tie_word_embeddings"}:
        got, _ = merged(tmp_path, "linear", "--ignore-config-differences", key)
        check(got, average(tmp_path))
        shutil.rmtree(tmp_path / "out")
        merged(tmp_path, "linear", ignore_config_differences=[key])


def test_rope_theta_in_both_spellings(tmp_path: Path) -> None:
    family(tmp_path, llama())
    for folder in ("base", "e1", "e2"):
        configure(tmp_path / folder, ("rope_parameters", "rope_scaling"), rope_theta=1e4)
    configure(tmp_path / "e1", ("rope_theta",), rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    merged(tmp_path)
    shutil.rmtree(tmp_path / "out")
    configure(tmp_path / "e1", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 2e4})
    said = refused(tmp_path)
    assert (
        "rope_theta: 20000.0, base has 10000.0" in said
        and "rope_scaling: {'factor': 2.0, 'rope_type': 'linear'}, base has none" in said
    )
    assert "ignore_config_differences: 'rope' is no setting" in refused(tmp_path, ignore_config_differences=["rope"])
    merged(tmp_path, ignore_config_differences=["rope_theta", "rope_scaling"])


def test_meaning() -> None:
    old = {
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "model_type": "qwen2_vl",
        "tie_word_embeddings": True,
    }
    new = {"model_type": "qwen2_vl", "tie_word_embeddings": True,
           "text_config": {"model_type": "qwen2_vl_text", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}}}  # fmt: skip
    assert meaning(old) == meaning(new)
    four = {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
    five = {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    }
    assert meaning(four) == meaning(five)
    assert meaning({"sliding_window": 9, "use_sliding_window": False}) == {"sliding_window": None}
    assert meaning({}) == {}


def test_tables_of_slow_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\na\n")
    assert tokens_of(tmp_path) == {"[PAD]": 0, "[UNK]": 1, "a": 2}
    (tmp_path / "added_tokens.json").write_text('{"<x>": 3, "a": 2}')
    assert tokens_of(tmp_path) == {"[PAD]": 0, "[UNK]": 1, "a": 2, "<x>": 3}
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"4": {"content": "<y>", "special": true}}}')
    assert (tokens_of(tmp_path) or {})["<y>"] == 4
    assert tokens_of(tmp_path / "none") is None


def test_pieces_of_sentencepiece(tmp_path: Path) -> None:
    import sentencepiece

    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=30, minloglevel=9
    )
    (tmp_path / "tokenizer.vocab").unlink()
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert tokens_of(tmp_path) == {model.id_to_piece(i): i for i in range(30)}
