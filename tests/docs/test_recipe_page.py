"""Every recipe of docs/recipes.md that is marked to run, merged by the command line on tiny models."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from flows.cli.app import app
from ota_core.recipe.methods import Method
from tests.checkpoints import read_tensors
from tests.tiny_models import perturb, write_tiny_llama

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
RECIPES = re.findall(r"<!-- run -->\n```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, math and code, the experts with second moments."""
    root = tmp_path_factory.mktemp("recipes")
    base = write_tiny_llama(root / "base", vocab=104)
    for seed, name in enumerate(("math", "code"), 1):
        folder = perturb(base, root / name, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        v = {n: 1e-20 * torch.rand(t.shape, generator=generator) for n, t in read_tensors(folder).items()}
        save_file(v, folder / "exp_avg_sq.safetensors")
    return root


def label(text: str) -> str:
    return " ".join(re.findall(r"^merge_method: (\w+)|^(slices)|(filter)|^(name)", text, re.MULTILINE)[0])


@pytest.mark.parametrize("text", RECIPES, ids=lambda text: text.split("merge_method: ")[1].split()[0])
def test_a_recipe_of_the_page_runs(text: str, models: Path, tmp_path: Path) -> None:
    recipe = models / f"{tmp_path.name}.yaml"
    recipe.write_text(text, encoding="utf-8")
    result = CliRunner().invoke(app, ["merge", str(recipe), str(tmp_path / "merged"), "--home", str(tmp_path / "home")])
    assert result.exit_code == 0, result.output
    merged, base = read_tensors(tmp_path / "merged"), read_tensors(models / "base")
    changed = (
        name not in base or tensor.shape != base[name].shape or (tensor != base[name]).any() for name, tensor in merged.items()
    )
    assert any(changed)
    assert not list(tmp_path.glob(".merged*"))


def test_the_page_has_a_recipe_for_every_method() -> None:
    shown = {method for text in RECIPES for method in re.findall(r"^merge_method: (\w+)", text, re.MULTILINE)}
    assert set(Method.__args__) <= shown  # type: ignore[attr-defined]
