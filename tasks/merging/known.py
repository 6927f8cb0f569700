"""Writes ``ota_core/files/architectures.json``: what transformers' own tables say of names, as data for ``ota_core``, which does without it.

Run after an update of transformers: ``python -m tasks.merging.known`` (a minute or two: it imports every architecture).
"""

import importlib
import json
import pkgutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import ota_core.files.architecture as core

TABLE = Path(core.__file__).with_name("architectures.json")


def classes(folders: list[str] | None = None) -> Iterator[Any]:
    """Every model class of the installed transformers, or of these of its folders."""
    import transformers
    from transformers import PreTrainedModel

    root = Path(transformers.__file__).parent / "models"
    for folder in folders or sorted(one.name for one in pkgutil.iter_modules([str(root)]) if one.ispkg):
        for module in sorted(root.glob(f"{folder}/modeling_*.py")):
            with suppress(ImportError, RuntimeError):  # some need libraries that are not there
                made = importlib.import_module(f"transformers.models.{folder}.{module.stem}")
                for _, one in sorted(vars(made).items()):
                    if isinstance(one, type) and issubclass(one, PreTrainedModel) and one.__module__ == made.__name__:
                        yield one


def entry(one: Any) -> dict[str, Any] | None:
    """What a class says: ``prefix`` of its base model, ``tied`` names by their aliases, patterns ``ignored`` on loading. None: no class to load."""
    if one.config_class is None or one.__name__.endswith("PreTrainedModel"):
        return None
    said = one._tied_weights_keys
    return {
        "prefix": one.base_model_prefix or "",
        "tied": dict(sorted(said.items())) if isinstance(said, dict) else {},
        "ignored": sorted(one._keys_to_ignore_on_load_unexpected or []),
    }


def ties(one: Any) -> bool | None:
    """What ``tie_word_embeddings`` is where a configuration is silent; None where the class has no such key."""
    with suppress(Exception):  # configurations that cannot be made without arguments
        return getattr(one.config_class(), "tie_word_embeddings", None)
    return getattr(one.config_class, "tie_word_embeddings", None)


def table(folders: list[str] | None = None) -> dict[str, Any]:
    """The table: entries that many classes share once, with the names of these; and the model types that tie by default."""
    shared: dict[str, list[str]] = {}
    tied: set[str] = set()
    for one in classes(folders):
        if (made := entry(one)) is not None:
            shared.setdefault(json.dumps(made, sort_keys=True), []).append(one.__name__)
            if ties(one):
                tied.add(one.config_class.model_type)
    return {
        "tied_by_default": sorted(tied),
        "entries": [{**json.loads(made), "classes": names} for made, names in sorted(shared.items(), key=lambda item: item[1])],
    }


def main() -> None:
    """Write the table, one entry a line."""
    import transformers

    made = table()
    lines = ",\n".join(f" {json.dumps(one, sort_keys=True)}" for one in made["entries"])
    head = f'{{"transformers": "{transformers.__version__}",\n"tied_by_default": {json.dumps(made["tied_by_default"])},\n"entries": [\n'
    TABLE.write_text(f"{head}{lines}\n]}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
