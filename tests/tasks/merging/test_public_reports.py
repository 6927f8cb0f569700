"""What people who merge and publish models have reported of other tools, with small models of the same kinds. Each case names its thread."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ota_core.engine.companions import set_dtype
from tests.tasks.merging.merging import (
    average,
    check,
    configure,
    family,
    jittered,
    loads,
    merged,
    ota,
    refused,
    rewrite,
    weights,
)
from tests.tasks.merging.tiny_architectures import TEXT, llama, qwen2_5_vl
from tests.tiny_models import vocabulary, write_tokenizer

EMBED = "model.embed_tokens.weight"


def qwen3(tied: bool = True) -> Any:
    torch.manual_seed(0)
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TEXT | {"head_dim": 4}, tie_word_embeddings=tied))


@pytest.mark.parametrize("source", ["base", "union", "model:e1"])
def test_rows_behind_the_last_token_are_kept(tmp_path: Path, source: str) -> None:
    """arcee-ai/mergekit#425: Qwen's embedding has more rows than its tokenizer tokens, and came out cut to these."""
    family(tmp_path, llama(vocab_size=128))
    for name in ("base", "e1", "e2"):
        write_tokenizer(tmp_path / name, vocabulary(120))
    got, _ = merged(tmp_path, tokenizer_source=source)
    assert got[EMBED].shape[0] == 128 and json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 128
    check(got, average(tmp_path))


def test_a_model_saved_without_its_head_among_those_with_one(tmp_path: Path) -> None:
    """arcee-ai/mergekit#653, ggml-org/llama.cpp#9211: an embedding model is Qwen3Model, whose names lack ``model.``."""
    model = qwen3()
    family(tmp_path, model)
    wanted = average(tmp_path)
    type(model).from_pretrained(tmp_path / "e1").model.save_pretrained(tmp_path / "e1")
    got, said = merged(tmp_path)
    assert "differ by the prefix 'model.' alone" in said
    check(got, wanted)
    loads(tmp_path / "out", transformers.Qwen3ForCausalLM)


