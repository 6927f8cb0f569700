"""Whether models are asked through their chat templates: decided once for all models of a comparison, so that they are asked alike."""

from collections.abc import Mapping
from pathlib import Path

from ota_core.files.checkpoint import read_json
from tasks.evaluation.backend import CHAT
from tasks.evaluation.suites import Suite, SuiteError


def chat_template(model: Path) -> str | None:
    """The template in a checkpoint's folder as transformers takes it: ``chat_template.jinja``, else what ``tokenizer_config.json`` holds."""
    file, config = model / "chat_template.jinja", model / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    named = read_json(config).get("chat_template") if config.is_file() else None
    return str(named) if named else None


def decided(suite: Suite, models: Mapping[str, Path]) -> tuple[Suite, str]:
    """The suite with ``apply_chat_template: auto`` decided for all these models together, and a sentence that says what was decided and why.

    Scores of a base that is asked in plain text and of a merge that is asked through its template do not compare; so it is all or none.
    Raises SuiteError where no model can be looked at.
    """
    if suite.backend.name == CHAT:
        return suite.asked(True), "every model is asked through the server's chat template"
    if not models:
        raise SuiteError(
            "apply_chat_template: auto looks at the models' tokenizers, and none of the models lies on this machine; "
            "write true or false into the suite"
        )
    found = {name: chat_template(folder) for name, folder in models.items()}
    without = [name for name, text in found.items() if text is None]
    if without:
        return suite.asked(False), f"no model is asked through a chat template, for there is none of {', '.join(without)}"
    differ = "" if len(set(found.values())) == 1 else "; the templates are not all the same"
    return suite.asked(True), f"every model is asked through its chat template ({', '.join(found)}){differ}"
