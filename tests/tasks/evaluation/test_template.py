"""apply_chat_template: auto is decided once for all models of a comparison, and scores are those of the suite that says so outright."""

import json
import logging
from pathlib import Path

import pytest

from tasks.benchmark import Benchmark
from tasks.evaluation.harness import score_model
from tasks.evaluation.kept import read_all
from tasks.evaluation.subject import Subject
from tasks.evaluation.suites import Suite, SuiteError, load_suite, suite_digest
from tasks.evaluation.template import chat_template, decided
from tasks.settings import places
from tests.tasks.evaluation.openai_server import serving
from tests.tiny_models import perturb
from tests.tiny_suite import edited

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"


@pytest.fixture
def chats(model: Path, tmp_path: Path) -> Path:
    """The model with a template of its own."""
    folder = perturb(model, tmp_path / "chats", seed=0, scale=0)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def auto(tiny: tuple[Path, Path]) -> Path:
    edited(tiny[0], ("name: tiny", "name: tiny\napply_chat_template: auto"))
    return tiny[0]


def subject(name: str, folder: Path | None) -> Subject:
    return Subject(name=name, role="expert", path=folder, digest=name)


def test_templates_are_found_where_transformers_finds_them(model: Path, chats: Path) -> None:
    from transformers import AutoTokenizer

    old = perturb(model, chats.parent / "old", seed=0, scale=0)
    config = json.loads((old / "tokenizer_config.json").read_text())
    (old / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ messages }}"}))
    for folder in (model, chats, old):
        assert chat_template(folder) == AutoTokenizer.from_pretrained(folder).chat_template
    assert [chat_template(folder) is not None for folder in (model, chats, old)] == [False, True, True]


def test_all_or_none(model: Path, chats: Path, auto: Path) -> None:
    suite = load_suite(str(auto))
    other = perturb(chats, chats.parent / "other", seed=1)
    (other / "chat_template.jinja").write_text(TEMPLATE.replace("[", "<"))
    told, why = decided(suite, {"base": chats, "math": chats})
    assert told.apply_chat_template is True and why == "every model is asked through its chat template (base, math)"
    assert decided(suite, {"base": chats, "math": other})[1].endswith("; the templates are not all the same")
    told, why = decided(suite, {"base": model, "math": chats, "code": model})
    assert told.apply_chat_template is False and why.endswith("there is none of base, code")
    with pytest.raises(SuiteError, match="none of the models lies on this machine; write true or false"):
        decided(suite, {})


def test_models_of_a_comparison_are_asked_alike(
    model: Path, chats: Path, auto: Path, tiny: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    where = places(tmp_path / "home")
    open_ = Benchmark.of(str(auto), str(tiny[1]), 4, where).check()
    assert open_.chat_template is None
    with pytest.raises(AssertionError, match="asked_alike decides"):
        open_.job(subject("chats", chats))
    with caplog.at_level(logging.INFO, logger="tasks"):
        mixed = open_.asked_alike([subject("base", model), subject("chats", chats), subject("merged", None)])
        alone = open_.asked_alike([subject("chats", chats)])
    assert "none of base" in caplog.text and "(chats)" in caplog.text
    assert (mixed.chat_template, alone.chat_template) == (False, True)
    refs = {name: one.job(subject("chats", chats)).run(where) for name, one in (("mixed", mixed), ("alone", alone))}
    found = read_all(where, refs)
    assert (found["mixed"].chat_template, found["alone"].chat_template) == (False, True)
    # Known by the same digest as the scores of a suite that says it outright.
    for name, value in (("mixed", False), ("alone", True)):
        outright = edited(auto, ("apply_chat_template: auto", f"apply_chat_template: {str(value).lower()}"))
        assert found[name].suite_digest == suite_digest(outright, limit=4)
        edited(auto, (f"apply_chat_template: {str(value).lower()}", "apply_chat_template: auto"))
        assert (
            open_.asked_as(found[name]).chat_template
            is open_.asked_as(found[name].model_copy(update={"chat_template": None})).chat_template
            is value
        )
    # What was decided for other models holds: another machine, a champion, a study's cell.
    assert open_.asked(True).step("d") == alone.step("d") and open_.asked(None).open
    assert alone.asked(False).chat_template is True


def test_prompts_go_through_the_template(chats: Path, auto: Path, tiny: tuple[Path, Path]) -> None:
    with serving({"chats": chats}) as (url, seen):
        suite = Suite.model_validate(
            load_suite(str(auto)).model_dump() | {"backend": {"name": "local-completions", "server": url}}
        )
        score_model(chats, suite, data_dir=tiny[1], served_as=["chats"], limit=1)
        score_model(chats, suite.asked(False), data_dir=tiny[1], served_as=["chats"], limit=1)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chats)
    asked = [tokenizer.decode(one["prompt"][0]) for one in seen if not one.get("echo")]
    assert asked == ["[user] Q: 0+0=\nA:\n[assistant] ", "Q: 0+0=\nA:"]
