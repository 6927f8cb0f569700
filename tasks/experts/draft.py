"""A recipe for experts that lie somewhere, from what their folders hold: what ``ota init`` writes. Of weights little is read, of others' none.

With the second moments of every expert OTA with FFG, refined by the row spaces; without, the row-space regression, which needs none. λ is
computed from the experts themselves, so that nothing is left to choose.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np

from ota_core.artifact import CARD
from ota_core.compute.blocks import row_blocks
from ota_core.engine.licences import card_head
from ota_core.errors import CheckpointError, MomentsError, RecipeError, raise_all
from ota_core.files.checkpoint import Checkpoint, read_json
from ota_core.moments import find_moments, moments_files, none_found, open_moments
from ota_core.moments.compression import compression_of, rank_of
from ota_core.plan.inputs import ExpertInput, MergeInputs, unique_names
from ota_core.plan.plan import checkpoint_problems, open_plan
from ota_core.recipe.recipe import MergeRecipe, parse_recipe
from ota_core.recipe.yaml_text import parse_yaml
from tasks.experts.find import find_experts, lineup
from tasks.merging.composed import locate
from tasks.merging.inputs import assemble, fetch_all
from tasks.storage.models import EXPERT_JSON, Fetched, is_s3
from tasks.storage.streaming.streams import Streams

DENSITY = 0.4
# What trainers and people call folders, whatever is in them: the folder above says more.
_SAYS_NOTHING = re.compile(r"checkpoint[-_]?\d*|\d[\d\-_.T:]*Z?|v\d+|model|models|hf|final|best|last|latest|output|out|weights")
_PLAIN = re.compile(r"[A-Za-z./~][\w./:@+~-]*")
_BLOCK = 2**20
_RAW = ("none", None)


@dataclass(frozen=True, kw_only=True)
class Expert:
    """One expert as the recipe will name it."""

    source: str
    name: str
    capability: str | None
    """What its ``expert.json`` says."""
    moments: str
    """Its second moments in words; why there are none that can be used, where ``compression`` is None."""
    compression: tuple[str, int | None] | None
    """How they are compressed already, and of rank_k the rank; None where there are none."""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """What a recipe will say, and what its reader should know."""

    base: str
    experts: tuple[Expert, ...]
    tokenizer: str | None
    """The expert whose tokenizer the merge takes, where the base has no chat template and an expert has."""
    notes: tuple[str, ...]

    @property
    def curved(self) -> bool:
        """Whether every expert has second moments that one merge can read."""
        held = {one.compression for one in self.experts}
        return None not in held and len(held - {_RAW}) <= 1

    @property
    def method(self) -> str:
        """The recipe's method in words."""
        return "OTA with FFG and row-space refinement" if self.curved else "row-space regression"

    @property
    def compression(self) -> tuple[str, int | None]:
        """What the merge's second moments are compressed with: as they are stored, where any are stored so."""
        return next((one.compression for one in self.experts if one.compression not in {None, _RAW}), None) or _RAW

    def text(self, file: str) -> str:
        """The commented recipe. file: what the commands in its comments call it."""
        return "\n".join([*_text(self, file), ""])

    def recipe(self) -> MergeRecipe:
        """The same as it is read back."""
        return parse_recipe(parse_yaml(self.text("recipe.yaml"), "the recipe that ota init wrote"))


def draft(sources: Sequence[str], base: str | None, *, cache: Path, recipe_dir: Path, memory: int = 2**30) -> Draft:
    """A recipe for these experts: folders, ``s3://…`` or ``org/name``, or a place with several of them, of which the newest of each capability.

    Of what lies in S3 only the headers are read, and a little of the weights. base: likewise an address, None for the one that the experts
    name. recipe_dir: where the recipe will lie. memory: bytes. Raises OtaError that lists everything that stands in the way of a merge.
    """
    notes: list[str] = []
    sources = [one for source in sources for one in _experts_at(source, base, notes)]
    with Streams(cache=cache, memory=memory) as streams:

        def fetched(models: Sequence[str], start: str | None = None) -> list[Fetched]:
            return fetch_all(_linear(models, start), cache=cache, recipe_dir=None, streams=streams, digests=False)

        models = fetched(sources, base)
        if base is None:
            base = _base_named_by(models, notes)
            models = [*fetched([base]), *models]
        else:
            notes += _other_bases(models[1:], base)
        whole = _linear(sources, base)
        inputs = assemble(whole, models, cache=cache, recipe_dir=None, streams=streams, digests=False)
        names = unique_names([_name(source, expert) for source, expert in zip(sources, inputs.experts, strict=True)])
        inputs = replace(inputs, experts=tuple(replace(one, name=name) for one, name in zip(inputs.experts, names, strict=True)))
        _check_weights(whole, inputs)
        experts = []
        for source, expert in zip(sources, inputs.experts, strict=True):
            said, held = _moments_of(whole, inputs, expert, streams)
            place = _from(source, recipe_dir)
            experts.append(Expert(source=place, name=expert.name, capability=expert.capability, moments=said, compression=held))
        template = _chat_template(models[0].path, {one.name: one.path for one in inputs.experts})
        found = Draft(base=_from(base, recipe_dir), experts=tuple(experts), tokenizer=template, notes=(*notes, *streams.notes))
    found.recipe()
    return replace(found, notes=(*found.notes, *_about_moments(found)))


