"""The demo's training on smoke settings: folders as the Trainer leaves them, and the suite's task files on the demo's data."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ota_core.errors import OtaError
from tasks.local.demo.data import CAPABILITIES, read_jsonl, write_data
from tasks.local.demo.train import SMOKE, TRAINING, DemoSettings, TrainedModel, make_tokenizer, train_base, train_expert

SUITE = Path(__file__).parents[4] / "deployments" / "suites"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/, base/ and knowledge/ (an expert), made once."""
    folder = tmp_path_factory.mktemp("demo")
    write_data(folder / "data", seed=0, settings=SMOKE.data)
    train_base(folder / "data", folder / "base", seed=0, model=SMOKE.model, training=SMOKE.base)
    expert(folder, "knowledge", folder / "knowledge")
    return folder


def expert(root: Path, capability: str, out: Path, **more: Any) -> TrainedModel:
    return train_expert(capability, root / "data", root / "base", out, seed=0, training=SMOKE.expert, **more)


@pytest.mark.parametrize("name", ["base", "knowledge"])
def test_a_folder_loads_without_a_missing_key_and_generates(root: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(root / name, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert {tensor.dtype for tensor in load_file(root / name / "model.safetensors").values()} == {torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(root / name)
    assert model.config.vocab_size == len(tokenizer)
    ids = tokenizer("Compute 12 + 3.\nAnswer:", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == tokenizer.bos_token_id and ids[0, 1] != tokenizer.bos_token_id
    answer = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > ids.shape[1]


def test_the_expert_keeps_the_optimizer_of_the_run_that_made_it(root: Path) -> None:
    """The integer keys are the decayed parameters, then the rest; each state has its parameter's shape and one count of steps."""
    from transformers import AutoModelForCausalLM

    saved = torch.load(root / "knowledge" / "optimizer.pt", weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(root / "knowledge")
    matrices = [p.shape for p in model.parameters() if p.dim() > 1]
    vectors = [p.shape for p in model.parameters() if p.dim() == 1]
    assert [len(group["params"]) for group in saved["param_groups"]] == [len(matrices), len(vectors)]
    assert [saved["state"][i]["exp_avg_sq"].shape for i in range(len(saved["state"]))] == matrices + vectors
    assert {float(state["step"]) for state in saved["state"].values()} == {SMOKE.expert.steps}
    assert {group["betas"][1] for group in saved["param_groups"]} == {SMOKE.expert.beta2}
    assert all((state["exp_avg_sq"] >= 0).all() and state["exp_avg_sq"].any() for state in saved["state"].values())
    assert (root / "knowledge" / "trainer_state.json").is_file()
    assert not (root / "base" / "optimizer.pt").exists()


def test_every_tensor_of_the_expert_moved_and_its_tokenizer_is_the_base_s(root: Path) -> None:
    base, tuned = (load_file(root / name / "model.safetensors") for name in ("base", "knowledge"))
    assert base.keys() == tuned.keys()
    assert [name for name in base if torch.equal(base[name], tuned[name])] == []
    assert (root / "base" / "tokenizer.json").read_bytes() == (root / "knowledge" / "tokenizer.json").read_bytes()


def test_the_record_of_a_run_is_kept_and_survives_a_move(root: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, float]] = []
    trained = expert(root, "math", tmp_path / "first", progress=lambda *said: seen.append(said))
    (tmp_path / "first").rename(tmp_path / "moved")
    kept = json.loads((tmp_path / "moved" / TRAINING).read_text(encoding="utf-8"))
    again = TrainedModel(path=tmp_path / "moved", **kept)
    assert again == trained.model_copy(update={"path": tmp_path / "moved"})
    assert (again.capability, again.step, again.beta2, again.optimizer) == ("math", SMOKE.expert.steps, 0.999, "adamw_torch")
    assert again.parameters == sum(tensor.numel() for tensor in load_file(tmp_path / "moved" / "model.safetensors").values())
    assert [said[:2] for said in seen] == [(step, SMOKE.expert.steps) for step in range(1, SMOKE.expert.steps + 1)]
    assert sum(said[2] for said in seen) / len(seen) == pytest.approx(trained.loss)
    assert [path.name for path in tmp_path.iterdir()] == ["moved"], "no temporary folder is left"


def test_the_same_seed_gives_the_same_weights_and_moments(root: Path, tmp_path: Path) -> None:
    expert(root, "knowledge", tmp_path / "again")
    first, again = (load_file(folder / "model.safetensors") for folder in (root / "knowledge", tmp_path / "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    states = [torch.load(f / "optimizer.pt", weights_only=True)["state"] for f in (root / "knowledge", tmp_path / "again")]
    assert all(torch.equal(states[0][i]["exp_avg_sq"], states[1][i]["exp_avg_sq"]) for i in states[0])


def test_user_mistakes_are_named_and_nothing_is_written(root: Path, tmp_path: Path) -> None:
    with pytest.raises(OtaError, match="unknown capability 'maths'; known are math, code"):
        expert(root, "maths", tmp_path / "x")
    before = (root / "knowledge" / "model.safetensors").read_bytes()
    with pytest.raises(OtaError, match="knowledge exists already; delete it"):
        expert(root, "math", root / "knowledge")
    assert (root / "knowledge" / "model.safetensors").read_bytes() == before and not list(tmp_path.iterdir())


def test_the_tokenizer_writes_any_text_back_and_cuts_prompts_where_answers_start(root: Path) -> None:
    """Training masks the prompt's tokens and scoring starts after them: both need the prompt to be a prefix of the whole."""
    tokenizer = make_tokenizer([row["text"] for row in read_jsonl(root / "data" / "base" / "train.jsonl")], size=768)
    assert tokenizer.decode(tokenizer("Täst [1, 23]; Ω\n x")["input_ids"], skip_special_tokens=True) == "Täst [1, 23]; Ω\n x"
    for capability in CAPABILITIES:
        for row in read_jsonl(root / "data" / capability / "train.jsonl"):
            prompt = tokenizer(row["prompt"])["input_ids"]
            whole = tokenizer(f"{row['prompt']} {row['answer']}")["input_ids"]
            assert whole[: len(prompt)] == prompt and len(whole) > len(prompt), row
            assert tokenizer.decode(whole[len(prompt) :]).strip() == row["answer"]


def test_settings_are_strict_and_have_one_canonical_form() -> None:
    from ota_core.artifact import canonical_json

    assert canonical_json(DemoSettings()) == canonical_json(DemoSettings.model_validate_json(DemoSettings().model_dump_json()))
    assert canonical_json(DemoSettings()) != canonical_json(SMOKE)
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        DemoSettings.model_validate({"expert": {"steps": 3, "learning_rat": 1}})


def test_the_suite_s_task_files_load_in_lm_eval_and_ask_the_test_split(root: Path, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    from tasks.evaluation.harness_tasks import load_tasks
    from tasks.evaluation.suites import load_suite

    suite = load_suite("demo")
    assert set(suite.capabilities) == set(CAPABILITIES)
    assert set(TaskManager(include_path=str(SUITE / "demo"), include_defaults=False).all_tasks) == {
        f"demo_{c}" for c in CAPABILITIES
    }
    loaded = load_tasks(suite, root / "data", tmp_path)
    for capability in CAPABILITIES:
        task = loaded[f"demo_{capability}"]["tasks"][f"demo_{capability}"]
        rows = read_jsonl(root / "data" / capability / "test.jsonl")
        documents = list(task.eval_docs)
        assert [(task.doc_to_text(d), task.doc_to_target(d)) for d in documents] == [(r["prompt"], r["answer"]) for r in rows]
        assert task.config.generation_kwargs["do_sample"] is False
