"""The chat template of the result, where the recipe says which (``chat_template``)."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ota_core.errors import CheckpointError
from ota_core.files.checkpoint import read_json
from ota_core.reading import read_text
from ota_core.recipe.chat_templates import AUTO_TEMPLATE, TEMPLATES
from ota_core.recipe.recipe import MergeRecipe

FILE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
OLD = "chat_template.json"
"""Where processors of models that see kept it before."""


def chat_template(recipe: MergeRecipe, folders: Sequence[Path]) -> str:
    """The template itself. folders: of all models, base first. Raises CheckpointError for auto where no model has one."""
    asked = recipe.chat_template or ""
    if asked != AUTO_TEMPLATE:
        return TEMPLATES.get(asked, asked)
    found = [text for folder in folders if (text := template_in(folder)) is not None]
    if not found:
        raise CheckpointError(
            "chat_template: auto takes the most common one of the models, and none of them has any; name one, such as chatml"
        )
    return Counter(found).most_common(1)[0][0]  # the first model's of several that are as common


def template_in(folder: Path) -> str | None:
    """A model's chat template; None where it has none. Raises CheckpointError for damaged files."""
    if (folder / FILE).is_file():
        try:
            return read_text(folder / FILE)
        except OSError as error:
            raise CheckpointError(f"{folder / FILE} cannot be read as text ({error}); fetch it again") from None
    file = next((folder / name for name in (OLD, CONFIG) if (folder / name).is_file()), None)
    own = read_json(file).get("chat_template") if file is not None else None
    if isinstance(own, list):  # several by name
        own = next((one.get("template") for one in own if isinstance(one, dict) and one.get("name") == "default"), None)
    return own if isinstance(own, str) else None


def write_template(folder: Path, template: str) -> None:
    """Make it the template of a copied tokenizer."""
    (folder / FILE).write_text(template, encoding="utf-8")
    if (folder / CONFIG).is_file():
        settings = {key: value for key, value in read_json(folder / CONFIG).items() if key != "chat_template"}
        (folder / CONFIG).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
