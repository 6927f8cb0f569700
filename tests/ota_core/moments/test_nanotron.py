"""nanotron's checkpoints, written by hand as its source says (nanotron/serialize, nanotron/optim/zero.py): the trainer was not run.

A model under Hugging Face's names is turned into nanotron's parameters, cut over ranks as nanotron cuts them, and saved; the reader has to
give back what went in.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ota_core.errors import MomentsError
from ota_core.moments import ParameterLayout, find_moments, moments_files, open_moments
from tests.ota_core.moments.sharded_fixture import assert_same

HEADS, GROUPS, WIDTH, HIDDEN, INNER, VOCABULARY, LAYERS = 4, 2, 6, 24, 20, 30, 2
CONFIG: dict[str, Any] = {
    "model_type": "llama", "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "hidden_size": HIDDEN, "vocab_size": VOCABULARY,
}  # fmt: skip
# How each parameter is cut by tensor parallelism: its axis, and the chunks within which it is cut.
QKV = (HEADS * WIDTH, GROUPS * WIDTH, GROUPS * WIDTH)
CUTS: dict[str, tuple[int, tuple[int, ...]]] = {
    "qkv_proj": (0, QKV), "gate_up_proj": (0, (INNER, INNER)), "o_proj": (1, (HIDDEN,)), "down_proj": (1, (INNER,)),
    "token_embedding": (0, (32,)), "lm_head": (0, (32,)),
}  # fmt: skip


def hf_model(tied: bool) -> dict[str, torch.Tensor]:
    """v of the Hugging Face model by name."""
    generator = torch.Generator().manual_seed(5)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        shapes |= {
            f"{p}self_attn.q_proj.weight": (HEADS * WIDTH, HIDDEN), f"{p}self_attn.k_proj.weight": (GROUPS * WIDTH, HIDDEN),
            f"{p}self_attn.v_proj.weight": (GROUPS * WIDTH, HIDDEN), f"{p}self_attn.o_proj.weight": (HIDDEN, HEADS * WIDTH),
            f"{p}mlp.gate_proj.weight": (INNER, HIDDEN), f"{p}mlp.up_proj.weight": (INNER, HIDDEN),
            f"{p}mlp.down_proj.weight": (HIDDEN, INNER), f"{p}input_layernorm.weight": (HIDDEN,),
            f"{p}post_attention_layernorm.weight": (HIDDEN,),
        }  # fmt: skip
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


def interleave(rows: torch.Tensor) -> torch.Tensor:
    """Hugging Face's halves of a head as neighbouring pairs, the opposite of ``_handle_attention_block`` of the conversion script."""
    return torch.cat([head.view(2, WIDTH // 2, -1).transpose(0, 1).reshape(WIDTH, -1) for head in rows.split(WIDTH)])


def to_nanotron(v: dict[str, torch.Tensor], interleaved: bool) -> dict[str, torch.Tensor]:
    padded = lambda rows: torch.cat([rows, torch.zeros(2, HIDDEN)])  # noqa: E731
    out = {
        "model.token_position_embeddings.pp_block.token_embedding.weight": padded(v["model.embed_tokens.weight"]),
        "model.final_layer_norm.pp_block.weight": v["model.norm.weight"],
    }
    if "lm_head.weight" in v:
        out["model.lm_head.pp_block.weight"] = padded(v["lm_head.weight"])
    turn = interleave if interleaved else lambda rows: rows
    for i in range(LAYERS):
        p, q = f"model.layers.{i}.", f"model.decoder.{i}.pp_block."
        qkv = [turn(v[f"{p}self_attn.q_proj.weight"]), turn(v[f"{p}self_attn.k_proj.weight"]), v[f"{p}self_attn.v_proj.weight"]]
        out[f"{q}attn.qkv_proj.weight"] = torch.cat(qkv)
        out[f"{q}attn.o_proj.weight"] = v[f"{p}self_attn.o_proj.weight"]
        out[f"{q}mlp.gate_up_proj.weight"] = torch.cat([v[f"{p}mlp.gate_proj.weight"], v[f"{p}mlp.up_proj.weight"]])
        out[f"{q}mlp.down_proj.weight"] = v[f"{p}mlp.down_proj.weight"]
        out[f"{q}input_layernorm.weight"] = v[f"{p}input_layernorm.weight"]
        out[f"{q}post_attention_layernorm.weight"] = v[f"{p}post_attention_layernorm.weight"]
    return out


def cut(name: str, whole: torch.Tensor, rank: int, ranks: int) -> tuple[torch.Tensor, str | None]:
    """A rank's part, and its slices as ``SlicesPair.tuple_to_str`` writes them; None where every rank has the whole."""
    found = next((own for part, own in CUTS.items() if part in name), None)
    if found is None:
        return whole, None
    axis, chunks = found
    pairs, parts, start, local = [], [], 0, 0
    for chunk in chunks:
        length = chunk // ranks
        first = start + rank * length
        parts.append(whole.narrow(axis, first, length))
        # numpy's numbers are written as they print: plain, and in newer versions' repr with their type.
        texts = [f"np.int64({local}),np.int64({local + length}),None", f"{first},{first + length},None"]
        if len(chunks) == 1:
            texts[0] = "None,None,None"
        pairs.append("#".join("|".join(t if i == axis else "None,None,None" for i in range(whole.ndim)) for t in texts))
        start, local = start + chunk, local + length
    return torch.cat(parts, axis).contiguous(), ";".join(pairs)


def dp_sizes(numel: int, ranks: int) -> list[tuple[int, int]]:
    """``ZeroDistributedOptimizer._partition_parameters``."""
    per = (numel - 1) // ranks + 1
    sizes = np.full(ranks, per)
    if remainder := per * ranks - numel:
        sizes[-remainder:] -= 1
    ends = np.cumsum(sizes)
    return [(int(end - size), int(end)) for size, end in zip(sizes, ends, strict=True)]


def stage_of(name: str, stages: int) -> int:
    return 0 if "token_embedding" in name or ".decoder.0." in name else stages - 1


def write(
    root: Path, v: dict[str, torch.Tensor], *, dp: int | None, tp: int, pp: int, interleaved: bool, noted: bool = True
) -> Path:
    """A checkpoint; dp: ranks that ZeRO 1 shards over, None without it."""
    parameters = to_nanotron(v, interleaved)
    (root / "optimizer").mkdir(parents=True)
    (root / "model_config.json").write_text(json.dumps({"is_llama_config": True, "rope_interleaved": interleaved}))
    offsets: dict[str, Any] = {}
    shapes: dict[str, Any] = {}
    for stage in range(pp):
        own = {n: t for n, t in parameters.items() if stage_of(n, pp) == stage}
        if "lm_head.weight" not in v and stage == pp - 1 > 0:  # the tied head keeps the embedding's state, under its name
            own["model.token_position_embeddings.pp_block.token_embedding.weight"] = parameters[
                "model.token_position_embeddings.pp_block.token_embedding.weight"
            ]
        for rank in range(tp):
            local = {}
            for name, whole in own.items():
                local[name], pairs = cut(name, whole, rank, tp)
                *modules, last = name.split(".")
                folder = root.joinpath("model", *modules)
                folder.mkdir(parents=True, exist_ok=True)
                suffix = f"_pp-rank-{stage}-of-{pp}_tp-rank-{rank}-of-{tp}" if pairs else ""
                metadata = {"version": "1.4", "local_global_slices_pairs": pairs, "unsharded_shape": str(tuple(whole.shape))}
                save_file(
                    {"data": local[name].bfloat16()}, folder / f"model_{last}{suffix}.safetensors", metadata if pairs else {}
                )
            for shard in range(dp or 1):
                state, names = {}, {}
                for name, tensor in local.items():
                    if dp:
                        places = dp_sizes(tensor.numel(), dp)
                        if stage == rank == 0 and noted:
                            offsets[name] = {str(i): [str(a), str(b)] for i, (a, b) in enumerate(places) if a < b}
                            shapes[name] = [str(n) for n in tensor.shape]
                        a, b = places[shard]
                        if a == b:
                            continue
                        tensor = tensor.reshape(-1)[a:b].clone()
                    number = len(names)
                    names[number] = name
                    state[number] = {"step": torch.tensor(9.0), "exp_avg": -tensor, "exp_avg_sq": tensor}
                group = {"params": list(names), "betas": (0.9, 0.95), "weight_decay": 0.1}
                saved = {"state": state, "param_groups": [group], "names": names, "gradient_accumulator": {"x": torch.ones(3)}}
                data = f"_dp-{shard}-of-{dp}" if dp else ""
                torch.save(saved, root / f"optimizer/optimizer_pp-{stage}-of-{pp}{data}_tp-{rank}-of-{tp}_exp-0-of-1.pt")
    configs = {"param_name_to_dp_rank_offsets": offsets, "orig_param_shapes": shapes} if dp and noted else {}
    kind = "ZeroDistributedOptimizer" if dp else "OptimizerFromGradientAccumulator"
    (root / "optimizer/optimizer_config.json").write_text(json.dumps({"type": kind, "parallelism": {}, "configs": configs}))
    return root


def layout_of(v: dict[str, torch.Tensor], **more: Any) -> ParameterLayout:
    config = CONFIG | {"tie_word_embeddings": "lm_head.weight" not in v} | more
    return ParameterLayout(shapes={n: tuple(t.shape) for n, t in v.items()}, decayed=frozenset(v), config=config)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("dp", "tp", "pp"), [(None, 1, 1), (None, 2, 1), (3, 1, 1), (7, 1, 2), (2, 2, 2)])
def test_v_is_what_went_in(tmp_path, dp, tp, pp, tied, interleaved):
    v = hf_model(tied)
    root = write(tmp_path / "10", v, dp=dp, tp=tp, pp=pp, interleaved=interleaved)
    (tmp_path / "latest.txt").write_text("10")
    assert find_moments(tmp_path) == find_moments(root) == root / "optimizer"
    moments = open_moments(tmp_path, layout=layout_of(v))
    assert_same(moments, v)
    assert {moments.step(name) for name in v} == {9} and moments.beta2 == 0.95
    files = moments_files(tmp_path)
    assert len(files) == (dp or 1) * tp * pp + 2 and root / "model_config.json" in files
    moments.close()


def test_an_older_checkpoint_without_shapes_takes_them_from_the_weights(tmp_path):
    v = hf_model(False)
    root = write(tmp_path, v, dp=2, tp=2, pp=1, interleaved=True, noted=False)
    (root / "model_config.json").write_text(json.dumps({"is_llama_config": True}))  # before rope_interleaved, which was always on
    assert_same(open_moments(root, layout=layout_of(v)), v)


def refused(root: Path, v: dict[str, torch.Tensor], **more: Any) -> str:
    with pytest.raises(MomentsError) as caught:
        open_moments(root, layout=layout_of(v, **more))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_the_files_do_not_tell_is_refused_by_name(tmp_path):
    v = hf_model(False)
    root = write(tmp_path / "a", v, dp=2, tp=2, pp=1, interleaved=False)
    assert "how its rows lie is known for llama, qwen2" in refused(root, v, model_type="gemma")
    assert "does not fit the heads and the width" in refused(root, v, num_attention_heads=2)
    (root / "model").rename(tmp_path / "model")
    assert "was cut is said by the files of its weights alone: fetch" in refused(root, v)
    (tmp_path / "model").rename(root / "model")
    (root / "model_config.json").write_text(json.dumps({"is_qwen2_config": True}))
    assert "does not say whether the rows of queries and keys are interleaved" in refused(root, v)
    (root / "model_config.json").unlink()
    assert "is missing; it says whether the rows" in refused(root, v)
    lost = root / "optimizer/optimizer_pp-0-of-1_dp-1-of-2_tp-0-of-2_exp-0-of-1.pt"
    assert "holds the part of one rank; name the folder" in refused(lost, v)
    content = lost.read_bytes()
    lost.unlink()
    assert "lacks the files of 1 ranks (pp-0 dp-1 tp-0); fetch them" in refused(root, v)
    lost.write_bytes(content[: len(content) // 2])
    assert "cannot be read" in refused(root, v)


def test_other_runs_and_experts_are_refused(tmp_path):
    v = hf_model(False)
    root = write(tmp_path / "a", v, dp=2, tp=1, pp=1, interleaved=False)
    first = root / "optimizer/optimizer_pp-0-of-1_dp-0-of-2_tp-0-of-1_exp-0-of-1.pt"
    second = first.with_name(first.name.replace("dp-0", "dp-1"))
    saved = torch.load(second, weights_only=True)
    saved["state"][2]["exp_avg_sq"] = saved["state"][2]["exp_avg_sq"][:-1].clone()
    torch.save(saved, second)
    assert "the files are of different runs" in refused(root, v)
    second.rename(second.with_name(second.name.replace("exp-0-of-1", "exp-0-of-2")))
    assert "different numbers of ranks" in refused(root, v)
    first.rename(first.with_name(first.name.replace("exp-0-of-1", "exp-0-of-2")))
    assert "of a mixture of experts that lay on 2 ranks" in refused(root, v)


def test_slices_that_leave_a_gap_are_refused(tmp_path):
    v = hf_model(False)
    root = write(tmp_path / "a", v, dp=None, tp=2, pp=1, interleaved=False)
    folder = root / "model/model/decoder/0/pp_block/attn/o_proj"
    one, two = sorted(folder.iterdir())
    two.write_bytes(one.read_bytes())
    assert "the ranks' slices do not cover the shape [24, 24], each element once" in refused(root, v)
