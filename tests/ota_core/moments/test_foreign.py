"""Trainers with layouts of their own. None of them runs here: what is tested is the arithmetic that their public sources state."""

import argparse
import fractions
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from ota_core.errors import MomentsError
from ota_core.moments import ParameterLayout, find_moments, moments_files, open_moments
from ota_core.moments.foreign.model import halves_of_pairs
from tests.ota_core.moments.sharded_fixture import assert_same

HEADS, GROUPS, WIDTH, HIDDEN, FEED, TOKENS, LAYERS = 4, 2, 6, 10, 7, 13, 2
CONFIG = {
    "model_type": "llama", "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": WIDTH, "hidden_size": HIDDEN,
    "vocab_size": TOKENS, "tie_word_embeddings": False,
}  # fmt: skip
ATTENTION = {
    "q": (HEADS * WIDTH, HIDDEN),
    "k": (GROUPS * WIDTH, HIDDEN),
    "v": (GROUPS * WIDTH, HIDDEN),
    "o": (HIDDEN, HEADS * WIDTH),
}
MLP = {"gate": (FEED, HIDDEN), "up": (FEED, HIDDEN), "down": (HIDDEN, FEED)}


def layout(**changes: object) -> ParameterLayout:
    return ParameterLayout(shapes={}, decayed=frozenset(), config=CONFIG | changes)


def hugging_face(seed: int = 0) -> dict[str, torch.Tensor]:
    """v of a Llama under the names of Hugging Face."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (TOKENS, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (TOKENS, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{key}_proj.weight": shape for key, shape in ATTENTION.items()}
        shapes |= {f"{prefix}mlp.{key}_proj.weight": shape for key, shape in MLP.items()}
        shapes |= {f"{prefix}{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


def meta_rows(v: torch.Tensor, heads: int) -> torch.Tensor:
    """From Hugging Face's order of rows to Meta's."""
    return v.view(heads, 2, WIDTH // 2, -1).transpose(1, 2).reshape(v.shape)


def save(folder: Path, v: dict[str, torch.Tensor], top: str = "optimizer") -> Path:
    state = {name: {"exp_avg_sq": tensor, "step": torch.tensor(5.0)} for name, tensor in v.items()}
    groups = {name: {"betas": (0.9, 0.95)} for name in v}
    dcp.save({top: {"state": state, "param_groups": groups}}, checkpoint_id=folder, no_dist=True)
    return folder


META = {
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output",
}  # fmt: skip
TUNE = {
    **{f"self_attn.{key}_proj": f"attn.{key}_proj" for key in "qkv"}, "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1", "mlp.down_proj": "mlp.w2", "mlp.up_proj": "mlp.w3", "input_layernorm": "sa_norm", "post_attention_layernorm": "mlp_norm",
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output",
}  # fmt: skip


def renamed(
    v: dict[str, torch.Tensor], table: dict[str, str], layer: str = "layers", *, turn: bool = True
) -> dict[str, torch.Tensor]:
    """v as a trainer names it, queries and keys in Meta's order where it has that."""
    result = {}
    for name, tensor in v.items():
        part = name.removesuffix(".weight")
        prefix = ""
        if part.startswith("model.layers."):
            _, _, number, part = part.split(".", 3)
            prefix = f"{layer}.{number}."
        heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": GROUPS}.get(part)
        result[f"{prefix}{table[part]}.weight"] = meta_rows(tensor, heads) if heads and turn else tensor
    return result


