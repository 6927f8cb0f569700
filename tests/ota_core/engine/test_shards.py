"""A merge done shard by shard, each as another machine would, gives the bytes of a merge in one process."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ota_core.engine.engine import mask, merge
from ota_core.engine.shards import (
    MergeInParts,
    Survey,
    finish,
    merge_shard,
    needs_survey,
    opened_bins,
    shard_files,
    shard_scales,
    survey,
    whole_facts,
    with_scales,
)
from ota_core.errors import ArtifactError, OtaError, RecipeError
from ota_core.plan.found import Found
from ota_core.plan.inputs import MergeInputs, resolve_local
from ota_core.plan.prepare import WholeFacts
from ota_core.recipe.recipe import MergeRecipe
from tests.checkpoints import ota_recipe, random_base, random_experts, with_compressed

SHARD = 500  # bytes: most files of the little model hold one tensor


def parts_of(job: MergeInParts, folder: Path) -> dict[str, Any]:
    """The whole of it, every intermediate result through a file or JSON as between machines."""
    folder.mkdir()

    def surveyed(name: str, **options: Any) -> Survey:
        found = []
        for shard in shard_files(job):
            survey(job, shard, **options).save(folder / f"{name}.survey")
            found.append(Survey.load(folder / f"{name}.survey"))
            (folder / f"{name}.survey").unlink()
        return Survey.sum(found)

    whole = None
    if needs_survey(job.recipe, job.inputs):
        first = surveyed("first")
        bins = opened_bins(job, first)
        whole = whole_facts(job, first, surveyed("second", opened=bins) if bins else None)
        whole = WholeFacts.model_validate_json(whole.model_dump_json())
    if job.recipe.auto:
        scales = [json.loads(json.dumps(shard_scales(job, shard, whole))) for shard in shard_files(job)]
        whole = WholeFacts.model_validate_json(with_scales(whole, scales).model_dump_json())
    found = [Found.model_validate_json(merge_shard(job, shard, folder, whole).model_dump_json()) for shard in shard_files(job)]
    return finish(job, folder, found)[1]


def inputs_of(tmp_path: Path, recipe: MergeRecipe) -> MergeInputs:
    """Local inputs; compressed second moments where the recipe compresses."""
    inputs = resolve_local(recipe)
    method = recipe.setting("compression") if recipe.merge_method in {"ota", "fisher"} else None
    return inputs if method in {None, "none"} else with_compressed(inputs, tmp_path, method)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("ota", {"density": 0.3}),
    ("ota", {"density": 0.3, "scope": "per_tensor"}),
    ("ota", {"precond_threshold": 1e-16}),
    ("ota", {"density": 0.3, "normalise": "global", "compression": "rank1", "lambda": 1.5}),
    ("ota", {"normalise": "global", "power": 0.7}),
    ("ota", {"density": 0.5, "compression": "rank1", "mask_curvature": "full", "rescale": True}),
    ("ota", {"density": 0.0001}),
    ("fisher", {}),
    ("linear", {}),
    ("ties", {"density": 0.4}),
    ("dare_ties", {"density": 0.4, "seed": 3}),
    ("breadcrumbs", {"density": 0.4, "gamma": 0.1}),
    ("ota", {"density": 0.3, "lambda": "auto"}),
    ("ties", {"density": 0.4, "lambda": "auto_per_tensor"}),
    ("ota", {"density": 0.3, "scope": "per_tensor", "refine": "rowspace"}),
    ("rowspace", {}),
    ("sce", {"density": 0.4, "lambda": "auto"}),
    ("della", {"density": 0.5, "seed": 2}),
    ("model_stock", {"refine": "rowspace"}),
    ("karcher", {}),
]


@pytest.mark.parametrize(("method", "parameters"), CASES)
def test_shards_give_the_bytes_of_one_process(tmp_path: Path, method: str, parameters: dict[str, Any]) -> None:
    base = random_base()
    recipe = MergeRecipe.model_validate(ota_recipe(tmp_path, base, random_experts(base), parameters, method=method))
    inputs = inputs_of(tmp_path, recipe)
    whole = merge(recipe, tmp_path / "whole", inputs=inputs, shard_size=SHARD)
    job = MergeInParts(recipe=recipe, inputs=inputs, shard_size=SHARD, threads=1)
    assert len(shard_files(job)) > 3
    results = parts_of(job, tmp_path / "parts")
    names = sorted(p.name for p in (tmp_path / "whole").iterdir() if p.name != "record.json")
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == names
    for name in names:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert json.loads(json.dumps(results)) == json.loads((tmp_path / "whole" / "record.json").read_text())["results"]
    assert results == whole.results


def test_a_tied_tensor_in_another_shard_has_its_parameters_threshold(tmp_path: Path) -> None:
    """The head is stored and tied to the embedding: its mask goes by the embedding's curvature, wherever that is merged."""
    shapes = {"model.embed_tokens.weight": (13, 8), "lm_head.weight": (13, 8), "model.norm.weight": (8,)}
    base = random_base(2, shapes)
    base["lm_head.weight"] = base["model.embed_tokens.weight"]
    experts = random_experts(base, 2)
    for expert in experts:
        expert.weights["lm_head.weight"] = expert.weights["model.embed_tokens.weight"]
    experts = [replace(e, v={n: x for n, x in e.v.items() if n != "lm_head.weight"}) for e in experts]
    for parameters in ({"density": 0.3}, {"density": 0.3, "scope": "per_tensor"}):
        root = tmp_path / parameters.get("scope", "global")  # type: ignore[arg-type]
        config = {"tie_word_embeddings": True}
        recipe = MergeRecipe.model_validate(ota_recipe(root, base, experts, parameters, config=config))
        inputs = resolve_local(recipe)
        merge(recipe, root / "whole", inputs=inputs, shard_size=450)
        parts_of(MergeInParts(recipe=recipe, inputs=inputs, shard_size=450), root / "parts")
        files = sorted((root / "whole").glob("*.safetensors"))
        assert len(files) == 2
        assert all((root / "parts" / f.name).read_bytes() == f.read_bytes() for f in files)


