"""The page of the documents that flipped: complete, cut where it says so, closed to what a document holds. A browser opens it in ``seen``."""

import json

import pandas as pd

from tasks.pages.documents import PAGE_ROWS, TABLE_ROWS, documents_html, documents_json, documents_note, flip_rows


def documents(n: int, *, texts: bool = True) -> pd.DataFrame:
    rows = [
        {
            "capability": capability, "task": f"{capability}_task", "document": f"{i:016x}", "prompt": f"What is {i}? <b>&</b>" if texts else None,
            "target": str(i) if texts else None, "base": float(i % 2), "expert": 1.0 if capability == "math" else float("nan"),
            "merge": float(i % 3 > 0), "expert_name": "math" if capability == "math" else None,
            "base_answer": "a" if texts else None, "expert_answer": None, "merge_answer": "</code><script>alert(1)</script>" if texts else None,
        }
        for capability in ("math", "code") for i in range(n)
    ]  # fmt: skip
    for row in rows:
        row["against_base"] = "won" if row["merge"] > row["base"] else "lost" if row["merge"] < row["base"] else "same"
        row["against_expert"] = "none" if row["expert_name"] is None else "lost" if row["merge"] < 1 else "same"
    return pd.DataFrame(rows)


def test_counts_are_those_of_the_table() -> None:
    math, code = flip_rows(documents(12))
    # Of 12: merge is wrong on 0, 3, 6, 9; the base right on odd ones.
    assert math == {
        "capability": "math", "n": 12, "expert": "math", "won_base": 4, "lost_base": 2, "won_expert": 0, "lost_expert": 4,
    }  # fmt: skip
    assert (code["expert"], code["won_expert"], code["lost_expert"]) == ("none", None, None)


def test_the_page_holds_what_flipped_and_nothing_runs() -> None:
    page = documents_html("ota & co", documents(12))
    assert page.count('<article class="document"') == 8 + 6, "math against base or expert, code against the base"
    assert "&lt;/code&gt;&lt;script&gt;alert(1)" in page and "<script>alert" not in page and "ota &amp; co" in page
    assert "are shown" not in page and page == documents_html("ota & co", documents(12))


def test_long_tables_are_cut_and_say_so() -> None:
    table = documents(3000)
    page = documents_html("ota", table)
    assert page.count('<article class="document"') == PAGE_ROWS and f"{PAGE_ROWS} of 3500 are shown" in page
    assert len(page) < 1_000_000
    held = json.loads(documents_json(table))
    assert len(held["data"]) == TABLE_ROWS and held["columns"][:4] == ["capability", "task", "document", "prompt"]
    assert documents_note(table) == "2,000 of 6,000 documents; long texts are cut"
    assert "6,000 without texts" in documents_note(documents(3000, texts=False))
    assert "Expected" not in documents_html("ota", documents(12, texts=False))
