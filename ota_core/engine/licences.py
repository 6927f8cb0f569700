"""Under which licence the inputs of a merge are, by their own model cards, and what follows for the merge."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ota_core.artifact import CARD
from ota_core.errors import OtaError
from ota_core.plan.inputs import MergeInputs, expert_facts
from ota_core.reading import read_file
from ota_core.recipe.yaml_text import parse_yaml

_UNKNOWN = "unknown"
"""The hub's identifier for a licence that the author does not know."""
_LARGEST_CARD = 4 * 2**20
_LONGEST = 200
"""Characters of what a card may state of its licence."""


class Licences(BaseModel):
    """What the merge's card says of licences."""

    model_config = ConfigDict(frozen=True)

    head: dict[str, str | list[str]]
    """Keys for the card's head: ``license`` (a list of those among which one may choose) and, for one that has no identifier of the hub's,
    its name and link. Empty where the inputs do not agree, or not all of them state one."""
    stated: dict[str, str | None]
    """Input to the licence that it states."""
    warning: str | None
    """What a reader must check; None where all inputs state the same licence."""


def card_head(folder: Path) -> dict[str, Any]:
    """The metadata at the head of the model card in a checkpoint's folder; nothing where there is no card, or no readable head."""
    try:
        text = read_file(folder / CARD, _LARGEST_CARD).decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    first, *lines = text.splitlines() or [""]
    if first.strip() != "---" or "---" not in [line.strip() for line in lines]:
        return {}
    end = [line.strip() for line in lines].index("---")
    try:
        head = parse_yaml("\n".join(lines[:end]), str(folder / CARD))
    except OtaError:  # somebody else's card: what cannot be read states nothing, and the warning says so
        return {}
    return head if isinstance(head, dict) else {}


def licences(inputs: MergeInputs) -> Licences:
    """The licences of base and experts, each by its card's head or, in ``expert.json``, the key ``license``."""
    found = {model.name: stated_licence(model.path) for model in inputs.models}
    stated = {name: _shown(one) for name, one in found.items()}
    silent = [name for name, text in stated.items() if text is None]
    kinds = sorted({text for text in stated.values() if text is not None})
    if not silent and len(kinds) == 1:
        return Licences(head=next(iter(found.values())), stated=stated, warning=None)
    if not kinds:
        warning = "no input states a licence; find out under which terms each may be used before you pass this model on"
    elif len(kinds) > 1:
        named = "; ".join(f"{name}: {text}" for name, text in stated.items() if text is not None)
        warning = (
            f"the inputs are under different licences ({named}); check that one model may be made of them, and on which terms"
        )
        warning += f". Not stated for {', '.join(silent)}" if silent else ""
    else:
        warning = (
            f"{', '.join(silent)} state no licence; the other inputs are under {kinds[0]}, which need not hold for the merge"
        )
    return Licences(head={}, stated=stated, warning=warning)


def stated_licence(folder: Path) -> dict[str, str | list[str]]:
    """Of a checkpoint's folder the keys on the licence that may stand in another model's head; none where no licence is stated, or one that says nothing.

    A link into the input's own folder is left out: the file that it names does not lie beside the merge.
    """
    for raw in (card_head(folder), expert_facts(folder)):
        kinds, name = _identifiers(raw.get("license")), raw.get("license_name")
        if not kinds or _UNKNOWN in kinds or ("other" in kinds and not name):
            continue
        link = str(raw.get("license_link") or "")[:_LONGEST]
        head: dict[str, str | list[str]] = {"license": kinds[0] if len(kinds) == 1 else kinds}
        return head | ({"license_name": str(name)[:_LONGEST]} if name else {}) | ({"license_link": link} if "://" in link else {})
    return {}


def _identifiers(stated: Any) -> list[str]:
    """The hub's identifiers, which are lower-case, in a fixed order: it takes one, or a list of those among which one may choose."""
    return sorted({str(one).strip().lower()[:_LONGEST] for one in (stated if isinstance(stated, list) else [stated]) if one})


def _shown(stated: Mapping[str, str | list[str]]) -> str | None:
    """A licence as one reads and compares it."""
    if not stated:
        return None
    kinds = _identifiers(stated["license"])
    return " or ".join(f"other: {stated['license_name']}".lower() if kind == "other" else kind for kind in kinds)
