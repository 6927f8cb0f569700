"""The pictures of an analysis show the table's numbers, each at its place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
import pytest
import vl_convert

from ota_core.errors import OtaError
from ota_core.plan.roles import ROLES
from tasks.pages.pictures import picture as drawing
from tasks.pages.pictures.analysis import pictures_of
from tasks.pages.pictures.pairs import ALL_PAIRS
from tasks.pages.pictures.picture import Picture
from tests.tasks.pages.analysis_table import COLUMNS, COMPRESSIONS, EXPERTS, OUTSIDE, _row, analysis_table
from tests.tasks.pages.page_reader import svg

LAYERS = 3
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return analysis_table(layers=LAYERS)


@pytest.fixture(scope="module")
def pictures(table: pd.DataFrame) -> dict[str, Picture]:
    return pictures_of(table)


def datasets(picture: Picture) -> Iterator[Rows]:
    yield from drawing.spec(picture.chart)["datasets"].values()


def one(picture: Picture) -> Rows:
    (rows,) = datasets(picture)
    return rows


def rows_of(table: pd.DataFrame, analysis: str, measure: str, variant: str = "") -> pd.DataFrame:
    return table[(table["analysis"] == analysis) & (table["measure"] == measure) & (table["variant"] == variant)]


def places(rows: pd.DataFrame) -> dict[tuple[Any, ...], float]:
    """(expert, layer, role) → value of all that is no sum."""
    parts = rows[rows["role"] != "all"]
    keys = zip(parts["expert"], parts["layer"].astype(object).where(parts["layer"].notna(), None), parts["role"], strict=True)
    return dict(zip(keys, parts["value"], strict=True))


def shown(rows: Rows, field: str = "value") -> dict[tuple[Any, ...], float]:
    return {(row["expert"], row["layer"], row["role"]): row[field] for row in rows}


def test_each_part_has_its_pictures_and_each_is_valid(pictures: dict[str, Picture]) -> None:
    assert list(pictures) == [
        "density", "density_difference", "sparsity", "empty", "curvature_overlap", "curvature_overlap_layers", "task_vector_layers",
        "task_vector_roles", "task_vector_pairs", "task_vector_pairs_layers", "compression",
    ]  # fmt: skip
    for picture in pictures.values():
        assert picture.title and picture.caption.endswith(".")
        assert vl_convert.vegalite_to_vega(drawing.spec(picture.chart))["marks"]


def test_nothing_is_cut_and_axes_say_what_they_show(pictures: dict[str, Picture]) -> None:
    said = {
        "density": ["kept by FFG", "layer", "final norm", "embed", *EXPERTS],
        "density_difference": ["FFG − magnitude (percentage points)"],
        "sparsity": ["kept share of a row or column", "share of them", "magnitude", "math: rows", "knowledge: columns"],
        "empty": ["share with nothing kept", "rows", "columns"],
        "curvature_overlap": ["cosine of √v", "Spearman ρ of v", "overlap (1 = the same)"],
        "task_vector_layers": ["‖Δ‖ (L2 norm)", "‖Δ‖ / ‖θ₀‖", "layer"],
        "task_vector_pairs": ["cosine (0 = unrelated)", "moved in opposite directions (50% = by chance)"],
        "compression": ["bytes per parameter (log scale)", "0 = exact", *COMPRESSIONS],
    }
    for name, picture in pictures.items():
        drawn = svg(picture.chart)
        assert "…" not in drawn
        assert "undefined" not in drawn and "NaN" not in drawn
        missing = [text for text in said.get(name, []) if f">{text}<" not in drawn]
        assert not missing, name


def test_density_shows_every_place_of_every_expert(table: pd.DataFrame, pictures: dict[str, Picture]) -> None:
    ffg = places(rows_of(table, "localisation", "density", "curvature"))
    assert shown(one(pictures["density"])) == ffg
    assert {row["row"] for row in one(pictures["density"]) if row["layer"] is None} == {"embed", "final norm", "head"}
    assert "math 40 %" in pictures["density"].caption
    magnitude = places(rows_of(table, "localisation", "density", "magnitude"))
    rows = one(pictures["density_difference"])
    assert shown(rows) == pytest.approx({key: 100 * (value - magnitude[key]) for key, value in ffg.items()})
    assert shown(rows, "FFG") == ffg and shown(rows, "magnitude") == magnitude


def test_captions_say_at_which_density_masks_are_compared(table: pd.DataFrame, pictures: dict[str, Picture]) -> None:
    for name in ("curvature_overlap", "curvature_overlap_layers"):
        assert "40 %" in pictures[name].caption
    assert (
        "masks keep: math 40 %, code 40 %, precise_if 40 %, general_if 40 %, knowledge 40 %." in pictures["compression"].caption
    )
    other = table.copy()
    other.loc[table["measure"] == "jaccard", "at"] = 0.3125
    other.loc[(table["measure"] == "mask_jaccard") & (table["expert"] == "code"), "at"] = 0.02
    drawn = pictures_of(other)
    assert "largest v, 31.2 % of its elements" in drawn["curvature_overlap"].caption
    assert "math 40 %, code 2 %," in drawn["compression"].caption
    # A table of before, which does not tell.
    before = pictures_of(table.assign(at=table["at"].where(~table["measure"].isin(["jaccard", "mask_jaccard"]))))
    assert "%" not in before["curvature_overlap"].caption
    assert before["compression"].caption.endswith("a point for each expert.")


def test_the_mask_that_is_drawn_is_not_called_the_merges(pictures: dict[str, Picture]) -> None:
    """A merge by magnitude, and one that masks nothing, has the same picture."""
    assert (
        "ranks by curvature" in pictures["density"].caption
        and "whether or not the merge masks by it" in pictures["density"].caption
    )


def test_colours_of_differences_are_even_to_both_sides(pictures: dict[str, Picture]) -> None:
    for name, middle in (("density_difference", 0.0), ("task_vector_pairs", None)):
        found = [s["domain"] for s in scales(drawing.spec(pictures[name].chart)) if s.get("scheme") == "blueorange"]
        assert found
        for low, high in found:
            assert (low + high) / 2 == pytest.approx(middle) if middle is not None else (low + high) / 2 in {0.0, 0.5}


def scales(spec: Any) -> Iterator[dict[str, Any]]:
    if isinstance(spec, dict):
        if "scheme" in spec:
            yield spec
        for value in spec.values():
            yield from scales(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from scales(value)


def test_histograms_count_the_rows_and_columns(table: pd.DataFrame, pictures: dict[str, Picture]) -> None:
    rows = pd.DataFrame(one(pictures["sparsity"]))
    for measure in ("rows", "columns"):
        for variant, how in (("curvature", "FFG"), ("magnitude", "magnitude")):
            source = rows_of(table, "sparsity", measure, variant)
            drawn = rows[(rows["measure"] == measure) & (rows["how"] == how)]
            for role, layers in (("all", source["layer"].isna()), ("q", source["layer"].notna())):
                expected = source[(source["role"] == role) & layers].groupby(["expert", "at"])["value"].sum()
                found = drawn[drawn["role"] == role].groupby(["expert", "at"])["count"].sum()
                assert found.to_dict() == expected[expected > 0].to_dict()
    assert rows.groupby(["expert", "measure", "how", "role"])["share"].sum().to_numpy() == pytest.approx(1.0)
    ffg, magnitude = rows[rows["how"] == "FFG"], rows[rows["how"] == "magnitude"]
    assert (ffg["left"] == ffg["at"]).all() and magnitude["left"].to_numpy() == pytest.approx(magnitude["at"].to_numpy() + 0.025)


def test_empty_rows_are_those_of_the_whole_expert(table: pd.DataFrame, pictures: dict[str, Picture]) -> None:
    source = table[table["measure"].isin(["empty_rows", "empty_columns"]) & (table["role"] == "all") & table["layer"].isna()]
    names = {"curvature": "FFG", "magnitude": "magnitude"}
    expected = {(r.measure.removeprefix("empty_"), r.expert, names[r.variant]): r.value for r in source.itertuples()}
    assert {(r["panel"], r["expert"], r["how"]): r["value"] for r in one(pictures["empty"])} == expected


@pytest.mark.parametrize(
    ("name", "analysis", "measures"),
    [
        ("curvature_overlap", "curvature_overlap", ["cosine_sqrt_v", "spearman", "jaccard"]),
        ("task_vector_pairs", "task_vector", ["cosine", "sign_conflict"]),
    ],
)
def test_pairs_stand_on_both_sides_and_by_layer(
    table: pd.DataFrame, pictures: dict[str, Picture], name: str, analysis: str, measures: list[str]
) -> None:
    squares, layers = list(datasets(pictures[name])), list(datasets(pictures[f"{name}_layers"]))
    assert len(squares) == len(layers) == len(measures)
    for measure, square, cells in zip(measures, squares, layers, strict=True):
        source = rows_of(table, analysis, measure)
        whole = source[(source["role"] == "all") & source["layer"].isna()]
        expected = {frozenset((r.expert, r.other)): r.value for r in whole.itertuples()}
        assert {(r["expert"], r["other"]): r["value"] for r in square} == {
            pair: expected[frozenset(pair)] for pair in permutations(EXPERTS, 2)
        }
        parts = source[source["role"] != "all"]
        by_pair = {
            (f"{r.expert} – {r.other}", r.role, None if pd.isna(r.layer) else r.layer): r.value for r in parts.itertuples()
        }
        assert {(r["pair"], r["role"], r["layer"]): r["value"] for r in cells if r["pair"] != ALL_PAIRS} == by_pair
        q0 = [value for (_, role, layer), value in by_pair.items() if (role, layer) == ("q", 0)]
        (mean,) = (r["value"] for r in cells if (r["pair"], r["role"], r["layer"]) == (ALL_PAIRS, "q", 0))
        assert mean == pytest.approx(sum(q0) / len(q0))


def test_task_vectors_by_layer_and_role(table: pd.DataFrame, pictures: dict[str, Picture]) -> None:
    for measure, rows in zip(("norm", "relative_norm"), datasets(pictures["task_vector_layers"]), strict=True):
        source = rows_of(table, "task_vector", measure)
        source = source[(source["role"] == "all") & source["layer"].notna()]
        assert {(r["expert"], r["layer"]): r["value"] for r in rows} == {
            (r.expert, r.layer): r.value for r in source.itertuples()
        }
    assert shown(one(pictures["task_vector_roles"])) == places(rows_of(table, "task_vector", "relative_norm"))


def test_compression_puts_loss_against_bytes(table: pd.DataFrame, pictures: dict[str, Picture]) -> None:
    for measure, rows in zip(("sqrt_error", "mask_jaccard", "saliency_spearman"), datasets(pictures["compression"]), strict=True):
        source = table[(table["measure"] == measure) & (table["role"] == "all") & table["layer"].isna()]
        assert {(r["expert"], r["variant"]): r[measure] for r in rows} == {
            (r.expert, r.variant): r.value for r in source.itertuples()
        }
        assert {r["variant"]: r["bytes_per_param"] for r in rows} == COMPRESSIONS


def test_what_the_table_lacks_makes_no_picture(table: pd.DataFrame) -> None:
    assert pictures_of(table.iloc[:0]) == {}
    assert set(pictures_of(table[table["analysis"] == "compression"])) == {"compression"}
    assert "density_difference" not in pictures_of(table[table["variant"] != "magnitude"])
    alone = pictures_of(analysis_table(experts=["math"], layers=1))
    assert not [name for name in alone if "pairs" in name or "overlap" in name]
    assert svg(alone["density"].chart)


def test_two_experts_need_no_menu_and_models_without_a_head_no_row() -> None:
    table = analysis_table(experts=["a", "b"], layers=2)
    pictures = pictures_of(table[table["role"] != "head"])
    spec = drawing.spec(pictures["curvature_overlap_layers"].chart)
    assert [p for p in spec["params"] if "bind" in p] == []
    assert {row["pair"] for rows in spec["datasets"].values() for row in rows} == {"a – b"}
    assert OUTSIDE[-1] not in {row["row"] for row in one(pictures["density"])}


def test_every_role_has_a_row_inside_and_outside_of_the_blocks(table: pd.DataFrame) -> None:
    """Of every role that the analysis knows: what has no row is missing from a picture without a word."""
    q = table[(table["layer"] == 0) & (table["role"] == "q")]
    inside = pd.concat([q.assign(role=role) for role in ROLES if role not in {"embed", "head"}], ignore_index=True)
    outside = pd.concat([q.assign(role=role, layer=pd.array([pd.NA] * len(q), "Int64")) for role in ROLES], ignore_index=True)
    pictures = pictures_of(pd.concat([inside, outside], ignore_index=True))
    for name in ("density", "density_difference", "task_vector_roles"):
        rows = [row for row in one(pictures[name]) if row["expert"] == "math"]
        assert {row["role"] for row in rows if row["layer"] == 0} == {*ROLES} - {"embed", "head"}
        assert len({row["row"] for row in rows}) == len(rows) == 2 * len(ROLES) - 2
    (menu,) = (p["bind"]["options"] for p in drawing.spec(pictures["sparsity"].chart)["params"] if "bind" in p)
    assert set(menu) == {"all", *ROLES}


def test_a_fused_model_shows_its_own_projections_alone(table: pd.DataFrame) -> None:
    fused = table[~table["role"].isin(["q", "k", "v", "gate", "up"])]
    drawn = svg(pictures_of(fused)["density"].chart)
    assert {name: f">{name}<" in drawn for name in ("qkv", "gate_up", "o", "q", "gate")} == {
        "qkv": True, "gate_up": True, "o": True, "q": False, "gate": False,
    }  # fmt: skip


def test_a_table_without_a_column_is_refused(table: pd.DataFrame) -> None:
    with pytest.raises(OtaError, match=r"lacks the columns \['role'\]"):
        pictures_of(table.drop(columns="role"))


@pytest.mark.parametrize(("layers", "count"), [(2, 4), (24, 64)])
def test_the_experts_of_a_mixture(layers: int, count: int) -> None:
    """Each number in the cell of its layer, expert and model; the caption has those over all layers."""
    rng = np.random.default_rng(layers)
    rows = [
        _row("moe", "density", rng.random(), (layer, role), expert=expert, variant=variant, at=float(at))
        for expert in ("math", "code") for at in range(count) for layer in (*range(layers), None)
        for role in ("all", "gate") for variant in ("curvature", "magnitude")
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=list(COLUMNS)).astype({"layer": "Int64", "elements": "Int64"})
    picture = pictures_of(pd.concat([analysis_table(("math", "code"), layers), table], ignore_index=True))["mixture"]
    wanted = table[(table["role"] == "all") & (table["variant"] == "curvature")]
    cells = wanted[wanted["layer"].notna()]
    seen = {(row["expert"], row["layer"], row["at"]): row["value"] for row in one(picture)}
    assert seen == dict(zip(zip(cells["expert"], cells["layer"], cells["at"], strict=True), cells["value"], strict=True))
    whole = wanted[wanted["layer"].isna() & (wanted["expert"] == "code")]
    low, high = whole.loc[whole["value"].idxmin()], whole.loc[whole["value"].idxmax()]
    said = (
        f"code from {100 * low['value']:.3g} % (number {low['at']:.0f}) to {100 * high['value']:.3g} % (number {high['at']:.0f})"
    )
    assert said in picture.caption
    texts = svg(picture.chart)
    assert {"math", "code", "number", "layer"} <= set(re.findall(r">([^<>]+)</text>", texts))
    assert "mixture" not in pictures_of(analysis_table(("math", "code"), layers))