def _experts_at(source: str, base: str | None, notes: list[str]) -> list[str]:
    """The source itself, or the newest expert of each capability below it."""
    if base is None or not (is_s3(source) or Path(source).expanduser().is_dir()):
        return [source]
    found, problems = find_experts(source, base_model=base)
    notes += [f"left out: {one.capability}/{one.name}: {one.problem}" for one in problems]
    return [several[0].uri for several in lineup(found).values()] or [source]


def _linear(sources: Sequence[str], base: str | None) -> MergeRecipe:
    """The plainest recipe that names these models: it asks nothing of them."""
    return parse_recipe({"merge_method": "linear", "base_model": base, "models": [{"model": one} for one in sources]})


def _bases_of(models: Sequence[Fetched]) -> Iterator[tuple[str, str, str]]:
    """(expert, what says so, the base that it was trained from): its expert.json or, as on the Hugging Face hub, its model card."""
    for one in models:
        named = (one.expert or {}).get("base_model")
        if isinstance(named, str) and named:
            yield one.source, EXPERT_JSON, named
            continue
        named = card_head(one.path).get("base_model")
        named = named[0] if isinstance(named, list) and len(named) == 1 else named
        if isinstance(named, str) and named:
            yield one.source, CARD, named


def _base_named_by(models: Sequence[Fetched], notes: list[str]) -> str:
    """The base that the experts themselves name. Raises RecipeError where they name none, or several."""
    said = list(_bases_of(models))
    named = sorted({base.rstrip("/") for *_, base in said})
    if len(named) == 1:
        notes.append(f"base: {named[0]}, as {said[0][1]} of {', '.join(source for source, *_ in said)} says")
        return named[0]
    if not named:
        raise RecipeError(
            f"no expert says what it was trained from ({EXPERT_JSON}, or base_model in the head of its model card); name the base with --base"
        )
    told = "; ".join(f"{source}: {base}" for source, _, base in said)
    raise RecipeError(
        f"the experts name {len(named)} bases ({told}); merge those of one base, or say with --base which model they share"
    )


def _other_bases(models: Sequence[Fetched], base: str) -> list[str]:
    wanted = base.rstrip("/")
    return [
        f"{source}: its {where} says that it was trained from {named}; the recipe takes {base}: be sure that these are the same weights"
        for source, where, named in _bases_of(models)
        if named.rstrip("/") != wanted
    ]


def _name(source: str, expert: ExpertInput) -> str:
    """The expert's label: its capability, else the last part of its address that says something."""
    if expert.capability:
        return expert.capability.replace("/", "-")
    place = source if is_s3(source) or not expert.path.is_dir() else locate(source, None)
    parts = [part.split("@")[0] for part in place.rstrip("/").split("/") if part]
    telling = [part for part in reversed(parts) if not _SAYS_NOTHING.fullmatch(part) and part not in {".", ".."}]
    return (telling or parts)[0]


def _check_weights(whole: MergeRecipe, inputs: MergeInputs) -> None:
    """Raises CheckpointError with what does not fit together: other architectures, a model that is named twice, an expert that is the base."""
    raise_all(checkpoint_problems(whole, inputs), CheckpointError)
    problems = []
    with ExitStack() as stack:
        opened = [(one, stack.enter_context(closing(one.opened()))) for one in inputs.models]
        for (one, mine), (other, theirs) in combinations(opened, 2):
            if not _same(mine, theirs):
                continue
            what = f"the expert {other.name} ({other.source}) has the same weights as"
            if one is inputs.base:
                problems.append(
                    f"{what} the base {one.source}: it has learned nothing; leave it out, or name another base with --base"
                )
            else:
                problems.append(f"{what} {one.name} ({one.source}): a model merges with itself to itself; leave one of them out")
    raise_all(problems, CheckpointError)


