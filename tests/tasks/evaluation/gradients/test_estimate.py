"""Estimated second moments of real models against plain autograd, resumed and cached; and merges of experts that kept none."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from ota_core.artifact import read_record
from ota_core.engine import engine
from ota_core.errors import CheckpointError, OtaError
from ota_core.moments import open_moments
from ota_core.recipe.estimate import EstimateSettings
from ota_core.recipe.recipe import MergeRecipe, parse_recipe
from tasks.artifacts.store import store_of
from tasks.evaluation.gradients import estimate as estimating
from tasks.evaluation.gradients.estimate import estimate, trained_parameters
from tasks.evaluation.gradients.job import EstimateJob, Texts, estimate_jobs
from tasks.evaluation.gradients.network import mean_loss
from tasks.evaluation.gradients.texts import file_blocks
from tasks.merge import merge_job
from tasks.merging.inputs import fetch_all
from tasks.merging.labels import merge_label
from tasks.merging.sources import planned
from tasks.settings import Places, places
from tasks.storage import models as storage
from tests.checkpoints import read_tensors
from tests.flows.merge_fixture import EXPERTS, write_experts
from tests.tiny_models import perturb, write_tiny_llama
from tests.tiny_suite import write_rows

ROWS = [{"prompt": f"{i} and {i} is", "completion": f" {2 * i}, {'so ' * (i % 4)}"} for i in range(12)]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    write_rows(tmp_path / "texts.jsonl", ROWS)
    return tmp_path / "texts.jsonl"


def settings(texts: Path, **given: Any) -> EstimateSettings:
    return EstimateSettings(**{"data": str(texts), "samples": 12, "batch": 4, "max_length": 64} | given)


def estimated(model: Path, out: Path, given: EstimateSettings, **options: Any) -> dict[str, torch.Tensor]:
    """v by name as the file has it."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    options = {"said": {"samples": 12}, "partial": out.with_name("partial"), "identity": "one"} | options
    estimate(model, out, given, lambda _, length: file_blocks(Path(given.data or ""), tokenizer, given, length), **options)
    with safe_open(out, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def plain(model: Path, given: EstimateSettings, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same in float64 by transformers' own loss and torch's own clipping, every document padded and labelled by hand."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    blocks = file_blocks(Path(given.data or ""), tokenizer, given, given.max_length)
    squares = {name: torch.zeros(one.shape, dtype=torch.float64) for name, one in network.named_parameters()}
    for at in range(0, 12, 4):
        batch = blocks[at : at + 4]
        width = max(len(one.ids) for one in batch)
        ids = torch.tensor([[*one.ids, *[0] * (width - len(one.ids))] for one in batch])
        labels = torch.tensor(
            [[-100] * one.first + list(one.ids[one.first :]) + [-100] * (width - len(one.ids)) for one in batch]
        )
        network.zero_grad()
        network(input_ids=ids, attention_mask=(torch.arange(width) < torch.tensor([[len(one.ids)] for one in batch])).long(),
                labels=labels).loss.backward()  # fmt: skip
        if given.clip is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), given.clip)
        for name, one in network.named_parameters():
            squares[name] += one.grad.double() ** 2 / 3
    return squares


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_v_is_that_of_plain_autograd_in_float64(tmp_path: Path, texts: Path, tie: bool, clip: float | None) -> None:
    model = write_tiny_llama(tmp_path / "model", tie=tie, dtype=torch.float32)
    given = settings(texts, clip=clip)
    found, wanted = estimated(model, tmp_path / "v", given), plain(model, given, torch.float64)
    assert set(found) == set(wanted) and ("lm_head.weight" in found) is not tie
    for name, v in found.items():
        assert v.dtype == torch.float32
        torch.testing.assert_close(v.double(), wanted[name], rtol=2e-3, atol=1e-5 * float(wanted[name].max()))


