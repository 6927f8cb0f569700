"""The stages without Prefect: what decides their fingerprints, and that an output that is there is not computed again."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from ota_core.artifact import ArtifactRef, read_record
from ota_core.engine import engine
from ota_core.plan.inputs import MergeInputs
from ota_core.recipe.recipe import MergeRecipe
from tasks import benchmark
from tasks.benchmark import Benchmark
from tasks.compress import compress_jobs, moments_step
from tasks.evaluation.kept import read_scores
from tasks.evaluation.scores import ModelScores
from tasks.evaluation.subject import Subject, merged_subject
from tasks.evaluation.suites import SuiteError, load_suite
from tasks.mask import mask_jobs, mask_step
from tasks.merge import assemble_job, merge_job, merge_step, shard_jobs, shards_of
from tasks.merging.inputs import model_sources
from tasks.merging.sources import Planned, planned
from tasks.settings import Places, places
from tasks.storage import models as storage
from tasks.storage.layout import write_expert_json
from tests.flows.merge_fixture import EXPERTS, write_experts, write_v
from tests.ota_core.plan.test_vocabulary import add_token
from tests.tiny_models import perturb
from tests.tiny_suite import write_rows, write_tiny_suite

OTA = {"density": 0.4, "compression": "rank1"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experts(tmp_path_factory.mktemp("models"))


@pytest.fixture
def where(tmp_path: Path) -> Places:
    return places(tmp_path / "home", None)


def recipe(
    models: Path, *, top: dict[str, Any] | None = None, own: dict[str, Any] | None = None, **parameters: Any
) -> MergeRecipe:
    """``own``: parameters of the first expert alone."""
    entries: list[dict[str, Any]] = [{"model": str(models / name)} for name in EXPERTS]
    entries[0]["parameters"] = own or {}
    raw = {"merge_method": "ota", "base_model": str(models / "base"), "models": entries, "parameters": OTA | parameters}
    return MergeRecipe.model_validate(raw | (top or {}))


def plan_of(recipe: MergeRecipe, where: Places) -> Planned:
    fetched = [storage.fetch(source, cache=where.cache) for (source,) in model_sources(recipe, None)]
    return planned(recipe, fetched, where)


def inputs_of(recipe: MergeRecipe, where: Places) -> MergeInputs:
    return plan_of(recipe, where).inputs


def all_stages(recipe: MergeRecipe, where: Places) -> list[ArtifactRef]:
    """Second moments, masks, and the merged model last."""
    plan = plan_of(recipe, where)
    moments = [job.run(where) for job in compress_jobs(plan)]
    plan = plan.with_artifacts(moments)
    masks = {i: job.run(where) for i, job in mask_jobs(plan).items()}
    return [*moments, *masks.values(), merge_job(plan.with_artifacts(masks=masks)).run(where)]


def fingerprints(recipe: MergeRecipe, where: Places) -> dict[str, str]:
    """Of the first expert's moments and mask, and of the merge."""
    inputs = inputs_of(recipe, where)
    return {
        "moments": moments_step(recipe, inputs.experts[0], 0).fingerprint,
        "mask": mask_step(recipe, inputs, 0).fingerprint,
        "merge": merge_step(recipe, inputs).fingerprint,
    }


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {stage for stage in before if before[stage] != after[stage]}


@pytest.mark.parametrize(
    ("options", "stale"),
    [
        ({"lambda": 1.5}, {"merge"}),
        ({"power": 0.25}, {"merge"}),
        ({"normalise": "global"}, {"merge"}),
        ({"masked_merge": "ties"}, {"merge"}),
        ({"top": {"dtype": "bfloat16"}}, {"merge"}),
        ({"own": {"scaling_factor": 2.0}}, {"merge"}),
        ({"density": 0.3}, {"mask", "merge"}),
        ({"own": {"density": 0.3}}, {"mask", "merge"}),
        ({"own": {"precond_threshold": 1e-26}}, {"mask", "merge"}),
        ({"scope": "per_tensor"}, {"mask", "merge"}),
        ({"metric": "magnitude"}, {"mask", "merge"}),
        ({"mask_curvature": "full"}, {"mask", "merge"}),
        ({"bias_correction": True}, {"mask", "merge"}),
        ({"top": {"tokenizer_source": "union"}}, {"mask", "merge"}),
        ({"compression": "none"}, {"moments", "mask", "merge"}),
        ({"compression": "log8"}, {"moments", "mask", "merge"}),
        # The defaults, spelled out.
        ({"lambda": 1, "power": 0.5, "density": 0.4, "fallback": "base", "own": {"density": 0.4}}, set()),
    ],
)
def test_options_stale_only_what_they_decide(models: Path, where: Places, options: dict[str, Any], stale: set[str]) -> None:
    assert changed(fingerprints(recipe(models), where), fingerprints(recipe(models, **options), where)) == stale


