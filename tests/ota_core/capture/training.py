"""Trainings in several processes whose second moments are captured, and what the live optimizer held, by another road.

Run by ``test_capture_many.py`` as ``python -m tests.ota_core.capture.training KIND FOLDER METHOD``, once for each process, with the variables of torchrun.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from ota_core.capture import save_second_moments

Tensors = dict[str, torch.Tensor]


def model_of(seed: int = 0, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    options = {"tie_word_embeddings": True, "hidden_size": 16, "intermediate_size": 36, "vocab_size": 101} | changes
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, **options))


def train(model: Any, optimizer: Any, *, steps: int = 3, backward: Any = None, step: Any = None) -> None:
    """A few steps on numbers that differ between the processes."""
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    generator = torch.Generator().manual_seed(100 + rank)
    for _ in range(steps):
        tokens = torch.randint(0, 100, (2, 8), generator=generator)
        loss = model(input_ids=tokens, labels=tokens).loss
        (backward or (lambda loss: loss.backward()))(loss)
        (step or optimizer.step)()
        if optimizer is not None:
            optimizer.zero_grad()


def by_torch(model: nn.Module, optimizer: Any) -> Tensors:
    """v by torch's own gathering of whole optimizer states."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    found: Mapping[str, Any] = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return {name: state["exp_avg_sq"] for name, state in found.get("state", {}).items()}


def by_partitions(model: nn.Module, optimizer: Any, stage: int) -> Tensors:
    """v by joining what each process of DeepSpeed holds: flat groups (ZeRO 1, 2) or a part of every parameter (ZeRO 3)."""
    names = {id(p): name for name, p in model.named_parameters()}

    def joined(part: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(part) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    if stage == 3:
        local = optimizer.get_local_fp32_param
        return {
            name: joined(local(p, "exp_avg_sq"))[: p.ds_numel].reshape(p.ds_shape)
            for name, p in model.named_parameters()
            if local
        }
    found: Tensors = {}
    for group, flat in zip(optimizer.round_robin_bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        whole, at = joined(optimizer.optimizer.state[flat]["exp_avg_sq"]), 0
        for p in group:
            found[names[id(p)]] = whole[at : at + p.numel()].reshape(p.shape).clone()
            at += p.numel()
    return found


def ddp(folder: Path, method: Any) -> Tensors:
    wrapped = nn.parallel.DistributedDataParallel(model_of())
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
    train(wrapped, optimizer)
    save_second_moments(wrapped, optimizer, folder, method=method)
    return {name: optimizer.state[p]["exp_avg_sq"] for name, p in wrapped.module.named_parameters()}


def fsdp1(folder: Path, method: Any) -> Tensors:
    """torch's own wrapper: accelerate gives it a device's number, which a CPU has not."""
    from functools import partial

    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    policy = partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    model = FullyShardedDataParallel(model_of(), auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer)
    save_second_moments(model, optimizer, folder, method=method)
    return by_torch(model, optimizer)


def fsdp2(folder: Path, method: Any) -> Tensors:
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
    )
    accelerator = Accelerator(cpu=True)
    # accelerate chooses FSDP on accelerators alone; everything after this choice runs on a CPU as well.
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    model = model_of()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    train(model, optimizer, backward=accelerator.backward)
    save_second_moments(model, optimizer, folder, method=method)
    return by_torch(model, optimizer.optimizer)


def zero(folder: Path, method: Any, stage: int) -> Tensors:
    import deepspeed

    model = model_of().to(torch.bfloat16)
    config = {
        "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}, "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    engine, optimizer, _, _ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    train(engine, None, backward=engine.backward, step=engine.step)
    save_second_moments(engine, optimizer, folder, method=method)
    return by_partitions(engine.module, optimizer, stage)


def zero1(folder: Path, method: Any) -> Tensors:
    return zero(folder, method, 1)


def zero2(folder: Path, method: Any) -> Tensors:
    return zero(folder, method, 2)


def zero3(folder: Path, method: Any) -> Tensors:
    return zero(folder, method, 3)


KINDS = {one.__name__: one for one in (ddp, fsdp1, fsdp2, zero1, zero2, zero3)}


def main() -> None:
    kind, folder, method = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    if not kind.startswith("zero"):
        distributed.init_process_group("gloo")
    held = KINDS[kind](folder, method)
    if int(os.environ["RANK"]) == 0:
        torch.save({name: v.float().cpu() for name, v in held.items()}, folder / "live.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