def test_what_sentence_transformers_needs_comes_along(tmp_path: Path) -> None:
    """arcee-ai/mergekit#286: without modules.json and 1_Pooling a merged embedding model silently takes the mean of all tokens."""
    sizes = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    torch.manual_seed(0)
    family(tmp_path, transformers.BertModel(transformers.BertConfig(**sizes)))
    files = {
        "modules.json": "[]",
        "sentence_bert_config.json": "{}",
        "config_sentence_transformers.json": "{}",
        "1_Pooling/config.json": '{"cls": true}',
    }
    for name, text in files.items():
        (tmp_path / "base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_text(text)
    got, _ = merged(tmp_path)
    check(got, average(tmp_path))
    assert {name: (tmp_path / "out" / name).read_text() for name in files} == files
    from tasks.storage.layout import folder_model_files

    assert files.keys() <= set(folder_model_files(tmp_path / "base"))  # and they are downloaded


VOCABULARIES = [
    "spm.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "tekken.json",
    "bpe.codes",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_files_of_every_tokenizer_and_processor_come_along(tmp_path: Path, name: str) -> None:
    """microsoft/DeBERTa#117, huggingface/transformers#12197, 2U1/Qwen-VL-Series-Finetune#34: a merged folder whose tokenizer or processor is gone."""
    family(tmp_path, qwen2_5_vl() if name.endswith("_config.json") else llama())
    (tmp_path / "base" / name).write_text("{}")
    merged(tmp_path)
    assert (tmp_path / "out" / name).read_text() == "{}"
    from tasks.storage.layout import folder_model_files

    assert name in folder_model_files(tmp_path / "base")


def test_every_vocabulary_that_transformers_names_is_known() -> None:
    """The names in the table are those of transformers' own tokenizers: what is added there is missed here."""
    import re
    from fnmatch import fnmatch

    from ota_core.files.checkpoint import TOKENIZER_PATTERNS
    from tasks.storage.layout import MODEL_FILES

    names: set[str] = set()
    for file in (Path(transformers.__file__).parent / "models").glob("*/tokenization_*.py"):
        for table in re.findall(r"VOCAB_FILES_NAMES\s*=\s*\{([^}]*)\}", file.read_text()):
            names |= set(re.findall(r":\s*\"([^\"]+)\"", table))
    assert len(names) > 20
    for patterns in (TOKENIZER_PATTERNS, MODEL_FILES):
        assert {name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)} == set()


@pytest.mark.parametrize("front", ["", "pretrained_model."])
def test_a_value_head_beside_the_model(tmp_path: Path, front: str) -> None:
    """huggingface/trl#86, huggingface/trl#3071: PPO's wrapper saves its head, and all names below ``pretrained_model``; transformers loads neither."""
    family(tmp_path, llama())
    wanted = average(tmp_path)
    head = {"v_head.summary.weight": torch.ones(1, 8), "v_head.summary.bias": torch.ones(1)}
    rewrite(tmp_path / "e1", lambda state: {front + name: x for name, x in state.items()} | head)
    got, said = merged(tmp_path)
    assert set(got) == set(weights(tmp_path / "base"))
    check(got, wanted)
    assert "e1: v_head.summary.bias, v_head.summary.weight left out: transformers loads e1 without them" in said


def test_tensors_of_modules_that_are_there_are_never_left_out(tmp_path: Path) -> None:
    """The other side of it: a bias of a layer that the class has without one may be an error of config.json, and means another model."""
    family(tmp_path, llama())
    rewrite(tmp_path / "e1", lambda state: state | {"model.layers.0.self_attn.q_proj.bias": torch.ones(8)})
    assert "'model.layers.0.self_attn.q_proj.bias' is here and not in base" in refused(tmp_path)


def test_the_type_of_every_part_of_a_configuration(tmp_path: Path) -> None:
    """huggingface/transformers#33997: a merged image-text model in bfloat16 whose text_config still says float32."""
    family(tmp_path, qwen2_5_vl())
    config = json.loads((tmp_path / "base/config.json").read_text())
    parts = {key: value | {"torch_dtype": "float32"} for key, value in config.items() if key in ("text_config", "vision_config")}
    configure(tmp_path / "base", **parts, torch_dtype="float32")
    merged(tmp_path, dtype="bfloat16")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert [written[key].get("dtype") for key in parts] == ["bfloat16"] * len(parts) and written["dtype"] == "bfloat16"
    assert '"torch_dtype"' not in (tmp_path / "out/config.json").read_text()
    plain: dict[str, Any] = {"dtype": "float32", "text_config": {"hidden_size": 8}}
    set_dtype(plain, "float16")
    assert plain == {"dtype": "float16", "text_config": {"hidden_size": 8}}  # a part that is silent stays so


def write_lora(folder: Path, **whole: torch.Tensor) -> None:
    """An adapter of the first layer's q_proj, with tensors that were trained whole."""
    folder.mkdir()
    front = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    factors = {f"{front}A.weight": torch.ones(2, 8), f"{front}B.weight": torch.ones(8, 2)}
    save_file(factors | {f"base_model.model.{name}": x for name, x in whole.items()}, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def test_an_embedding_that_was_saved_under_zero_3(tmp_path: Path) -> None:
    """hiyouga/LlamaFactory#7665: ``modules_to_save`` of the shape [0], ungathered."""
    family(tmp_path, llama())
    write_lora(tmp_path / "adapter", **{EMBED: torch.zeros(0)})
    said = refused(tmp_path, experts=("adapter",))
    assert "has the shape [0]" in said and "saved under ZeRO-3 or FSDP without being gathered: save the adapter again" in said


def test_an_adapter_that_brought_tokens(tmp_path: Path) -> None:
    """hiyouga/LlamaFactory#5262, #10186: the embedding has grown with the adapter, and PEFT refuses it on the base that it was trained on."""
    family(tmp_path, llama(vocab_size=120))
    for name in ("base", "e1", "e2"):
        write_tokenizer(tmp_path / name, vocabulary(120))
    held = weights(tmp_path / "base")
    grown = {name: torch.cat([held[name], torch.full((2, 8), 3.0)]) for name in (EMBED, "lm_head.weight")}
    write_lora(tmp_path / "adapter", **grown)
    write_tokenizer(tmp_path / "adapter", vocabulary(120))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter")
    tokenizer.add_tokens(["<a>", "<b>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    got, _ = merged(tmp_path, experts=("adapter",), tokenizer_source="union")
    assert torch.equal(got[EMBED], grown[EMBED])
    edited = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(got[edited], held[edited] + 2)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<b>") == 121
    loads(tmp_path / "out", transformers.LlamaForCausalLM)


def test_sampling_settings_that_contradict_each_other(tmp_path: Path) -> None:
    """hiyouga/LlamaFactory#2479, huggingface/transformers#29988: a base whose generation_config.json transformers does not save again."""
    family(tmp_path, llama())
    text = '{"do_sample": false, "temperature": 0.9, "top_p": 0.6}'
    (tmp_path / "base" / "generation_config.json").write_text(text)
    merged(tmp_path)
    assert (tmp_path / "out" / "generation_config.json").read_text() == text
    loads(tmp_path / "out", transformers.LlamaForCausalLM)


def test_norms_in_float32_beside_matrices_in_bfloat16(tmp_path: Path) -> None:
    """Some trainers keep norms wide: each tensor has the type that the base has for it."""
    model = jittered(llama(), 3)
    family(tmp_path, model)
    rewrite(tmp_path / "base", lambda state: {name: x if "norm" in name else x.bfloat16() for name, x in state.items()})
    got, _ = merged(tmp_path)
    assert {name: x.dtype for name, x in got.items()} == {
        name: x.dtype for name, x in load_file(tmp_path / "base/model.safetensors").items()
    }
    assert ota("plan", tmp_path).exit_code == 0
