"""Bad input through the real command line: exit code 2, one message that names what is wrong and what to do, and nothing half-written."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flows.cli.app import app
from ota_core.errors import MomentsError, OtaError, raise_all
from tests.checkpoints import ota_recipe, random_base, random_experts
from tests.servers import S3Test, free_port

Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
UP = "model.layers.1.mlp.up_proj.weight"


class World:
    """A base and two experts on the disk, a recipe for them, and the command line."""

    def __init__(self, root: Path) -> None:
        self.root, self.home, self.out = root, root / "home", root / "out"
        base = random_base()
        self.recipe: dict[str, Any] = ota_recipe(root, base, random_experts(base, 2), {"density": 0.4})

    def edit(self, file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        """Change the tensors of a safetensors file in place."""
        path = self.root / file
        tensors = load_file(path)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
        return path

    def cut(self, file: str, by: int = 40) -> Path:
        """Truncate a file."""
        path = self.root / file
        path.write_bytes(path.read_bytes()[:-by])
        return path

    def run(self, command: str = "merge", *options: str) -> Any:
        path = self.root / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.recipe))
        out = [] if command == "plan" else [str(self.out)]
        return CliRunner().invoke(app, [command, str(path), *out, "--home", str(self.home), *options])

    def refused(self, command: str = "merge", *options: str) -> str:
        """The message of a refused command; nothing may be left of it."""
        before = {path for path in self.root.rglob("*") if self.home not in path.parents}
        result = self.run(command, *options)
        assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
        assert "Traceback" not in result.output
        assert result.stderr.count("Error: ") == 1
        after = {path for path in self.root.rglob("*") if self.home not in path.parents}
        assert after - before <= {self.root / "recipe.yaml", self.home}
        return str(result.stderr[result.stderr.index("Error: ") :])


def assert_says(text: str, *parts: object) -> None:
    """That an error names what it must: files, keys, tensors, the remedy."""
    assert [part for part in map(str, parts) if part not in text] == [], text


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "w")


def test_good_input_is_not_refused(world: World) -> None:
    assert world.run("plan").exit_code == 0
    assert world.run().exit_code == 0
    assert world.run("merge", "--overwrite").exit_code == 0


def test_missing_recipe_and_broken_yaml(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["merge", str(tmp_path / "no.yaml"), str(tmp_path / "out")])
    assert result.exit_code == 2 and f"{tmp_path / 'no.yaml'} does not exist; expected a YAML file" in result.stderr
    (tmp_path / "r.yaml").write_text("models: [a,\n")
    result = CliRunner().invoke(app, ["plan", str(tmp_path / "r.yaml")])
    assert result.exit_code == 2 and f"{tmp_path / 'r.yaml'} is not valid YAML" in result.stderr and "line 2" in result.stderr


@pytest.mark.parametrize("command", ["merge", "plan", "mask"])
def test_missing_folders_are_all_named(world: World, command: str) -> None:
    for name in ("base", "expert1"):
        shutil.rmtree(world.root / name)
    missing = (f"{world.root / name}' does not exist" for name in ("base", "expert1"))
    assert_says(world.refused(command), "2 problems found", *missing, "s3://bucket/prefix, or a Hugging Face id")


@pytest.mark.parametrize("command", ["merge", "plan"])
def test_truncated_files_are_named_with_both_sizes(world: World, command: str) -> None:
    weights, moments = world.cut("expert0/model.safetensors"), world.cut("expert1/exp_avg_sq.safetensors", by=1)
    size = weights.stat().st_size
    text = world.refused(command)
    assert f"{weights} is truncated: its tensors need {size + 40} bytes, {size} are there; fetch or save the file again" in text
    assert f"{moments} is truncated: its tensors need {moments.stat().st_size + 1} bytes" in text


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    world = World(tmp_path / "w")
    base = random_base()
    world.recipe = ota_recipe(world.root, base, random_experts(base, 2), {"density": 0.4}, shards=2)
    lost = world.root / "expert1" / "model-00002-of-00002.safetensors"
    lost.unlink()
    (lost.parent / "model.safetensors").unlink()  # of the world's own experts: a single file wins over an index
    assert f"{lost} does not exist" in world.refused()


def test_shapes_and_missing_and_extra_tensors_of_one_expert(world: World) -> None:
    world.edit("expert0/model.safetensors", lambda t: t.update({Q: t[Q][:, :4]}))
    world.edit("expert0/exp_avg_sq.safetensors", lambda t: t.update({Q: t[Q][:, :4]}))
    world.edit("expert1/model.safetensors", lambda t: (t.pop(NORM), t.update({"adapter.weight": torch.zeros(3)})))
    shape = f"{world.root / 'expert0'} (expert0): tensor '{Q}' has shape [8, 4], base has [8, 8]"
    lacks = f"{world.root / 'expert1'} (expert1): tensor '{NORM}' is missing"
    for command in ("merge", "plan"):
        text = world.refused(command)
        assert_says(
            text,
            "3 problems found",
            "names are no tensors of the weights (model.norm.weight)",
            shape,
            "from the same base",
            lacks,
            "'adapter.weight' is here and not in base",
        )


def test_second_moments_of_another_shape(world: World) -> None:
    path = world.edit(
        "expert0/exp_avg_sq.safetensors", lambda t: t.update({Q: t[Q][:, :4], "model.embed_tokens.weight": torch.ones(15, 8)})
    )
    shape = f"{path}: second moments of '{Q}' have shape [8, 4], the expert 'expert0' has [8, 8] there"
    rows = "'model.embed_tokens.weight' have shape [15, 8], the expert 'expert0' has [13, 8] there; was the vocabulary changed"
    assert_says(world.refused(), shape, "do they belong to this checkpoint?", rows)


def test_second_moments_of_another_model(world: World) -> None:
    path = world.edit(
        "expert1/exp_avg_sq.safetensors", lambda t: [t.update({f"transformer.{name}": t.pop(name)}) for name in list(t)]
    )
    text = world.refused()
    assert_says(text, f"{path}: 6 of its 6 names are no tensors of the weights (transformer.", "the weights hold 6 others")


@pytest.mark.parametrize("bad", [-1e-9, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("parameters", [{}, {"density": 0.4}, *({"compression": name} for name in ("rank1", "log8", "rank_k"))])
def test_bad_entries_of_v_name_file_tensor_and_index(world: World, bad: float, parameters: dict[str, Any]) -> None:
    path = world.edit("expert1/exp_avg_sq.safetensors", lambda t: t[UP].view(-1).__setitem__(11, bad))
    world.recipe["parameters"] = parameters
    text = world.refused()
    assert f"{path}: the second moment of '{UP}' is {bad if bad != -1e-9 else '-'}" in text
    assert "at index [1, 3], a finite value of at least 0 was expected" in text
    assert "take the second moments of an earlier checkpoint, or save them again" in text


def test_bad_entries_of_v_stop_mask_and_compress_too(world: World) -> None:
    path = world.edit("expert0/exp_avg_sq.safetensors", lambda t: t[UP].view(-1).__setitem__(0, float("nan")))
    assert f"{path}: the second moment of '{UP}' is nan" in world.refused("mask")
    for method in ("rank1", "log8", "rank_k", "none"):
        target = world.root / "c.safetensors"
        result = CliRunner().invoke(
            app, ["compress", str(world.root / "expert0"), str(target), "--method", method, "--home", str(world.home)]
        )
        assert result.exit_code == 2 and f"{path}: the second moment of '{UP}' is nan" in result.stderr
        assert [p.name for p in world.root.iterdir() if "c.safetensors" in p.name] == []


@pytest.mark.parametrize("command", ["merge", "mask"])
def test_tensors_that_moved_without_second_moments_are_all_named(world: World, command: str) -> None:
    paths = [world.edit(f"expert{i}/exp_avg_sq.safetensors", lambda t: (t.pop(Q), t.pop(NORM))) for i in (0, 1)]
    text = world.refused(command)
    for i, path in enumerate(paths):
        assert_says(text, f"{i + 1}. expert 'expert{i}': 2 tensors", f"no second moments in {path}: {Q}, {NORM}.")
    assert_says(text, "set missing_curvature: mean")
    # What did not move needs none.
    for i in (0, 1):
        base = load_file(world.root / "base" / "model.safetensors")
        world.edit(f"expert{i}/model.safetensors", lambda t, base=base: t.update({name: base[name] for name in (Q, NORM)}))
    assert world.run(command).exit_code == 0


def test_no_second_moments_at_all_are_named_beside_the_checkpoints_own_problems(world: World) -> None:
    for i in (0, 1):
        (world.root / f"expert{i}" / "exp_avg_sq.safetensors").unlink()
    cut = world.cut("base/model.safetensors")
    for command in ("merge", "plan"):
        text = world.refused(command)
        lack = (f"expert 'expert{i}': {world.root / f'expert{i}'} holds no second moments" for i in (0, 1))
        assert_says(text, "3 problems found", f"{cut} is truncated", *lack, "expected exp_avg_sq.safetensors, ")
        assert text.count("optimizer.pt, optimizer.bin (also in checkpoint-*). Name the file with preconditioner_path") == 2


def test_unknown_keys_methods_and_densities_are_listed_together(world: World) -> None:
    world.recipe |= {"merge_method": "ota2", "merge_methd": "ota", "parameters": {"densty": 0.4, "density": 0}}
    world.recipe["models"][1]["parameters"] = {"density": 1.5}
    for command in ("merge", "plan", "mask"):
        assert_says(
            world.refused(command), "5 problems found", world.root / "recipe.yaml", "'ota2'; did you mean 'ota'?",
            "'merge_methd'; did you mean 'merge_method'?", "'parameters.densty'; did you mean 'density'?", "parameters.density: got 0",
            "models[1].parameters.density: got 1.5",
        )  # fmt: skip


def test_the_wrong_base_is_suspected_when_all_experts_differ_alike(world: World) -> None:
    def other(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q] = torch.zeros(16, 8)
        tensors["model.layers.2.extra.weight"] = torch.zeros(2, 2)

    world.edit("base/model.safetensors", other)
    shape = f"'{Q}' has shape [8, 8], base has [16, 8]; tensor 'model.layers.2.extra.weight' is missing, base has it"
    assert_says(world.refused(), f"{world.root / 'base'} (base) and all 2 experts differ", shape, "Is base_model the one")


def test_hundreds_of_differing_tensors_fit_on_a_screen(world: World) -> None:
    world.edit(
        "expert1/model.safetensors", lambda t: t.update({f"model.layers.{i}.other.weight": torch.zeros(1) for i in range(300)})
    )
    text = world.refused()
    assert "and 292 more tensors like these" in text and len(text) < 2000


def test_nothing_that_exists_is_touched(world: World) -> None:
    world.out.mkdir()
    (world.out / "thesis.txt").write_text("mine")
    for command in ("merge", "mask"):
        assert f"{world.out} exists already; choose another output or pass --overwrite" in world.refused(command)
    world.cut("expert0/model.safetensors")
    for command in ("merge", "mask"):
        world.refused(command, "--overwrite")
    assert [(p.name, p.read_text()) for p in world.out.iterdir()] == [("thesis.txt", "mine")]


@pytest.mark.parametrize("command", ["merge", "mask"])
def test_an_output_that_is_an_input_is_refused_even_with_overwrite(world: World, command: str) -> None:
    expert = world.root / "expert0"
    for out in (expert, world.root):
        world.out = out
        before = {
            path: path.read_bytes()
            for path in world.root.rglob("*")
            if path.is_file() and path.name != "recipe.yaml" and world.home not in path.parents
        }
        seen = world.refused(command, "--overwrite")
        assert "is, or holds, " in seen or "--overwrite does not replace it" in seen
        assert all(path.read_bytes() == content for path, content in before.items())


def test_an_earlier_merge_that_is_an_input_is_refused_even_with_overwrite(world: World) -> None:
    """It has a record, so that it could be replaced as an output."""
    world.out = world.root / "expert0"
    (world.out / "record.json").write_text('{"kind": "merged", "fingerprint": "0", "files": {}}')
    assert "is, or holds, an input of the merge" in world.refused("merge", "--overwrite")


def test_options_that_mean_nothing(world: World) -> None:
    assert "memory: got 'lots', expected a size such as 2GiB" in world.refused("merge", "--memory", "lots")
    assert "memory: got '1MiB', expected at least 64MiB" in world.refused("plan", "--memory", "1MiB")
    assert "device: got 'gpu', expected cpu, cuda or auto" in world.refused("merge", "--device", "gpu")
    result = CliRunner().invoke(app, ["compress", str(world.root / "expert0"), str(world.root / "c"), "--method", "log9"])
    assert result.exit_code == 2 and "'log9' is not known; expected one of none, rank1, log8, rank_k" in result.stderr
    if not torch.cuda.is_available():
        assert "torch sees no GPU here; use --device cpu or auto" in world.refused("merge", "--device", "cuda")


def test_an_output_that_cannot_be_written(world: World) -> None:
    (world.root / "file").write_text("")
    world.out = world.root / "file" / "below"
    for command in ("merge", "mask"):
        assert f"{world.root / 'file'} cannot be written to" in world.refused(command)
    result = CliRunner().invoke(app, ["compress", str(world.root / "expert0"), str(world.out), "--home", str(world.home)])
    assert result.exit_code == 2 and "cannot be written to" in result.stderr


def test_a_full_disk_is_a_message_and_leaves_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from ota_core.files.writer import SafetensorsWriter

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SafetensorsWriter, "write_rows", full)
    said = world.refused()
    assert f"the disk of {world.out} became full while it was written (No space left on device" in said
    assert "what was written of it is removed" in said and "Make room or choose another place" in said


def test_a_real_process_exits_with_2_and_prints_to_stderr_alone(world: World) -> None:
    world.cut("expert0/model.safetensors")
    (world.root / "recipe.yaml").write_text(yaml.safe_dump(world.recipe))
    code = "import sys; from flows.cli.app import app; sys.argv = ['ota', *sys.argv[1:]]; app()"
    arguments = ["merge", str(world.root / "recipe.yaml"), str(world.out), "--home", str(world.home)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.strip().startswith("Error: expert0: ") and "is truncated" in done.stderr
    assert not world.out.exists()


def in_s3(world: World, source: str) -> str:
    world.recipe["models"][1]["model"] = source
    return world.refused("merge")


def test_no_such_key_or_bucket_beside_a_local_problem(world: World, s3_server: S3Test) -> None:
    shutil.rmtree(world.root / "base")
    text = in_s3(world, f"{s3_server.uri}/experts/matth")
    missing = f"{s3_server.uri}/experts/matth: there is no such key or prefix (endpoint {s3_server.endpoint}"
    assert_says(text, "2 problems found", f"{world.root / 'base'}' does not exist", missing, "check the spelling")
    assert_says(in_s3(world, "s3://no-such-bucket/math"), "no bucket 'no-such-bucket' there; check the name and the endpoint")
    assert_says(world.refused("plan"), "there is no bucket")
    assert_says(in_s3(world, "s3://"), "is not an S3 address; expected s3://bucket/prefix")


def test_an_unreachable_endpoint(world: World, s3_server: S3Test, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
    for text in (in_s3(world, "s3://models/math"), world.refused("plan")):
        assert_says(text, f"endpoint http://127.0.0.1:{port}, bucket 'models'", "AWS_ENDPOINT_URL_S3")


def test_second_moments_in_s3_that_are_not_there(world: World, s3_server: S3Test) -> None:
    s3_server.client.put_object(Bucket=s3_server.bucket, Key="v/other.safetensors", Body=b"x")
    world.recipe["models"][0]["parameters"]["preconditioner_path"] = f"{s3_server.uri}/v/exp_avg_sq.safetensors"
    assert f"{s3_server.uri}/v does not hold exp_avg_sq.safetensors" in world.refused()


def test_errors_list_each_problem_once() -> None:
    raise_all([])
    with pytest.raises(MomentsError, match=r"^only$") as one:
        raise_all(["only"], MomentsError)
    with pytest.raises(OtaError, match=r"^2 problems found:\n  1\. a\n  2\. b$") as two:
        raise_all(["a", "b"])
    assert (one.value.problems, two.value.problems) == (("only",), ("a", "b"))


def test_of_more_problems_than_one_reads_each_kind_is_shown_and_the_rest_counted() -> None:
    many = [f"models[{i}] ('m{i}'): no such folder: /models/m{i}; check the spelling" for i in range(2000)]
    other = "parameters.density: got 7, expected a number from 0 to 1"
    with pytest.raises(OtaError) as found:
        raise_all([*many, other, *many])
    text, shown = str(found.value), str(found.value).count("no such folder")
    assert len(text) < 4096 and text.startswith("4001 problems found:\n  1. models[0] ") and other in text and shown > 20
    assert text.endswith(f"\n  … and {4000 - shown} more, of the same kinds") and len(found.value.problems) == 4001
    with pytest.raises(OtaError) as found:
        raise_all([f"{'kind ' * i}{'x' * 1500}" for i in range(1, 31)] + ["\x1b" * 9000])
    shown = str(found.value).count("xxx…")
    assert len(str(found.value)) < 4096 and f"and {31 - shown} more, {31 - shown} of them of other kinds" in str(found.value)
    with pytest.raises(OtaError) as found:
        raise_all(["x" * 1500, "y" * 1500])
    assert "x" * 1500 in str(found.value) and "y" * 1500 in str(found.value), "few are shown whole"


def test_a_damaged_configuration_and_record(world: World) -> None:
    (world.root / "base" / "config.json").write_text("{nope")
    assert f"{world.root / 'base' / 'config.json'} is not readable JSON" in world.refused()
    (world.root / "base" / "config.json").write_text(json.dumps([1]))
    assert "holds a JSON list, expected an object" in world.refused()
