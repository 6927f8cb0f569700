"""What a recipe with slices puts together: every tensor of the result, the models that it is merged of and what they call it."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

from ota_core.errors import RecipeError, raise_all
from ota_core.files.rows import NAMED, Dtype
from ota_core.plan.roles import place_of
from ota_core.plan.sliced.layers import numbered, position, stack_of, stacks
from ota_core.plan.views import ExpertView, ModelView, TensorJob
from ota_core.plan.vocabulary.match import Vocabulary, is_vocabulary_tensor
from ota_core.recipe.methods import WITHOUT_BASE
from ota_core.recipe.recipe import MergeRecipe
from ota_core.recipe.slices import Slice, base_range, same_model

SHOWN = 8
"""Tensors that one problem names."""
_AT_THE_START = ("embed", "wte", "wpe", "shared")


@dataclass(kw_only=True)
class Cut:
    """One slice: a recipe of its own, with the slice's sources as its experts."""

    place: str
    """As the recipe has it, such as ``slices[0]``."""
    recipe: MergeRecipe
    base: ModelView | None
    sources: list[ExpertView]
    base_names: dict[str, str] = field(default_factory=dict)
    """Name in the result → the base's own, where they differ."""
    names: list[dict[str, str]] = field(default_factory=list)
    """The same of each source."""
    positions: dict[str, float] = field(default_factory=dict)
    """Every tensor of the slice, by its name in the result, and where its layer lies in the slice (0 … 1)."""

    @property
    def first(self) -> tuple[ModelView, Mapping[str, str]]:
        """The model that says which tensors there are, and what it calls them."""
        return self.sources[0], self.names[0]

    def loads(self, kinds: Container[Dtype]) -> bool:
        """Whether every floating-point tensor that is merged here is stored as one of these types."""
        models: list[tuple[ModelView, Mapping[str, str]]] = [*zip(self.sources, self.names, strict=True)]
        if self.base is not None and self.recipe.merge_method not in WITHOUT_BASE:
            models.append((self.base, self.base_names))
        stored = (
            view.checkpoint.info(view.stored_name(names.get(name, name))).dtype
            for view, names in models
            for name in self.positions
        )
        return all(dtype in kinds for dtype in stored if dtype.is_floating_point)


@dataclass(kw_only=True)
class Assembly:
    """All slices of a recipe."""

    cuts: list[Cut]
    taken: dict[str, list[int]]
    """Stack → for each layer of the result the layer of its first source."""


def assemble(recipe: MergeRecipe, base: ModelView | None, experts: Sequence[ExpertView], first: ModelView) -> Assembly:
    """The slices of a recipe on these models. first: whose tensors outside of layers the result has. Raises RecipeError with all problems."""
    found = stacks(first.checkpoint.names())
    problems: list[str] = []
    by_stack: dict[str, list[Cut]] = {}
    taken: dict[str, list[int]] = {}
    for stack, places in _by_stack(recipe, list(found), problems).items():
        by_stack[stack], taken[stack] = [], []
        for place, one in places:
            cut = _cut(recipe, place, one, base, experts)
            _add_layers(cut, one, stack, taken[stack], found[stack], problems)
            by_stack[stack].append(cut)
    raise_all(problems, RecipeError)
    for name in first.checkpoint.names():
        layer = numbered(name)
        if layer is not None and layer.stack in by_stack:
            continue
        owner = _owner(name, by_stack)
        owner.positions[name] = 0.0
    return Assembly(cuts=[cut for cuts in by_stack.values() for cut in cuts], taken=taken)


def _by_stack(recipe: MergeRecipe, found: list[str], problems: list[str]) -> dict[str, list[tuple[str, Slice]]]:
    """Stack → its slices."""
    shown = ", ".join(found) or "none"
    if recipe.slices is not None:
        if len(found) != 1:
            words = sorted({word for stack in found for word in stack.split(".")[:-1]})
            problems.append(
                f"slices: the model has layers in {len(found)} places ({shown}); say which are meant with modules: {{NAME: {{slices: […]}}}}, NAME "
                f"being one of {', '.join(words)}"
            )
            return {}
        return {found[0]: recipe.places()}
    result: dict[str, list[tuple[str, Slice]]] = {}
    for name, module in (recipe.modules or {}).items():
        stack = stack_of(name, found)
        if stack is None or stack in result:
            problems.append(f"modules.{name}: no layers of the model are clearly meant by it; its layers are in: {shown}")
            continue
        result[stack] = [(f"modules.{name}[{i}]", one) for i, one in enumerate(module.as_slices())]
    return result


def _cut(recipe: MergeRecipe, place: str, one: Slice, base: ModelView | None, experts: Sequence[ExpertView]) -> Cut:
    own = recipe.of_slice(one)

    def view(model: str) -> ModelView:
        named = (expert for entry, expert in zip(recipe.models, experts, strict=True) if same_model(entry.model, model))
        found = next(named, None)
        assert found is not None or base is not None
        return found or base  # type: ignore[return-value]

    sources = [view(entry.model) for entry in own.models]
    under = None if own.base_model is None else base if same_model(own.base_model, recipe.base_model) else view(own.base_model)
    return Cut(place=place, recipe=own, base=under, sources=[one for one in sources if isinstance(one, ExpertView)])


