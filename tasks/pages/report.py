"""The report of one merge: a single HTML file that opens without a network, beside the model and among the artifacts of its MLflow run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from statistics import NormalDist
from typing import Any, Literal
from urllib.parse import urlsplit

import pandas as pd
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, field_validator

from tasks.evaluation.gate import GateDecision
from tasks.evaluation.scores import AVERAGE, ROLES, STDERR, capability_columns
from tasks.evaluation.smoke import Smoke
from tasks.pages import documents, gate, scores
from tasks.pages.html import Block, Section, template, to_html
from tasks.pages.pictures.analysis import pictures_of
from tasks.pages.pictures.scales import scale_picture
from tasks.pages.pictures.scores import pictures_of_scores
from tasks.pages.tables import COUNT, NOT_MEASURED, PERCENT, Column, Table, Unit
from tasks.tracking.run import InputRef

Row = dict[str, str | float | None]
_CONFIDENCE = 0.95
"""One-sided, of a fall below the base that is called one: as the gate's, which has the pairs of documents to look closer."""


class MergeReport(BaseModel):
    """All that the report shows. Parts that were not computed are left empty, and the page says so or goes without."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: str
    method: str
    recipe_yaml: str
    record: dict[str, Any]
    """``record.json`` of the merged model."""
    inputs: tuple[InputRef, ...]
    created: datetime
    """With its time zone."""
    model_uri: str | None = None
    model_digest: str | None = None
    scores: tuple[Row, ...] = ()
    """Base, experts, merge, as ``tasks.evaluation.scores.rows_of`` gives them; scores in 0…1."""
    losses: tuple[Row, ...] = ()
    """As ``tasks.evaluation.scores.loss_rows`` gives them; empty where the suite measures none."""
    suite: str = ""
    """The name of what was measured."""
    limit: int | None = None
    """Documents per task, where not all were to be scored."""
    documents: dict[str, int] = {}
    """Capability to how many documents were scored."""
    analysis: pd.DataFrame | None = None
    """The tidy table of ``ota analyse``."""
    analysis_notes: tuple[str, ...] = ()
    """What the analysis was taken over and what it left out, in sentences."""
    unanalysed: str = ""
    """Why there is no analysis, where one was wanted."""
    gate: GateDecision | None = None
    smoke: Smoke | None = None
    flips: tuple[Row, ...] = ()
    """As ``tasks.pages.documents.flip_rows`` gives them; empty where no documents are shown."""
    links: dict[str, str] = {}
    """Text to http(s) address: the MLflow run, the Prefect run."""
    versions: dict[str, str] = {}
    """Program or library to version."""

    @field_validator("links")
    @classmethod
    def _only_pages(cls, links: dict[str, str]) -> dict[str, str]:
        for text, url in links.items():
            if urlsplit(url).scheme not in {"http", "https"}:
                raise ValueError(f"the link {text!r} leads to {url!r}; expected an address that begins with http:// or https://")
        return links

    @field_validator("created")
    @classmethod
    def _in_utc(cls, created: datetime) -> datetime:
        if created.tzinfo is None:
            raise ValueError(f"created is {created}, without a time zone; give it one, for example datetime.now(UTC)")
        return created.astimezone(UTC)


_HEADER = template("""
<h1>{{ name }}</h1>
<p>{{ report.method }} merge of {{ experts | join(", ") }}{% if base %} over {{ base }}{% endif %}.</p>
<p class="verdict {{ mood }}">{{ verdict }}</p>
<dl>
<dt>Made</dt><dd>{{ report.created.strftime("%Y-%m-%d %H:%M UTC") }}{% if versions %} with {{ versions }}{% endif %}</dd>
{% if report.model_uri %}<dt>Model</dt><dd><code>{{ report.model_uri }}</code></dd>{% endif %}

{% if report.model_digest %}<dt>Digest</dt><dd><code>{{ report.model_digest }}</code></dd>{% endif %}

{% if fingerprint %}<dt>Fingerprint</dt><dd><code>{{ fingerprint }}</code></dd>{% endif %}

{% if report.links %}<dt>See also</dt><dd>
{% for text, url in report.links.items() %}<a href="{{ url }}" rel="noreferrer">{{ text }}</a>{{ ", " if not loop.last }}{% endfor %}
</dd>{% endif %}

