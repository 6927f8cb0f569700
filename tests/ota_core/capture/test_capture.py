"""Second moments kept by a training in one process: by the Trainer and by loops, each compared with the live optimizer's."""

import json
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ota_core.capture import SecondMomentsCallback, save_second_moments
from ota_core.engine.engine import compress_moments
from ota_core.errors import MomentsError
from ota_core.files.checkpoint import Checkpoint
from ota_core.moments import find_moments, open_moments
from ota_core.moments.compression import compression_of, open_compressed
from tests.ota_core.capture.training import model_of, train

Tensors = Mapping[str, torch.Tensor]


def read_all(path: Path) -> dict[str, torch.Tensor]:
    """v by name as the product reads it."""
    moments = open_moments(path)
    found = {}
    for name, shape in moments.shapes().items():
        rows = shape[0] if len(shape) < 2 else int(torch.Size(shape[:-1]).numel())
        found[name] = torch.from_numpy(moments.read(name, 0, rows).copy()).reshape(shape)
    moments.close()
    return found


def assert_same(found: Tensors, live: Tensors) -> None:
    assert found.keys() == live.keys()
    for name, v in live.items():
        assert torch.equal(found[name], v.float()), name
    assert any(bool(v.any()) for v in live.values())


def adam_state(model: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    return {name: optimizer.state[p]["exp_avg_sq"] for name, p in model.named_parameters() if p in optimizer.state}


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 100, (8,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": tokens, "labels": tokens}


class Watch(SecondMomentsCallback):
    """The callback, with a look at the live optimizer whenever it has saved."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.live: dict[str, dict[str, torch.Tensor]] = {}

    def on_save(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **others: Any) -> None:
        super().on_save(args, state, control, model=model, optimizer=optimizer, **others)
        held = adam_state(model, optimizer.optimizer)
        self.live[f"checkpoint-{state.global_step}"] = {name: v.clone() for name, v in held.items()}


def run_trainer(folder: Path, callback: SecondMomentsCallback, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        **{
            "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 4, "save_steps": 2, "save_only_model": True,
            "use_cpu": True, "report_to": [], "learning_rate": 1e-3, "disable_tqdm": True, **options,
        }
    )  # fmt: skip
    trainer = Trainer(
        model=model_of(),
        args=arguments,
        train_dataset=Rows(),
        eval_dataset=Rows(),
        callbacks=[callback],  # type: ignore[list-item]
    )
    trainer.train()
    return trainer


def test_the_trainer_with_save_only_model(tmp_path: Path) -> None:
    callback = Watch(capability="math", base_model="org/base")
    trainer = run_trainer(tmp_path, callback)
    trainer.save_model()
    assert callback.live.keys() == {"checkpoint-2", "checkpoint-4"}
    for name, live in callback.live.items():
        checkpoint = tmp_path / name
        assert not (checkpoint / "optimizer.pt").exists()
        assert find_moments(checkpoint) == checkpoint / "exp_avg_sq.safetensors"
        assert_same(read_all(checkpoint), live)
        assert live.keys() == set(Checkpoint(checkpoint).names()), "the names of the saved weights, tied ones once"
        moments = open_moments(checkpoint)
        step = int(name.removeprefix("checkpoint-"))
        assert {moments.step(one) for one in moments.shapes()} == {step} and moments.beta2 == 0.999
        said = json.loads((checkpoint / "expert.json").read_text())
        assert said.pop("trained_at").endswith("+00:00")
        assert said == {"capability": "math", "base_model": "org/base", "step": step, "beta2": 0.999, "optimizer": "AdamW"}
    assert_same(read_all(tmp_path / "exp_avg_sq.safetensors"), callback.live["checkpoint-4"])


def test_the_best_checkpoints_moments_stand_beside_the_best_model(tmp_path: Path) -> None:
    """By a metric that falls: the first checkpoint is the best, the last step's v is another's."""
    callback = Watch()
    trainer = run_trainer(
        tmp_path, callback, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, metric_for_best_model="loss",
        greater_is_better=True,
    )  # fmt: skip
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert_same(read_all(tmp_path / "exp_avg_sq.safetensors"), callback.live["checkpoint-2"])
    assert not (tmp_path / "expert.json").exists()


def test_an_optimizer_without_second_moments_ends_the_training_at_once(tmp_path: Path) -> None:
    with pytest.raises(MomentsError, match=r"SGD keeps no second moment of .+: .*mean of gradients.*ota estimate"):
        run_trainer(tmp_path, SecondMomentsCallback(), optim="sgd", optim_args="momentum=0.9")
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_callback_answers_to_every_event_of_transformers() -> None:
    from transformers import TrainerCallback

    callback = SecondMomentsCallback()
    events = {name for name in dir(TrainerCallback) if name.startswith("on_")}
    assert len(events) > 10 and all(callable(getattr(callback, event)) for event in events)
    assert callback.on_log(None, None, None, logs={}) is None
    with pytest.raises(AttributeError):
        callback.something_else  # noqa: B018


def test_neither_transformers_nor_numba_is_loaded_by_an_import() -> None:
    script = "import sys; from ota_core.capture import SecondMomentsCallback, save_second_moments; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"transformers", "numba", "pydantic", "safetensors", "accelerate"} & set(loaded) and "torch" in loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_loop_with_frozen_parameters(tmp_path: Path, dtype: torch.dtype) -> None:
    model = model_of(tie_word_embeddings=False).to(dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0" not in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, betas=(0.9, 0.95))
    train(model, optimizer)
    path = save_second_moments(model, optimizer, tmp_path / "out")
    assert path == tmp_path / "out" / "exp_avg_sq.safetensors" and [*path.parent.iterdir()] == [path]
    live = adam_state(model, optimizer)
    assert len(live) == 12 and not any("layers.0" in name for name in live)
    assert_same(read_all(path), live)
    assert open_moments(path).beta2 == 0.95


def test_names_of_wrappers_are_undone(tmp_path: Path) -> None:
    model = model_of()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=1e-3)
    train(compiled, optimizer)
    assert next(iter(dict(compiled.named_parameters()))).startswith("_orig_mod.")
    assert_same(read_all(save_second_moments(compiled, optimizer, tmp_path)), adam_state(model, optimizer))


def test_rank1_is_what_compress_makes_of_the_full_moments(tmp_path: Path) -> None:
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer)
    full = save_second_moments(model, optimizer, tmp_path / "full")
    small = save_second_moments(model, optimizer, tmp_path / "small", method="rank1")
    compress_moments(full, tmp_path / "wanted.safetensors", method="rank1")
    wanted, found = open_compressed(tmp_path / "wanted.safetensors"), open_compressed(small)
    assert compression_of(found) == "rank1" and found.header == wanted.header
    for name, values in wanted.tensors().items():  # type: ignore[attr-defined]
        # float64 sums in another order, rounded to float32
        torch.testing.assert_close(torch.from_numpy(found.tensors()[name]), torch.from_numpy(values), rtol=2**-23, atol=0)  # type: ignore[attr-defined]
    assert find_moments(small.parent) == small and small.stat().st_size < full.stat().st_size


def test_steps_that_differ_stand_beside_each_tensor(tmp_path: Path) -> None:
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    norm = model.model.norm.weight
    train(model, optimizer, steps=1)
    norm.requires_grad_(False)
    train(model, optimizer, steps=2)
    for method in ("none", "rank1"):
        moments = open_moments(save_second_moments(model, optimizer, tmp_path / method, method=method))  # type: ignore[arg-type]
        steps = {name: moments.step(name) for name in moments.shapes()}
        assert steps.pop("model.norm.weight") == 1 and set(steps.values()) == {3}


def test_adafactor_of_both_libraries(tmp_path: Path) -> None:
    """Their own quotient, gradient over update, is the root of what is saved: that is the v that they steer by."""
    from transformers.optimization import Adafactor

    for kind in (Adafactor, torch.optim.Adafactor):
        model = model_of()
        optimizer = kind(model.parameters(), lr=1e-3, **({"relative_step": False} if kind is Adafactor else {}))
        train(model, optimizer)
        found = read_all(save_second_moments(model, optimizer, tmp_path / kind.__module__, method="none"))
        assert found.keys() == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            state = optimizer.state[parameter]
            row, col = state.get("exp_avg_sq_row"), state.get("exp_avg_sq_col")
            if row is not None:
                assert torch.allclose(found[name], 1 / Adafactor._approx_sq_grad(row, col).square(), rtol=1e-5, atol=0)
            elif "row_var" in state:
                assert torch.allclose(
                    found[name], state["row_var"] @ state["col_var"] / state["row_var"].mean(), rtol=1e-5, atol=0
                )
            else:
                assert torch.equal(found[name], state.get("exp_avg_sq", state.get("variance")))
        beta2 = open_moments(tmp_path / kind.__module__).beta2
        assert beta2 == pytest.approx(1 - 3**-0.8)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra 'trainers')")
def test_bitsandbytes(tmp_path: Path) -> None:
    import bitsandbytes
    from bitsandbytes.functional import QuantState, dequantize_blockwise

    model = model_of(hidden_size=64, intermediate_size=80)
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-3, min_8bit_size=1024)
    train(model, optimizer)
    found = read_all(save_second_moments(model, optimizer, tmp_path))
    coded = 0
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        wanted = state["state2"]
        if wanted.dtype == torch.uint8:
            coded += 1
            quant = QuantState(absmax=state["absmax2"], code=state["qmap2"], blocksize=256, dtype=torch.float32)
            wanted = dequantize_blockwise(wanted, quant)
        assert torch.equal(found[name], wanted.float().reshape(parameter.shape)), name
    assert 0 < coded < len(found)


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed (extra 'trainers')")
@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW4bit"])
def test_torchao(tmp_path: Path, kind: str) -> None:
    from torchao import optim

    model = model_of(hidden_size=64, intermediate_size=128)
    optimizer = getattr(optim, kind)(model.parameters(), lr=1e-3)
    train(model, optimizer)
    live = adam_state(model, optimizer)
    wanted = {name: v.dequantize() if type(v) is not torch.Tensor else v for name, v in live.items()}
    assert any(type(v) is not torch.Tensor for v in live.values())
    assert_same(read_all(save_second_moments(model, optimizer, tmp_path)), wanted)


def test_a_mixture_of_experts_under_the_names_of_its_checkpoint(tmp_path: Path) -> None:
    """transformers holds Mixtral's experts in joined tensors and saves each by itself."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 101, "num_local_experts": 3}
    model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer)
    model.save_pretrained(tmp_path)
    found = read_all(save_second_moments(model, optimizer, tmp_path))
    assert found.keys() == set(Checkpoint(tmp_path).names())
    live = adam_state(model, optimizer)
    fused = live["model.layers.0.mlp.experts.gate_up_proj"]
    for i in range(3):
        expert = f"model.layers.0.block_sparse_moe.experts.{i}"
        assert torch.equal(torch.cat([found[f"{expert}.w1.weight"], found[f"{expert}.w3.weight"]]), fused[i])
        assert torch.equal(found[f"{expert}.w2.weight"], live["model.layers.0.mlp.experts.down_proj"][i])


def test_names_that_the_weights_beside_it_do_not_have_are_refused(tmp_path: Path) -> None:
    model = model_of()
    model.save_pretrained(tmp_path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer)
    with pytest.raises(MomentsError, match=r"holds weights without the names of 20 trained parameters, such as other\."):
        save_second_moments(model, optimizer, tmp_path, convert=lambda read: {f"other.{name}": v for name, v in read.items()})
    assert not list(tmp_path.glob("*exp_avg_sq*"))


def test_what_cannot_be_kept_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)

    def refused(optimizer: Any, model: nn.Module = model) -> str:
        loss = model(torch.ones(2, 4)).sum()
        loss.backward()
        optimizer.step()
        with pytest.raises(MomentsError) as caught:
            save_second_moments(model, optimizer, tmp_path / "out")
        assert not list(tmp_path.glob("out/*"))
        return str(caught.value)

    with pytest.raises(MomentsError, match="AdamW: it keeps no second moments yet; save them after the first step"):
        save_second_moments(model, torch.optim.AdamW(model.parameters()), tmp_path / "out")
    assert "SGD: it keeps no second moments yet" in refused(torch.optim.SGD(model.parameters()))
    assert "Adagrad keeps a sum over all steps" in refused(torch.optim.Adagrad(model.parameters()))
    adapter = nn.Sequential()
    adapter.add_module("lora_A", nn.Linear(4, 3))
    outer = nn.Sequential()
    outer.add_module("q", adapter)
    assert "from v of A and B does not follow v of the weights" in refused(torch.optim.AdamW(outer.parameters()), outer)


def test_bad_values_and_options(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    path = save_second_moments(model, optimizer, tmp_path)
    before = path.read_bytes()
    optimizer.state[model.weight]["exp_avg_sq"][1, 2] = float("nan")
    for method in ("none", "rank1"):
        with pytest.raises(MomentsError, match="v of weight holds a negative, NaN or infinite entry"):
            save_second_moments(model, optimizer, tmp_path, method=method)  # type: ignore[arg-type]
        assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path], "the earlier save stays"
    optimizer.state[model.weight]["exp_avg_sq"] = torch.zeros(2, 4)
    with pytest.raises(MomentsError, match=r"v of weight has the shape \[2, 4\], the parameter \[3, 4\].+GaLore"):
        save_second_moments(model, optimizer, tmp_path)
    with pytest.raises(MomentsError, match="method: got 'log8'"):
        save_second_moments(model, optimizer, tmp_path, method="log8")  # type: ignore[arg-type]
    with pytest.raises(MomentsError, match="base_model: expert"):
        save_second_moments(model, optimizer, tmp_path, capability="math")
