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

EXAMPLES = {
    "linear": """
models:
  - model: $a
    parameters:
      weight: 1.0
  - model: $b
    parameters:
      weight: 0.3
  - model: $c
    parameters:
      weight: 0.5
merge_method: linear
dtype: float32
""",
    "gradient-slerp": """
slices:
  - sources:
      - model: $a
        layer_range: [0, 4]
      - model: $b
        layer_range: [0, 4]
merge_method: slerp
base_model: $a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # the rest
dtype: float32
""",
    "orcamini-platy": """
slices:
  - sources:
    - model: $a
      layer_range: [0, 3]
  - sources:
    - model: $b
      layer_range: [1, 4]
merge_method: passthrough
dtype: float32
""",
    "ties": """
models:
  - model: $a
    parameters:
      density: [1, 0.7, 0.1] # a gradient
      weight: 1.0
  - model: $b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: $c
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: $base
parameters:
  normalize: true
  int8_mask: true
dtype: float32
""",
    "bio-merge": """
models:
  - model: $a
    parameters:
      density: 0.5
      weight: 0.5
  - model: $b
    parameters:
      density: 0.5
      weight: 0.5
merge_method: ties
base_model: $base
parameters:
  normalize: false
  int8_mask: true
dtype: float32
""",
    "mega": """
slices:
  - sources:
      - model: $a
        layer_range: [0, 4]
      - model: $b
        layer_range: [0, 4]
merge_method: slerp
base_model: $a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - value: 0.5
dtype: float32
out_path: ./models/gradient-slerp
---
models:
  - model: ./models/gradient-slerp
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: $c
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: $base
parameters:
  normalize: true
  int8_mask: true
dtype: float32
out_path: ./models/gradient-slerp-ties
""",
    "mergekit-multi": """
name: first-merge
merge_method: linear
models:
  - model: $a
    parameters: {weight: 0.4}
  - model: $b
    parameters: {weight: 0.6}
dtype: float32
---
name: second-merge
merge_method: slerp
base_model: first-merge
models:
  - model: $c
parameters:
  t: 0.45
dtype: float32
---
merge_method: passthrough
slices:
- sources:  # the lower layers
  - model: first-merge
    layer_range: [0, 2]
- sources:
  - model: second-merge
    layer_range: [1, 4]
dtype: float32
""",
}
"""mergekit's own examples, and its two kinds of files with several documents."""

