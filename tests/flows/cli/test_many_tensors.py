"""Models of thousands of small tensors: a plan is there in two seconds, and a merge takes time in proportion to their number."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tasks.local.stack.layout import ROOT

H = 8
SHAPES = {
    "self_attn.q_proj": (H, H), "self_attn.k_proj": (H // 2, H), "self_attn.v_proj": (H // 2, H), "self_attn.o_proj": (H, H),
    "mlp.gate_proj": (2 * H, H), "mlp.up_proj": (2 * H, H), "mlp.down_proj": (H, 2 * H), "input_layernorm": (H,),
    "post_attention_layernorm": (H,),
}  # fmt: skip


def write_deep_llama(folder: Path, tensors: int, seed: int) -> None:
    """A Llama without its tokenizer, of that many tensors or a few less, each of at most 128 elements; second moments beside it."""
    folder.mkdir(parents=True)
    draw, layers = np.random.default_rng(seed), (tensors - 3) // len(SHAPES)
    names = {"model.embed_tokens.weight": (32, H), "lm_head.weight": (32, H), "model.norm.weight": (H,)}
    names |= {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in SHAPES.items()}
    save_file(
        {name: draw.standard_normal(shape, dtype=np.float32) for name, shape in names.items()}, folder / "model.safetensors",
        metadata={"format": "pt"},
    )  # fmt: skip
    v = {name: (10.0 ** (-14 + 6 * draw.random(shape))).astype(np.float32) for name, shape in names.items()}
    save_file(v, folder / "exp_avg_sq.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": H, "intermediate_size": 2 * H, "vocab_size": 32,
        "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False,
        "torch_dtype": "float32", "rms_norm_eps": 1e-6,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def recipe(folder: Path, tensors: int) -> Path:
    """A recipe that merges two experts of that many tensors by curvature."""
    for seed, name in enumerate(("base", "a", "b")):
        write_deep_llama(folder / name, tensors, seed)
    file = folder / "recipe.yaml"
    said = "merge_method: ota\nbase_model: base\nmodels: [{model: a}, {model: b}]\ndtype: float32\n"
    file.write_text(said + "parameters: {density: 0.4, compression: rank1}\n")
    return file


def seconds(*arguments: object) -> float:
    """What the command takes of the processors: a machine that does other work makes it wait, and this little longer."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OTA_", "PREFECT_"))}
    command = [sys.executable, "-m", "flows.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.slow
def test_a_plan_of_ten_thousand_tensors_takes_two_seconds(tmp_path: Path) -> None:
    file = recipe(tmp_path, 10_000)
    took = min(seconds("plan", file) for _ in range(3))
    print(f"{took:.1f} s")
    assert took < 2 * 2.0, "twice what is promised, for a busy machine"


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--shard-size", "50KB")], ids=["one file", "many files"])
def test_the_time_of_a_merge_is_linear_in_the_tensors(tmp_path: Path, options: tuple[str, ...]) -> None:
    took = {}
    for tensors in (2_500, 10_000):
        file = recipe(tmp_path / str(tensors), tensors)
        took[tensors] = min(seconds("merge", file, tmp_path / f"{tensors}-{i}", *options) for i in range(3))
    print(took)
    assert took[10_000] < 8 * took[2_500], f"four times as many tensors: four times the time, not sixteen times: {took}"
