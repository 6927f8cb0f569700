"""Configurations of a merge's models: a difference that changes what the weights mean makes their average a wrong model."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from math import isclose
from typing import Any

from ota_core.files.architecture import ties
from ota_core.reading import quoted

# Settings that no tensor's shape shows, by transformers' names for them. Compared where both configurations say them: what a class
# does where its configuration is silent is known to transformers alone.
KEYS = frozenset({
    "model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "n_head", "num_heads", "encoder_attention_heads",
    "decoder_attention_heads", "multi_query", "linear_num_key_heads", "linear_num_value_heads", "kv_lora_rank", "qk_rope_head_dim",
    "hidden_act", "hidden_activation", "activation_function", "feed_forward_proj", "mlp_hidden_act",
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps",
    "sliding_window", "sliding_window_pattern", "max_window_layers", "layer_types", "attention_chunk_size", "no_rope_layers",
    "partial_rotary_factor", "rotary_pct", "rotary_dim", "position_embedding_type", "alibi", "relative_attention_num_buckets",
    "relative_attention_max_distance", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar",
    "attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale", "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx", "use_qk_norm", "parallel_attn", "use_parallel_residual",
    "num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor", "scoring_func", "n_group", "topk_group",
    "state_size", "time_step_rank", "time_step_limit", "residual_in_fp32", "ssm_cfg",
    "vision_feature_layer", "vision_feature_select_strategy", "spatial_merge_size", "patch_size", "image_size",
})  # fmt: skip
MADE = ("rope_theta", "rope_local_base_freq", "rope_scaling", "tie_word_embeddings")
"""Settings that versions of transformers write in different places."""
_PARTS = ("text_config", "llm_config", "language_config")
"""Parts of a configuration that are the language model's own, which other versions write at its top."""
_TOWERS = ("vision_config", "audio_config")


def config_problems(
    names: Sequence[str], configs: Sequence[Mapping[str, Any]], first: int, ignored: Collection[str]
) -> list[str]:
    """Every setting of a model that contradicts the ``first`` one's, whose configuration the output takes; but for ``ignored`` keys."""
    unknown = sorted(key for key in ignored if key.split(".")[-1] not in KEYS | {*MADE})
    problems = [
        f"ignore_config_differences: '{key}' is no setting that is compared; these are {', '.join(sorted(KEYS | {*MADE}))}"
        for key in unknown
    ]
    wanted = meaning(configs[first])
    for name, config in zip(names, configs, strict=True):
        seen = meaning(config)
        differing = [k for k in wanted if k in seen and k not in ignored and not _same(seen[k], wanted[k])]
        problems += [
            f"{name}: config.json has {key}: {_said(seen[key])}, {names[first]} has {_said(wanted[key])}, so that the same weights mean something "
            f"else; if that is known to do no harm, say --ignore-config-differences {key}, or ignore_config_differences: [{key}] in the recipe"
            for key in differing
        ]
    return problems


def meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a configuration that decide what its weights mean, under one name each, wherever its version writes them."""
    if not config:
        return {}
    flat = dict(config)
    for part in _PARTS:
        if isinstance(config.get(part), dict):
            flat |= {key: value for key, value in config[part].items() if key != "model_type"}
    found = {key: flat[key] for key in KEYS if flat.get(key) is not None}
    if "sliding_window" in flat:
        found["sliding_window"] = flat["sliding_window"] if flat.get("use_sliding_window", True) else None
    if "max_window_layers" in found and found.get("sliding_window", 0) is None:
        del found["max_window_layers"]
    for tower in _TOWERS:
        inner = config.get(tower)
        if isinstance(inner, dict):
            found |= {f"{tower}.{key}": inner[key] for key in KEYS - {"model_type"} if inner.get(key) is not None}
    found |= _rope(flat)
    if config.get("model_type") is not None or "tie_word_embeddings" in config:
        found["tie_word_embeddings"] = ties(config)
    return found


def _rope(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary embeddings: transformers 5 has ``rope_parameters``, earlier versions ``rope_theta`` beside ``rope_scaling``."""
    given = flat.get("rope_parameters")
    given = given if isinstance(given, dict) else {}
    full = given.get("full_attention")
    whole = full if isinstance(full, dict) else given
    local = given.get("sliding_attention")
    theta = whole.get("rope_theta", flat.get("rope_theta", flat.get("rotary_emb_base")))
    near = local.get("rope_theta") if isinstance(local, dict) else flat.get("rope_local_base_freq")
    old = flat.get("rope_scaling")
    scaling = whole if whole else (old if isinstance(old, dict) else {})
    found: dict[str, Any] = {}
    if theta is not None:
        found["rope_theta"] = theta
    if near is not None:
        found["rope_local_base_freq"] = near
    partial = whole.get("partial_rotary_factor", flat.get("partial_rotary_factor"))
    if partial is not None:
        found["partial_rotary_factor"] = partial
    if theta is not None or scaling:
        found["rope_scaling"] = _scaling(scaling)
    return found


def _scaling(given: Mapping[str, Any]) -> dict[str, Any]:
    """How rotary frequencies are scaled, nothing where they are not."""
    apart = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "full_attention", "sliding_attention"}
    kind = given.get("rope_type", given.get("type", "default"))
    scaling = {key: value for key, value in given.items() if key not in apart and value is not None}
    return scaling if kind in ("default", "mrope", None) else {"rope_type": kind} | scaling


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    numbers = (int, float)
    if isinstance(one, numbers) and isinstance(other, numbers):
        with suppress(OverflowError):  # an integer beyond any float
            return isclose(one, other, rel_tol=1e-5)  # an eps that went through float32
    return bool(one == other)


def _said(value: Any) -> str:
    return "none" if value is None or value == {} else quoted(value)