def test_given_masks_need_no_survey(tmp_path: Path) -> None:
    base = random_base()
    recipe = MergeRecipe.model_validate(ota_recipe(tmp_path, base, random_experts(base), {"density": 0.3}))
    inputs = resolve_local(recipe)
    (tmp_path / "masks").mkdir()
    mask(recipe, tmp_path / "masks", inputs=inputs)
    masked = replace(
        inputs, experts=tuple(replace(e, masks=tmp_path / "masks" / f"{e.name}.safetensors") for e in inputs.experts)
    )
    assert needs_survey(recipe, inputs) and not needs_survey(recipe, masked)
    merge(recipe, tmp_path / "whole", inputs=inputs, shard_size=SHARD)
    parts_of(MergeInParts(recipe=recipe, inputs=masked, shard_size=SHARD), tmp_path / "parts")
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "parts" / file.name).read_bytes() == file.read_bytes()


def test_the_shard_size_is_part_of_the_identity(tmp_path: Path) -> None:
    base = random_base()
    recipe = MergeRecipe.model_validate(ota_recipe(tmp_path, base, random_experts(base), {"density": 0.3}))
    one = merge(recipe, tmp_path / "one")
    many = merge(recipe, tmp_path / "many", shard_size=SHARD)
    assert one.fingerprint != many.fingerprint


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    base = random_base()
    experts = random_experts(base)
    recipe = MergeRecipe.model_validate(ota_recipe(tmp_path, base, experts, {"density": 0.3}))
    job = MergeInParts(recipe=recipe, inputs=resolve_local(recipe), shard_size=SHARD)
    shards = shard_files(job)
    with pytest.raises(OtaError, match="survey all shards first"):
        merge_shard(job, shards[0], tmp_path, None)
    with pytest.raises(OtaError, match="no file 'model-9'"):
        survey(job, "model-9")
    first = Survey.sum([survey(job, shard) for shard in shards])
    with pytest.raises(ArtifactError, match="does not hold the bins"):
        whole_facts(job, first, None)
    with pytest.raises(ArtifactError, match="different merges"):
        Survey.sum([first, Survey(sums={})])
    compressed = MergeRecipe.model_validate(
        {**recipe.model_dump(by_alias=True), "parameters": {"density": 0.3, "compression": "rank1"}}
    )
    with pytest.raises(RecipeError, match="compressed before"):
        shard_files(MergeInParts(recipe=compressed, inputs=resolve_local(compressed)))
    shutil.copyfile(tmp_path / "base" / "model.safetensors", tmp_path / "other.survey")
    with pytest.raises(ArtifactError, match="format None"):
        Survey.load(tmp_path / "other.survey")
