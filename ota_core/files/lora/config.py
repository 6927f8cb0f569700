"""``adapter_config.json`` of PEFT: what of it decides the edit, and what cannot be an edit of weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from ota_core.errors import CheckpointError, raise_all
from ota_core.files.checkpoint import ADAPTER_CONFIG, read_json
from ota_core.files.lora.patterns import Patterns, pattern_problem
from ota_core.reading import MAX_ROWS, quoted

# Variants whose result depends on the input, or whose base is not the one that the adapter names.
_REFUSED = {
    "alora_invocation_tokens": "is an activated LoRA, which works from its invocation tokens on and has no merged weights",
    "arrow_config": "is a router of adapters (Arrow), whose result depends on the input",
    "use_bdlora": "has block-diagonal factors (BD-LoRA), which are not read here",
    "use_qalora": "is a QA-LoRA, whose groups belong to a quantised base",
    "velora_config": "is a VeLoRA, whose activations are compressed",
    "monteclora_config": "is a MonteCLoRA, which draws its weights at random",
    "kasa_config": "is a KaSA, whose base lacks its last singular values",
    "layer_replication": "repeats layers of its base (layer_replication); build that model first, with merge_method: passthrough and "
    "slices, and name it as the base",
}
# Ways of beginning that take a part out of the base's weights: the adapter is an edit of what is left.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
WAY_OUT = "correct it, or merge the adapter into its base with PEFT (merge_and_unload) and name the merged model"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What an adapter's configuration says of its edit."""

    folder: Path
    rank: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    fan_in_fan_out: bool = False
    ranks: Patterns[int]
    """``rank_pattern``: modules of another rank."""
    alphas: Patterns[float]
    target_parameters: tuple[str, ...] = ()
    token_indices: Mapping[str, tuple[int, ...]] | tuple[int, ...] = ()
    """Rows of the embedding that were trained, or the same by module."""
    base: str | None = None
    """``base_model_name_or_path``: what it was trained on."""

    def rank_of(self, module: str) -> int:
        """The rank that the configuration gives a module, or a parameter of ``target_parameters``."""
        return self.ranks.of(module, self.rank)

    def scale_of(self, module: str) -> float:
        """α / r, with rsLoRA α / √r (Kalajdzievski 2023, arXiv 2312.03732)."""
        rank = self.rank_of(module)
        return self.alphas.of(module, self.alpha) / (sqrt(rank) if self.rslora else rank)

    def tokens_of(self, module: str) -> tuple[int, ...] | None:
        """The trained rows of an embedding."""
        if not isinstance(self.token_indices, Mapping):
            return self.token_indices or None
        return next((rows for key, rows in self.token_indices.items() if module == key or module.endswith("." + key)), None)


def read_config(folder: Path) -> AdapterConfig:
    """The adapter's configuration. Raises CheckpointError for what is no LoRA, or no edit of weights, all problems at once."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds the weights of an adapter and no {ADAPTER_CONFIG}, which says its kind, rank and alpha; copy it there"
        )
    said = read_json(path)
    kind = str(said.get("peft_type", "nothing")).upper()
    if kind != "LORA":
        raise CheckpointError(
            f"{path}: the adapter is of the type {kind}, and only LORA can be read. Merge it into its base with PEFT "
            "(merge_and_unload, where the type has it), save the model, and name that"
        )
    problems = [f"{path}: the adapter {why}" for key, why in _REFUSED.items() if said.get(key)]
    begun = str(said.get("init_lora_weights", "")).lower()
    if begun.startswith(_CHANGES_BASE):
        problems.append(
            f"{path}: the adapter began as {begun}, which changes the base's weights, so that it is no edit of the base as published. "
            "Save it with PEFT's path_initial_model_for_weight_conversion, or merge it with PEFT and name the merged model"
        )
    rank, alpha = said.get("r"), said.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank < MAX_ROWS:
        problems.append(f"{path} of a LoRA adapter: r is {quoted(rank)}, expected a whole number of at least 1; {WAY_OUT}")
    if not _is_number(alpha):
        problems.append(f"{path} of a LoRA adapter: lora_alpha is {quoted(alpha)}, expected a number; {WAY_OUT}")
    for key in ("rank_pattern", "alpha_pattern"):
        problems += _pattern_problems(path, key, said.get(key))
    tokens = said.get("trainable_token_indices") or ()
    if not all(map(_are_rows, tokens.values() if isinstance(tokens, dict) else [tokens])):
        problems.append(f"{path}: trainable_token_indices is {quoted(tokens)}, expected rows of the embedding; {WAY_OUT}")
    named, base = said.get("target_parameters") or (), said.get("base_model_name_or_path")
    if not isinstance(named, list | tuple) or not all(isinstance(one, str) for one in named):
        problems.append(f"{path}: target_parameters is {quoted(named)}, expected names of parameters; {WAY_OUT}")
    if base is not None and not isinstance(base, str):
        problems.append(f"{path}: base_model_name_or_path is {quoted(base)}, expected the model's name; {WAY_OUT}")
    raise_all(problems, CheckpointError)
    return AdapterConfig(
        folder=folder, rank=int(said["r"]), alpha=float(said["lora_alpha"]), rslora=bool(said.get("use_rslora")),
        dora=bool(said.get("use_dora")), fan_in_fan_out=bool(said.get("fan_in_fan_out")),
        ranks=Patterns(path, "rank_pattern", said.get("rank_pattern") or {}),
        alphas=Patterns(path, "alpha_pattern", said.get("alpha_pattern") or {}), target_parameters=tuple(named),
        token_indices={key: tuple(rows) for key, rows in tokens.items()} if isinstance(tokens, dict) else tuple(tokens),
        base=base or None,
    )  # fmt: skip


def _are_rows(given: Any) -> bool:
    return isinstance(given, list | tuple) and all(type(row) is int and 0 <= row < MAX_ROWS for row in given)


def _is_number(given: Any) -> bool:
    return isinstance(given, int | float) and not isinstance(given, bool) and abs(given) <= 2**53


def _pattern_problems(path: Path, key: str, given: Any) -> list[str]:
    if not given:
        return []
    if not isinstance(given, dict):
        return [f"{path}: {key} is {quoted(given, 80)}, expected modules with a number of each"]
    found = []
    for pattern, value in given.items():
        if not _is_number(value) or (key == "rank_pattern" and not (type(value) is int and 1 <= value < MAX_ROWS)):
            found.append(f"{path}: {key} gives {quoted(pattern, 80)} the value {quoted(value, 80)}, expected a number")
        if problem := pattern_problem(pattern):
            found.append(f"{path}: {key}: {quoted(pattern, 80)} {problem}; {WAY_OUT}")
    return found