</dl>
""")
_RECIPE = template("""<p><button type="button" data-copy="recipe">Copy</button></p>
<pre id="recipe">{{ text }}</pre>""")
_RECORD = template("""<details><summary>record.json: what decided the bytes, where from, and what was measured on the way</summary>
<pre>{{ text }}</pre></details>""")
_MARK = template("""<p class="bad-text">{{ text }}</p>""")
_REASONS = template("""<p><strong>{{ headline }}</strong></p>
<ul>{% for reason in reasons %}<li>{{ reason }}</li>{% endfor %}</ul>""")
_DENSITY = Unit("percent", ".4g", 100)


def report_html(report: MergeReport) -> str:
    """The page. The same report gives the same bytes. Raises OtaError for scores or an analysis that are not in the agreed form."""
    mood, verdict = _verdict(report)
    header = _HEADER.render(
        report=report, fingerprint=report.record.get("fingerprint"), name=Markup("+<wbr>").join(report.name.split("+")), mood=mood, verdict=verdict, versions=", ".join(f"{name} {version}" for name, version in report.versions.items()),
        experts=[one.name for one in report.inputs if one.role == "expert"],
        base=next((one.source for one in report.inputs if one.role == "base"), None),
    )  # fmt: skip
    sections = [Section(title, list(blocks)) for title, blocks in _parts(report)]
    return to_html(report.name, sections, header=Markup(header))


def _parts(report: MergeReport) -> Iterator[tuple[str, Iterator[Block]]]:
    if report.scores:
        yield "Scores", _scores(report)
    if report.gate:
        yield "The gate's decision", _gate(report.gate)
    if report.flips:
        yield "Documents that flipped", iter([documents.flips(report.flips)])
    if report.smoke:
        yield "Smoke test", _smoke(report.smoke)
    if report.analysis is not None:
        yield "Analysis", _analysis(report, report.analysis)
    elif report.unanalysed:
        yield (
            "Analysis",
            iter([_mark("The merge is complete, but its experts could not be analysed."), f"Reason: {report.unanalysed}"]),
        )
    yield "Recipe", _recipe(report)
    yield "Inputs", _inputs(report)
    yield "Record", iter([Markup(_RECORD.render(text=json.dumps(report.record, indent=2, ensure_ascii=False)))])


def _scores(report: MergeReport) -> Iterator[Block]:
    pictures = pictures_of_scores(report.scores)  # looks at the form, too
    if report.limit is not None:
        yield _mark(_quick_look(report.limit))
    frame = pd.DataFrame(sorted(report.scores, key=lambda row: ROLES.index(str(row["role"]))))
    falls = [_falls(report, row) if row["role"] == "merge" else {} for row in frame.to_dict("records")]
    frame["below_base"] = [
        ", ".join(name if real else f"{name} (within the noise)" for name, real in one.items()) for one in falls
    ]
    yield scores.scores(frame)
    if any(not real for one in falls for real in one.values()):
        yield (
            f"Within the noise: a fall that the two standard errors explain, at {100 * _CONFIDENCE:g} % one-sided confidence in each "
            "capability by itself."
        )
    if report.suite:
        counted = ", ".join(f"{name} {count:,}" for name, count in report.documents.items())
        yield f"Suite {report.suite}{f'; documents: {counted}' if counted else ''}."
    yield from scores.losses(pd.DataFrame(report.losses))
    yield from pictures.values()


def _smoke(smoke: Smoke) -> Iterator[Block]:
    yield smoke.said if smoke.passed else _mark(f"{smoke.said} The merge was not benchmarked.")
    yield "Tried before the benchmark, beside the base: loading, vocabulary, chat template, tokenizer, finite logits, greedy answers, their end."
    yield from (f"No failure, but seen: {note}." for note in smoke.notes)


def _gate(decision: GateDecision) -> Iterator[Block]:
    yield Markup(_REASONS.render(headline=gate.headline(decision), reasons=decision.reasons))
    yield from gate.tables(decision)


def _analysis(report: MergeReport, analysis: pd.DataFrame) -> Iterator[Block]:
    yield from report.analysis_notes
    pictures = pictures_of(analysis)
    yield from pictures.values()
    if not pictures:
        yield "The analysis holds nothing that can be drawn."


def _recipe(report: MergeReport) -> Iterator[Block]:
    yield Markup(_RECIPE.render(text=report.recipe_yaml.rstrip()))
    results = report.record.get("results", {})
    if found := results.get("lambda"):
        picture = scale_picture(found)
        yield picture if picture else f"λ = {found['value']:g}, from the row spaces of the task vectors."
    densities: dict[str, Any] = results.get("densities", {})
    if densities:
        frame = pd.DataFrame([{"expert": name, **found} for name, found in densities.items()])
        columns = [
            Column("expert"),
            Column("kept", unit=COUNT),
            Column("total", "of", COUNT),
            Column("density", "density, %", _DENSITY),
        ]
        yield Table("Densities", frame, columns, ["Elements that each expert's mask keeps."])


def _inputs(report: MergeReport) -> Iterator[Block]:
    code = Markup("<code>{}</code>")
    rows = [one.model_dump() | {"source": code.format(one.source), "digest": code.format(one.digest)} for one in report.inputs]
    yield Table("Inputs", pd.DataFrame(rows, dtype=object), [Column(name) for name in ("name", "role", "source", "digest")])


def _verdict(report: MergeReport) -> tuple[Literal["good", "bad", ""], str]:
    """What a reader takes away, in a few sentences, and whether it is good news: the gate's word, else the scores beside the base's."""
    merge = next((row for row in report.scores if row["role"] == "merge"), None)
    said = [f"{gate.headline(report.gate)}.", *report.gate.reasons[:1]] if report.gate else []
    if merge is None:
        if report.smoke and not report.smoke.passed:
            return "bad", " ".join([*said, report.smoke.said, "It was not benchmarked."])
        return _mood(report, None, 0.0, {}), " ".join(said) or "Not benchmarked: how good the merge is, nobody has measured."
    average, base = _number(merge.get(AVERAGE)), _base(report)
    before = None if base is None else _number(base.get(AVERAGE))
    difference = None if average is None or before is None else average - before
    if not report.gate:  # whose reason compares the average
        beside = (
            ""
            if difference is None
            else f", {100 * abs(difference):.1f} points {'below' if difference < 0 else 'above'} the base"
        )
        said.append(f"Average {_percent(average)}{beside}.")
    if _number(merge.get("retention")) is not None:
        said.append(f"It retains {_percent(merge['retention'])} of the experts' scores on their own capabilities.")
    falls = _falls(report, merge)
    if base is not None:
        real, noise = ([name for name, beyond in falls.items() if beyond is wanted] for wanted in (True, False))
        where = [f"on {', '.join(real)}"] if real else []
        where += [f"by no more than the noise on {', '.join(noise)}"] if noise else []
        said.append(f"It is below the base {', and '.join(where) or 'on no capability'}.")
    if report.limit is not None:
        said.append(f"{_quick_look(report.limit)}.")
    return _mood(report, difference, _noise(report, merge, AVERAGE), falls), " ".join(said)


def _mood(report: MergeReport, difference: float | None, noise: float, falls: Mapping[str, bool]) -> Literal["good", "bad", ""]:
    """Good: promoted, or without a gate better than the base and nowhere below it. Bad: not promoted, or below it by more than the noise.

    ``difference``: of the averages, ``noise``: how large it becomes by chance; ``falls`` as ``_falls``.
    """
    if report.gate:
        return "good" if report.gate.promoted else "bad"
    if difference is None:
        return ""
    if difference < -noise or any(falls.values()):
        return "bad"
    return "good" if difference > 0 and not falls else ""


def _base(report: MergeReport) -> Row | None:
    return next((row for row in report.scores if row["role"] == "base"), None)


def _falls(report: MergeReport, row: Row) -> dict[str, bool]:
    """The capabilities on which a model scores lower than the base, where both were measured, and whether by more than the noise."""
    base = _base(report) or {}
    names = [name for name in capability_columns(pd.DataFrame(report.scores)) if name != AVERAGE]
    pairs = {name: (_number(row.get(name)), _number(base.get(name))) for name in names}
    return {
        name: theirs - mine > _noise(report, row, name)
        for name, (mine, theirs) in pairs.items()
        if mine is not None and theirs is not None and mine < theirs
    }


def _noise(report: MergeReport, row: Row, capability: str) -> float:
    """How far a model falls below the base by chance, by the standard errors that the page has; 0 where it has none.

    As if the two had answered different documents: on the same ones the noise is mostly smaller, which is the gate's to say.
    """
    errors = [_number(one.get(f"{capability}{STDERR}")) for one in (row, _base(report) or {})]
    return NormalDist().inv_cdf(_CONFIDENCE) * math.hypot(*(error for error in errors if error is not None))


def _mark(text: str) -> Markup:
    """A sentence that nobody shall miss."""
    return Markup(_MARK.render(text=text))


def _quick_look(limit: int) -> str:
    return f"{limit:,} document{'s' if limit != 1 else ''} per task: a quick look"


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and value == value else None


def _percent(value: object) -> str:
    number = _number(value)
    return NOT_MEASURED if number is None else f"{PERCENT.text(number)} %"
