"""Merges in memory: the weights and the scores of the folder that was never written, whatever the model held before."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ota_core.engine import engine
from ota_core.plan.inputs import MergeInputs, resolve_local
from ota_core.recipe.recipe import MergeRecipe
from tasks.evaluation.harness import LoadedModel, score_model
from tasks.evaluation.in_memory import MergedModel, few_threads
from tasks.evaluation.suites import Suite, SuiteError, load_suite
from tests.tiny_models import edit_config, perturb, vocabulary, write_tiny_llama, write_tokenizer
from tests.tiny_suite import edited

SMALL: dict[str, Any] = {"memory": "64MiB", "block_elements": 64}
RECIPES = [
    {"merge_method": "ota", "parameters": {"density": 0.3, "compression": "rank1", "lambda": 1.3}},
    {"merge_method": "ties", "parameters": {"density": 0.5, "lambda": "auto"}},
    {"merge_method": "ota", "parameters": {"density": 0.8, "refine": "rowspace"}},
    {"merge_method": "linear"},
]


def experts_of(base: Path, **options: Any) -> tuple[MergeRecipe, MergeInputs]:
    """Two experts beside the base, and a recipe of each; with second moments."""
    for name, seed in (("one", 1), ("two", 2)):
        expert = perturb(base, base.parent / name, seed=seed, scale=0.2)
        generator = torch.Generator().manual_seed(seed)
        tensors = {key: one for file in expert.glob("*.safetensors") for key, one in load_file(file).items()}
        v = {key: 10 ** (-14 + 6 * torch.rand(one.shape, generator=generator)) for key, one in sorted(tensors.items())}
        save_file(v, expert / "exp_avg_sq.safetensors")
    recipe = recipe_of(base, RECIPES[0] | options)
    return recipe, resolve_local(recipe)


def recipe_of(base: Path, raw: dict[str, Any]) -> MergeRecipe:
    models = [{"model": str(base.parent / name)} for name in ("one", "two")]
    return MergeRecipe.model_validate({"base_model": str(base), "models": models, **raw})


def same_as_folder(model: MergedModel, recipe: MergeRecipe, inputs: MergeInputs, suite: Suite, data: Path, out: Path) -> None:
    """Weights by name, bit for bit with the types, and everything that is scored."""
    model.become(recipe, inputs, **SMALL)
    engine.merge(recipe, out, inputs=inputs, overwrite=True, **SMALL)
    with LoadedModel(out, suite, data_dir=data) as folder:  # as the benchmark loads it
        held, wanted = model.loaded.module.state_dict(), folder.module.state_dict()
        assert held.keys() == wanted.keys()
        assert all(held[name].dtype == tensor.dtype and torch.equal(held[name], tensor) for name, tensor in wanted.items())
        buffers = dict(model.loaded.module.named_buffers())
        assert all(torch.equal(buffers[name], buffer) for name, buffer in folder.module.named_buffers())
    for limit in (5, 12):
        scored, alone = model.score(limit), score_model(out, suite, data_dir=data, limit=limit)
        assert scored.model_dump(exclude={"seconds"}) == alone.model_dump(exclude={"seconds"})


@pytest.mark.parametrize(
    ("options", "top"),
    [({}, {}), ({"tie": True}, {}), ({"max_shard_size": "8KB"}, {"dtype": "bfloat16"}), ({"dtype": torch.bfloat16}, {}),
     ({"dtype": torch.bfloat16}, {"dtype": "float32"})],
    ids=["plain", "tied", "shards to bfloat16", "bfloat16", "to float32"],
)  # fmt: skip
def test_one_model_becomes_one_merge_after_another(
    options: dict[str, Any], top: dict[str, Any], tiny: tuple[Path, Path], tmp_path: Path
) -> None:
    base = write_tiny_llama(tmp_path / "m" / "base", **options)
    _, inputs = experts_of(base)
    suite = load_suite(str(tiny[0]))
    with MergedModel(suite, tiny[1], "cpu", tmp_path) as model:
        modules = set()
        for raw in [*RECIPES, RECIPES[0]]:
            same_as_folder(model, recipe_of(base, raw | top), inputs, suite, tiny[1], tmp_path / "out")
            modules.add(id(model.loaded.module))
        assert len(modules) == 1, "loaded once"


def test_examples_in_prompts_and_drawn_answers_begin_anew(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    """Two that go on counting random numbers from one score to the next."""
    suite = edited(tiny[0], ("capabilities:", "num_fewshot: 2\ncapabilities:"))
    sums = tiny[0].parent / "tiny" / "sums.yaml"
    sums.write_text(sums.read_text().replace("do_sample: false", "do_sample: true, temperature: 1.0"))
    base = write_tiny_llama(tmp_path / "m" / "base")
    recipe, inputs = experts_of(base)
    with MergedModel(suite, tiny[1], "cpu", tmp_path) as model:
        for _ in range(2):
            same_as_folder(model, recipe, inputs, suite, tiny[1], tmp_path / "out")


def test_buffers_that_follow_the_length_of_a_text_are_put_back(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "m" / "base")
    edit_config(base, max_position_embeddings=8, rope_scaling={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    recipe, inputs = experts_of(base)
    suite = load_suite(str(tiny[0]))
    with MergedModel(suite, tiny[1], "cpu", tmp_path) as model:
        model.become(recipe, inputs, **SMALL)
        before = {name: one.clone() for name, one in model.loaded.module.named_buffers()}
        model.loaded.module(torch.ones(1, 30, dtype=torch.long))
        assert any(not torch.equal(one, before[name]) for name, one in model.loaded.module.named_buffers())
        same_as_folder(model, recipe, inputs, suite, tiny[1], tmp_path / "out")


def test_what_files_hold_and_the_model_does_not_is_left_out(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    """An old checkpoint's integer buffer; and an output matrix beside the embedding that the configuration ties it to."""
    base = write_tiny_llama(tmp_path / "m" / "base")
    edit_config(base, tie_word_embeddings=True)
    _, inputs = experts_of(base)
    for file in base.parent.glob("*/model.safetensors"):
        save_file(load_file(file) | {"model.layers.0.self_attn.position_ids": torch.arange(6)}, file, metadata={"format": "pt"})
    suite = load_suite(str(tiny[0]))
    with MergedModel(suite, tiny[1], "cpu", tmp_path) as model:
        for raw in RECIPES[:2]:
            same_as_folder(model, recipe_of(base, raw), inputs, suite, tiny[1], tmp_path / "out")


