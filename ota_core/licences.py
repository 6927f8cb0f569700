"""Under which licence the inputs of a merge are, by their own model cards, and what follows for the merge."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ota_core.artifact import CARD
from ota_core.errors import OtaError
from ota_core.inputs import MergeInputs, expert_facts
from ota_core.recipe_yaml import parse_yaml

_KEYS = ("license", "license_name", "license_link")


class Licences(BaseModel):
    """What the merge's card says of licences."""

    model_config = ConfigDict(frozen=True)

    head: dict[str, str]
    """Keys for the card's head: ``license`` and, for one that has no identifier of the hub's, its name and link. Empty where the inputs
    do not agree, or not all of them state one."""
    stated: dict[str, str | None]
    """Input to the licence that it states."""
    warning: str | None
    """What a reader must check; None where all inputs state the same licence."""


def card_head(folder: Path) -> dict[str, Any]:
    """The metadata at the head of the model card in a checkpoint's folder; nothing where there is no card, or no readable head."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
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
    models = {"base": inputs.base} if inputs.base is not None else {}
    found = {name: _stated(model.path) for name, model in (models | {e.name: e for e in inputs.experts}).items()}
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


def _stated(folder: Path) -> dict[str, str]:
    head: Mapping[str, Any] = card_head(folder)
    facts = expert_facts(folder)
    raw = head if head.get("license") else facts if facts.get("license") else {}
    values = {key: raw[key] for key in _KEYS if raw.get(key)}
    # The hub also allows a list: of several licences, one of which may be chosen.
    return {key: " or ".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in values.items()}


def _shown(stated: Mapping[str, str]) -> str | None:
    """A licence as one compares it: ``other`` says nothing without its name."""
    if not stated:
        return None
    name, link = stated.get("license_name"), stated.get("license_link")
    text = stated["license"] if stated["license"].lower() != "other" or not (name or link) else f"other: {name or link}"
    return text.lower()
