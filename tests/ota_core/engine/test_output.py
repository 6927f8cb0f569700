"""The merged folder as a user loads it, and what is left when the writing breaks off."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ota_core.artifact import read_record
from ota_core.engine import engine
from ota_core.errors import OtaError
from ota_core.files.writer import SafetensorsWriter
from ota_core.recipe.recipe import MergeRecipe
from tests.checkpoints import write_moments
from tests.ota_core.files.test_place import an_output
from tests.tiny_models import edit_config, perturb, write_tiny_llama

ROOT = Path(__file__).parents[3]


def llama_experts(root: Path, count: int = 2, **options: Any) -> dict[str, Any]:
    """A small Llama, experts of it with second moments, and a recipe for OTA with FFG. options: as ``write_tiny_llama``."""
    base = write_tiny_llama(root / "base", **options)
    models = []
    for i in range(count):
        expert = perturb(base, root / f"expert{i}", seed=i + 1)
        add_moments(expert, seed=i)
        models.append({"model": str(expert)})
    return {"merge_method": "ota", "base_model": str(base), "models": models, "parameters": {"density": 0.4}}


def add_moments(folder: Path, seed: int = 0) -> None:
    """v between 1e-16 and 1e-10 for every tensor of a folder."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(file).items()}
    write_moments(
        folder,
        {n: 10.0 ** (-16 + 6 * torch.rand(x.shape, generator=generator)) for n, x in weights.items()},
        step=100,
        beta2=0.999,
    )


def merge(recipe: dict[str, Any], out: Path, **options: Any) -> engine.MergeReport:
    return engine.merge(MergeRecipe.model_validate(recipe), out, **options)


def loaded(folder: Path) -> Any:
    """The model as transformers loads it, with every key in its place."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert {kind: list(keys) for kind, keys in info.items() if keys} == {}
    return model


def leftovers(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if out.name in path.name and path != out)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_it_loads_and_generates(tmp_path: Path, tie: bool, dtype: str | None) -> None:
    from transformers import AutoTokenizer

    recipe = llama_experts(tmp_path, tie=tie) | ({"dtype": dtype} if dtype else {})
    old = os.umask(0o022)
    try:
        report = merge(recipe, tmp_path / "out")
    finally:
        os.umask(old)
    out = tmp_path / "out"
    model, tokenizer = loaded(out), AutoTokenizer.from_pretrained(out)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16 if dtype else torch.float32}
    assert json.loads((out / "config.json").read_text())["dtype"] == (dtype or "float32")
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) is tie
    written = load_file(out / "model.safetensors")
    assert all(torch.equal(parameter, written[name]) for name, parameter in model.named_parameters())
    total = sum(parameter.numel() for parameter in model.parameters())  # a tied head is counted once
    assert {(d["total"], d["kept"]) for d in report.densities.values()} == {(total, round(0.4 * total))}
    answer = model.generate(**tokenizer("2+2=", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert answer.shape[1] > 4 and isinstance(tokenizer.decode(answer[0]), str)
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o644} and stat.S_IMODE(out.stat().st_mode) == 0o755
    assert set(read_record(out).files) == {path.name for path in out.iterdir()} - {"record.json"}


def test_everything_beside_the_weights_comes_along(tmp_path: Path) -> None:
    recipe = llama_experts(tmp_path)
    base = tmp_path / "base"
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.3, "do_sample": True, "eos_token_id": 2}))
    (base / "chat_template.jinja").write_text("{% for m in messages %}<s>{{ m['content'] }}{% endfor %}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("tool: {{ messages[0]['content'] }}")
    for private in ("optimizer.pt", "training_args.bin", "notes.txt", "README.md"):
        (base / private).write_text("not of the model")
    merge(recipe, tmp_path / "out")
    out = tmp_path / "out"
    for name in (
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
    ):
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    assert not {"optimizer.pt", "training_args.bin", "notes.txt"} & {path.name for path in out.iterdir()}
    from transformers import AutoTokenizer

    chat = [{"role": "user", "content": "hi"}]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<s>hi"
    assert tokenizer.apply_chat_template(chat, tokenize=False, chat_template="tool") == "tool: hi"
    assert loaded(out).generation_config.temperature == 0.3
    card = (out / "README.md").read_text()
    assert (
        "not of the model" not in card and "density: 0.4" in card and "| expert1 |" in card.replace("expert expert1", "expert1")
    )


def test_pickled_weights_give_the_same_merge(tmp_path: Path) -> None:
    recipe = llama_experts(tmp_path, tie=True)
    merge(recipe, tmp_path / "a")
    for folder in ("base", "expert0", "expert1"):
        file = tmp_path / folder / "model.safetensors"
        state = load_file(file)
        if folder == "expert1":  # two pickles with an index
            names = sorted(state)
            parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
            for part, held in parts.items():
                torch.save({name: state[name] for name in held}, tmp_path / folder / part)
            index = {"metadata": {}, "weight_map": {name: part for part, held in parts.items() for name in held}}
            (tmp_path / folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        else:
            torch.save(state, tmp_path / folder / "pytorch_model.bin")
        file.unlink()
    merge(recipe, tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    recipe = llama_experts(tmp_path)

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "trapped",))

    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Trap()}, tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(OtaError, match=r"pytorch_model.bin cannot be read as PyTorch weights"):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "trapped").exists() and not (tmp_path / "out").exists()


def test_an_error_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = llama_experts(tmp_path)
    original, written = SafetensorsWriter.write_rows, []

    def breaks(self: SafetensorsWriter, *arguments: Any) -> None:
        written.append(arguments[0])
        if len(written) == 5:
            raise KeyboardInterrupt
        original(self, *arguments)

    monkeypatch.setattr(SafetensorsWriter, "write_rows", breaks)
    with pytest.raises(KeyboardInterrupt):
        merge(recipe, tmp_path / "out")
    assert len(written) >= 5 and not (tmp_path / "out").exists() and leftovers(tmp_path / "out") == []


STOPPED_MERGE = """
import signal, sys
from pathlib import Path
from ota_core.engine import engine
from ota_core.recipe.recipe import load_recipe
from ota_core.files.writer import SafetensorsWriter
write = SafetensorsWriter.write_rows
wrote = []
def stop(self, *arguments):
    write(self, *arguments)
    wrote.append(arguments[0])
    if len(wrote) == 3:
        print("wrote", *wrote, flush=True)
        signal.pause()
