"""What is wrong with a recipe, in its own words: which key, in which line, and whether another spelling works."""

import math
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from ota_core.reading import quoted
from ota_core.recipe.estimate import EstimateSettings
from ota_core.recipe.parameters import USED, MergeParameters, ModelParameters
from ota_core.recipe.slices import Module, ModuleSource, Slice, SliceSource
from ota_core.recipe.spellings import SPELLINGS
from ota_core.recipe.yaml_text import line_of, nearest

Lines = Mapping[tuple[Any, ...], int]
"""Place in a YAML file, as the keys and positions that lead to it, to its line."""

_WORDS = {
    "merge_method": "a slice has the merge_method of the recipe; what is merged otherwise goes into a document of its own (---) with a 'name', whose "
    "result this slice names as its model",
    "layer_range": "it belongs to a source of a slice: slices: [{sources: [{model: …, layer_range: [0, 8]}]}]",
    "select_topk": "write 'density'",
    "pattern": "write 'filter'",
    "revision": "write it behind the model's name: org/name@revision",
    "majority_sign_threshold": "it is not supported: signs are elected by their sum",
    "cuda": "say --device cuda on the command line",
    "out_shard_size": "say --shard-size on the command line",
    "merge_mode": "write merge_method",
    "method": "write merge_method",
    "base": "write base_model",
    "base_models": "write base_model, which is one model",
}
"""What stands in recipes of other programs."""
_METHODS = {
    "task_vector": "task_arithmetic", "average": "linear", "mean": "linear", "weighted_average": "linear", "uniform": "linear", "dare": "dare_linear",
    "dare-ties": "dare_ties", "fisher_merging": "fisher", "linear_average": "linear", "model_soup": "linear", "ranked_ties": "ties",
}  # fmt: skip
_LEVELS: dict[str, type[BaseModel]] = {"slices": Slice, "sources": SliceSource, "estimate": EstimateSettings}


def explain(
    item: dict[str, Any], root: type[BaseModel], entry: type[BaseModel], methods: tuple[str, ...], lines: Lines
) -> list[str]:
    """One pydantic problem. root: of the recipe; entry: of a model in it; lines: empty where the recipe comes from no file."""
    return [_with_line(text, item["loc"], lines) for text in _explain(item, root, entry, methods)]


def _explain(item: dict[str, Any], root: type[BaseModel], entry: type[BaseModel], methods: tuple[str, ...]) -> list[str]:
    location = item["loc"]
    where = _shown(location)
    if item["type"] == "extra_forbidden":
        key = str(location[-1])
        return [f"unknown key '{where}'; {_WORDS.get(key) or nearest(key, _known_keys(location, root, entry))}"]
    if item["type"] == "missing":
        return [f"the key '{where}' is missing"]
    if item["type"] == "literal_error" and where == "merge_method":
        return [f"unknown merge_method {quoted(item['input'])}; {_method(str(item['input']), methods)}"]
    if item["type"] == "varying":
        return [problem.replace("{at}", where) for problem in item["ctx"]["problems"].split("\n")]
    if item["type"] == "value_error":
        inside = f"{where}: " if "slices" in location or "modules" in location else ""
        return [inside + line for line in str(item["ctx"]["error"]).split("\n")]
    if isinstance(item["input"], float) and math.isnan(item["input"]):
        return [f"{where}: got NaN, expected a number"]
    message = item["msg"][0].lower() + item["msg"][1:]
    return [f"{where}: got {quoted(item['input'])}; {message}"]


def _shown(location: tuple[Any, ...]) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return path.lstrip(".").replace("lambda_", "lambda")


def _method(given: str, known: tuple[str, ...]) -> str:
    other = _METHODS.get(given) or _METHODS.get(given.lower().replace("-", "_"))
    plain = given.lower().replace("-", "_").replace(" ", "_")
    if plain in known:
        return f"write {plain}"
    return f"write {other}" if other else nearest(given, known)


def _known_keys(location: tuple[Any, ...], root: type[BaseModel], entry: type[BaseModel]) -> set[str]:
    level: type[BaseModel] = root
    named = [part for part in location[:-1] if isinstance(part, str)]
    if named:
        level = _level(named, entry)
    own = {"rank1_approx", "fallback_to_base", *SPELLINGS} if issubclass(level, MergeParameters | ModelParameters) else set()
    return {"lambda" if name == "lambda_" else name for name in level.model_fields} - {"varying", "ignored"} | own


def _level(named: list[str], entry: type[BaseModel]) -> type[BaseModel]:
    last = named[-1]
    if last == "parameters":
        return ModelParameters if {"models", "sources"} & set(named) else MergeParameters
    if last == "models":
        return ModuleSource if "modules" in named else entry
    if "modules" in named and last not in _LEVELS:
        return Module
    return _LEVELS.get(last, MergeParameters)


def _with_line(text: str, location: tuple[Any, ...], lines: Lines) -> str:
    """The problem with the line where its key stands, as far as the file has it."""
    if not lines:
        return text
    if not location:
        location = _place_in(text, lines)
    # A key may stand under another spelling; then the line is that of what holds it.
    path = tuple("lambda" if part == "lambda_" else part for part in location)
    line = line_of(path, lines)
    return text if line is None else f"line {line}: {text}"


def _place_in(text: str, lines: Lines) -> tuple[Any, ...]:
    """Where a problem that names its place stands: ``models[1].parameters: 'gamma' has …``."""
    found = re.match(r"[A-Za-z_]+(?:\[\d+\]|\.[A-Za-z_]+)*", text)
    if not found:
        return ()
    parts = [int(part) if part.isdigit() else part for part in re.findall(r"\w+", found[0])]
    quoted = re.search(r": '(\w+)'|parameters\.(\w+)", text)
    key = (quoted[1] or quoted[2]) if quoted else None
    for path in ([*parts, key], [*parts, "parameters", key], parts) if key else (parts,):
        if tuple(path) in lines:
            return tuple(path)
    first = parts[0] if parts else ""
    if first == "base_model":  # it is missing; what needs it is not
        words = re.findall(r"\w+", text)
        needing = (path for path in lines if path and path[-1] in words and "parameters" in path[:-1])
        return next(needing, ("merge_method",))
    return ("merge_method",) if first in USED else tuple(parts)