def test_a_rank_stales_what_is_compressed_with_it(models: Path, where: Places) -> None:
    prints = [fingerprints(recipe(models, compression="rank_k", **rank), where) for rank in ({}, {"rank": 4}, {"rank": 2})]
    assert prints[0] == prints[1] and changed(prints[1], prints[2]) == {"moments", "mask", "merge"}


@pytest.mark.parametrize("compression", [{"compression": "log8"}, {"compression": "rank_k", "rank": 2}], ids=str)
def test_every_compression_goes_through_the_stages(models: Path, where: Places, tmp_path: Path, compression: Any) -> None:
    wanted = recipe(models, **compression)
    *refs, merged = all_stages(wanted, where)
    assert [read_record(Path(ref.uri)).results["rank"] for ref in refs[:2]] == [compression.get("rank")] * 2 and len(refs) == 4
    engine.merge(wanted, tmp_path / "fused", inputs=inputs_of(wanted, where))
    names = [path.name for path in (tmp_path / "fused").glob("*.safetensors")]
    assert names and all((Path(merged.uri) / name).read_bytes() == (tmp_path / "fused" / name).read_bytes() for name in names)


def test_fingerprints_are_of_contents_not_of_places(models: Path, where: Places, tmp_path: Path) -> None:
    before = fingerprints(recipe(models), where)
    moved = shutil.copytree(models, tmp_path / "elsewhere")
    assert fingerprints(recipe(moved), places(tmp_path / "other home", "s3://bucket/prefix")) == before

    # Another expert beside the first: not the first's moments and mask.
    shutil.rmtree(moved / "knowledge")
    write_v(perturb(moved / "base", moved / "knowledge", seed=5), seed=5)
    assert changed(before, fingerprints(recipe(moved), where)) == {"merge"}
    # Where the vocabulary is joined from all models, a mask depends on all of them.
    union = {"top": {"tokenizer_source": "union"}}
    assert changed(fingerprints(recipe(models, **union), where), fingerprints(recipe(moved, **union), where)) == {"mask", "merge"}


@pytest.mark.parametrize(
    ("change", "stale"),
    [("weights", {"moments", "mask", "merge"}), ("v", {"moments", "mask", "merge"}), ("base", {"mask", "merge"})],
)
def test_other_inputs_stale_what_is_made_of_them(
    models: Path, where: Places, tmp_path: Path, change: str, stale: set[str]
) -> None:
    other = shutil.copytree(models, tmp_path / "other")
    if change == "v":
        write_v(other / "math", seed=9)
    else:
        folder = other / ("math" if change == "weights" else "base")
        shutil.copy(perturb(folder, tmp_path / "changed", seed=9) / "model.safetensors", folder / "model.safetensors")
    assert changed(fingerprints(recipe(models), where), fingerprints(recipe(other), where)) == stale


def test_another_step_of_the_optimizer_is_another_bias_correction(models: Path, where: Places, tmp_path: Path) -> None:
    other = shutil.copytree(models, tmp_path / "other")
    write_expert_json(other / "math", capability="math", base_model="base", trained_at="2026-11-21", step=5, beta2=0.999)
    corrected = {"bias_correction": True}
    assert "merge" in changed(fingerprints(recipe(models, **corrected), where), fingerprints(recipe(other, **corrected), where))
    assert "merge" not in changed(fingerprints(recipe(models), where), fingerprints(recipe(other), where))