def test_a_bfloat16_model_is_taken_as_it_is_stored(tmp_path: Path, texts: Path) -> None:
    model = write_tiny_llama(tmp_path / "model", dtype=torch.bfloat16)
    given = settings(texts, clip=None)
    found, wanted = estimated(model, tmp_path / "v", given), plain(model, given, torch.bfloat16)
    for name, v in found.items():
        assert v.dtype == torch.float32
        torch.testing.assert_close(v.double(), wanted[name], rtol=0.05, atol=0.01 * float(wanted[name].max()))
    wide = estimated(model, tmp_path / "wide", given.model_copy(update={"dtype": "float32"}))
    assert any(not torch.equal(wide[name], v) for name, v in found.items())


def test_points_between_base_and_expert_share_the_batches(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_tiny_llama(tmp_path / "base")
    expert = perturb(base, tmp_path / "expert", seed=1, scale=0.2)
    given = settings(texts, clip=None, points=3)
    found = estimated(expert, tmp_path / "v", given, base=base)
    tokenizer = AutoTokenizer.from_pretrained(expert)
    blocks = file_blocks(texts, tokenizer, given, 64)
    end, start = ({k: torch.from_numpy(v).double() for k, v in read_tensors(folder).items()} for folder in (expert, base))
    wanted = {name: torch.zeros(one.shape, dtype=torch.float64) for name, one in found.items()}
    for i in range(3):
        network = AutoModelForCausalLM.from_pretrained(expert, dtype=torch.float64)
        with torch.no_grad():
            for name, one in network.named_parameters():
                one.copy_(start[name] + (i + 1) / 3 * (end[name] - start[name]))
        mean_loss(network, blocks[4 * i : 4 * i + 4]).backward()
        for name, one in network.named_parameters():
            assert one.grad is not None
            wanted[name] += one.grad.double() ** 2 / 3
    for name, v in found.items():
        torch.testing.assert_close(v.double(), wanted[name], rtol=2e-3, atol=1e-5 * float(wanted[name].max()))
    # To the same bytes also where a kill fell between two points.
    monkeypatch.setattr(estimating, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(estimating, "SAVE_SHARE", 0)

    def progress(_: str, done: int, total: int) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        estimated(expert, tmp_path / "again", given, base=base, progress=progress)
    estimated(expert, tmp_path / "again", given, base=base)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "v").read_bytes()
    wide = write_tiny_llama(tmp_path / "wide", vocab=130)
    with pytest.raises(CheckpointError, match="another shape than in the expert"):
        estimated(expert, tmp_path / "w", given, base=wide)


class Killed(Exception):
    """Stands for the end of a process."""


def test_what_goes_on_after_a_kill_has_the_same_bytes(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimating, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(estimating, "SAVE_SHARE", 0)
    model, given = write_tiny_llama(tmp_path / "model"), settings(texts, samples=12, batch=2)
    seen: list[tuple[int, int]] = []

    def progress(_: str, done: int, total: int) -> None:
        seen.append((done, total))
        if done == 3 and len(seen) == 4:
            raise Killed

    with pytest.raises(Killed):
        estimated(model, tmp_path / "v", given, progress=progress)
    assert (tmp_path / "partial").is_file() and not (tmp_path / "v").exists()
    estimated(model, tmp_path / "v", given, progress=progress)
    estimated(model, tmp_path / "whole", given)
    assert (tmp_path / "v").read_bytes() == (tmp_path / "whole").read_bytes()
    assert seen[-1] == (6, 6) and not (tmp_path / "partial").exists()


def test_what_training_left_as_the_base_has_it_has_no_second_moments(tmp_path: Path, texts: Path) -> None:
    base = write_tiny_llama(tmp_path / "base")
    expert = perturb(base, tmp_path / "expert", seed=1)
    from safetensors.torch import load_file, save_file

    frozen = {"model.embed_tokens.weight", "model.norm.weight"}
    weights, start = load_file(expert / "model.safetensors"), load_file(base / "model.safetensors")
    save_file(weights | {name: start[name] for name in frozen}, expert / "model.safetensors", metadata={"format": "pt"})
    some, all_of = (estimated(expert, tmp_path / f"v{i}", settings(texts, clip=None), base=b) for i, b in enumerate((base, None)))
    assert set(all_of) - set(some) == frozen
    assert all(torch.equal(v, all_of[name]) for name, v in some.items())
    network = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(CheckpointError, match="every weight equals that of the base"):
        trained_parameters(network, base, base)
    with pytest.raises(CheckpointError, match=r"other parameters than LlamaForCausalLM \(lm_head\.weight"):
        trained_parameters(network, write_tiny_llama(tmp_path / "tied", tie=True), None)


@pytest.fixture
def where(tmp_path: Path) -> Places:
    return places(tmp_path / "home", None)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = write_experts(tmp_path / "models")
    (folder / "knowledge" / "exp_avg_sq.safetensors").unlink()
    return folder


def recipe_of(models: Path, texts: Path, **parameters: Any) -> MergeRecipe:
    how = {"missing_curvature": "estimate", "estimate": {"data": str(texts), "samples": 4, "batch": 2}}
    entries = [{"model": str(models / name)} for name in EXPERTS]
    raw = {
        "merge_method": "ota",
        "base_model": str(models / "base"),
        "models": entries,
        "parameters": {"density": 0.4} | how | parameters,
    }
    return parse_recipe(raw)


def merged(recipe: MergeRecipe, where: Places, out: Path) -> tuple[Any, Path]:
    """(The record, the folder) of a staged merge with its estimates."""
    fetched = fetch_all(recipe, cache=where.cache, recipe_dir=None)
    jobs = estimate_jobs(recipe, fetched, where)
    made = {i: job.located(job.run(where), where) for i, job in jobs.items()}
    plan = planned(recipe, fetched, where, estimated=made)
    ref = merge_job(plan).run(where)
    engine.merge(recipe, out, inputs=plan.inputs)
    assert {path.name: path.read_bytes() for path in out.glob("*") if path.name != "record.json"} == {
        path.name: path.read_bytes() for path in Path(ref.uri).glob("*") if path.name != "record.json"
    }
    return read_record(Path(ref.uri)), Path(ref.uri)


def test_as_soon_as_one_expert_kept_none_those_of_all_are_estimated(
    models: Path, texts: Path, where: Places, tmp_path: Path
) -> None:
    recipe = recipe_of(models, texts, compression="rank1")
    record, folder = merged(recipe, where, tmp_path / "out")
    assert set(record.results["estimated"]) == set(EXPERTS)
    assert record.results["estimated"]["math"]["samples"] == 4 and record.inputs["moments0"].startswith("estimate:")
    card = (folder / "README.md").read_text()
    assert "## Second moments" in card and "- math: estimated: the mean squared gradient over 4 documents" in card
    assert merge_label(recipe) == "ota rho=0.40 rank1 estimate=4/texts/batch:2"

    # Where all kept theirs, nothing is estimated, unless the recipe says so; the same estimates are found.
    shutil.copy(models / "math" / "exp_avg_sq.safetensors", models / "knowledge")
    fetched = fetch_all(recipe, cache=where.cache, recipe_dir=None)
    assert estimate_jobs(recipe, fetched, where) == {}
    replacing = recipe_of(models, texts, estimate={"data": str(texts), "samples": 4, "batch": 2, "replace": True})
    jobs = estimate_jobs(replacing, fetched, where)
    assert list(jobs) == [0, 1] and all(job.find(where) for job in jobs.values())


def test_a_file_that_the_recipe_names_is_taken_and_the_difference_is_said(
    models: Path, texts: Path, where: Places, tmp_path: Path
) -> None:
    raw = recipe_of(models, texts).model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)
    raw["models"][0]["parameters"] = {"preconditioner_path": str(models / "math" / "exp_avg_sq.safetensors")}
    recipe = parse_recipe(raw)
    fetched = fetch_all(recipe, cache=where.cache, recipe_dir=None)
    jobs = estimate_jobs(recipe, fetched, where)
    made = {i: job.located(job.run(where), where) for i, job in jobs.items()}
    plan = planned(recipe, fetched, where, estimated=made)
    report = engine.merge(recipe, tmp_path / "out", inputs=plan.inputs)
    assert list(jobs) == [1] and list(report.results["estimated"]) == ["knowledge"]
    assert "- math: from training." in (tmp_path / "out" / "README.md").read_text()
    assert any("those of math come from training: their scales may differ" in note for note in report.notes)


def test_what_decides_an_estimate_is_in_its_fingerprint(models: Path, texts: Path, where: Places) -> None:
    fetched, base = (storage.fetch(str(models / name), cache=where.cache) for name in ("math", "base"))

    def step(**given: Any) -> str:
        one = settings(texts, **given)
        return EstimateJob.of(fetched, base, one, Texts.of(one, where), name="m").step.fingerprint

    first = step()
    assert first == step(replace=True) and len({first, step(seed=1), step(clip=None), step(batch=2), step(dtype="bfloat16")}) == 5
    moved = texts.with_name("moved.jsonl")
    shutil.copy(texts, moved)
    assert step(data=str(moved)) == first, "where the texts lie decides nothing"
    with pytest.raises(OtaError, match="2 points lie on the way from the base, which is not known"):
        EstimateJob.of(fetched, None, settings(texts, points=2), Texts.of(settings(texts), where), name="m")
    moved.write_text(moved.read_text() + '{"text": "more"}\n')
    assert step(data=str(moved)) != first
    given = settings(moved)
    asked = EstimateJob.of(fetched, None, given, Texts.of(given, where), name="m")
    moved.write_text('{"text": "other"}\n')
    with pytest.raises(OtaError, match="these texts are not what they were"):
        asked.run(where)


def test_random_tokens_need_no_texts_and_the_file_is_read_like_any_other(models: Path, where: Places) -> None:
    given = EstimateSettings(random_tokens=True, samples=4, batch=2, max_length=9)
    model = storage.fetch(str(models / "math"), cache=where.cache)
    job = EstimateJob.of(model, None, given, Texts.of(given, where), name="m")
    ref = job.run(where)
    record = store_of(where).read_record(ref)
    assert record.results["tokens"] == 4 * 8 and record.provenance["estimated"] is True
    moments = open_moments(job.located(ref, where).path)
    assert moments.estimated is not None and moments.estimated["random_tokens"] is True
    assert dict(moments.shapes()) == {name: tuple(one.shape) for name, one in read_tensors(models / "math").items()}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nowhere/texts.jsonl", "expert 'math': nowhere/texts.jsonl is no file"),
        ("nosuch", "there is no suite 'nosuch'"),
        ("demo-validation", "reads data of its own; name their folder"),
    ],
)
def test_texts_that_are_not_there(models: Path, where: Places, data: str, message: str) -> None:
    recipe = recipe_of(models, Path(data))
    with pytest.raises(OtaError, match=message):
        estimate_jobs(recipe, fetch_all(recipe, cache=where.cache, recipe_dir=None), where)


def test_texts_by_the_expert_s_capability(models: Path, where: Places, tmp_path: Path) -> None:
    for name in EXPERTS:
        write_rows(tmp_path / name / "train.jsonl", ROWS)
    recipe = recipe_of(models, Path("{capability}/train.jsonl"))
    jobs = estimate_jobs(recipe, fetch_all(recipe, cache=where.cache, recipe_dir=None), where, tmp_path)
    assert [job.texts.source for job in jobs.values()] == [str(tmp_path / name / "train.jsonl") for name in EXPERTS]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"missing_curvature": "error"}, "go together"),
        ({"estimate": None}, "go together"),
        ({"estimate": {"data": "a", "smaples": 4}}, "unknown key 'parameters.estimate.smaples'.*samples"),
        ({"estimate": {"data": "a", "samples": 9}}, "no multiple of batch 8"),
    ],
)
def test_recipes_that_say_half(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(OtaError, match=message):
        recipe_of(Path("m"), Path("t"), **parameters)
