"""What a shard adds to the facts of whole experts, and how the shards' parts lead to them where values differ between tensors.

Rows of the counts are experts; where tensors differ, a row is an expert in one group that is ranked together (``plan.groups``), by its number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ota_core.compute.blocks import matrix_shape
from ota_core.errors import ArtifactError
from ota_core.files.rows import I64
from ota_core.files.safetensors_io import FORMAT_KEY, SafetensorsFile
from ota_core.files.writer import SafetensorsWriter, TensorSpec
from ota_core.plan.groups import Ranked, parts_of, ranked_groups
from ota_core.plan.plan import MergePlan
from ota_core.plan.prepare import WholeFacts
from ota_core.plan.scoring import ffg_scoring
from ota_core.plan.tally import Brackets, Counts, bins_of, count_brackets, count_high, read_off, taus_of
from ota_core.rules.varied import means_of, sums_of

FORMAT = "survey/1"


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a shard adds to the facts of whole experts, which are named by their position in the recipe."""

    experts: tuple[int, ...] = ()
    """Rows of the counts."""
    high: Counts | None = None
    """Round 1: histogram of the scores' upper bits, int64 (M, 65536)."""
    brackets: Brackets | None = None
    """Round 2: what lies above and inside the bins of the thresholds."""
    sums: Mapping[int, Mapping[str, float]]
    """Round 1: expert → tensor → Σ v̂^power, with ``normalise: global``."""

    @staticmethod
    def sum(surveys: Sequence["Survey"]) -> "Survey":
        """The survey of all shards together. Raises ArtifactError when they are not of one merge and round."""
        first = surveys[0]
        if any(one._kind() != first._kind() for one in surveys):
            raise ArtifactError("surveys of different merges or rounds cannot be added up; take one round of one recipe")
        high = None if first.high is None else np.sum([one.high for one in surveys if one.high is not None], axis=0)
        brackets = None
        if first.brackets is not None:
            brackets = Brackets.empty(first.brackets.bins)
            for one in surveys:
                assert one.brackets is not None
                brackets += one.brackets
        sums: dict[int, dict[str, float]] = {}
        for one in surveys:
            for expert, tensors in one.sums.items():
                sums.setdefault(expert, {}).update(tensors)
        return Survey(experts=first.experts, high=high, brackets=brackets, sums=sums)

    def _kind(self) -> tuple[Any, ...]:
        bins = None if self.brackets is None else self.brackets.bins.tolist()
        return self.experts, self.high is None, bins

    def save(self, path: Path) -> None:
        """Write a safetensors file: the counts, int64, and the sums in the metadata (as hexadecimal floats, exact)."""
        tensors = {} if self.high is None else {"high": self.high}
        if self.brackets is not None:
            tensors |= {"bins": self.brackets.bins, "above": self.brackets.above, "inside": self.brackets.inside}
        metadata = {FORMAT_KEY: FORMAT, "experts": ",".join(map(str, self.experts))}
        metadata |= {f"sum {m} {name}": value.hex() for m, sums in self.sums.items() for name, value in sums.items()}
        with SafetensorsWriter(path, [TensorSpec(n, t.shape, I64) for n, t in tensors.items()], metadata) as writer:
            for name, counts in tensors.items():
                writer.write_rows(name, 0, counts.reshape(matrix_shape(counts.shape)))

    @staticmethod
    def load(path: Path) -> "Survey":
        """Read what ``save`` wrote. Raises ArtifactError for another format."""
        with SafetensorsFile(path) as file:
            if file.metadata.get(FORMAT_KEY) != FORMAT:
                raise ArtifactError(
                    f"{path}: format {file.metadata.get(FORMAT_KEY)!r}, expected {FORMAT}; survey the shard again"
                )
            held = {
                name: file.read_rows(name, 0, matrix_shape(info.shape)[0]).held.reshape(info.shape).copy()
                for name, info in file.infos.items()
            }
            experts = tuple(int(m) for m in file.metadata["experts"].split(",") if m)
            sums: dict[int, dict[str, float]] = {}
            for key, value in file.metadata.items():
                if key.startswith("sum "):
                    _, expert, name = key.split(" ", 2)
                    sums.setdefault(int(expert), {})[name] = float.fromhex(value)
        brackets = Brackets(held["bins"], held["above"], held["inside"]) if "bins" in held else None
        return Survey(experts=experts, high=held.get("high"), brackets=brackets, sums=sums)


def _rows(ranked: Sequence[Ranked]) -> list[slice]:
    """The rows of each group among those of all."""
    ends = np.cumsum([0, *(len(one.group.experts) for one in ranked)]).tolist()
    return [slice(a, b) for a, b in pairwise(ends)]


def survey_varied(plan: MergePlan, opened: Mapping[int, int] | None, what: str) -> Survey:
    """The survey of a shard of a merge whose values differ between tensors; ``opened``: row → bin."""
    parts = parts_of(plan)
    ranked = ranked_groups(parts)
    rows = tuple(range(sum(len(one.group.experts) for one in ranked)))
    if opened is not None:
        brackets = []
        for one, own in zip(ranked, _rows(ranked), strict=True):
            bins = np.array([[opened.get(row, -1)] for row in rows[own]], np.int64)
            brackets.append(count_brackets(ffg_scoring(one.part.plan), one.group, bins, what=what))
        joined = Brackets(*(np.concatenate([getattr(one, name) for one in brackets]) for name in ("bins", "above", "inside")))
        return Survey(experts=rows, brackets=joined, sums={})
    counts = [count_high(ffg_scoring(one.part.plan), one.group, what=what) for one in ranked]
    sums = sums_of(parts) if plan.recipe.setting("normalise") == "global" else {}
    return Survey(experts=rows, high=np.concatenate(counts) if counts else None, sums=sums)


def bins_varied(plan: MergePlan, first: Survey) -> dict[int, int]:
    """Row → the bin that holds its threshold."""
    assert first.high is not None
    ranked = ranked_groups(parts_of(plan))
    found = [bins_of(one.group, first.high[own]).max(axis=1, initial=-1) for one, own in zip(ranked, _rows(ranked), strict=True)]
    return {row: int(bin) for row, bin in enumerate(np.concatenate(found)) if bin >= 0}


def facts_varied(plan: MergePlan, first: Survey, second: Survey | None) -> WholeFacts:
    """Thresholds of every group and means of every expert."""
    parts = parts_of(plan)
    means = means_of(parts, {expert: dict(sums) for expert, sums in first.sums.items()}) if first.sums else {}
    ranked, groups = ranked_groups(parts), []
    for one, own in zip(ranked, _rows(ranked), strict=True):
        brackets = Brackets.empty(np.full((len(one.group.experts), 1), -1, np.int64))
        if second is not None and (held := second.brackets) is not None:
            brackets = Brackets(held.bins[own], held.above[own], held.inside[own])
        scores = read_off(one.group, brackets)
        if scores is None:
            raise ArtifactError("the second survey does not hold the bins that the first one asks for; survey all shards again")
        groups.append(taus_of(scores))
    return WholeFacts(means=means, groups=groups)