def test_an_architecture_whose_tensors_are_joined_in_loading_goes_through_a_folder(
    tiny: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=128, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    base = tmp_path / "m" / "base"
    MixtralForCausalLM(config).save_pretrained(base)
    write_tokenizer(base, vocabulary(128))
    _, inputs = experts_of(base)
    suite = load_suite(str(tiny[0]))
    with caplog.at_level(logging.WARNING), MergedModel(suite, tiny[1], "cpu", tmp_path / "cache") as model:
        for raw in RECIPES[:2]:
            same_as_folder(model, recipe_of(base, raw), inputs, suite, tiny[1], tmp_path / "out")
    assert sum("every trial is merged to a folder" in line for line in caplog.messages) == 1
    assert not list((tmp_path / "cache").glob("*"))


def test_after_a_merge_that_failed_the_next_is_whole(
    tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_tiny_llama(tmp_path / "m" / "base")
    recipe, inputs = experts_of(base)
    suite = load_suite(str(tiny[0]))
    merge: Callable[..., Any] = engine.merge_into_memory

    def failing(recipe: MergeRecipe, inputs: MergeInputs, put: Any, **limits: Any) -> Any:
        left = iter(range(5))

        def counted(*rows: Any) -> None:
            next(left)
            put(*rows)

        return merge(recipe, inputs, counted, **limits)

    with MergedModel(suite, tiny[1], "cpu", tmp_path) as model:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "merge_into_memory", failing)
            with pytest.raises(StopIteration):
                model.become(recipe, inputs, **SMALL)
        same_as_folder(model, recipe, inputs, suite, tiny[1], tmp_path / "out")


def test_a_server_is_not_asked_for_what_it_cannot_have(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    suite = edited(
        tiny[0], ("capabilities:", "backend: {name: local-completions, server: 'http://127.0.0.1:1/v1'}\ncapabilities:")
    )
    with pytest.raises(SuiteError, match="cannot be asked for a merge that is in memory alone"):
        MergedModel(suite, tiny[1], "cpu", tmp_path)


def test_rows_are_those_of_the_files_each_once(tmp_path: Path) -> None:
    recipe, inputs = experts_of(write_tiny_llama(tmp_path / "m" / "base", tie=True, dtype=torch.bfloat16))
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    report = engine.merge_into_memory(
        recipe, inputs, lambda name, start, rows: parts.setdefault(name, []).append((start, rows.tensor().clone())), **SMALL
    )  # fmt: skip
    written = engine.merge(recipe, tmp_path / "out", inputs=inputs, **SMALL)
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert held.keys() == parts.keys() and max(map(len, parts.values())) > 1
    for name, tensor in held.items():
        rows = torch.cat([part for _, part in sorted(parts[name], key=lambda one: one[0])])
        assert rows.dtype == tensor.dtype and torch.equal(rows.view(tensor.shape), tensor)
    assert report.results == written.results and report.fingerprint == written.fingerprint


def test_an_outline_takes_kilobytes_and_is_a_model_to_every_loader(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "m" / "base", hidden=512, layers=2, max_shard_size="4MB")
    recipe, inputs = experts_of(base)
    out = tmp_path / "outline"
    out.mkdir()
    engine.outline_into(out, recipe, inputs)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    room = sum(file.stat().st_blocks * 512 for file in out.glob("*.safetensors"))
    assert size > 18 * 2**20 > 40 * room
    model, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and model.config.hidden_size == 512
    assert json.loads((out / "config.json").read_text()) == json.loads((base / "config.json").read_text())


def test_small_models_take_one_thread_for_a_while(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with few_threads(write_tiny_llama(tmp_path / "base")):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with few_threads(tmp_path):  # nothing there that would be small
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
