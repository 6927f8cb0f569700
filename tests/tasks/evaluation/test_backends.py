"""Backends: a served model scores as the same model in this process; what cannot work is said before anything is asked."""

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

from tasks.evaluation.backend import Backend
from tasks.evaluation.harness import score_model
from tasks.evaluation.scores import ModelScores
from tasks.evaluation.suites import Suite, SuiteError, at_server, load_suite, score_identity, suite_digest
from tests.tasks.evaluation.openai_server import serving
from tests.tasks.evaluation.test_benchmark import greedy
from tests.tiny_models import perturb
from tests.tiny_suite import edited, read_rows, write_rows

LOSS = """
task: tiny_text
dataset_path: json
dataset_kwargs: {data_files: {test: "{data}/text.jsonl"}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""


def same(one: ModelScores, other: ModelScores) -> None:
    """To rounding: answers are equal, likelihoods nearly."""
    assert one.samples == other.samples
    for name, score in one.capabilities.items():
        assert score.tasks == {task: pytest.approx(numbers) for task, numbers in other.capabilities[name].tasks.items()}
    assert one.losses == pytest.approx(other.losses, rel=1e-6)


@pytest.fixture
def suite(model: Path, tiny: tuple[Path, Path]) -> Suite:
    """Generation of which half is right, four choices, and held-out text."""
    rows = read_rows(tiny[1] / "sums.jsonl")
    write_rows(
        tiny[1] / "sums.jsonl",
        [row | {"answer": greedy(model, row["prompt"], 4)} if i % 2 else row for i, row in enumerate(rows)],
    )
    write_rows(tiny[1] / "text.jsonl", [{"text": f"Held-out text, line {i}."} for i in range(6)])
    (tiny[0].parent / "tiny" / "text.yaml").write_text(LOSS)
    return edited(tiny[0], ("\ncapabilities:", "\nlosses: {knowledge: {task: tiny_text}}\ncapabilities:"))


@pytest.mark.parametrize("batch", [64, 1, "auto"])
def test_a_served_model_scores_as_the_loaded_one(model: Path, tiny: tuple[Path, Path], suite: Suite, batch: int | str) -> None:
    suite = Suite.model_validate(suite.model_dump() | {"batch_size": batch})
    here = score_model(model, suite, data_dir=tiny[1])
    other = perturb(model, tiny[1] / "other", seed=3, scale=0.3)
    with serving({"tiny": model, "other": other}) as (url, seen):
        asked = score_model(model, at_server(suite, url), data_dir=tiny[1], served_as=["tiny"])
        another = score_model(model, at_server(suite, f"{url}/completions"), data_dir=tiny[1], served_as=["other"])
    assert here.capabilities["math"].score == 0.5 and here.backend is None
    same(asked, here)
    assert another.losses != asked.losses
    assert {one["path"] for one in seen} == {"/v1/completions"}
    assert len(seen[0]["prompt"]) == (12 if batch == 64 else 1), "a batch is one request"
    # The backend is part of what scores are known by; where the server stands is not.
    assert asked.backend == "local-completions" and asked.suite_digest != here.suite_digest
    assert asked.suite_digest == another.suite_digest == suite_digest(at_server(suite, "https://elsewhere.example/v1"))


@pytest.mark.parametrize(
    "template", ["", "<s>{% for m in messages %}{{ m['content'] }}{% endfor %}", "{{ messages[0]['content'] }}"]
)
def test_prompts_begin_as_in_this_process(model: Path, tiny: tuple[Path, Path], suite: Suite, template: str) -> None:
    """With a tokenizer that puts <s> before every text, once, also where the template writes it."""
    from tokenizers import Tokenizer, processors

    begins = perturb(model, tiny[1] / "begins", seed=0, scale=0)
    tokenizer = Tokenizer.from_file(str(begins / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(begins / "tokenizer.json"))
    if template:
        (begins / "chat_template.jinja").write_text(template)
    suite = suite.asked(bool(template))
    here = score_model(begins, suite, data_dir=tiny[1])
    with serving({"tiny": begins}) as (url, seen):
        same(score_model(begins, at_server(suite, url), data_dir=tiny[1], served_as=["tiny"]), here)
    prompts = [ids for one in seen if not one.get("echo") for ids in one["prompt"]]
    assert {ids[:2].count(1) for ids in prompts} == {1}


def test_requests_side_by_side(model: Path, tiny: tuple[Path, Path], suite: Suite, capfd: pytest.CaptureFixture[str]) -> None:
    here = score_model(model, suite, data_dir=tiny[1])
    with serving({"tiny": model}) as (url, seen):
        asked = at_server(suite, url)
        several = asked.model_copy(
            update={"batch_size": 2, "backend": asked.backend.model_copy(update={"args": {"num_concurrent": 4}})}
        )
        capfd.readouterr()
        same(score_model(model, several, data_dir=tiny[1], served_as=["tiny"]), here)
    assert capfd.readouterr() == ("", "") and max(len(one["prompt"]) for one in seen) == 2
    assert suite_digest(several) == suite_digest(asked), "how many at a time changes no score"


def test_keys_come_from_the_environment(model: Path, tiny: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    suite = load_suite(str(tiny[0]))
    with serving({"tiny": model}, key="k-1") as (url, _):
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        with pytest.raises(SuiteError, match=r"does not say which models it serves .*401"):
            score_model(model, at_server(suite, url), data_dir=tiny[1], served_as=["tiny"])
        monkeypatch.setenv("OPENAI_API_KEY", "k-1")
        assert score_model(model, at_server(suite, url), data_dir=tiny[1], served_as=["tiny"], limit=2).average is not None
    for wrong in ("http://user:secret@host/v1", "http://host/v1?key=secret"):
        with pytest.raises(SuiteError, match=r"keys come from the environment") as caught:
            at_server(suite, wrong)
        assert "secret" not in str(caught.value)
    with pytest.raises(SuiteError, match=r"backend\.args\.auth_token: keys come from the environment"):
        edited(tiny[0], ("name: tiny", "name: tiny\nbackend: {name: local-completions, args: {auth_token: abc}}"))


def test_a_server_that_serves_another_model_is_refused(model: Path, tiny: tuple[Path, Path]) -> None:
    suite = load_suite(str(tiny[0]))
    with serving({"other": model}) as (url, seen):
        with pytest.raises(
            SuiteError, match=r"serves other, not tiny; serve the model under that name .*--served-model-name tiny"
        ):
            score_model(model, at_server(suite, url), data_dir=tiny[1], served_as=["tiny"])
        assert seen == []
    with pytest.raises(SuiteError, match="does not say which models it serves"):  # nobody is there any more
        score_model(model, at_server(suite, url), data_dir=tiny[1], served_as=["tiny"])
    nowhere = edited(tiny[0], ("name: tiny", "name: tiny\nbackend: {name: local-completions}"))
    with pytest.raises(SuiteError, match="name it: server in the suite's backend, or the option --server"):
        score_model(model, nowhere, data_dir=tiny[1], served_as=["tiny"])


def test_a_server_that_chats(model: Path, tiny: tuple[Path, Path]) -> None:
    chats = perturb(model, tiny[1] / "chats", seed=0, scale=0)
    (chats / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}\n")
    file = tiny[0]
    knowledge = "  knowledge: {tasks: [{task: tiny_facts, metric: acc}]}\n"
    head = "name: tiny\napply_chat_template: true\nbackend: {name: local-chat-completions, args: {max_retries: 1}}"
    with pytest.raises(SuiteError, match="local-chat-completions always asks through the server's chat template; write true"):
        edited(file, ("name: tiny", head.replace("apply_chat_template: true\n", "")))
    suite = edited(file, ("name: tiny\nbackend: {name: local-chat-completions, args: {max_retries: 1}}", head))
    with serving({"tiny": chats}) as (url, seen):
        with pytest.raises(
            SuiteError, match=r"'tiny_facts' compares likelihoods \(multiple_choice\), which local-chat-completions"
        ):
            score_model(chats, at_server(suite, url), data_dir=tiny[1], served_as=["tiny"])
        suite = edited(file, (knowledge, ""))
        asked = score_model(chats, at_server(suite, url), data_dir=tiny[1], served_as=["tiny"])
    here = score_model(chats, edited(file, (head, "name: tiny\napply_chat_template: true")), data_dir=tiny[1])
    same(asked, here)
    assert {one["path"] for one in seen} == {"/v1/chat/completions"} and seen[0]["messages"][0]["role"] == "user"


@pytest.mark.parametrize(("name", "install"), [("vllm", r"lm-eval\[vllm\]"), ("sglang", "pip install sglang")])
def test_backends_that_are_not_installed_say_what_to_install(
    model: Path, tiny: tuple[Path, Path], name: str, install: str
) -> None:
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    suite = edited(tiny[0], ("name: tiny", f"name: tiny\nbackend: {{name: {name}, args: {{tensor_parallel_size: 2}}}}"))
    for asks in (lambda: score_identity("m", suite, "d"), lambda: score_model(model, suite, data_dir=tiny[1])):
        with pytest.raises(SuiteError, match=f"backend {name} is not installed on this machine: .*{install}"):
            asks()


def test_what_of_a_backend_identifies_scores(tiny: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = suite_digest(load_suite(str(tiny[0])))
    real, versions = importlib.metadata.version, {"vllm": "0.18.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name) or real(name))

    def digest(backend: str) -> str:
        suite = load_suite(str(tiny[0])).model_dump() | {"backend": Backend.model_validate_json(backend)}
        return suite_digest(Suite.model_validate(suite))

    assert digest('{"name": "hf"}') == digest('{"name": "hf", "args": {"parallelize": true}}') == plain
    first = digest('{"name": "vllm", "args": {"tensor_parallel_size": 1}}')
    assert first == digest('{"name": "vllm", "args": {"tensor_parallel_size": 8, "gpu_memory_utilization": 0.8}}')
    seen = [plain, first, digest('{"name": "hf", "args": {"add_bos_token": true}}')]
    seen.append(digest('{"name": "vllm", "args": {"quantization": "fp8"}}'))
    versions["vllm"] = "0.19.0"
    seen.append(digest('{"name": "vllm"}'))
    assert len(set(seen)) == 5
    assert Backend(name="vllm").label() == "vllm 0.19.0"


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("{name: vlm}", "no model for this name found"),
        ("{name: hf, args: {tensor_parallel: 2}}", "backend hf does not take these arguments|cannot be loaded"),
        ("{name: hf, server: 'http://host/v1'}", "backend: hf asks no server; take local-completions or local-chat-completions"),
        ("{name: local-completions, server: 'host:8000'}", "expected the URL of an API such as http://host:8000/v1"),
        ("{name: vllm, args: {dtype: float16}}", "backend.args.dtype: it is a key of the suite"),
        ("{name: local-completions}\ndtype: float32", "local-completions asks a server, which decides the data type by itself"),
    ],
)
def test_wrong_backends(model: Path, tiny: tuple[Path, Path], backend: str, message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        score_model(model, edited(tiny[0], ("name: tiny", f"name: tiny\nbackend: {backend}")), data_dir=tiny[1])
    assert type(caught.value).__module__.startswith(("tasks.", "ota_core.")), "an error for people"
