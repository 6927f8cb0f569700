"""Adapters in recipes: base+adapter, an adapter on the recipe's base, an adapter alone; here, in S3, in parts on other machines."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from ota_core.engine import engine
from ota_core.errors import OtaError
from ota_core.recipe.recipe import MergeRecipe
from tasks.evaluation.gradients.job import weights_digest
from tasks.evaluation.subject import bring_model, subjects_of
from tasks.merging.composed import locate, parts_of
from tasks.merging.describe import describe_source
from tasks.merging.describe_plan import describe_plan
from tasks.merging.inputs import assemble, fetch_all
from tasks.merging.sources import MergeSources
from tasks.settings import places
from tasks.storage.models import upload_folder
from tests.ota_core.files.tiny_adapters import tiny_base, write_adapter
from tests.servers import S3Test


class World:
    """A base, two adapters, and what PEFT merges of each."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = tiny_base(root / "base", "llama")
        self.adapters = [
            write_adapter(root / f"a{i}", self.base, seed=i, merged=root / f"m{i}", r=3, use_dora=i == 2) for i in (1, 2)
        ]

    def merged(
        self,
        out: str,
        models: list[str],
        *,
        beside: Path | None = None,
        base: str | None = "base",
        method: str = "ties",
        **parameters: Any,
    ) -> dict[str, Any]:
        folder = beside or self.root
        recipe = MergeRecipe.model_validate(
            {"merge_method": method, "base_model": base, "models": [{"model": one} for one in models], "parameters": parameters}
        )
        fetched = fetch_all(recipe, cache=self.root / "cache", recipe_dir=folder)
        inputs = assemble(recipe, fetched, cache=self.root / "cache", recipe_dir=folder)
        engine.merge(recipe, self.root / out, inputs=inputs)
        assert {"config.json", "tokenizer.json", "record.json"} <= {path.name for path in (self.root / out).iterdir()}
        return {name: one.numpy() for name, one in load_file(self.root / out / "model.safetensors").items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("made"))


