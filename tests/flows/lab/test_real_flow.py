"""The flow of the real study on tiny stand-ins for what is fetched: everything is made once, and has its names in the home folder."""

import hashlib
import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from flows.lab import real, real_study
from ota_core.artifact import read_record
from ota_core.errors import OtaError
from tasks.experiments.study.study import load_study
from tasks.local.real import steps
from tasks.local.real.base import BaseSettings, HubSettings, convert
from tasks.local.real.corpus import DOMAINS, CorpusError, CorpusSettings
from tasks.local.real.questions import QuestionSettings
from tasks.local.real.train import RealTrainSettings
from tasks.settings import Places, places
from tasks.storage.models import fetch
from tests.tiny_real import write_gguf, write_real_corpora

RealSettings = steps.RealSettings
TWO = {name: DOMAINS[name] for name in ("code", "german")}
# transformers changes the state of the whole process while it loads a model: two threads in one process must not.
ONE_AT_A_TIME = threading.Lock()


def in_this_process(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with ONE_AT_A_TIME:
        return function(*args, **options)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: None) -> Iterator[Places]:
    """A home folder that holds the base's package, with two domains of made-up text; trainings run in this process."""
    where = places(tmp_path / "home")
    write_gguf(tmp_path / "tiny.gguf")
    package = steps.real_folder(where) / "package"
    package.mkdir(parents=True)
    with zipfile.ZipFile(package / "tiny.whl", "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "tiny/tiny.gguf")
    monkeypatch.setattr(real, "DOMAINS", TWO)
    monkeypatch.setattr(steps, "DOMAINS", TWO)
    monkeypatch.setattr(steps, "find_packages", lambda folder: {})
    monkeypatch.setattr(
        steps, "write_corpora", lambda out, packages, settings: write_real_corpora(out, domains=tuple(TWO)) and {}
    )
    monkeypatch.setattr(steps, "in_process", in_this_process)
    yield where


def settings_of(where: Places) -> steps.RealSettings:
    digest = hashlib.sha256((steps.real_folder(where) / "package" / "tiny.whl").read_bytes()).hexdigest()
    return RealSettings(
        base=BaseSettings(wheel="tiny.whl", sha256=digest, gguf="tiny/tiny.gguf"),
        training=RealTrainSettings(steps=2, batch=2, length=16, warmup=0),
        questions=QuestionSettings(context=40, continuation=30, passage=60),
    )


def test_everything_is_made_once(home: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    train_real = steps.train_real
    monkeypatch.setattr(steps, "train_real", lambda *args, **options: made.append(args[0]) or train_real(*args, **options))
    found = real.real_experts_flow(home, settings=settings_of(home))
    assert sorted(made) == ["code", "german"]
    assert set(found) == {"data", "corpora", "models/base", "models/code", "models/german"}
    manifest = json.loads((found["models/german"] / "expert.json").read_text())
    assert (manifest["capability"], manifest["step"], manifest["beta2"]) == ("german", 2, 0.999)
    assert "manpages-de" in (found["models/german"] / "README.md").read_text()
    assert (found["models/german"] / "optimizer.pt").is_file()
    assert sorted(path.name for path in (found["data"] / "code").iterdir()) == [
        "test-passages.jsonl", "test-questions.jsonl", "validation-passages.jsonl", "validation-questions.jsonl",
    ]  # fmt: skip
    record = read_record(found["models/german"].parent)
    assert record.provenance["parameters"] > 0
    assert not list(found["models/base"].parent.rglob("*.gguf"))

    assert real.real_experts_flow(home, settings=settings_of(home)) == found
    assert len(made) == 2
    # Questions may change without training again.
    other = settings_of(home).model_copy(update={"questions": QuestionSettings(context=30, continuation=30, passage=60)})
    changed = real.real_experts_flow(home, settings=other)
    assert len(made) == 2
    assert [name for name in found if changed[name] != found[name]] == ["data"]
    # What is not the study's own gets none of its names.
    assert not (steps.real_folder(home) / "models").exists()


def test_the_names_in_the_home_folder(home: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = settings_of(home)
    monkeypatch.setattr(real, "RealSettings", lambda base, training: mine)
    names = real_study.make_models(home.home)
    assert (names["models"] / "code" / "model.safetensors").is_file()
    assert (names["data"] / "german" / "test-questions.jsonl").is_file()
    assert real_study.make_models(home.home) == names


def test_the_base_may_come_from_the_hub(home: Places, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A snapshot in bfloat16, as the hub has it, under names of its own; another snapshot is another base, with other experts."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    snapshot = tmp_path / "snapshot"
    convert(tmp_path / "tiny.gguf", snapshot, BaseSettings())
    tokenizer = AutoTokenizer.from_pretrained(snapshot)
    AutoModelForCausalLM.from_pretrained(snapshot, dtype=torch.bfloat16).save_pretrained(snapshot)
    tokenizer.save_pretrained(snapshot)
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\nThe hub's own words.\n")
    asked: list[str] = []
    monkeypatch.setattr(steps, "fetch", lambda source, cache: asked.append(source) or fetch(str(snapshot), cache=cache))
    ours, hub = settings_of(home), HubSettings()
    monkeypatch.setattr(real, "RealSettings", lambda base, training: RealSettings(**dict(ours) | {"base": base}))
    names = real_study.make_models(home.home, "hub")
    assert asked == ["HuggingFaceTB/SmolLM2-135M-Instruct@main"] == [hub.source]
    assert names["models"] == home.home / "real-hub" / "models"
    weights, given = (load_file(folder / "model.safetensors") for folder in (names["models"] / "base", snapshot))
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert all(torch.equal(weights[name], tensor.float()) for name, tensor in given.items())
    assert "The hub's own words." in (names["models"] / "base" / "README.md").read_text()
    assert (names["models"] / "code" / "optimizer.pt").is_file()
    record = read_record((names["models"] / "base").resolve().parent)
    assert record.inputs["snapshot"] == fetch(str(snapshot), cache=home.cache).digest

    first = (names["models"] / "code").resolve()
    tensors = {name: tensor + 0.5 for name, tensor in given.items()}
    save_file(tensors, snapshot / "model.safetensors", metadata={"format": "pt"})
    assert (real_study.make_models(home.home, "hub")["models"] / "code").resolve() != first


def test_nothing_is_trained_when_text_lacks(home: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(folder: Path) -> dict[str, Path]:
        raise CorpusError(f"{folder} lacks a package")

    monkeypatch.setattr(steps, "find_packages", lacks)
    monkeypatch.setattr(steps, "train_real", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(OtaError, match="lacks a package"):
        real.real_experts_flow(home, settings=settings_of(home))
    assert not (Path(home.artifacts) / "data").exists() or not list((Path(home.artifacts) / "data").iterdir())


def test_an_expert_is_known_by_its_text_and_its_training(home: Places) -> None:
    """Corpora of other settings are other corpora, with other experts; the base stays."""
    found = real.real_experts_flow(home, settings=settings_of(home))
    other = settings_of(home).model_copy(update={"corpora": CorpusSettings(longest=3000)})
    changed = real.real_experts_flow(home, settings=other)
    assert {name for name in found if changed[name] == found[name]} == {"models/base"}


def test_the_study_is_of_the_experts_that_are_made(tmp_path: Path) -> None:
    config, _ = load_study(str(real_study.STUDY))
    assert {model.capability for model in config.models} == set(DOMAINS)
    moved = real_study.at_home(config, tmp_path)
    folder = steps.real_folder(places(tmp_path))
    assert {Path(model.model) for model in moved.models} == {folder / "models" / name for name in DOMAINS}
    assert (moved.base_model, moved.data_dir) == (str(folder / "models" / "base"), str(folder / "data"))
    assert moved.tune is not None and moved.tune.suite == "real-validation"
    assert [cell.label for cell in moved.cells()] == [cell.label for cell in config.cells()]
    hub = real_study.at_home(config, tmp_path, "hub")
    assert hub.name == "real-hub" and Path(hub.base_model) == tmp_path / "real-hub" / "models" / "base"
    assert hub.data_dir == str(tmp_path / "real-hub" / "data")