def _add_layers(cut: Cut, one: Slice, stack: str, taken: list[int], count: int, problems: list[str]) -> None:
    """The layers of a slice behind those that are there."""
    skipped = [s for s in one.sources if any(same_model(s.model, entry.model) for entry in cut.recipe.models)]
    ranges = [source.layer_range or (0, count) for source in skipped]
    own = base_range(cut.recipe.base_model, one) if cut.recipe.base_model is not None else None
    under = (0, count) if own is None or own == "unclear" else own
    cut.names = [{} for _ in ranges]
    first, renamed = ranges[0], len(taken)
    for source, (start, stop), view in zip(skipped, ranges, cut.sources, strict=True):
        has = stacks(view.checkpoint.names()).get(stack, 0)
        if stop > has:
            problems.append(f"{cut.place}: layer_range [{start}, {stop}] of {source.model}, which has {has} layers in {stack}")
    if problems:
        return
    for name in cut.sources[0].checkpoint.names():
        layer = numbered(name)
        if layer is None or layer.stack != stack or not first[0] <= layer.number < first[1]:
            continue
        offset = layer.number - first[0]
        target = f"{stack}.{renamed + offset}.{layer.rest}"
        cut.positions[target] = position(offset, first[1] - first[0])
        for names, (start, _) in zip(cut.names, ranges, strict=True):
            names[target] = f"{stack}.{start + offset}.{layer.rest}"
        cut.base_names[target] = f"{stack}.{under[0] + offset}.{layer.rest}"
    taken += range(*first)


def _owner(name: str, by_stack: Mapping[str, Sequence[Cut]]) -> Cut:
    """The slice whose models and parameters hold for a tensor outside of its layers: the first for what comes before them, else the last."""
    chosen = next(iter(by_stack.values()))
    if len(by_stack) > 1:
        parts = set(name.split(".")[:-1])
        shared = {stack: len(parts & set(stack.split(".")[:-1])) for stack in by_stack}
        # A head, and what no module names, goes with the text: the last stack that is none of pictures or sounds.
        texts = [stack for stack in by_stack if not any(word in stack for word in ("vision", "visual", "audio"))]
        best = max(shared.values())
        candidates = [stack for stack, score in shared.items() if score == best]
        chosen = by_stack[candidates[0] if len(candidates) == 1 else (texts or candidates)[-1]]
    early = place_of(name).role == "embed" or any(word in part for part in name.split(".") for word in _AT_THE_START)
    return chosen[0] if early else chosen[-1]


def sliced_jobs(
    recipe: MergeRecipe, assembly: Assembly, first: ModelView, vocabulary: Vocabulary | None, problems: list[str]
) -> list[TensorJob]:
    """The tensors of the result, checked in every model that they are merged of; what does not fit is added to ``problems``."""
    jobs = []
    out_dtype = NAMED[recipe.output_dtype] if recipe.output_dtype else None
    for cut in assembly.cuts:
        told, names = cut.first
        for name in cut.positions:
            info = told.checkpoint.info(told.stored_name(names.get(name, name)))
            token_rows = vocabulary is not None and is_vocabulary_tensor(name)
            shape = (vocabulary.rows, *info.shape[1:]) if vocabulary is not None and token_rows else info.shape
            floating = info.dtype.is_floating_point
            dtype = out_dtype or info.dtype if floating else info.dtype
            jobs.append(TensorJob(name, first.tied.get(name, name), shape, dtype, not floating))
        for view, own in [*zip(cut.sources, cut.names, strict=True), *([(cut.base, cut.base_names)] if cut.base else [])]:
            wrong = [text for name in cut.positions if (text := _unlike(view, own, name, told, names))]
            if wrong:
                more = f"; and {len(wrong) - SHOWN} more tensors like these" if len(wrong) > SHOWN else ""
                problems.append(f"{cut.place}: {view.checkpoint.path} ({view.name}): {'; '.join(wrong[:SHOWN])}{more}")
    return sorted(jobs, key=lambda job: natural(job.name))


def own_jobs(view: ModelView) -> list[TensorJob]:
    """A model's own tensors, by its own names: what its second moments are compared with."""
    infos = [(name, view.checkpoint.info(name)) for name in view.checkpoint.names()]
    return [TensorJob(name, view.tied.get(name, name), i.shape, i.dtype, not i.dtype.is_floating_point) for name, i in infos]


def _unlike(view: ModelView, own: Mapping[str, str], name: str, told: ModelView, names: Mapping[str, str]) -> str:
    """How a source's tensor differs in form from that of the slice's first source; empty where it does not."""
    mine, other = view.stored_name(own.get(name, name)), told.stored_name(names.get(name, name))
    if mine not in view.checkpoint:
        return f"tensor '{mine}' is missing, {told.name} has '{other}'"
    start = 1 if is_vocabulary_tensor(name) else 0
    seen, expected = view.checkpoint.info(mine), told.checkpoint.info(other)
    if seen.shape[start:] != expected.shape[start:]:
        return f"tensor '{mine}' has shape {list(seen.shape)}, {told.name} has {list(expected.shape)} in '{other}'"
    if seen.dtype.is_floating_point != expected.dtype.is_floating_point:
        return f"tensor '{mine}' is {seen.dtype}, {told.name} has {expected.dtype}"
    return ""


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key in which layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
