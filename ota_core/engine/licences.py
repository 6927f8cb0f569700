"""Under which licence the inputs of a merge are, by their own model cards, and what follows for the merge."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ota_core.artifact import CARD
from ota_core.errors import OtaError
from ota_core.plan.inputs import MergeInputs, expert_facts
from ota_core.reading import printable, read_text
from ota_core.recipe.yaml_text import parse_yaml

_UNKNOWN = "unknown"
"""The hub's identifier for a licence that the author does not know."""
_LARGEST_CARD, _LARGEST_HEAD = 4 * 2**20, 512 * 2**10
"""Bytes of a card, and characters of its metadata; reading YAML takes time."""
_LONGEST, _MOST = 200, 20
"""Characters of what a card may state of its licence, and licences that it may offer."""


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


@dataclass(frozen=True)
class InputCard:
    """What an input's own model card and ``expert.json`` say, as far as a merge's card repeats it."""

    head: Mapping[str, Any]
    """The card's metadata, with keys that are texts; empty where there is no card, or none that can be read."""
    licence: dict[str, str | list[str]]
    """Keys for another card's head, as ``stated_licence`` gives them."""
    note: str | None
    """Why the card could not be read; None where it could, or where there is none."""


Cards = Mapping[str, InputCard]
"""By the name of the input."""


def read_cards(inputs: MergeInputs) -> dict[str, InputCard]:
    """Every input's card. They are anybody's texts: one that cannot be read ends no merge, it states nothing, and its ``note`` says why.

    Raises CheckpointError where an ``expert.json`` is damaged.
    """
    found = {}
    for model in inputs.models:
        head, problem = _head_of(model.path)
        note = None if problem is None else f"{model.name}: its model card says nothing to this merge: {problem}"
        found[model.name] = InputCard(head, _stated(head, expert_facts(model.path)), note)
    return found


def card_head(folder: Path) -> dict[str, Any]:
    """The metadata at the head of the model card in a checkpoint's folder; nothing where there is no card, or no readable head."""
    return _head_of(folder)[0]


def _head_of(folder: Path) -> tuple[dict[str, Any], str | None]:
    """(the head, why there is a card and no readable head)."""
    path = folder / CARD
    try:
        text = read_text(path, _LARGEST_CARD)
    except FileNotFoundError:
        return {}, None
    except OSError as error:
        return {}, f"{CARD} cannot be read ({error.strerror or error})"
    first, *lines = text.splitlines() or [""]
    ends = [i for i, line in enumerate(lines) if line.strip() == "---"]
    if first.strip() != "---" or not ends:
        return {}, None
    head = "\n".join(lines[: ends[0]])
    if len(head) > _LARGEST_HEAD:
        return {}, f"the head of {CARD} has more than {_LARGEST_HEAD} characters"
    try:
        found = parse_yaml(head, CARD)
    except OtaError as error:
        return {}, str(error)
    if not isinstance(found, dict):
        return {}, None if found is None else f"the head of {CARD} is no mapping"
    return {key: value for key, value in found.items() if isinstance(key, str)}, None


def licences(inputs: MergeInputs, cards: Cards | None = None) -> Licences:
    """The licences of base and experts, each by its card's head or, in ``expert.json``, the key ``license``."""
    found = {name: card.licence for name, card in (read_cards(inputs) if cards is None else cards).items()}
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
    return _stated(card_head(folder), expert_facts(folder))


def _stated(*facts: Mapping[str, Any]) -> dict[str, str | list[str]]:
    for raw in facts:
        kinds, name = _identifiers(raw.get("license")), raw.get("license_name")
        if not kinds or _UNKNOWN in kinds or ("other" in kinds and not name):
            continue
        link = printable(str(raw.get("license_link") or ""))[:_LONGEST]
        head: dict[str, str | list[str]] = {"license": kinds[0] if len(kinds) == 1 else kinds}
        return (
            head
            | ({"license_name": printable(str(name))[:_LONGEST]} if name else {})
            | ({"license_link": link} if "://" in link else {})
        )
    return {}


def _identifiers(stated: Any) -> list[str]:
    """The hub's identifiers, which are lower-case, in a fixed order: it takes one, or a list of those among which one may choose."""
    given = stated if isinstance(stated, list) else [stated]
    return sorted(
        {printable(str(one)).strip().lower()[:_LONGEST] for one in given[:_MOST] if one and not isinstance(one, dict | list)}
    )


def _shown(stated: Mapping[str, str | list[str]]) -> str | None:
    """A licence as one reads and compares it."""
    if not stated:
        return None
    kinds = _identifiers(stated["license"])
    return " or ".join(f"other: {stated['license_name']}".lower() if kind == "other" else kind for kind in kinds)
