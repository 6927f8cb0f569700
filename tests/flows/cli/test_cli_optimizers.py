"""Experts that other optimizers than AdamW trained: the commands read their states as the Trainer left them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.flows.cli.typed import ota, refused
from tests.tiny_models import write_tiny_llama


def fine_tuned(base: Path, folder: Path, *, seed: int, optim: str, options: str = "") -> tuple[Path, dict[str, dict[str, Any]]]:
    """Fine-tune with the Trainer: its checkpoint's folder and, by name, the live optimizer's state."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(4, 100, (12, 8))]
    arguments = TrainingArguments(
        folder, max_steps=3, save_steps=3, per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True,
        weight_decay=0.1, learning_rate=1e-3, dataloader_pin_memory=False, optim=optim, optim_args=options or None,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    held = trainer.optimizer
    state = getattr(held, "optimizer", held).state  # accelerate wraps it
    return folder / "checkpoint-3", {name: state[parameter] for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def adafactor(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], list[dict[str, dict[str, Any]]]]:
    """Folder, two experts that Adafactor trained, and what their optimizers held."""
    root = tmp_path_factory.mktemp("adafactor")
    base = write_tiny_llama(root / "base")
    made = [fine_tuned(base, root / f"run{i}", seed=i, optim="adafactor") for i in range(2)]
    return root, [folder for folder, _ in made], [live for _, live in made]


def recipe_of(root: Path, path: Path, experts: list[dict[str, Any]], **parameters: Any) -> Path:
    raw = {
        "merge_method": "ota",
        "base_model": str(root / "base"),
        "models": experts,
        "parameters": {"density": 0.4} | parameters,
    }
    path.write_text(yaml.safe_dump(raw))
    return path


def test_compress_writes_the_means_of_adafactor_as_they_are(tmp_path: Path, adafactor: Any) -> None:
    _, [folder, _], [live, _] = adafactor
    result = ota("compress", folder, tmp_path / "v.safetensors")
    stored = load_file(tmp_path / "v.safetensors")
    for name, entry in live.items():
        if "exp_avg_sq" in entry:
            assert torch.equal(stored.pop(name), entry["exp_avg_sq"])
            continue
        rows, cols = entry["exp_avg_sq_row"], entry["exp_avg_sq_col"]
        assert torch.equal(stored.pop(f"{name}#row"), rows * len(cols)), "sums, where Adafactor has means"
        assert torch.equal(stored.pop(f"{name}#col"), cols * len(rows))
    assert not stored
    assert "rank1" in result.stdout and "relative error of the square root of v: 0.0000" in result.stdout
    assert f"β₂ {1 - 3**-0.8:.6g}, step 3" in result.stdout
    for method in ("none", "log8", "rank_k"):
        text = refused("compress", folder, tmp_path / "w.safetensors", "--method", method)
        assert (
            f"kept row and column means and no full second moments, which is the form rank1; {method} cannot be made of it"
            in text
        )
    assert [path.name for path in tmp_path.iterdir()] == ["v.safetensors"]


def test_inspect_says_what_adafactor_kept(tmp_path: Path, adafactor: Any) -> None:
    _, [folder, _], _ = adafactor
    text = ota("inspect", folder).stdout
    assert "optimizer.pt: second moments of" in text and "as the trainer left them: row and column means alone (rank1)" in text
    assert f"β₂ {1 - 3**-0.8:.6g}, step 3, needs no bias correction" in text
    ota("compress", folder, tmp_path / "v.safetensors")
    text = ota("inspect", tmp_path / "v.safetensors").stdout
    assert ", rank1, " in text and f"β₂ {1 - 3**-0.8:.6g}, step 3, needs no bias correction" in text


@pytest.mark.parametrize("bias_correction", [False, True])
def test_a_merge_with_adafactors_state_is_the_merge_with_rank1_files_of_the_same_means(
    tmp_path: Path, adafactor: Any, bias_correction: bool
) -> None:
    root, experts, _ = adafactor
    options = {"compression": "rank1", "bias_correction": bias_correction}
    direct = recipe_of(root, tmp_path / "direct.yaml", [{"model": str(folder)} for folder in experts], **options)
    files = []
    for i, folder in enumerate(experts):
        ota("compress", folder, tmp_path / f"{i}.safetensors")
        files.append({"model": str(folder), "parameters": {"preconditioner_path": str(tmp_path / f"{i}.safetensors")}})
    by_file = recipe_of(root, tmp_path / "files.yaml", files, **options)
    assert "no problems found" in ota("plan", direct).stdout
    ota("merge", direct, tmp_path / "a")
    ota("merge", by_file, tmp_path / "b")
    weights = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert weights == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert weights != (root / "base" / "model.safetensors").read_bytes()
    # Adafactor's average has no bias, so that correcting it changes nothing.
    plain = recipe_of(root, tmp_path / "plain.yaml", [{"model": str(folder)} for folder in experts], compression="rank1")
    ota("merge", plain, tmp_path / "c")
    assert weights == (tmp_path / "c" / "model.safetensors").read_bytes()


def test_a_recipe_without_compression_is_told_of_adafactor(tmp_path: Path, adafactor: Any) -> None:
    root, experts, _ = adafactor
    recipe = recipe_of(root, tmp_path / "r.yaml", [{"model": str(folder)} for folder in experts])
    message = "row and column means, all that Adafactor keeps, which are read with compression: rank1; the recipe asks for compression: none"
    assert message in refused("plan", recipe) and message in refused("merge", recipe, tmp_path / "out")


def test_an_adafactor_expert_merges_with_one_of_rmsprop(tmp_path: Path, adafactor: Any) -> None:
    root, [folder, _], _ = adafactor
    other, live = fine_tuned(root / "base", tmp_path / "run", seed=7, optim="rmsprop")
    ota("compress", other, tmp_path / "v.safetensors", "--method", "none")
    stored = load_file(tmp_path / "v.safetensors")
    assert stored.keys() == live.keys() and all(torch.equal(stored[name], entry["square_avg"]) for name, entry in live.items())
    assert "β₂ 0.99, step 3" in ota("inspect", other).stdout
    experts = [{"model": str(folder)}, {"model": str(other)}]
    recipe = recipe_of(root, tmp_path / "r.yaml", experts, compression="rank1", bias_correction=True)
    assert "no problems found" in ota("plan", recipe).stdout
    ota("merge", recipe, tmp_path / "out")


def test_a_state_without_second_moments_is_refused_by_every_command(tmp_path: Path, adafactor: Any) -> None:
    root, [folder, _], _ = adafactor
    other, _ = fine_tuned(root / "base", tmp_path / "run", seed=7, optim="sgd")
    recipe = recipe_of(root, tmp_path / "r.yaml", [{"model": str(folder)}, {"model": str(other)}], compression="rank1")
    reason = "has an empty state: SGD without momentum keeps none. Measure them on data instead: ota estimate MODEL --data FILE"
    for words in (
        ["compress", other, tmp_path / "v"],
        ["inspect", other],
        ["plan", recipe],
        ["merge", recipe, tmp_path / "out"],
    ):
        assert reason in refused(*words)


def test_parameters_of_different_steps_are_said(tmp_path: Path) -> None:
    steps = {"a": 3, "b": 5, "c": 5}
    state = {name: {"step": torch.tensor(float(step)), "exp_avg_sq": torch.rand(4, 4)} for name, step in steps.items()}
    torch.save({"state": state, "param_groups": [{"params": list(steps), "betas": (0.9, 0.999)}]}, tmp_path / "optimizer.pt")
    said = "β₂ 0.999, steps 3 to 5 (2 different ones: parameters were updated unequally often)"
    assert said in ota("inspect", tmp_path / "optimizer.pt").stdout
    assert said in ota("compress", tmp_path / "optimizer.pt", tmp_path / "v.safetensors").stdout
    assert said in ota("inspect", tmp_path / "v.safetensors").stdout