SafetensorsWriter.write_rows = stop
engine.merge(load_recipe(Path(sys.argv[1])), Path(sys.argv[2]), overwrite=True, threads=1)
"""


@pytest.mark.parametrize("existing", [False, True])
def test_a_killed_merge_leaves_no_half_output(tmp_path: Path, existing: bool) -> None:
    (tmp_path / "r.yaml").write_text(json.dumps(llama_experts(tmp_path)))
    out = tmp_path / "out"
    if existing:
        an_output(out, "old")
    running = subprocess.Popen(
        [sys.executable, "-c", STOPPED_MERGE, str(tmp_path / "r.yaml"), str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    assert running.stdout.readline().startswith("wrote")
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert (out / "old").exists() if existing else not out.exists()
    [abandoned] = tmp_path.glob(".out.*.tmp")
    merge(json.loads((tmp_path / "r.yaml").read_text()), out, overwrite=existing)
    read_record(out)
    loaded(out)
    assert not abandoned.exists(), "what the killed merge left behind is removed by the next"


def test_overwrite_replaces_the_folder_as_a_whole(tmp_path: Path) -> None:
    recipe = llama_experts(tmp_path)
    out = tmp_path / "out"
    merge(recipe, out)
    first = read_record(out).fingerprint
    (out / "model-00001-of-00009.safetensors").write_text("of an older output")
    with pytest.raises(OtaError, match="exists already; choose another output or pass --overwrite"):
        merge(recipe, out)
    seen: set[str] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            record = out / "record.json"
            try:
                seen.add(json.loads(record.read_text())["fingerprint"])
            except FileNotFoundError:
                seen.add("gone")  # never: the two folders exchange their names in one step
            time.sleep(0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    merge(recipe | {"parameters": {"density": 0.1}}, out, overwrite=True)
    done.set()
    watcher.join()
    second = read_record(out).fingerprint
    assert first != second and first in seen and seen <= {first, second}
    assert not (out / "model-00001-of-00009.safetensors").exists() and leftovers(out) == []


def test_only_the_dtype_of_the_recipe_changes_the_configuration(tmp_path: Path) -> None:
    recipe = llama_experts(tmp_path)
    edit_config(tmp_path / "base", torch_dtype="float32", custom={"kept": [1, 2]})
    merge(recipe, tmp_path / "a")
    merge(recipe | {"dtype": "float32", "out_dtype": "float16"}, tmp_path / "b")
    base = json.loads((tmp_path / "base" / "config.json").read_text())
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == base
    changed = json.loads((tmp_path / "b" / "config.json").read_text())
    assert changed.pop("dtype") == "float16" and changed == {
        key: value for key, value in base.items() if key not in {"dtype", "torch_dtype"}
    }