PUBLIC = {
    "arcee-ai/mergekit#479, filters and a seed among the parameters": """
base_model: $base
dtype: float32
merge_method: breadcrumbs_ties
tokenizer:
  source: union
parameters:
  int8_mask: true
  random_seed: 145
models:
  - model: $a
    parameters:
      weight:
        - filter: lm_head
          value: 0.0
        - filter: self_attn.o_proj
          value: 0.0
        - value: 0.42
      density: 0.9
      gamma: 0.01
  - model: $b
    parameters:
      weight:
        - filter: mlp.down_proj
          value: 0.0
        - value: 0.33
      density: 0.9
      gamma: 0.01
""",
    "arcee-ai/mergekit#198, a dummy model without weight": """
merge_method: linear # so that models can be named at a weight of zero
parameters:
  weight: 1.0
slices:
  - sources:
      - model: $a
        layer_range: [0, 1]
      - model: $b
        layer_range: [0, 1]
        parameters:
          weight: 0
  - sources:
      - model: $b
        layer_range: [1, 3]
  - sources:
      - model: $c
        layer_range: [1, 4]
dtype: float32
tokenizer_source: union
""",
    "arcee-ai/mergekit#198, scales of repeated layers": """
slices:
  - sources:
      - model: $a
        layer_range: [0, 3]
  - sources:
      - model: $a
        layer_range: [1, 4]
        parameters:
          scale:
            - filter: q_proj
              value: 0.84
            - filter: k_proj
              value: 0.84
            - value: 1.0
merge_method: passthrough
dtype: float32
""",
    "arcee-ai/mergekit#169, a base without parameters": """
models:
  - model: $base
    # no parameters necessary for base model
  - model: $a
    parameters:
      density: 1
      weight: 0.4
merge_method: dare_ties
base_model: $base
parameters:
  normalize: true
  int8_mask: true
dtype: float32
tokenizer_source: base
""",
    "arcee-ai/mergekit#469, a gradient of slerp": """
models:
  - model: $a
  - model: $b
base_model: $a
merge_method: slerp
dtype: float32
tokenizer_source: "union"
chat_template: "chatml"
parameters:
  t: [0, 0.5, 1, 0.5, 0]
""",
    "arcee-ai/mergekit#139 and #185, embed_slerp": """
slices:
  - sources:
      - model: $a
        layer_range: [0, 4]
      - model: $b
        layer_range: [0, 4]
merge_method: slerp
base_model: $a
embed_slerp: true
parameters:
  t: 0.3
  embed_slerp: true
dtype: float32
tokenizer_source: union
""",
    "what mergekit's evolution writes": """
base_model: $base
dtype: float32
merge_method: task_arithmetic
allow_negative_weights: true
parameters:
  int8_mask: 1.0
  normalize: 1.0
slices:
- sources:
  - layer_range: [0, 2]
    model: $a
    parameters:
      weight: 1
  - layer_range: [0, 2]
    model: $b
    parameters:
      weight: 0.3475802891062396
  - layer_range: [0, 2]
    model: $base
- sources:
  - layer_range: [2, 4]
    model: $a
    parameters:
      weight: 0.8971381657317269
  - layer_range: [2, 4]
    model: $b
    parameters:
      weight: 0.45369921781118544
  - layer_range: [2, 4]
    model: $base
""",
    "a module named default, and a method in a slice": """
base_model: $base
dtype: float32
merge_method: ties
modules:
  default:
    slices:
    - merge_method: ties
      residual_weight: 0.1
      sources:
      - layer_range: [0, 4]
        model: $a
        parameters:
          density: 0.5
          weight: [0.9, 0.2, 0.2, 0.2, 0.95, 0.8, 0.4, 0.2]
      - layer_range: [0, 4]
        model: $b
        parameters:
          density: 0.5
          weight: [0.1, 0.9, 1.0, 0.95, 0.4, 0.4, 0.5, 0.3]
      - layer_range: [0, 4]
        model: $base
parameters:
  normalize: 1.0
  int8_mask: 1.0
""",
    "weights that arcee_fusion leaves unread": """
dtype: float32
out_dtype: float32
merge_method: arcee_fusion
base_model: $a
models:
    - model: $a
      parameters:
        weight:
          - filter: mlp
            value: [1, 2]
          - value: 1
    - model: $b
      parameters:
        weight:
          - filter: lm_head
            value: 1
          - value: [1, 0.5]
""",
    "weights that model_stock leaves unread": """
merge_method: model_stock
base_model: $base
models:
    - model: $a
      parameters:
        weight:
          - filter: mlp
            value: [2, 1]
          - value: 1
    - model: $b
      parameters:
        weight: 0.5
        density: 0.2
parameters:
  normalize: true
  int8_mask: true
dtype: float32
""",
    "model_stock on slices, its base among them": """

slices:
  - sources:
      - model: $base
        layer_range: [0, 4]
      - model: $b
        layer_range: [0, 4]
      - model: $c
        layer_range: [0, 4]
merge_method: model_stock
base_model: $base
dtype: float32
""",
    "karcher with a union": """
name: First
models:
  - model: $a
  - model: $b
merge_method: karcher
dtype: float32
parameters:
  tol: 1e-10
  max_iter: 120
tokenizer:
  source: union
""",
    "nuslerp with gradients and one model's tokenizer": """
models:
  - model: $a
    parameters:
      weight: [0.1, 0.3, 0.1]
  - model: $b
    parameters:
      weight: [0.9, 0.7, 0.9]

merge_method: nuslerp

dtype: float32
out_dtype: float32
tokenizer:
  source: $b
""",
    "slerp of the base and the one model that is named": """
merge_method: slerp
dtype: float32
base_model: $base
models:
  - model: $a
parameters:
  t: 0.45
""",
    "sce as the paper's authors run it": """
merge_method: sce
base_model: $base
parameters:
  density: 0.9
  select_topk: 0.2
  weight: 1.0
models:
  - model: $a
    parameters:
      weight: 1.0
  - model: $b
    parameters:
      weight: 1.0
  - model: $c
    parameters:
      weight: 1.0
dtype: float32
tokenizer_source: union
""",
    "breadcrumbs_ties with a weight at both levels": """
merge_method: breadcrumbs_ties
base_model: $base
parameters:
  density: 0.65
  gamma: 0.0001
  weight: 1.0
models:
  - model: $a
    parameters:
      weight: 1.0
  - model: $b
    parameters:
      weight: 0.8
dtype: float32
tokenizer_source: union""",
    "normalize and rescale under a model, where nobody reads them": """
models:
  - model: $a
    parameters: {weight: 0.5, density: 0.4, normalize: false, rescale: true, lambda: 0.3}
  - model: $b
    parameters: {weight: 0.7, density: 0.4}
merge_method: ties
base_model: $base
parameters: {rescale: true}
dtype: float32
""",
    "models as mappings": """
base_model:
  model:
    path: $base
merge_method: ties
slices:
- sources:
  - layer_range: [0, 4]
    model:
      model:
        path: $a
    parameters: {density: 0.5, weight: 0.5}
  - layer_range: [0, 4]
    model:
      model:
        path: $b
    parameters: {density: 0.4, weight: 0.5}
  - layer_range: [0, 4]
    model: {model: {path: $base}}
dtype: torch.float32
""",
    "options of the command line in the file": """
merge_method: linear
trust_remote_code: true
lazy_unpickle: true
allow_crimes: true
models:
  - model: $a
    parameters: {weight: 0.5, density: 0.5}
  - model: $b
    parameters: {weight: "0.25"}
parameters: {normalize: true, int8_mask: true, t: 0.4}
dtype: float32
""",
}
"""By where they were seen: reports of mergekit's users, and the cards of published models."""


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