def _same(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two models have the same weights, bit by bit. Read are the smallest tensors first, and of other models hardly more."""
    infos = {name: one.info(name) for name in one.names()}
    if one.names() != other.names() or any(
        (info.shape, info.dtype) != (other.info(name).shape, other.info(name).dtype) for name, info in infos.items()
    ):
        return False
    for name, info in sorted(infos.items(), key=lambda item: int(np.prod(item[1].shape))):
        for block in row_blocks(info.shape, _BLOCK):
            mine, theirs = (model.read_rows(name, *block).held for model in (one, other))
            if mine.tobytes() != theirs.tobytes():
                return False
    return True


def _moments_of(
    whole: MergeRecipe, inputs: MergeInputs, expert: ExpertInput, streams: Streams
) -> tuple[str, tuple[str, int | None] | None]:
    """An expert's second moments in words, and how they are compressed; None where a merge could not read them, and the words say why."""
    try:
        path = find_moments(expert.path)
        if path is None:
            return none_found(expert.source), None
        streams.settle(moments_files(path))
        with closing(open_moments(path, layout=expert.layout, source_of=expert.source_of)) as moments:
            held = compression_of(moments) or "none", rank_of(moments)
        parameters = {"compression": held[0]} | ({"rank": held[1]} if held[1] else {})
        alone = parse_recipe(
            {"merge_method": "ota", "base_model": whole.base_model, "models": [{"model": expert.source}], "parameters": parameters}
        )  # fmt: skip
        with open_plan(alone, replace(inputs, experts=(replace(expert, moments=path),))):
            pass
    except (MomentsError, CheckpointError) as error:
        return str(error), None
    return path.name + ("" if held[0] == "none" else f", compressed with {held[0]}"), held


def _about_moments(found: Draft) -> Iterator[str]:
    """What one must know of the second moments to understand the choice of the method."""
    without = [one for one in found.experts if one.compression is None]
    if found.curved or len(without) == len(found.experts):
        return
    if not without:
        held = "; ".join(f"{one.name}: {one.moments}" for one in found.experts)
        yield f"the second moments are compressed in different ways ({held}), which no merge can read together; the recipe does without them"
    yield from (f"{one.name} has no second moments that a merge can read: {one.moments}" for one in without)
    if without:
        have = ", ".join(one.name for one in found.experts if one.compression is not None)
        yield (
            f"OTA needs the second moments of every expert; only {have} {'have' if ',' in have else 'has'} them, so that the recipe does without. "
            "With those of the others, or without the others, write it again: the merge gets better by them"
        )


def _chat_template(base: Path, experts: dict[str, Path]) -> str | None:
    """The first expert with a chat template, where the base has none."""

    def has(folder: Path) -> bool:
        config = folder / "tokenizer_config.json"
        return any(folder.glob("chat_template*")) or (config.is_file() and "chat_template" in read_json(config))

    return None if has(base) else next((name for name, folder in experts.items() if has(folder)), None)


def _from(source: str, recipe_dir: Path) -> str:
    """An address as a recipe in this folder names it: what lies in the folder by its relative path, else as it reads from anywhere."""
    place = Path(locate(source, None))
    if is_s3(source) or not place.is_dir():
        return source
    inside = place.resolve()
    return inside.relative_to(recipe_dir).as_posix() if inside.is_relative_to(recipe_dir) else str(place)


# The recipe's text. What a reader may want to change, or to understand, stands beside the line that does it.

_OTA = """
# OTA weighs every edit of every parameter by the second moments that training left; FFG keeps of each expert the edits that matter most.
merge_method: ota"""
_ROWSPACE = """
# Each matrix becomes the one that does, on the inputs that each expert's own edit answers to, most nearly what that expert does.
# This needs no second moments. With those of every expert in its folder (optimizer.pt, exp_avg_sq.safetensors), ota init writes a better recipe.
merge_method: rowspace"""
_LAMBDA = "  lambda: auto         # the scale of the merged edit, computed from the experts; a number such as 1.2 sets it by hand"
_REFINE = (
    "  refine: rowspace     # each matrix is then drawn towards what every expert does on its own inputs; none leaves it out"
)
_INPUTS = "  input_curvature: 0.1 # of those inputs the second moments tell a little more"


def _text(found: Draft, file: str) -> Iterator[str]:
    yield from (
        f"# Written by ota init: a merge of {len(found.experts)} experts that needs no further choice. docs/recipes.md explains every key.",
        "#",
        f"#   ota plan {file}             # what would be read and written, peak memory, every problem",
        f"#   ota merge {file} merged/    # the merged model alone",
        f"#   ota run {file}              # merge, benchmark, report, MLflow",
        *(_OTA if found.curved else _ROWSPACE).split("\n"),
        "",
        f"base_model: {_scalar(found.base)}",
        "models:",
    )
    for one in found.experts:
        yield f"  - model: {_scalar(one.source)}"
        yield f"    name: {_scalar(one.name)}"
        if one.capability:
            yield f"    capability: {_scalar(one.capability)}"
        elif one is found.experts[0]:
            yield "    # capability: the benchmark's name for what the expert was trained for, where that is not its name here"
    yield "parameters:"
    if found.curved:
        method, rank = found.compression
        yield f"  density: {DENSITY}         # FFG: the share of each expert's edits that is kept"
        yield from [_LAMBDA, _REFINE, _INPUTS]
        if method != "none":
            yield f"  compression: {method}   # as the second moments are stored already"
            yield from [f"  rank: {rank}"] if rank else []
        else:
            yield "  # compression: rank1   # second moments in a hundredth of their size, for a little of the quality"
    else:
        yield _LAMBDA
    if found.tokenizer:
        yield "# The base has no chat template; this expert has."
        yield f"tokenizer_source: {_scalar(f'model:{found.tokenizer}')}"
    yield "# dtype: bfloat16       # of the merged weights; as in the base where nothing is said"


def _scalar(text: str) -> str:
    """A text as YAML writes it: plain where it is read back as it is, else in quotes."""
    return text if _PLAIN.fullmatch(text) and parse_yaml(text, text) == text else json.dumps(text, ensure_ascii=False)
