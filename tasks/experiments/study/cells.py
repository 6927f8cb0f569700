"""The cells of a study's grid: subsets of the experts, what makes two cells equal in effect, and families of cells that differ in one thing."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Any

from ota_core.artifact import canonical_json
from ota_core.learn.groups import Per
from ota_core.recipe.recipe import MergeRecipe, ModelEntry
from tasks.merging.labels import settings_of, spell

KEYWORDS = ("all", "each", "pairs", "leave_one_out")


@dataclass(frozen=True)
class Cell:
    """One merge of a study, on each of its replicates."""

    label: str
    """Unique in the study."""
    experts: tuple[str, ...]
    """Names of the experts that are merged."""
    recipes: tuple[MergeRecipe, ...]
    """One for each replicate."""
    tune: tuple[str, ...] = ()
    """Parameters that are searched for on a validation suite: lambda, density."""
    learn: Per | None = None
    """What shares a learned scale of each expert, where the recipe's scales are learned on that suite."""
    equal: tuple[str, ...] = ()
    """Labels of the grid that mean the same merge, and are not run again."""

    @property
    def chosen(self) -> str:
        """How data chose for it, for names: tuned, learned per tensor; empty where none did."""
        return "tuned" if self.tune else f"learned per {self.learn}" if self.learn else ""

    @property
    def method(self) -> str:
        return self.recipes[0].merge_method

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Every parameter in force by name, as far as it has an effect; one that differs between experts is a tuple.

        Without FFG ``density`` is 1.0 and its other settings are absent: they decide nothing. Where a search chooses the density,
        those that say what is masked are there.
        """
        found = settings_of(self.recipes[0])
        if "density" in self.tune and self.method == "ota":
            masked = {key: self.recipes[0].setting(key) for key in ("scope", "metric", "mask_curvature")}
            found |= {key: value for key, value in masked.items() if value is not None}
        return found


def canonical(cell: Cell, *, without: Iterable[str] = (), experts: bool = True) -> str:
    """One spelling for all cells that merge the same experts (unless ``experts`` is false) and agree in every setting but those of ``without``."""
    left_out = set(without)
    rest = {
        key: list(value) if isinstance(value, tuple) else value for key, value in cell.settings.items() if key not in left_out
    }
    return canonical_json([list(cell.experts) if experts else [], list(cell.tune), cell.learn, rest])


def join_equal(cells: Iterable[Cell]) -> tuple[Cell, ...]:
    """The cells without those that merge the same experts in the same way as an earlier one, which remembers their labels."""
    found: dict[str, Cell] = {}
    for cell in cells:
        first = found.setdefault(key := canonical(cell), cell)
        if cell.label not in {first.label, *first.equal}:
            found[key] = replace(first, equal=(*first.equal, cell.label))
    return tuple(found.values())


def families(cells: Sequence[Cell], vary: Iterable[str]) -> list[list[Cell]]:
    """Groups of at least two cells that merge the same experts and differ in no setting but those of ``vary``, in the grid's order.

    Tuned and learned cells belong to none: what they differ in is decided by data.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in (one for one in cells if not one.chosen):
        groups.setdefault(canonical(cell, without=vary), []).append(cell)
    return [group for group in groups.values() if len(group) > 1]


def as_subsets(raw: Any) -> Any:
    """``experts`` as a tuple of keywords, names and tuples of names. Raises ValueError on anything else."""
    items = [raw] if isinstance(raw, str) else raw
    fits = isinstance(items, list | tuple) and all(
        isinstance(item, str) or (isinstance(item, list | tuple) and item and all(isinstance(name, str) for name in item))
        for item in items
    )
    if not fits or not items:
        raise ValueError(
            f"grid: experts: got {raw!r}, expected {', '.join(KEYWORDS)}, a name, or a list of those and of lists of names"
        )
    return tuple(item if isinstance(item, str) else tuple(item) for item in items)


def subset_problems(subsets: Sequence[str | tuple[str, ...]], models: Sequence[ModelEntry], names: Sequence[str]) -> list[str]:
    """What is wrong with an entry's ``experts``: names that nobody has, pairs of one."""
    known = {*names, *(model.capability for model in models if model.capability)}
    asked = [name for item in subsets for name in ([item] if isinstance(item, str) else item)]
    unknown = [name for name in dict.fromkeys(asked) if name not in known and name not in KEYWORDS]
    problems = [
        f"experts: there is no expert '{name}'; expected {', '.join(KEYWORDS)} or {', '.join(sorted(known))}" for name in unknown
    ]
    inner = [name for item in subsets if not isinstance(item, str) for name in item if name in KEYWORDS and name not in known]
    problems += [f"experts: '{name}' stands for subsets and cannot stand inside one; write it by itself" for name in inner]
    if len(models) < 2:
        problems += [f"experts: '{item}' needs at least two experts" for item in subsets if item in {"pairs", "leave_one_out"}]
    return problems


def subsets_of(
    subsets: Sequence[str | tuple[str, ...]], models: Sequence[ModelEntry], names: Sequence[str]
) -> list[tuple[int, ...]]:
    """The subsets as positions of experts in the study's order, each once. They must have passed ``subset_problems``."""
    everyone = tuple(range(len(models)))

    def positions(asked: Iterable[str]) -> tuple[int, ...]:
        wanted = set(asked)
        return tuple(i for i in everyone if names[i] in wanted or models[i].capability in wanted)

    found: list[tuple[int, ...]] = []
    for item in subsets:
        if not isinstance(item, str):
            found.append(positions(item))
        elif item == "each":
            found += [(i,) for i in everyone]
        elif item == "pairs":
            found += list(combinations(everyone, 2))
        elif item == "leave_one_out":
            found += [tuple(i for i in everyone if i != left) for left in everyone]
        else:
            found.append(everyone if item == "all" else positions([item]))
    return list(dict.fromkeys(found))


def subset_label(subset: Sequence[int], names: Sequence[str]) -> list[str]:
    """The words that tell a subset in a cell's label: none for all, ``on math+code``, ``without math``."""
    missing = [name for i, name in enumerate(names) if i not in subset]
    if not missing:
        return []
    if len(missing) == 1 and len(names) > 2:
        return ["without", missing[0]]
    return ["on", "+".join(names[i] for i in subset)]


def spelled(values: Sequence[Any]) -> list[Any]:
    """A column's values, all as text where one of them is of several experts, or words stand beside numbers (λ: 1.5, auto): a column of a file
    has one type."""
    there = [value for value in values if value is not None and value == value]
    words = [isinstance(value, str) for value in there]
    if not any(isinstance(value, tuple) for value in there) and any(words) == all(words):
        return list(values)
    return [None if value is None or value != value else spell(value) for value in values]
