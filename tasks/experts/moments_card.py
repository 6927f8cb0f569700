"""The card (README.md) of harvested second moments: what they are of, and how they are used."""

from collections.abc import Mapping
from typing import Any

from ota_core.engine.markdown import cell, fenced, table
from ota_core.frozen import Frozen
from ota_core.recipe.yaml_text import dump_yaml

_FACTS = {
    "base_model": "trained from",
    "capability": "trained for",
    "data": "data",
    "optimizer": "optimizer",
    "step": "steps behind v",
    "beta2": "β₂",
    "trained_at": "trained at",
    "origin": "origin",
}


class Harvested(Frozen):
    """Second moments that were harvested."""

    uri: str
    """The folder, the address in S3 or that of the repository on the hub."""
    label: str
    """The method, such as rank1."""
    weights: str
    """The digest of the weights that they belong to."""
    parameters: int
    bytes: int
    """Size of the file."""
    sqrt_error: float | None
    """‖√v − √ṽ‖ / ‖√v‖; None where they were compressed before."""
    facts: dict[str, str]
    """What the file says of the training."""
    notes: list[str]


def moments_card(harvested: Harvested, *, source: str, licence: Mapping[str, Any], address: str) -> str:
    """Markdown with the metadata head that the hub reads. source: the weights, as the user named them. address: as a recipe names the file."""
    kept = f"{harvested.parameters:,} parameters in {harvested.bytes / 2**20:.2f} MiB, {harvested.bytes / max(1, harvested.parameters):.4f} bytes each"
    lost = "" if harvested.sqrt_error is None else f"; ‖√v − √ṽ‖ / ‖√v‖ = {harvested.sqrt_error:.4f}"
    rows = [["weights", source], ["digest of the weights", harvested.weights]]
    rows += [[label, harvested.facts[key]] for key, label in _FACTS.items() if key in harvested.facts]
    rows += [["licence", licence.get("license") or "not stated"], ["form", f"{harvested.label}: {kept}{lost}"]]
    lines = ["---", _head(source, licence), "---", "", f"# Second moments of {cell(source)}", ""]
    lines += [
        "Adam's v (`exp_avg_sq`) as a training left it, by parameter: the curvature that merges by OTA, Fast Fisher Grafting "
        "([arXiv 2509.11167](https://arxiv.org/abs/2509.11167)) and Fisher averaging weigh edits by. There are no weights here.",
        "", table(["", ""], rows), "", "## Use", "", fenced(_recipe(source, address, harvested.label), "yaml"), "",
        "A merge reads a digest in the file and refuses weights that have another: it covers names, types and shapes of all tensors and "
        "a sample of the trained ones.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _recipe(source: str, address: str, label: str) -> str:
    """What a recipe must say to take the file; label: such as rank1, or rank_k with rank 4."""
    method, _, rank = label.partition(" with rank ")
    compression = {"compression": method} | ({"rank": int(rank)} if rank else {})
    return dump_yaml({"models": [{"model": source, "parameters": {"preconditioner_path": address}}], "parameters": compression})


def _head(source: str, licence: Mapping[str, Any]) -> str:
    """The card's metadata as YAML, by the hub's own library; what is not known is left out."""
    from huggingface_hub.repocard_data import ModelCardData

    from tasks.storage.hub import repository_in

    repository = repository_in(source)
    data = ModelCardData(
        tags=["second-moments", "ota-merging"],
        base_model=repository[0] if repository and repository[2] is None else None,
        **licence,
    )
    return str(data.to_yaml())