@pytest.fixture
def world(made: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A copy, and a working directory elsewhere."""
    shutil.copytree(made.root, tmp_path / "world")
    monkeypatch.chdir(tmp_path)
    world = object.__new__(World)
    world.root, world.base = tmp_path / "world", tmp_path / "world" / "base"
    world.adapters = [world.root / "a1", world.root / "a2"]
    return world


def alike(one: dict[str, Any], other: dict[str, Any], atol: float = 3e-6) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        np.testing.assert_allclose(tensor, other[name], atol=atol, err_msg=name)


@pytest.mark.parametrize(
    "method, parameters",
    [("task_arithmetic", {}), ("ties", {"density": 0.5}), ("task_arithmetic", {"lambda": "auto"}), ("task_arithmetic", {"refine": "rowspace"}), ("rowspace", {})],
)  # fmt: skip
def test_adapters_merge_as_the_models_that_peft_makes_of_them(world: World, method: str, parameters: dict[str, Any]) -> None:
    expected = world.merged("whole", ["m1", "m2"], method=method, **parameters)
    # Where numbers are close to a threshold, float32 sums of another order choose another element.
    atol = 1e-4 if parameters or method == "rowspace" else 3e-6
    alike(world.merged("adapters", ["a1", "a2"], method=method, **parameters), expected, atol)
    plus = world.merged("plus", ["base+a1", f"{world.base}+{world.adapters[1]}"], method=method, **parameters)
    for name, tensor in world.merged("again", ["a1", "a2"], method=method, **parameters).items():
        assert np.array_equal(tensor, plus[name])


def test_without_a_base_an_adapter_lies_on_the_one_that_it_names(world: World) -> None:
    seen = world.merged("out", ["a1"], base=None, method="linear")
    alike(seen, {name: one.numpy() for name, one in load_file(world.root / "m1" / "model.safetensors").items()})
    config = world.adapters[0] / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "/no/such/model"}))
    with pytest.raises(OtaError, match=r"a LoRA adapter of /no/such/model, which cannot be had .* BASE\+a1"):
        world.merged("out2", ["a1"], base=None, method="linear")


def test_a_base_that_is_an_adapter_itself(world: World) -> None:
    alike(
        world.merged("out", ["base+a1+a2"], base="base+a1", method="task_arithmetic"),
        world.merged("out2", ["base+a1+a2"], base=None, method="linear"),
    )


def test_a_folder_with_a_plus_in_its_name_is_that_folder(world: World) -> None:
    shutil.copytree(world.base, world.root / "c++" / "base+one")
    shutil.copytree(world.adapters[0], world.root / "c++" / "ad+apter")
    beside = world.root / "c++"
    assert parts_of("base+one", beside) == [str(beside / "base+one")]
    assert parts_of("base+one+ad+apter", beside) == [str(beside / "base+one"), str(beside / "ad+apter")]
    assert parts_of("org/model+org/adapter@main", beside) == ["org/model", "org/adapter@main"]
    assert parts_of("s3://b/c++/model", None) == ["s3://b/c++/model"]
    assert parts_of("s3://b/c++/model+s3://b/lora", None) == ["s3://b/c++/model", "s3://b/lora"]
    assert locate("base+one+ad+apter", beside) == f"{beside}/base+one+{beside}/ad+apter"
    seen = world.merged("out", ["base+one+ad+apter"], base=None, method="linear", beside=beside)
    alike(seen, world.merged("out2", ["base+a1"], base=None, method="linear"))


def test_what_stands_behind_a_plus_must_be_an_adapter(world: World) -> None:
    with pytest.raises(OtaError, match="is no LoRA adapter, and is named behind a '\\+'"):
        world.merged("out", ["base+m1"])


def test_second_moments_of_factors_are_refused_and_estimated_ones_taken(world: World) -> None:
    with pytest.raises(OtaError) as caught:
        world.merged("out", ["a1", "a2"], method="ota")
    assert "expert 'a1' is a LoRA adapter" in str(caught.value) and "ota estimate a1" in str(caught.value)
    shutil.copy(world.adapters[0] / "adapter_model.safetensors", world.adapters[0] / "exp_avg_sq.safetensors")
    with pytest.raises(OtaError, match=r"exp_avg_sq.safetensors holds those of its factors A and B"):
        world.merged("out", ["a1", "a2"], method="ota")
    from safetensors.torch import save_file

    v = {name: one.square() + 1e-9 for name, one in load_file(world.base / "model.safetensors").items()}
    for adapter in world.adapters:
        save_file(v, adapter / "exp_avg_sq.safetensors")
    assert world.merged("out", ["a1", "a2"], method="ota", density=0.5).keys() == v.keys()


def test_plan_and_inspect_say_what_lies_on_what(world: World) -> None:
    recipe = MergeRecipe.model_validate(
        {
            "merge_method": "ties",
            "base_model": "base",
            "models": [{"model": "a1"}, {"model": "base+a2"}],
            "parameters": {"density": 0.5},
        }
    )
    told = "\n".join(describe_plan(recipe, world.root, "1GiB", world.root / "home"))
    assert "a1, a LoRA adapter on" in told and "no problems found" in told
    lines = describe_source(str(world.adapters[1]), None)
    assert lines[0].startswith("adapter: DoRA of rank 3, α 8") and "q_proj (2)" in lines[2]
    both = describe_source(f"{world.base}+{world.adapters[1]}", None)
    assert both[0].startswith("checkpoint: llama") and lines[0] in both


def test_in_s3_and_on_another_machine_the_bytes_are_the_same(world: World, s3_server: S3Test) -> None:
    for name in ("base", "a1", "a2"):
        upload_folder(world.root / name, f"{s3_server.uri}/{name}")
    expected = world.merged("out", ["a1", "a2"], density=0.5)
    recipe = MergeRecipe.model_validate(
        {
            "merge_method": "ties", "base_model": f"{s3_server.uri}/base", "parameters": {"density": 0.5},
            "models": [{"model": f"{s3_server.uri}/a1"}, {"model": f"{s3_server.uri('base')}+{s3_server.uri('a2')}"}],
        }
    )  # fmt: skip
    from tasks.storage.streaming.streams import Streams

    here, there = places(world.root / "here"), places(world.root / "there")
    with Streams(cache=here.cache, memory=2**26) as streams:
        fetched = fetch_all(recipe, cache=here.cache, recipe_dir=None, streams=streams)
        inputs = assemble(recipe, fetched, cache=here.cache, recipe_dir=None, streams=streams)
        assert not list(here.cache.glob("checkpoints/*"))
        engine.merge(recipe, world.root / "streamed", inputs=inputs, block_elements=64, threads=3)
        sources = MergeSources.of(recipe, inputs, fetched, streamed=True)
    told = MergeSources.model_validate_json(sources.abroad().model_dump_json())
    with told.opened(there, 2**26) as inputs:
        engine.merge(recipe, world.root / "abroad", inputs=inputs, block_elements=1000)
    for out in ("streamed", "abroad"):
        for name, tensor in load_file(world.root / out / "model.safetensors").items():
            assert np.array_equal(tensor.numpy(), expected[name]), f"{out}: {name}"


def test_an_adapter_that_is_scored_is_merged_in_the_cache(world: World) -> None:
    recipe = MergeRecipe.model_validate(
        {"merge_method": "ties", "base_model": "base", "models": [{"model": "a1"}, {"model": "m1"}], "parameters": {"density": 1}}
    )
    where = places(world.root / "home")
    fetched = fetch_all(recipe, cache=where.cache, recipe_dir=world.root)
    subjects = subjects_of(assemble(recipe, fetched, cache=where.cache, recipe_dir=world.root), fetched)
    assert subjects["expert/a1"].path is None and subjects["expert/m1"].path is not None
    folder = bring_model(subjects["expert/a1"], where)
    alike(
        *(
            {name: one.numpy() for name, one in load_file(one / "model.safetensors").items()}
            for one in (folder, world.root / "m1")
        )
    )
    assert (folder / "tokenizer.json").is_file() and (folder / "config.json").is_file()
    other = fetched[1].model_copy(update={"under": fetched[2]})
    assert weights_digest(fetched[1]) != weights_digest(other)
