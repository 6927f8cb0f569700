"""Scales: one coefficient for each expert and tensor, by which the expert's part of the merged edit is multiplied (docs/methods.md).

Merged = θ₀ + λ·Σ_m s[m, n]·A_m in tensor n, with A_m expert m's part of the merged edit at λ = 1. The file is safetensors: under the name
of each tensor its M coefficients, float32 or float64 (M,); in the metadata the experts' names, in the order of the coefficients, and the
settings of the recipe for which they were learned. A tensor that is tied to another has the other's.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.blocks import matrix_shape
from ota_core.errors import CheckpointError, OtaError, RecipeError
from ota_core.files.rows import F64
from ota_core.files.safetensors_io import FORMAT_KEY, SafetensorsFile
from ota_core.files.writer import SafetensorsWriter, TensorSpec
from ota_core.recipe.recipe import MergeRecipe

FORMAT = "scales/1"
AGAIN = "learn them again with `ota tune`, or take the key 'scales' out of the recipe"
SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class ExpertScales:
    """What a file of scales holds. ``s[m, n]`` is ``values[n][m]``."""

    experts: tuple[str, ...]
    values: Mapping[str, NDArray[np.float64]]
    """Tensor to its coefficients, float64 (M,)."""
    settings: Mapping[str, Any]
    """``MergeRecipe.effective`` of the recipe that they were learned for."""

    @classmethod
    def read(cls, path: Path) -> "ExpertScales":
        """Raises RecipeError for a file that is missing, of another format, or that holds what is no coefficient."""
        try:
            with SafetensorsFile(path) as file:
                if file.metadata.get(FORMAT_KEY) != FORMAT:
                    seen = file.metadata.get(FORMAT_KEY)
                    raise RecipeError(f"scales {path}: format {seen!r}, expected a file of the format {FORMAT}; {AGAIN}")
                experts = tuple(json.loads(file.metadata["experts"]))
                wrong = [
                    f"'{name}' {list(info.shape)} {info.dtype}"
                    for name, info in file.infos.items()
                    if info.shape != (len(experts),) or info.dtype.code not in {"F32", "F64"}
                ]
                if wrong:
                    expected = f"float32 or float64 of shape [{len(experts)}], one for each expert ({', '.join(experts)})"
                    raise RecipeError(f"scales {path}: {some(wrong)}; expected {expected}; {AGAIN}")
                values = {name: file.read_rows(name, 0, len(experts)).held.reshape(-1).astype(np.float64) for name in file.infos}
                settings = json.loads(file.metadata.get("settings", "{}"))
        except CheckpointError as error:
            raise RecipeError(f"scales: {error}; or take the key 'scales' out of the recipe") from None
        except (KeyError, ValueError) as error:
            raise RecipeError(f"scales {path}: its metadata cannot be read ({error!r}); {AGAIN}") from None
        bad = [f"'{name}'" for name, row in values.items() if not np.isfinite(row).all()]
        if bad:
            raise RecipeError(f"scales {path}: the coefficients of {some(bad)} are not all finite numbers; {AGAIN}")
        return cls(experts=experts, values=values, settings=settings)

    def save(self, path: Path) -> None:
        """Write the file; equal scales give equal bytes."""
        specs = [TensorSpec(name, (len(self.experts),), F64) for name in self.values]
        metadata = {
            FORMAT_KEY: FORMAT,
            "experts": json.dumps(list(self.experts), ensure_ascii=False),
            "settings": json.dumps(self.settings, sort_keys=True),
        }
        with SafetensorsWriter(path, specs, metadata) as writer:
            for name, row in self.values.items():
                writer.write_rows(name, 0, np.asarray(row, np.float64).reshape(matrix_shape(row.shape)))

    def learned_for_other(self, recipe: MergeRecipe) -> list[str]:
        """The settings that this recipe has otherwise than the one that the scales were learned for."""
        now = json.loads(json.dumps(recipe.effective()))
        flat = [
            {"merge_method": one.get("merge_method"), **one.get("parameters", {}), "those of single experts": one.get("experts")}
            for one in (self.settings, now)
        ]
        return [key for key, value in flat[1].items() if flat[0].get(key) != value]

    def ordered(self, experts: Sequence[str]) -> "ExpertScales":
        """The same with the experts in this order, which names the same ones."""
        places = [self.experts.index(name) for name in experts]
        return ExpertScales(
            experts=tuple(experts), values={name: row[places] for name, row in self.values.items()}, settings=self.settings
        )


def scales_digest(path: Path) -> str:
    """sha256 of the file, as a merge's identity names it. Raises RecipeError when there is none."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise RecipeError(f"scales {path} cannot be read ({error.strerror}); {AGAIN}") from None


def find_scales(named: str, recipe_dir: Path | None) -> Path:
    """The file that a recipe's ``scales`` means: beside the recipe, else in the working directory. Raises RecipeError."""
    given = Path(named).expanduser()
    places = [given] if given.is_absolute() else [*([recipe_dir / given] if recipe_dir else []), Path.cwd() / given]
    for place in places:
        if place.is_file():
            return place
    raise RecipeError(
        f"scales: '{named}' does not exist (looked for {', '.join(map(str, places))}); expected the file that `ota tune` wrote "
        "beside its recipe: copy it there, or take the key 'scales' out of the recipe"
    )


def scales_for(path: Path, experts: Sequence[str], tensors: Iterable[str], problems: list[str]) -> ExpertScales | None:
    """The scales in a file for a merge of these experts, in their order; what does not fit is added to ``problems``.

    tensors: those that are merged, each parameter once.
    """
    try:
        scales = ExpertScales.read(path)
    except OtaError as error:
        problems += error.problems
        return None
    before = len(problems)
    if set(scales.experts) != set(experts):
        problems.append(
            f"scales {path}: they were learned for the experts {', '.join(scales.experts)}, the recipe's are {', '.join(experts)}; give the "
            f"recipe's models the same names with 'name', or {AGAIN}"
        )
    wanted = set(tensors)
    for what, names in (
        ("no coefficients for tensors of the merged model", wanted - scales.values.keys()),
        ("coefficients for tensors that the merged model does not have", scales.values.keys() - wanted),
    ):
        if names:
            problems.append(f"scales {path}: {what}: {some([repr(name) for name in sorted(names)])}; {AGAIN}")
    return scales.ordered(experts) if len(problems) == before else None


def some(items: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = len(items) - SHOWN
    return ", ".join(items[:SHOWN]) + (f" and {more} more" if more > 0 else "")