def test_what_is_there_is_not_computed_again(models: Path, where: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = recipe(models)

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("computed again")

    first = all_stages(wanted, where)
    record = read_record(Path(first[-1].uri))
    assert record.provenance["sources"] == {"base": str(models / "base")} | {name: str(models / name) for name in EXPERTS}
    assert set(record.results["densities"]) == set(EXPERTS) and record.provenance["seconds"] > 0
    for name in ("compress_moments", "mask", "merge_into"):
        monkeypatch.setattr(engine, name, never)
    assert all_stages(wanted, where) == first


def test_scores_are_known_by_model_and_settings(
    models: Path, where: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, data = write_tiny_suite(tmp_path / "suite")
    suite = load_suite(str(file))

    def step(
        digest: str = "xxh3:1", path: Path = models / "base", data: Path = data, limit: int | None = None, **changes: Any
    ) -> str:
        subject = Subject(name="any", role="base", path=path, digest=digest)
        tests = suite.model_copy(update=changes)
        return Benchmark("tiny", str(data), limit, tests, data).job(subject).step.fingerprint

    same = step()
    assert (
        step(path=models / "math") == same
        and step(data=shutil.copytree(data, tmp_path / "copy")) == same
        and step(batch_size=3) == same
    )
    assert same not in {step(digest="xxh3:2"), step(limit=3), step(seed=1), step(num_fewshot=2)}
    assert step(limit=3) == step(**{"limit": 3}) != step(limit=4)
    write_rows(data / "facts.jsonl", [{"prompt": "?", "choices": ["a", "b"], "label": 0}])
    assert step() != same

    subject = Subject(name="base", role="base", path=models / "base", digest="xxh3:1")
    job = Benchmark.of(str(file), str(data), None, where).job(subject)
    write_rows(data / "facts.jsonl", [{"prompt": "?", "choices": ["a", "b"], "label": 1}])
    with pytest.raises(SuiteError, match="differ on this machine from those of the flow that asks"):
        job.run(where)
    job = Benchmark.of(str(file), str(data), None, where).job(subject)
    ref = job.run(where)
    scores = read_scores(where, ref)
    assert isinstance(scores, ModelScores) and set(scores.capabilities) == {"math", "knowledge"}
    assert read_record(Path(ref.uri)).results["capabilities"] == scores.by_capability()
    monkeypatch.setattr(benchmark, "score_model", lambda *args, **kwargs: pytest.fail("scored again"))
    assert job.run(where) == ref


def test_a_suite_is_checked_before_it_is_needed(where: Places, tmp_path: Path) -> None:
    file, data = write_tiny_suite(tmp_path)

    def check(data_dir: Path | None, limit: int | None) -> Benchmark:
        return Benchmark.of(str(file), data_dir and str(data_dir), limit, where).check()

    assert check(data, 3).limit == 3 and check(data, None).limit is None
    for limit in (0, -1):
        with pytest.raises(SuiteError, match=f"limit is {limit}; expected at least one"):
            check(data, limit)
    with pytest.raises(SuiteError, match="depend on data"):
        check(None, None)
    with pytest.raises(SuiteError, match="not a folder"):
        check(tmp_path / "nowhere", None)


def test_a_capability_called_base_gets_another_label(models: Path, where: Places, tmp_path: Path) -> None:
    """Tables and metrics know the base by its name. A recipe's own names are checked with the recipe; this one comes with the expert."""
    expert = shutil.copytree(models / "math", tmp_path / "expert")
    write_expert_json(expert, capability="base", base_model="base", trained_at="2026-11-20")
    entries = [{"model": str(expert)}, {"model": str(models / "knowledge")}]
    names = [expert.name for expert in inputs_of(recipe(models, top={"models": entries}), where).experts]
    assert names == ["base-2", "knowledge"]


def test_the_merged_models_digest_is_of_its_content(models: Path, where: Places) -> None:
    """The model card and the record do not decide scores."""
    wanted = recipe(models, top={"merge_method": "linear", "parameters": {}})
    (merged,) = all_stages(wanted, where)
    subject = merged_subject(where, "m", merged)
    assert (subject.role, subject.path) == ("merge", Path(merged.uri))
    copy = shutil.copytree(merged.uri, where.cache / "copy")
    (copy / "README.md").write_text("another card")
    assert storage.digest_folder(copy, cache=where.cache)[0] == subject.digest
    with open(copy / "model.safetensors", "r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x55")
    assert storage.digest_folder(copy, cache=where.cache)[0] != subject.digest


def test_notes_of_a_merge_in_parts_are_those_of_one_process(models: Path, where: Places, tmp_path: Path) -> None:
    chat = perturb(models / "base", tmp_path / "chat", seed=5)
    add_token(chat, "<|chat|>", 5)
    raw = {
        "merge_method": "linear", "base_model": str(models / "base"), "parameters": {"density": 0.5},
        "models": [{"model": str(chat)}, {"model": str(models / "math")}],
    }  # fmt: skip
    job = merge_job(plan_of(MergeRecipe.model_validate(raw), where), 5000)
    notes = read_record(Path(job.run(where).uri)).provenance["notes"]
    assert any("left out ('<|chat|>')" in note and "has the norm" in note for note in notes)
    assert any("without meaning for linear, and ignored, as mergekit ignores them: parameters.density" in note for note in notes)
    elsewhere = places(tmp_path / "elsewhere", None)
    files, surveyed = shards_of(job, elsewhere)
    assert len(files) > 1 and not surveyed
    parts = {part.shard: part.run(elsewhere) for part in shard_jobs(job, files, None)}
    whole = assemble_job(job, parts).run(elsewhere)
    assert read_record(Path(whole.uri)).provenance["notes"] == notes
