"""GGUF files that are one model: llama.cpp splits large ones into ``NAME-00001-of-00003.gguf`` and so on, which only read together."""

import re
from collections.abc import Iterable

SUFFIX = ".gguf"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_PROJECTOR = "mmproj"
"""Begins the names of files that hold an image-text model's projector alone, which lie beside the language model's."""


def models_among(names: Iterable[str]) -> list[list[str]]:
    """The GGUF models among these files of one folder, each as its files in their order. Projectors are none where a model is there.

    Raises ValueError where parts of a model are missing.
    """
    own = [name for name in names if name.endswith(SUFFIX)]
    own = [name for name in own if not name.rsplit("/", 1)[-1].startswith(_PROJECTOR)] or own
    found: dict[tuple[str, str], list[str]] = {}
    for name in sorted(own):
        part = _PART.fullmatch(name)
        found.setdefault((part["stem"], part["count"]) if part else (name, ""), []).append(name)
    for (stem, count), parts in found.items():
        wanted = {f"{stem}-{i:05}-of-{count}{SUFFIX}" for i in range(1, int(count) + 1)} if count else set(parts)
        if lacking := sorted(wanted - set(parts)):
            raise ValueError(
                f"{parts[0]} is one of {int(count)} parts of a model; missing: {', '.join(lacking[:4])}; fetch all of them"
            )
    return list(found.values())


def only_model(where: object, names: Iterable[str], hint: str) -> list[str]:
    """The files of the one GGUF model among these; none where there is none. hint: what to do where there are more, {name} stands for the first.

    Raises ValueError, which says what lies ``where``.
    """
    try:
        models = models_among(names)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if len(models) > 1:
        firsts = [files[0] for files in models]
        shown = ", ".join(firsts[:4]) + (", …" if len(firsts) > 4 else "")
        raise ValueError(f"{where} holds {len(models)} GGUF models ({shown}); {hint.replace('{name}', firsts[0])}")
    return models[0] if models else []


def model_of(name: str, names: Iterable[str]) -> list[str]:
    """The files of the model that one of its files is named for. Raises ValueError as ``models_among``."""
    part = _PART.fullmatch(name)
    alike = [
        one for one in names if part and (m := _PART.fullmatch(one)) and m.group("stem", "count") == part.group("stem", "count")
    ]
    return models_among({name, *alike})[0]
