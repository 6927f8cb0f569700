"""The gradient of a loss with respect to scales against plain autograd through the sum, and the weights that scales give."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ota_core.engine.engine import merge
from ota_core.errors import OtaError
from ota_core.learn.edits import Edits
from ota_core.learn.groups import Per, group_of
from ota_core.learn.model import ScaledModel
from ota_core.plan.expert_scales import ExpertScales
from ota_core.plan.inputs import resolve_local
from ota_core.plan.plan import open_plan
from ota_core.recipe.recipe import MergeRecipe
from ota_core.rules.rule import rule_of
from tests.checkpoints import read_tensors
from tests.flows.merge_fixture import write_v
from tests.tiny_models import perturb, write_tiny_llama

IDS = torch.tensor([[1, 20, 31, 42, 53, 64, 75]])
METHODS: dict[str, dict[str, Any]] = {
    "ota": {"density": 0.4, "lambda": 1.5},
    "task_arithmetic": {"lambda": 0.5},
    "ties": {"density": 0.5},
    "dare_linear": {"density": 0.5, "seed": 3},
    "rowspace": {"lambda": "auto"},
    "breadcrumbs_ties": {"density": 0.5, "gamma": 0.1, "rescale": True},
    "della": {"density": 0.5, "epsilon": 0.2, "seed": 3},
    "sce": {"density": 0.5, "lambda": 1.2},
    "ramplus_tl": {"epsilon": 1e-3, "r": 0.5},
    "multislerp": {"lambda": 0.8},
    "nuslerp": {"nuslerp_flatten": False},
    "model_stock": {},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products on a machine that others use: threads would wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe_of(root: Path, method: str = "ota", parameters: dict[str, Any] | None = None, **options: Any) -> MergeRecipe:
    base = write_tiny_llama(root / "base", **options)
    experts = [perturb(base, root / f"expert{i}", seed=i, scale=0.05) for i in (1, 2)]
    for i, expert in enumerate(experts):
        write_v(expert, seed=i)
    models = [{"model": str(expert)} for expert in experts]
    raw = {"merge_method": method, "base_model": str(base), "models": models, "parameters": parameters or METHODS[method]}
    return MergeRecipe.model_validate(raw)


@contextmanager
def scaled_model(recipe: MergeRecipe, per: Per = "tensor", memory: int = 2**26, **options: Any) -> Iterator[ScaledModel]:
    with open_plan(recipe, resolve_local(recipe), memory="64MiB", block_elements=200) as plan:
        rule = rule_of(plan)
        rule.prepare()
        config = AutoConfig.from_pretrained(recipe.base_model)
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with ScaledModel(network, Edits(plan, rule, memory), per, **options) as model:
            yield model


def loss_of(network: Any) -> torch.Tensor:
    return network(input_ids=IDS, labels=IDS).loss  # type: ignore[no-any-return]


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_is_that_of_autograd_through_the_sum(tmp_path: Path, method: str, tie: bool) -> None:
    with scaled_model(recipe_of(tmp_path, method, tie=tie)) as model:
        factors = torch.randn(model.scales.shape, generator=torch.Generator().manual_seed(0)).double()
        model.scales.copy_(1 + 0.3 * factors)
        model.write()
        loss_of(model.network).backward()
        assert all(parameter.grad is None for parameter in model.network.parameters())

        # The same in one piece: every weight as θ₀ + Σ s·E with the whole parts, and autograd down to s.
        names, count = list(model.edits.jobs), len(model.edits.experts)
        zero, units = torch.zeros(count), torch.eye(count)
        targets = {name: torch.empty(job.shape) for name, job in model.edits.jobs.items()}

        def written(row: torch.Tensor) -> dict[str, torch.Tensor]:
            model.edits.write(dict.fromkeys(names, row.tolist()), targets)
            return {name: target.clone() for name, target in targets.items()}

        base, alone = written(zero), [written(unit) for unit in units]
        leaf = model.scales.float().requires_grad_()
        weights = {
            name: base[name] + sum(leaf[i, m] * (alone[m][name] - base[name]) for m in range(count))
            for i, name in enumerate(names)
        }
        if tie:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        found = torch.func.functional_call(model.network, weights, kwargs={"input_ids": IDS, "labels": IDS})
        (wanted,) = torch.autograd.grad(found.loss, leaf)
        torch.testing.assert_close(model.gradient.float(), wanted, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("per, groups", [("layer", 2 + 3), ("role", 10), ("expert", 1)])
def test_shared_coefficients_have_the_sum_of_the_gradients(tmp_path: Path, per: Per, groups: int) -> None:
    recipe = recipe_of(tmp_path)
    with scaled_model(recipe) as model:
        loss_of(model.network).backward()
        each = dict(zip(model.edits.jobs, model.gradient, strict=True))
    with scaled_model(recipe, per) as model:
        loss_of(model.network).backward()
        assert len(model.gradient) == groups
        names = list(dict.fromkeys(group_of(name, per) for name in each))
        for group, row in zip(names, model.gradient, strict=True):
            wanted = torch.stack([one for name, one in each.items() if group_of(name, per) == group]).sum(0)
            torch.testing.assert_close(row, wanted, rtol=1e-5, atol=1e-9)
        assert set(model.by_tensor()) == set(each)


@pytest.mark.parametrize("method", ["ota", "ties", "rowspace"])
def test_the_weights_in_memory_are_those_that_the_merge_writes(tmp_path: Path, method: str) -> None:
    recipe = recipe_of(tmp_path, method)
    with scaled_model(recipe) as model:
        model.scales.copy_(torch.linspace(-0.5, 2, model.scales.numel()).view_as(model.scales))
        model.write()
        held = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
        values = {name: torch.tensor(row).double().numpy() for name, row in model.by_tensor().items()}
        ExpertScales(experts=tuple(model.edits.experts), values=values, settings={}).save(tmp_path / "scales.safetensors")
    merge(recipe.model_copy(update={"scales": str(tmp_path / "scales.safetensors")}), tmp_path / "merged")
    for name, tensor in read_tensors(tmp_path / "merged").items():
        torch.testing.assert_close(held[name], torch.from_numpy(tensor), rtol=1e-6, atol=1e-6)


def test_memory_decides_what_is_kept_and_changes_no_number(tmp_path: Path) -> None:
    recipe, found = recipe_of(tmp_path), []
    for memory in (0, 20_000, 2**26):
        with scaled_model(recipe, memory=memory) as model:
            loss_of(model.network).backward()
            found.append((model.edits.kept_bytes, model.gradient.clone()))
            size = model.edits.bytes
    assert found[0][0] == 0 and 0 < found[1][0] <= 20_000 and found[2][0] == size
    assert torch.equal(found[0][1], found[1][1]) and torch.equal(found[0][1], found[2][1])


def test_learning_begins_with_the_coefficients_of_the_recipe(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    with scaled_model(recipe) as model:
        start = {name: [0.5, 1.5 + i] for i, name in enumerate(model.edits.jobs)}
    with scaled_model(recipe, start=start) as model:
        assert model.by_tensor() == start
    with (
        pytest.raises(OtaError, match="differ among tensors that would share them per role"),
        scaled_model(recipe, "role", start=start),
    ):
        pass


def test_a_network_that_holds_other_tensors_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    other = write_tiny_llama(tmp_path / "other", layers=3)
    with open_plan(recipe, resolve_local(recipe)) as plan:
        rule = rule_of(plan)
        rule.prepare()
        network = AutoModelForCausalLM.from_pretrained(other)
        with pytest.raises(OtaError, match=r"it lacks none, and has 'model.layers.2.*without converting names"):
            ScaledModel(network, Edits(plan, rule, 0), "tensor")