def rotate_pairs(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """RoPE of Llama's own code: elements 2i and 2i + 1 turn together."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), -1).flatten(-2)


def rotate_halves(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """RoPE of Hugging Face: elements i and i + width / 2 turn together."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), -1)


def test_the_order_of_rows_is_that_of_the_same_attention():
    torch.manual_seed(0)
    meta_q, meta_k, x = torch.rand(HEADS * WIDTH, HIDDEN), torch.rand(HEADS * WIDTH, HIDDEN), torch.rand(3, HIDDEN)
    rows = torch.from_numpy(halves_of_pairs(HEADS, WIDTH))
    angles = torch.arange(3.0)[:, None, None] * torch.rand(WIDTH // 2)
    scores = []
    for q, k, rotate in ((meta_q, meta_k, rotate_pairs), (meta_q[rows], meta_k[rows], rotate_halves)):
        queries, keys = (rotate((x @ w.T).view(3, HEADS, WIDTH), angles) for w in (q, k))
        scores.append(torch.einsum("ihd,jhd->hij", queries, keys))
    torch.testing.assert_close(scores[0], scores[1])
    assert not torch.allclose(
        scores[0],
        torch.einsum("ihd,jhd->hij", *(rotate_halves((x @ w.T).view(3, HEADS, WIDTH), angles) for w in (meta_q, meta_k))),
    )


@pytest.mark.parametrize("inner", ["", "qkv_linear."])
def test_torchtitan_s_llama(tmp_path, inner):
    v = hugging_face()
    own = {
        name.replace("attention.w", f"attention.{inner}w") if ".wo." not in name else name: x
        for name, x in renamed(v, META).items()
    }
    folder = save(tmp_path / "step-10", own)
    assert find_moments(tmp_path) == folder
    moments = open_moments(tmp_path, layout=layout())
    assert_same(moments, v)
    assert moments.beta2 == 0.95 and moments.step("lm_head.weight") == 5


def test_torchtitan_in_bfloat16_and_tied(tmp_path):
    v = {name: tensor.bfloat16() for name, tensor in hugging_face().items()}
    save(tmp_path / "step-10", renamed(v, META))
    del v["lm_head.weight"]
    assert_same(open_moments(tmp_path, layout=layout(tie_word_embeddings=True)), v)


def test_torchtitan_s_qwen3_is_not_turned(tmp_path):
    v = hugging_face()
    save(tmp_path / "step-10", renamed(v, META | {"lm_head": "lm_head"}, turn=False))
    assert_same(open_moments(tmp_path, layout=layout(model_type="qwen3")), v)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_torchtitan_s_fused_attention(tmp_path, kind):
    v = hugging_face()
    own = renamed(v, META, turn=kind == "llama")
    for layer in range(LAYERS):
        q, k, w = (own.pop(f"layers.{layer}.attention.w{key}.weight").view(GROUPS, -1, WIDTH, HIDDEN) for key in "qkv")
        own[f"layers.{layer}.attention.qkv_linear.wqkv.weight"] = torch.cat([q, k, w], 1).reshape(-1, HIDDEN)
    save(tmp_path / "step-10", own)
    assert_same(open_moments(tmp_path, layout=layout(model_type=kind)), v)


def test_torchtitan_s_experts(tmp_path):
    v = hugging_face()
    own = renamed(v, META, turn=False)
    stack = {
        f"w{number}": torch.rand(3, *shape) for number, shape in ((1, (FEED, HIDDEN)), (2, (HIDDEN, FEED)), (3, (FEED, HIDDEN)))
    }
    for layer in range(LAYERS):
        for key in ("gate", "up", "down"):
            del v[f"model.layers.{layer}.mlp.{key}_proj.weight"]
        for number in (1, 2, 3):
            del own[f"layers.{layer}.feed_forward.w{number}.weight"]
            own[f"layers.{layer}.moe.experts.w{number}"] = stack[f"w{number}"] + layer
            name = {1: "gate", 2: "down", 3: "up"}[number]
            v |= {f"model.layers.{layer}.mlp.experts.{e}.{name}_proj.weight": stack[f"w{number}"][e] + layer for e in range(3)}
    save(tmp_path / "step-10", own)
    assert_same(open_moments(tmp_path, layout=layout(model_type="qwen3_moe")), v)


@pytest.mark.parametrize("kind", ["llama", "olmo2"])
def test_olmo_core(tmp_path, kind):
    table = {
        **{f"self_attn.{key}_proj": f"attention.w_{key}" for key in "qkv"}, "self_attn.o_proj": "attention.w_out",
        "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "feed_forward_norm",
        "model.embed_tokens": "embeddings", "model.norm": "lm_head.norm", "lm_head": "lm_head.w_out",
    }  # fmt: skip
    v = hugging_face()
    folder = save(tmp_path / "step100" / "model_and_optim", renamed(v, table, "blocks", turn=False), top="optim")
    if kind == "olmo2":
        v = {
            name.replace("post_attention_layernorm", "post_feedforward_layernorm").replace(
                "input_layernorm", "post_attention_layernorm"
            ): x
            for name, x in v.items()
        }
    assert find_moments(tmp_path / "step100") == folder
    assert_same(open_moments(tmp_path / "step100", layout=layout(model_type=kind)), v)


def tune_state(v: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("norm.weight", "norm.scale"): x for name, x in renamed(v, TUNE).items()}


def test_torchtune(tmp_path):
    v = hugging_face()
    state = {name: {"exp_avg_sq": x, "step": torch.tensor(5.0)} for name, x in tune_state(v).items()}
    path = tmp_path / "recipe_state" / "recipe_state.pt"
    path.parent.mkdir()
    groups = [{"betas": (0.9, 0.95), "params": list(state)}]
    torch.save({"optimizer": {"state": state, "param_groups": groups}, "epochs_run": 1}, path)
    assert find_moments(tmp_path) == path
    moments = open_moments(tmp_path, layout=layout())
    assert_same(moments, v)
    assert moments.beta2 == 0.95 and moments.step("lm_head.weight") == 5
    torch.save({"optimizer": {"state": dict(enumerate(state.values())), "param_groups": groups}}, path)
    with pytest.raises(MomentsError, match="numbers its parameters in torchtune's own order"):
        open_moments(tmp_path, layout=layout())


def megatron(v: dict[str, torch.Tensor], *, padded: int = 16) -> dict[str, torch.Tensor]:
    """v as Megatron keeps it, one tensor per layer."""

    def pad(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, torch.zeros(padded - TOKENS, HIDDEN)])

    own = {
        "embedding.word_embeddings.weight": pad(v["model.embed_tokens.weight"]), "output_layer.weight": pad(v["lm_head.weight"]),
        "decoder.final_layernorm.weight": v["model.norm.weight"],
    }  # fmt: skip
    for layer in range(LAYERS):
        old, new = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        q, k, w = (v[f"{old}self_attn.{key}_proj.weight"].view(GROUPS, -1, WIDTH, HIDDEN) for key in "qkv")
        own |= {
            f"{new}self_attention.linear_qkv.weight": torch.cat([q, k, w], 1).reshape(-1, HIDDEN),
            f"{new}self_attention.linear_qkv.layer_norm_weight": v[f"{old}input_layernorm.weight"],
            f"{new}self_attention.linear_proj.weight": v[f"{old}self_attn.o_proj.weight"],
            f"{new}mlp.linear_fc1.weight": torch.cat([v[f"{old}mlp.gate_proj.weight"], v[f"{old}mlp.up_proj.weight"]]),
            f"{new}mlp.linear_fc1.layer_norm_weight": v[f"{old}post_attention_layernorm.weight"],
            f"{new}mlp.linear_fc2.weight": v[f"{old}mlp.down_proj.weight"],
        }
    return own


def save_megatron(folder: Path, own: dict[str, torch.Tensor], prefix: str = "optimizer.state.exp_avg_sq.") -> Path:
    dcp.save({f"{prefix}{name}": x for name, x in own.items()}, checkpoint_id=folder, no_dist=True)
    return folder


def stacked(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The layers of each kind in one tensor."""
    result = {name: x for name, x in own.items() if ".layers." not in name}
    for part in {name.split(".", 3)[3] for name in own if ".layers." in name}:
        result[f"decoder.layers.{part}"] = torch.stack([own[f"decoder.layers.{layer}.{part}"] for layer in range(LAYERS)])
    return result


@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_megatron(tmp_path, stack, biases):
    v, kind = hugging_face(), "llama"
    own = megatron(v)
    if biases:  # Qwen 2 has some, for queries, keys and values
        kind = "qwen2"
        for layer in range(LAYERS):
            bias = {key: torch.rand(ATTENTION[key][0]) for key in "qkv"}
            v |= {f"model.layers.{layer}.self_attn.{key}_proj.bias": x for key, x in bias.items()}
            joined = torch.cat([bias[key].view(GROUPS, -1, WIDTH) for key in "qkv"], 1).reshape(-1)
            own[f"decoder.layers.{layer}.self_attention.linear_qkv.bias"] = joined
    save_megatron(tmp_path / "iter_0000010", stacked(own) if stack else own)
    assert_same(open_moments(tmp_path, layout=layout(model_type=kind)), v)


def test_megatron_keeps_step_and_beta2_in_what_the_ranks_have_in_common(tmp_path):
    folder = save_megatron(tmp_path / "iter_0000010", megatron(hugging_face()))
    assert open_moments(folder, layout=layout()).beta2 is None, "it is not in the tensors' files"
    groups = [{"betas": (0.9, 0.95), "step": 10, "wd_mult": 1.0}, {"betas": (0.9, 0.95), "step": 10, "wd_mult": 0.0}]
    common = {
        "args": argparse.Namespace(adam_beta2=0.95, dtype=torch.bfloat16),
        "optimizer": {0: {"optimizer": {"param_groups": groups}}},
    }
    torch.save(common, folder / "common.pt")
    moments = open_moments(folder, layout=layout())
    assert moments.beta2 == 0.95 and {moments.step(name) for name in moments.shapes()} == {10}
    assert moments_files(folder)[-1] == folder / "common.pt"
    groups[1]["step"] = 11
    torch.save(common, folder / "common.pt")
    assert "different steps ([10, 11])" in refused(folder, layout())
    torch.save({"optimizer": fractions.Fraction(1, 3)}, folder / "common.pt")
    assert "fractions.Fraction" in refused(folder, layout()) and "refused because loading it could run code" in refused(
        folder, layout()
    )


def refused(folder: Path, changed: ParameterLayout | None) -> str:
    with pytest.raises(MomentsError) as caught:
        open_moments(folder, layout=changed)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_megatron_s_buckets_and_flat_states_are_refused(tmp_path):
    buckets = save_megatron(
        tmp_path / "buckets", {"exp_avg_sq": torch.rand(100)}, "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.bucket_idx_0."
    )
    said = refused(buckets, layout())
    assert "dp_reshardable" in said and "only the running program knows where each begins" in said
    flat = {name: x.reshape(1, 1, -1) if x.dim() == 2 else x for name, x in megatron(hugging_face()).items()}
    assert "as the formats fully_sharded_model_space" in refused(save_megatron(tmp_path / "flat", flat), layout())


def test_what_is_missing_or_does_not_fit(tmp_path):
    folder = save(tmp_path / "step-10", renamed(hugging_face(), META))
    assert "put the config.json of the Hugging Face model beside the weights" in refused(folder, None)
    assert "of the kind 'gemma3'; how its rows lie is known for llama" in refused(folder, layout(model_type="gemma3"))
    assert "does not fit the heads and the width of a head" in refused(folder, layout(num_attention_heads=2, head_dim=WIDTH))
    other = save(tmp_path / "other", renamed(hugging_face(), META) | {"layers.0.attention.sinks": torch.rand(3)})
    assert "1 names that are not known, such as 'layers.0.attention.sinks'" in refused(other, layout())
    mega = save_megatron(tmp_path / "mega", megatron(hugging_face()))
    assert "does not fit the heads" in refused(mega, layout(num_attention_heads=2))
    assert "has 16 rows, the configuration says 20 tokens" in refused(mega, layout(vocab_size=20))


def test_rows_that_are_turned_are_checked(tmp_path):
    v = renamed(hugging_face(), META)
    v["layers.1.attention.wq.weight"][3, 2] = -1
    moments = open_moments(save(tmp_path / "step-10", v), layout=layout())
    place = int(np.flatnonzero(halves_of_pairs(HEADS, WIDTH) == 3)[0])
    with pytest.raises(MomentsError, match=rf"'model\.layers\.1\.self_attn\.q_proj\.weight' is -1\.0 at index \[{place}, 2\]"):
        moments.read("model.layers.1.self_attn.q_proj.weight", 0, HEADS * WIDTH)
