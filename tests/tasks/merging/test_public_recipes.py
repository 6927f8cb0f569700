"""Recipes in the forms that people publish, through the command line and through mergekit 0.1.5: equal to float32 rounding.

The models are small ones made here; the keys, their order and their forms are those of the recipes that are named. ``$a``, ``$b``, ``$c`` and
``$base`` stand for the models.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from flows.cli.app import app
from tests.checkpoints import read_tensors
from tests.ota_core.methods.test_mergekit_parity import by_mergekit
from tests.tiny_models import perturb, write_tiny_llama

pytest.importorskip("mergekit", reason="the oracle is a development dependency")
LAYERS = 4
NAMES = ("base", "a", "b", "c")

_KNOWN = yaml.safe_load(Path(__file__).with_name("public_recipes.yaml").read_text(encoding="utf-8"))
EXAMPLES: dict[str, str] = _KNOWN["examples"]
PUBLIC: dict[str, str] = _KNOWN["public"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("public")
    write_tiny_llama(root / "base", seed=0, vocab=104, layers=LAYERS)
    for seed, name in enumerate(NAMES[1:], 1):
        perturb(root / "base", root / name, seed=seed, scale=0.02 * seed)
    yield root


def theirs(text: str, models: Path, out: Path) -> dict[str, np.ndarray[Any, Any]]:
    """mergekit's output; of several documents each is run with the folders of those before it."""
    documents = list(yaml.safe_load_all(Template(text).substitute({name: str(models / name) for name in NAMES})))
    made: dict[str, str] = {}
    for i, document in enumerate(documents):
        name = document.pop("name", None) or document.pop("out_path", f"stage{i}")
        spelled = json.dumps(document)
        for known, folder in made.items():
            spelled = spelled.replace(json.dumps(known), json.dumps(folder))
        made[name] = str(out / f"stage{i}")
        last = by_mergekit(json.loads(spelled), out / f"stage{i}")
    return last


@pytest.mark.parametrize("text", [*EXAMPLES.values(), *PUBLIC.values()], ids=[*EXAMPLES, *PUBLIC])
def test_a_public_recipe_gives_mergekits_model(text: str, models: Path, tmp_path: Path) -> None:
    want = theirs(text, models, tmp_path / "theirs")
    recipe = models / f"{tmp_path.name}.yaml"
    recipe.write_text(Template(text).substitute({name: name for name in NAMES}), encoding="utf-8")
    command = ["merge", str(recipe), str(tmp_path / "ours"), "--home", str(tmp_path / "home")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    got = read_tensors(tmp_path / "ours")
    assert sorted(got) == sorted(want)
    for name, one in want.items():
        allowed = 2e-6 * max(1.0, float(np.abs(one).max()))
        assert np.abs(got[name] - one).max() <= allowed, f"{name}: by up to {np.abs(got[name] - one).max():.3g}"
    planned = CliRunner().invoke(app, ["plan", str(recipe), "--home", str(tmp_path / "home")])
    assert planned.exit_code == 0 and "no problems found" in planned.output


@pytest.mark.parametrize(
    ("case", "places"),
    [
        ("weights that arcee_fusion leaves unread", ["models[0].parameters.weight", "models[1].parameters.weight"]),
        ("a module named default, and a method in a slice", ["slices[0].residual_weight", "slices[0].merge_method"]),
        ("normalize and rescale under a model, where nobody reads them", ["models[0].parameters.rescale", "models[0].parameters.lambda"]),
        ("options of the command line in the file", ["trust_remote_code", "models[0].parameters.density", "parameters.t"]),
    ],
)  # fmt: skip
def test_what_is_ignored_is_said(case: str, places: list[str], models: Path, tmp_path: Path) -> None:
    recipe = models / f"{tmp_path.name}.yaml"
    recipe.write_text(Template(PUBLIC[case]).substitute({name: name for name in NAMES}), encoding="utf-8")
    said = CliRunner().invoke(app, ["plan", str(recipe), "--home", str(tmp_path / "home")]).output
    flat = " ".join(said.split())
    note = flat[flat.index("without meaning for") :]
    assert all(place in note for place in places), note
