"""Second moments of many classes of models, from an optimizer's numbers to the checkpoint's names: held against transformers itself."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ota_core.compute.blocks import matrix_shape
from ota_core.errors import CheckpointError, MomentsError
from ota_core.files.checkpoint import Checkpoint
from ota_core.moments import Moments
from tasks.merging.architecture import expert_moments
from tests.tasks.merging.tiny_architectures import MODELS

V = dict[str, torch.Tensor]
Groups = Callable[[Any], list[list[str]]]


def trainers_groups(model: Any) -> list[list[str]]:
    from transformers import Trainer

    class Rule(Trainer):
        def __init__(self) -> None: ...

    decayed = set(Rule().get_decay_parameter_names(model))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [[name for name in names if name in decayed], [name for name in names if name not in decayed]]


def train(
    model: Any, folder: Path, groups: list[list[str]] | None = None, decay: tuple[float, ...] = (0.1, 0.0), lr: float = 1e-2
) -> V:
    """A few steps of AdamW on random gradients; the checkpoint and the optimizer beside it. Returns the live v by the model's names."""
    generator = torch.Generator().manual_seed(1)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = groups or trainers_groups(model)
    optimizer = torch.optim.AdamW(
        [{"params": [named[n] for n in group], "weight_decay": wd} for group, wd in zip(groups, decay, strict=False)], lr=lr, betas=(0.9, 0.98)
    )  # fmt: skip
    for _ in range(2):
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return {name: optimizer.state[parameter]["exp_avg_sq"] for name, parameter in named.items()}


def read(moments: Moments, rows: int) -> V:
    """Every v, read in blocks of so many rows."""
    found = {}
    for name, shape in moments.shapes().items():
        count = matrix_shape(shape)[0]
        blocks = [moments.read(name, a, min(a + rows, count)) for a in range(0, count, rows)]
        found[name] = torch.from_numpy(np.concatenate(blocks).reshape(shape))
    return found


