"""What each compression of the second moments costs and loses, against the full ones (docs/methods.md section 2)."""

from collections.abc import Iterator
from contextlib import ExitStack

from ota_core.analysis.agreement import Agreement, agreements
from ota_core.analysis.subject import Subject
from ota_core.analysis.table import Row, row
from ota_core.moments.compression import DEFAULT_RANK, CompressedMoments, CompressionReport, compress
from ota_core.plan.roles import WHOLE
from ota_core.plan.views import ExpertView


def compressions(subject: Subject) -> Iterator[Row]:
    """Rows of ``compression``: for every expert and compression, over the whole expert. One expert's forms are held at a time."""
    if not subject.compressions:
        return
    for expert in subject.curved:
        if not subject.full(expert):
            subject.left_out.append(
                f"compression of {expert.name}: it needs the uncompressed second moments, which are not at hand"
            )
            continue
        yield from _of_expert(subject, expert)


def _of_expert(subject: Subject, expert: ExpertView) -> Iterator[Row]:
    plan, full = subject.plan, expert.full_moments
    assert full is not None
    reports: dict[str, CompressionReport] = {}
    forms: dict[str, CompressedMoments] = {}
    droppable = [*plan.stream.droppable]
    with ExitStack() as stack:
        for method in subject.compressions:
            if method == "none":
                continue
            rank = (plan.recipe.setting("rank") or DEFAULT_RANK) if method == "rank_k" else None
            forms[method], reports[method] = compress(
                full, method=method, rank=rank, stream=plan.stream, scratch=plan.scratch, what=f"compress {expert.name}"
            )
            stack.callback(forms[method].close)
        try:
            agreed = _agreements(subject, expert, forms)
        finally:
            plan.stream.droppable[:] = droppable
    for method in subject.compressions:
        report, same = reports.get(method), agreed.get(method)
        elements = sum(job.elements for job in plan.curved(expert))
        values = {
            "sqrt_error": report.sqrt_error if report else 0.0,
            "bytes_per_param": report.bytes_per_param if report else 4.0,
        }
        if same is not None:
            values |= {"mask_jaccard": same.jaccard, "saliency_spearman": same.spearman}
        for measure, value in values.items():
            at = same.density if same is not None and measure == "mask_jaccard" else None
            yield row("compression", expert.name, WHOLE, measure, value, elements, variant=method, at=at)


def _agreements(subject: Subject, expert: ExpertView, forms: dict[str, CompressedMoments]) -> dict[str, Agreement]:
    """Method → how far masks and ranks agree with those of the full v; without a base, or with another vocabulary, of none."""
    plan, full = subject.plan, expert.full_moments
    assert full is not None
    if plan.base is None:
        return {}
    if not (expert.as_it_stands and plan.base.as_it_stands):
        subject.left_out.append(
            f"mask_jaccard and saliency_spearman of {expert.name}'s compressions: its vocabulary is not the base's, row for row"
        )
        return {}
    density = subject.density_of(expert)
    found = [Agreement(density=density, spearman=1.0, jaccard=1.0)] if "none" in subject.compressions else []
    if forms:
        found += agreements(
            full, list(forms.values()), expert.checkpoint, plan.base.checkpoint, density=density, stream=plan.stream
        )
    return dict(zip([*(["none"] if "none" in subject.compressions else []), *forms], found, strict=True))
