"""The analysis as a stage: its tables, what decides its fingerprint, and that it is computed once."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ota_core import analysis as core
from ota_core.analysis import AnalysisOptions, Row
from ota_core.errors import ArtifactError, OtaError
from ota_core.plan.roles import ROLES
from ota_core.recipe.recipe import MergeRecipe
from tasks.analyse import analyse_job, analysis_options, analysis_step
from tasks.compress import compress_jobs
from tasks.mask import mask_jobs
from tasks.merging.inputs import model_sources
from tasks.merging.sources import Planned, planned
from tasks.pages.analysis import TYPES, densest_cells, frame, read_analysis, read_settings, read_tables
from tasks.settings import Places, places
from tasks.storage import models as storage
from tests.flows.merge_fixture import EXPERTS, write_experts

OTA = {"density": 0.4, "compression": "rank1"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experts(tmp_path_factory.mktemp("models"))


@pytest.fixture
def where(tmp_path: Path) -> Places:
    return places(tmp_path / "home", None)


def recipe(models: Path, method: str = "ota", own: dict[str, Any] | None = None, **parameters: Any) -> MergeRecipe:
    """``own``: parameters of the first expert alone."""
    entries: list[dict[str, Any]] = [{"model": str(models / name)} for name in EXPERTS]
    entries[0]["parameters"] = own or {}
    given = (OTA if method == "ota" else {}) | parameters
    return MergeRecipe.model_validate(
        {"merge_method": method, "base_model": str(models / "base"), "models": entries, "parameters": given}
    )


def plan_of(recipe: MergeRecipe, where: Places) -> Planned:
    fetched = [storage.fetch(source, cache=where.cache) for (source,) in model_sources(recipe, None)]
    return planned(recipe, fetched, where, memory="256MiB")


def print_of(recipe: MergeRecipe, where: Places, **options: Any) -> str:
    return analysis_step(recipe, plan_of(recipe, where).inputs, AnalysisOptions(**options)).fingerprint


def test_the_table_is_tidy_and_survives_its_files(models: Path, where: Places) -> None:
    wanted = recipe(models)
    ref = analyse_job(plan_of(wanted, where)).run(where)
    table = read_analysis(where, ref)
    assert {name: str(kind) for name, kind in table.dtypes.items()} == TYPES and list(TYPES) == list(Row._fields)
    assert not table.duplicated(["analysis", "expert", "other", "layer", "role", "variant", "measure", "at"]).any()
    assert set(table.analysis) == {"localisation", "sparsity", "curvature_overlap", "task_vector", "compression"}
    assert set(table.role) <= {*ROLES, "all"} and set(table.expert) == {"math", "knowledge"}
    assert set(table.layer.dropna()) == {0, 1} and table[table.role.isin(["embed", "head"])].layer.isna().all()
    assert table.groupby("measure").unit.nunique().eq(1).all()
    assert set(table.unit) == {"fraction", "count", "norm", "bytes/parameter", ""}
    folder = Path(ref.uri)
    csv = pd.read_csv(folder / "analysis.csv", dtype={"layer": "Int64"}, keep_default_na=True)
    assert csv.shape == table.shape and csv.value.to_numpy() == pytest.approx(table.value.to_numpy(), rel=1e-15, nan_ok=True)
    said = read_settings(folder)
    assert said["settings"]["experts"] == ["math", "knowledge"] and said["left_out"] == [] and said["notes"] == []
    assert json.loads((folder / "record.json").read_text())["results"] == said
    # Rows and columns of every matrix are counted once.
    rows = table[(table.measure == "rows") & (table.role == "all") & (table.variant == "curvature") & (table.expert == "math")]
    assert rows.value.sum() == rows.elements.iloc[0] and list(rows["at"]) == pytest.approx([i / 20 for i in range(20)])


@pytest.mark.parametrize(
    ("changes", "stale"),
    [
        ({"lambda": 1.5}, False),
        ({"power": 0.25}, False),
        ({"masked_merge": "ties"}, False),
        ({"fallback": "mean"}, False),
        ({"own": {"scaling_factor": 2.0}}, False),
        ({"own": {"density": 0.4}}, False),
        ({"own": {"density": 0.3}}, True),
        ({"own": {"precond_threshold": 1e-26}}, True),
        ({"density": 0.3}, True),
        ({"scope": "per_tensor"}, True),
        ({"metric": "magnitude"}, True),
        ({"mask_curvature": "full"}, True),
        ({"compression": "none"}, True),
        ({"bias_correction": True}, True),
    ],
    ids=str,
)
def test_what_decides_the_masks_decides_the_fingerprint(
    models: Path, where: Places, changes: dict[str, Any], stale: bool
) -> None:
    assert (print_of(recipe(models, **changes), where) != print_of(recipe(models), where)) == stale


def test_options_and_contents_decide_it_places_do_not(models: Path, where: Places, tmp_path: Path) -> None:
    one = recipe(models)
    prints = [print_of(one, where, **options) for options in ({}, {"density": 0.1}, {"compressions": ("rank1",)})]
    assert len(set(prints)) == 3
    moved = shutil.copytree(models, tmp_path / "elsewhere")
    assert print_of(recipe(moved), places(tmp_path / "other", None)) == prints[0]
    shutil.copy(moved / "knowledge" / "exp_avg_sq.safetensors", moved / "math" / "exp_avg_sq.safetensors")
    assert print_of(recipe(moved), places(tmp_path / "other", None)) != prints[0]


def test_the_inputs_of_later_stages_name_the_same_analysis(models: Path, where: Places) -> None:
    wanted = recipe(models)
    raw = plan_of(wanted, where)
    staged = raw.with_artifacts([job.run(where) for job in compress_jobs(raw)])
    staged = staged.with_artifacts(masks={i: job.run(where) for i, job in mask_jobs(staged).items()})
    with staged.sources.opened(where, 2**28, raw_moments=True) as ready:
        assert all(expert.masks and expert.moments != expert.full_moments for expert in ready.experts)
        assert analysis_step(wanted, ready) == analysis_step(wanted, raw.inputs)
    first = read_analysis(where, analyse_job(raw).run(where))
    shutil.rmtree(Path(where.artifacts) / "analysis")
    pd.testing.assert_frame_equal(read_analysis(where, analyse_job(staged).run(where)), first)


def test_a_linear_merge_is_analysed_with_the_second_moments_that_lie_there(models: Path, where: Places) -> None:
    wanted = recipe(models, "linear")
    plan = plan_of(wanted, where)
    job = analyse_job(plan, analysis_options(compressions="rank1"))
    step, inputs = job.step, plan.inputs
    assert set(step.inputs) == {"base", "expert0", "moments0", "expert1", "moments1"}
    ref = job.run(where)
    assert set(read_analysis(where, ref).analysis) >= {"curvature_overlap", "compression"}
    assert "merge masks nothing of math, knowledge" in read_settings(Path(ref.uri))["notes"][0]
    off = analysis_step(wanted, inputs, analysis_options(curvature="off"))
    assert set(off.inputs) == {"base", "expert0", "expert1"} and off.fingerprint != step.fingerprint


def test_what_is_there_is_not_computed_again(models: Path, where: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = recipe(models)
    job = analyse_job(plan_of(wanted, where), analysis_options(compressions="-"))
    ref = job.run(where)
    monkeypatch.setattr(core, "analyse", None)
    assert job.run(where) == ref


def test_options_as_a_person_writes_them() -> None:
    assert analysis_options(compressions="log8, rank1").compressions == ("rank1", "log8")
    assert analysis_options(compressions="-").compressions == ()
    with pytest.raises(OtaError, match="compressions: got 'rank2', expected some of none, rank1, log8, rank_k"):
        analysis_options(compressions="rank1,rank2")
    with pytest.raises(OtaError, match=r"density: got 1\.5; input should be less than or equal to 1"):
        analysis_options(density=1.5)
    with pytest.raises(OtaError, match="curvature: got 'maybe'; input should be 'auto', 'require' or 'off'"):
        analysis_options(curvature="maybe")


def test_other_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no analysis\.parquet; make it with ota analyse"):
        read_tables(tmp_path)
    frame([]).drop(columns="unit").to_parquet(tmp_path / "analysis.parquet")
    with pytest.raises(ArtifactError, match="expected analysis, expert"):
        read_tables(tmp_path)


def test_the_densest_cells_are_those_of_all_experts(models: Path, where: Places) -> None:
    wanted = recipe(models)
    ref = analyse_job(plan_of(wanted, where), analysis_options(compressions="-")).run(where)
    cells = densest_cells(read_analysis(where, ref), count=100)
    assert list(cells.columns) == ["layer", "role", "size", "curvature density", "magnitude density"]
    assert cells["curvature density"].is_monotonic_decreasing and "norm" not in set(cells.role)
    assert cells["size"].sum() == pytest.approx(1)
    assert (cells["size"] * cells["curvature density"]).sum() == pytest.approx(0.4, abs=0.02)