def as_saved(model: Any, v: V) -> V:
    """v under the checkpoint's names, by transformers' own conversion of whole tensors."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(v)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_v_bears_the_name_of_its_tensor(tmp_path, kind, dtype):
    model = MODELS[kind]().to(dtype)
    expected = as_saved(model, train(model, tmp_path))
    for rows in (1, 3, 1000):
        with closing(expert_moments(tmp_path / "optimizer.pt", tmp_path)) as moments:
            found = read(moments, rows)
            assert moments.beta2 == 0.98
            assert {moments.step(name) for name in found} == {2}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name].float()) for name in found)
    with closing(Checkpoint(tmp_path)) as checkpoint:
        assert {name: tuple(v.shape) for name, v in found.items()} == {n: checkpoint.info(n).shape for n in found}


def test_experts_of_a_stack_lie_where_they_did(tmp_path):
    """The same without transformers: gate and up are halves of a stack, in the order of the experts."""
    v = train(MODELS["mixtral"](), tmp_path)
    found = read(expert_moments(tmp_path / "optimizer.pt", tmp_path), 4)
    stack, down = v["model.layers.1.mlp.experts.gate_up_proj"], v["model.layers.1.mlp.experts.down_proj"]
    for i in range(4):
        name = f"model.layers.1.block_sparse_moe.experts.{i}"
        assert torch.equal(found[f"{name}.w1.weight"], stack[i, :12])
        assert torch.equal(found[f"{name}.w3.weight"], stack[i, 12:])
        assert torch.equal(found[f"{name}.w2.weight"], down[i])


def test_reading_an_expert_touches_its_rows_alone(tmp_path):
    from ota_core.moments.converted import ConvertedMoments

    train(MODELS["mixtral"](), tmp_path)
    moments = expert_moments(tmp_path / "optimizer.pt", tmp_path)
    assert isinstance(moments, ConvertedMoments)
    asked = []
    inner = moments._moments
    original = inner.read
    inner.read = lambda name, a, b, **more: (asked.append((name, a, b)), original(name, a, b, **more))[1]
    moments.read("model.layers.0.block_sparse_moe.experts.2.w3.weight", 1, 3)
    assert asked == [("model.layers.0.mlp.experts.gate_up_proj", 2 * 24 + 12 + 1, 2 * 24 + 12 + 3)]


# How other trainers group parameters: what each takes out of the first group.
def split(model: Any, plain: Callable[[str, Any], bool]) -> list[list[str]]:
    names = dict(model.named_parameters())
    return [[n for n in names if not plain(n, names[n])], [n for n in names if plain(n, names[n])]]


def bias_and_layer_norm(model: Any) -> list[list[str]]:
    return split(model, lambda name, _: any(word in name for word in ("bias", "LayerNorm.weight")))


def by_dimensions(model: Any) -> list[list[str]]:
    return split(model, lambda _, parameter: parameter.dim() < 2)


def plain_first(model: Any) -> list[list[str]]:
    return by_dimensions(model)[::-1]


def all_in_one(model: Any) -> list[list[str]]:
    return [[name for name, _ in model.named_parameters()]]


def before_4_47(model: Any, kinds: tuple[str, ...] = ("LayerNorm", "RMSNorm")) -> list[list[str]]:
    norms = [name for name, module in model.named_modules() if type(module).__name__.endswith(kinds)]
    return split(model, lambda name, _: "bias" in name or name.rpartition(".")[0] in norms)


def layer_norm_alone(model: Any) -> list[list[str]]:
    return before_4_47(model, ("LayerNorm",))


GROUPS: dict[str, tuple[Groups, tuple[float, ...]]] = {
    "accelerate": (bias_and_layer_norm, (0.1, 0.0)), "dimensions": (by_dimensions, (0.1, 0.0)), "plain_first": (plain_first, (0.0, 0.1)),
    "without_decay": (plain_first, (0.0, 0.0)), "one": (all_in_one, (0.1,)), "earlier": (before_4_47, (0.1, 0.0)),
    "earlier_without_rms": (layer_norm_alone, (0.1, 0.0)),
}  # fmt: skip


@pytest.mark.parametrize("grouping", GROUPS)
@pytest.mark.parametrize("kind", ["llama", "tied", "bert", "mixtral", "qwen2_5_vl"])
def test_groups_of_other_trainers(tmp_path, kind, grouping):
    model = MODELS[kind]()
    make, decay = GROUPS[grouping]
    expected = as_saved(model, train(model, tmp_path, make(model), decay))
    found = read(expert_moments(tmp_path / "optimizer.pt", tmp_path), 100)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def last_layer(name: str) -> bool:
    return "layers.1." in name or "lm_head" in name or "language_model.norm" in name


FROZEN: dict[str, Callable[[str], bool]] = {
    "all_but_the_last_layers": lambda name: not last_layer(name),
    "embeddings": lambda name: "embed_tokens" in name or "lm_head" in name,
    "one_of_two_alike": lambda name: "q_proj" not in name,
    "like_lora": lambda name: not ("q_proj" in name or "v_proj" in name) or "layers.0." in name,
    "vision": lambda name: "visual" in name or "vision" in name or "layers.0" in name,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("kind", ["llama", "tied", "mixtral", "qwen2_5_vl"])
def test_the_base_says_what_was_trained(tmp_path, kind, frozen, dtype):
    model = MODELS[kind]().to(dtype)
    model.save_pretrained(tmp_path / "base")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not FROZEN[frozen](name))
    expected = as_saved(model, train(model, tmp_path / "expert"))
    folder = tmp_path / "expert"
    found = read(expert_moments(folder / "optimizer.pt", folder, tmp_path / "base"), 100)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].float()) for name in found)


def test_the_base_may_have_another_type(tmp_path):
    model = MODELS["llama"]().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    model = model.float()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("gate_proj" in name)  # up_proj beside it has the same shape
    folder = tmp_path / "expert"
    expected = train(model, folder)
    with pytest.raises(MomentsError, match=r"may be .* or .*name the base model \(--base, or base_model"):
        expert_moments(folder / "optimizer.pt", folder)
    found = read(expert_moments(folder / "optimizer.pt", folder, lambda: tmp_path / "base"), 100)
    assert all(torch.equal(found[name], expected[name]) for name in expected) and found.keys() == expected.keys()


def test_trained_parameters_that_did_not_move_leave_it_unclear(tmp_path):
    """With a rate below the precision of bfloat16 weights stay as they were, and then the base cannot tell either."""
    model = MODELS["llama"]().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("gate_proj" in name)
    train(model, tmp_path / "expert", lr=1e-12)
    with pytest.raises(MomentsError, match=r"may be .* or .*; the weights of the base leave more than one way, too"):
        expert_moments(tmp_path / "expert" / "optimizer.pt", tmp_path / "expert", tmp_path / "base")


def test_another_models_base_contradicts_the_optimizer(tmp_path):
    model = MODELS["llama"]()
    torch.manual_seed(7)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "base")
    model = MODELS["llama"]()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("gate_proj" in name)
    train(model, tmp_path / "expert")
    with pytest.raises(MomentsError, match=r"with every parameter that differs from the base's among them"):
        expert_moments(tmp_path / "expert" / "optimizer.pt", tmp_path / "expert", tmp_path / "base")


PREFIXES = ("_orig_mod.", "module.", "base_model.model.", "_fsdp_wrapped_module.", "module._orig_mod.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_prefixes_of_wrappers_are_undone(tmp_path, kind, prefix):
    from safetensors.torch import load_file, save_file

    model = MODELS[kind]()
    live = train(model, tmp_path)
    expected = as_saved(model, live)
    (tmp_path / "optimizer.pt").unlink()
    weights = load_file(tmp_path / "model.safetensors")
    save_file({prefix + name: tensor for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    save_file({prefix + name: tensor for name, tensor in live.items()}, tmp_path / "exp_avg_sq.safetensors")
    with closing(Checkpoint(tmp_path)) as checkpoint:
        assert set(checkpoint.names()) == weights.keys()
        assert all(
            torch.equal(
                checkpoint.read_rows(n, 0, 3).tensor().reshape(-1),
                weights[n].reshape(-1, weights[n].shape[-1] if weights[n].dim() > 1 else 1)[:3].reshape(-1),
            )
            for n in weights
        )
    found = read(expert_moments(tmp_path / "exp_avg_sq.safetensors", tmp_path), 100)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_names_that_match_nothing_are_an_error(tmp_path):
    from safetensors.torch import save_file

    v = train(MODELS["llama"](), tmp_path)
    save_file(v | {"v_head.weight": torch.ones(2)}, tmp_path / "exp_avg_sq.safetensors")
    with pytest.raises(MomentsError, match=r"1 of its 22 names are no tensors of the weights \(v_head\.weight\)"):
        expert_moments(tmp_path / "exp_avg_sq.safetensors", tmp_path)


def test_a_damaged_checkpoint_of_a_mixture_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    train(MODELS["mixtral"](), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.block_sparse_moe.experts.3.w1.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises((CheckpointError, MomentsError), match=r"experts"):
        expert_moments(tmp_path / "optimizer.pt", tmp_path)


def shrunk(config: Any, depth: int = 0) -> Any:
    """Two layers of each kind: the names of all others are like them."""
    for key in ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers", "depth"):
        if isinstance(getattr(config, key, None), int) and getattr(config, key) > 2:
            setattr(config, key, 2)
    for key in ("layer_types", "mlp_layer_types"):
        if isinstance(getattr(config, key, None), list):
            setattr(config, key, getattr(config, key)[:2])
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and depth < 3:
            shrunk(value, depth + 1)
    return config


@pytest.mark.slow
def test_every_class_that_transformers_converts(tmp_path):
    """Names and shapes of all generating classes that can be built from their default configuration, on tensors without storage."""
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.models.auto import modeling_auto as auto

    from tasks.merging.architecture import _tied
    from tasks.merging.conversion import conversion_of

    mappings = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )  # fmt: skip
    kinds: dict[str, str] = {}
    for kind, name in ((kind, name) for mapping in mappings for kind, name in mapping.items() if isinstance(name, str)):
        kinds.setdefault(name, kind)  # the class's own configuration is named first
    seen, wrong = 0, {}
    for name, kind in sorted(kinds.items()):
        try:
            with torch.device("meta"):
                model = getattr(transformers, name)._from_config(shrunk(transformers.AutoConfig.for_model(kind)))
        except Exception:
            continue
        if not get_model_conversion_mapping(model, add_legacy=False):
            continue
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        saved = revert_weight_conversion(model, {n: torch.empty(s, device="meta") for n, s in shapes.items()})
        held = {n: tuple(t.shape) for n, t in saved.items()}
        found = conversion_of(model, held, shapes, _tied(model))
        expected = {t: shapes[n] for t, n in found.own.items()} | {t: one.shape for t, one in found.made.items()}
        missing = [n for n in shapes if n not in found.tensors()]
        seen += 1
        if missing or any(held[t] != shape for t, shape in expected.items()):
            wrong[name] = missing[:2]
    assert seen > 60
    # The first joins along an inner axis; of the second, transformers itself does not read one tensor under the name that it wrote.
    assert wrong.keys() <= {"InklingForConditionalGeneration", "DeepseekV4ForCausalLM"}, wrong


# The parameters of one layer in the order in which transformers 4 defined them: modeling_mixtral.py and modeling_qwen3_moe.py of 4.57.
ATTENTION = [f"self_attn.{key}_proj.weight" for key in "qkvo"]
NORMS = ["input_layernorm.weight", "post_attention_layernorm.weight"]
OLDER = {
    "mixtral": [
        *ATTENTION, "block_sparse_moe.gate.weight",
        *(f"block_sparse_moe.experts.{e}.{part}.weight" for e in range(4) for part in ("w1", "w2", "w3")), *NORMS,
    ],
    "qwen3_moe": [
        *ATTENTION, "self_attn.q_norm.weight", "self_attn.k_norm.weight", "mlp.gate.weight",
        *(f"mlp.experts.{e}.{part}_proj.weight" for e in range(4) for part in ("gate", "up", "down")), *NORMS,
    ],
}  # fmt: skip


@pytest.mark.parametrize("one_group", [False, True])
@pytest.mark.parametrize("kind", OLDER)
def test_experts_that_transformers_4_kept_apart_are_named_as_in_the_checkpoint(
    tmp_path: Path, kind: str, one_group: bool
) -> None:
    model = MODELS[kind]()
    model.save_pretrained(tmp_path)
    layers = [f"model.layers.{layer}.{part}" for layer in range(2) for part in OLDER[kind]]
    names = ["model.embed_tokens.weight", *layers, "model.norm.weight", "lm_head.weight"]
    with closing(Checkpoint(tmp_path)) as weights:
        assert set(names) == set(weights.names())
        shapes = {name: weights.info(name).shape for name in names}
    generator = torch.Generator().manual_seed(2)
    v = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    groups = [names] if one_group else [[n for n in names if "norm" not in n], [n for n in names if "norm" in n]]
    number = {name: i for i, name in enumerate(name for group in groups for name in group)}
    state = {number[name]: {"step": torch.tensor(2.0), "exp_avg_sq": own} for name, own in v.items()}
    made = [
        {"params": [number[n] for n in group], "betas": (0.9, 0.98), "weight_decay": decay}
        for group, decay in zip(groups, (0.1, 0.0), strict=False)
    ]
    torch.save({"state": state, "param_groups": made}, tmp_path / "optimizer.pt")
    with closing(expert_moments(tmp_path / "optimizer.pt", tmp_path)) as moments:
        found = read(moments, 3)
    assert found.keys() == v.keys() and all(torch.equal(found[name], own) for name, own in v.items())
