"""What a merge answered, document by document: the table for MLflow, how many documents flipped, and the page that shows those."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from tasks.evaluation.answers import at_most, flipped
from tasks.pages.html import Section, template, to_html
from tasks.pages.tables import COUNT, Column, Table
from tasks.tracking.run import DOCUMENTS_HTML

if TYPE_CHECKING:
    import pandas as pd

TABLE_ROWS = 2000
"""Rows of MLflow's table; with texts of at most 5,000 characters each, some megabytes."""
PAGE_ROWS = 600

_PAGE = template("""
<p>Documents that <strong>{{ name }}</strong> won or lost against the base, or against the best expert of a capability.
{% if cut %}<strong>{{ shown }} of {{ total }} are shown</strong>, of each capability an equal share; scores of all are in the run's samples.{% endif %}
Prompts and answers are cut where they are long; of a prompt the end is shown.</p>
<p class="filters">
<label>Capability <select data-filter="capability"><option value="">all</option>{% for one in capabilities %}<option>{{ one }}</option>{% endfor %}</select></label>
<label>Against the base <select data-filter="base"><option value="">all</option><option>won</option><option>lost</option><option>same</option></select></label>
<label>Against the expert <select data-filter="expert"><option value="">all</option><option>won</option><option>lost</option><option>same</option></select></label>
<span data-count>{{ shown }}</span> documents
</p>
{% for row in rows %}
<article class="document" data-capability="{{ row.capability }}" data-base="{{ row.against_base }}" data-expert="{{ row.against_expert }}">
<p class="soft">{{ row.capability }}, {{ row.task }}, document {{ row.document }}
{%- for which in ("base", "expert") %}{% if row["against_" + which] in ("won", "lost") %}, <strong class="{{ "good-text" if row["against_" + which] == "won" else "bad-text" }}">{{ row["against_" + which] }} against the {{ which }}</strong>{% endif %}{% endfor %}.</p>
{% if row.prompt is not none %}<pre>{{ row.prompt }}</pre>
<p class="soft">Expected: <code>{{ row.target }}</code></p>{% endif %}
<dl>
{% for which, label in (("base", "base"), ("expert", row.expert_name), ("merge", "this merge")) %}{% if row[which] is not none %}
<dt>{{ label }}: {{ row[which] }}</dt><dd>{% if row[which + "_answer"] is not none %}<code>{{ row[which + "_answer"] }}</code>{% endif %}</dd>
{% endif %}{% endfor %}
</dl>
</article>
{% endfor %}
""")


def documents_json(table: pd.DataFrame) -> str:
    """The table as MLflow's UI reads one (``mlflow.log_table``'s form), at most 2,000 rows, what flipped first."""
    columns = [
        "capability", "task", "document", "prompt", "target", "base", "expert_name", "expert", "merge", "base_answer", "expert_answer",
        "merge_answer", "against_base", "against_expert",
    ]  # fmt: skip
    return str(at_most(table, TABLE_ROWS)[columns].to_json(orient="split", index=False))


def documents_note(table: pd.DataFrame) -> str:
    """What the table lacks, in a sentence; for the run's tags."""
    rows = f"{min(len(table), TABLE_ROWS):,} of {len(table):,} documents"
    without = int(table["prompt"].isna().sum())
    if not without:
        return f"{rows}; long texts are cut"
    return f"{rows}; {without:,} without texts: their scores were kept without them, by an earlier version or a suite with documents: false"


def flip_rows(table: pd.DataFrame) -> Iterator[dict[str, str | float | None]]:
    """How many documents of each capability the merge won and lost; None against what is not there."""
    for capability, of in table.groupby("capability", sort=False):
        counts = {
            f"{what}_{which}": int((of[f"against_{which}"] == what).sum()) if (of[f"against_{which}"] != "none").any() else None
            for which in ("base", "expert") for what in ("won", "lost")
        }  # fmt: skip
        yield {"capability": str(capability), "n": len(of), "expert": next(iter(of["expert_name"].dropna()), "none"), **counts}


def flips(rows: Iterable[Mapping[str, str | float | None]]) -> Table:
    """``flip_rows`` as a table."""
    import pandas as pd

    columns = [
        Column("capability"), Column("n", "documents", COUNT), Column("won_base", "won against the base", COUNT),
        Column("lost_base", "lost", COUNT), Column("expert", "best expert"), Column("won_expert", "won against it", COUNT),
        Column("lost_expert", "lost to it", COUNT),
    ]  # fmt: skip
    said = f"Documents on which the merge scores higher, or lower. The page {DOCUMENTS_HTML} shows them with prompts and answers."
    return Table("Documents that flipped", pd.DataFrame(list(rows)), columns, [said])


def documents_html(name: str, table: pd.DataFrame) -> str:
    """The documents that flipped, with prompts and answers, to be filtered without a network. The same table gives the same bytes."""
    changed = flipped(table)
    shown = at_most(changed, PAGE_ROWS)
    records: list[dict[str, Any]] = shown.astype(object).where(shown.notna(), None).to_dict("records")
    for row in records:
        row |= {which: f"{100 * row[which]:g} %" for which in ("base", "expert", "merge") if row[which] is not None}
    body = _PAGE.render(
        name=name, rows=records, shown=len(records), total=len(changed), cut=len(records) < len(changed),
        capabilities=list(dict.fromkeys(changed["capability"])),
    )  # fmt: skip
    return to_html(
        f"{name}: documents that flipped", [Section("Counts", [flips(flip_rows(table))]), Section("Documents", [Markup(body)])]
    )
