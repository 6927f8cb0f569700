"""The commands as a person types them: what they print, what they write, and where they look."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ota_core.engine import engine
from ota_core.moments.compression import open_compressed
from ota_core.plan.masks import MaskFile
from ota_core.recipe.recipe import MergeRecipe
from tasks.storage.models import upload_folder
from tests.flows.cli.typed import invoke, ota, refused
from tests.ota_core.engine.test_output import llama_experts, loaded
from tests.servers import S3Test
from tests.tasks.merging.test_architecture import llama, train
from tests.tiny_models import perturb, write_tiny_llama

ROOT = Path(__file__).parents[3]
COMMANDS = ["merge", "plan", "compress", "mask", "inspect", "run", "demo"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str) -> None:
    text = " ".join(ota(command, "--help").stdout.split())
    assert f"Usage: root {command} [OPTIONS]" in text and "--help" in text
    if command in {"merge", "mask"}:
        assert "RECIPE" in text and "OUT" in text and "it must not exist yet" in text and "--overwrite" in text
    if command != "inspect":
        assert "$OTA_HOME or ~/.ota" in text, "rich must not take the default for markup"


def test_help_lists_every_command_and_no_arguments_print_it() -> None:
    text = ota("--help").stdout
    assert all(command in text for command in COMMANDS)
    assert invoke().stdout.strip() == text.strip()
    assert "No such command 'mrege'" in refused("mrege")


def test_merge_in_files_of_a_size(recipe: Path) -> None:
    out = recipe.parent / "out"
    ota("merge", recipe, out, "--shard-size", "8KB")
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2 and (out / "model.safetensors.index.json").exists()
    result = refused("merge", recipe, recipe.parent / "other", "--shard-size", "much")
    assert "shard size: got 'much', expected a size" in result


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--runner", "slurm"], "got 'slurm', expected threads, dask, ray, workers"), (["--runner", "workers"], "set PREFECT_API_URL"),
     (["--address", "tcp://x:1"], "only dask and ray connect to an address"), (["--suite", "nosuch"], "there is no suite 'nosuch'"),
     (["--device", "gpu"], "device: got 'gpu'"), (["--memory", "lots"], "memory: got 'lots'")],
)  # fmt: skip
def test_run_checks_its_options_before_it_starts_a_server(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with temporary_settings(restore_defaults={PREFECT_API_URL}):  # other tests of the session may have a server
        text = refused("run", recipe, "--suite", "none", *options)  # of an option that is given twice the last counts
    assert message in text and "temporary server" not in text


def test_merge_prints_the_lambda_that_it_found(recipe: Path) -> None:
    raw = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump(raw | {"parameters": raw.get("parameters", {}) | {"refine": "rowspace"}}))
    out = recipe.parent / "refined"
    result = ota("merge", recipe, out)
    found = json.loads((out / "record.json").read_text())["results"]["lambda"]["value"]
    assert f"λ = {found:g}, found from the row spaces" in result.stdout
    loaded(out)


def test_merge_prints_densities_and_writes_what_the_engine_writes(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = recipe.parent
    out = folder / "deep" / "out"
    monkeypatch.chdir("/")
    result = ota("merge", recipe, out, "--memory", "256MiB", "--device", "auto")
    record = json.loads((out / "record.json").read_text())
    for name, density in record["results"]["densities"].items():
        assert (
            f"{name}: kept {density['kept']:,} of {density['total']:,} elements (density {density['density']:.6f})"
            in result.stdout
        )
    assert f"{out}: merged in " in result.stdout and f"fingerprint {record['fingerprint']}" in result.stdout
    assert "━" not in result.stdout  # progress goes to stderr: the output can be piped
    assert "merge" in result.stderr and "100%" in result.stderr and result.stderr.count("thresholds") == 1
    loaded(out)
    raw = llama_experts(folder / "again")
    engine.merge(MergeRecipe.model_validate(raw), folder / "direct")
    assert (folder / "direct" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert set(record["inputs"]) == {"base", "expert0", "expert1"} and all(
        len(digest) > 20 for digest in record["inputs"].values()
    )
    assert record["provenance"]["sources"] == {"base": "base", "expert0": "expert0", "expert1": "./expert1"}


def test_the_fingerprint_knows_contents_not_places(recipe: Path, tmp_path: Path) -> None:
    def fingerprint(out: str) -> str:
        ota("merge", recipe, tmp_path / out)
        return str(json.loads((tmp_path / out / "record.json").read_text())["fingerprint"])

    first = fingerprint("a")
    (tmp_path / "expert0").rename(tmp_path / "moved")
    recipe.write_text(recipe.read_text().replace("expert0", "moved"))
    assert fingerprint("b") == first
    state = load_file(tmp_path / "moved" / "exp_avg_sq.safetensors")
    from tests.checkpoints import write_moments

    write_moments(tmp_path / "moved", state | {"model.norm.weight": state["model.norm.weight"] * 2}, step=100, beta2=0.999)
    assert fingerprint("c") != first


def test_models_in_s3_and_in_folders_give_the_same_merge(recipe: Path, tmp_path: Path, s3_server: S3Test) -> None:
    ota("merge", recipe, tmp_path / "local")
    upload_folder(tmp_path / "expert0", f"{s3_server.uri}/experts/one")
    recipe.write_text(
        recipe.read_text().replace("model: expert0", f"model: {s3_server.uri}/experts/one").replace("expert0", "one")
    )
    ota("merge", recipe, tmp_path / "streamed")
    result = ota("merge", recipe, tmp_path / "fetched", "--fetch")
    assert f"fetch {s3_server.uri}/experts/one" in " ".join(result.stderr.split())
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        for out in ("streamed", "fetched"):
            assert (tmp_path / "local" / file).read_bytes() == (tmp_path / out / file).read_bytes()
    records = {out: json.loads((tmp_path / out / "record.json").read_text()) for out in ("local", "streamed", "fetched")}
    assert records["local"]["fingerprint"] == records["fetched"]["fingerprint"]
    # A streamed input is known by its listing, and the record says so.
    assert records["streamed"]["fingerprint"] != records["local"]["fingerprint"]
    assert records["streamed"]["inputs"]["expert0"].startswith("etag-listing:")
    assert records["streamed"]["inputs"]["base"] == records["local"]["inputs"]["base"]


def test_masks_and_compressed_moments_of_streamed_experts_are_the_same_bytes(
    recipe: Path, tmp_path: Path, s3_server: S3Test
) -> None:
    ota("mask", recipe, tmp_path / "masks")
    ota("compress", tmp_path / "expert0", tmp_path / "local.safetensors")
    upload_folder(tmp_path / "expert0", f"{s3_server.uri}/expert0")
    upload_folder(tmp_path / "base", f"{s3_server.uri}/base")
    text = recipe.read_text().replace("model: expert0", f"model: {s3_server.uri}/expert0")
    recipe.write_text(text.replace("base_model: base", f"base_model: {s3_server.uri}/base"))
    ota("mask", recipe, tmp_path / "streamed")
    for name in ("expert0.safetensors", "expert1.safetensors", "densities.json"):
        assert (tmp_path / "masks" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes()
    base = ("--base", f"{s3_server.uri}/base")
    shown = ota("compress", f"{s3_server.uri}/expert0", tmp_path / "streamed.safetensors", *base).stdout
    assert (tmp_path / "local.safetensors").read_bytes() == (tmp_path / "streamed.safetensors").read_bytes()
    assert "overlap of the masks" in shown
    assert not (tmp_path / "home" / "cache" / "blobs").exists()
    ota("compress", f"{s3_server.uri}/expert0", tmp_path / "fetched.safetensors", "--fetch")
    assert (tmp_path / "local.safetensors").read_bytes() == (tmp_path / "fetched.safetensors").read_bytes()
    assert (tmp_path / "home" / "cache" / "blobs").exists()


@pytest.mark.parametrize("method", ["rank1", "log8", "rank_k"])
def test_compress_compares_with_the_full_second_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setenv("OTA_HOME", str(tmp_path / "home"))
    base, folder = tmp_path / "base", tmp_path / "expert"
    write_tiny_llama(base)
    perturb(base, folder, seed=1, scale=0.01)
    weights = load_file(folder / "model.safetensors")
    save_file({name: torch.rand_like(tensor) * 1e-12 for name, tensor in weights.items()}, folder / "exp_avg_sq.safetensors")
    out = tmp_path / "a.safetensors"
    rank = ("--rank", "2") if method == "rank_k" else ()
    result = ota("compress", folder, out, "--base", base, "--density", "0.3", "--method", method, *rank)
    label = "rank_k with rank 2" if rank else method
    assert f"{out}: {label}, " in result.stdout and f", {label}, " in ota("inspect", out).stdout
    shown = re.search(r"rank correlation ([\d.]+), overlap of the masks at density 0\.3: ([\d.]+) \(Jaccard\)", result.stdout)
    # Uniform noise: a product of rows and columns keeps the order roughly, a code of each element closely.
    assert shown and (0.9 if method == "log8" else 0.5) < float(shown[2]) <= float(shown[1]) <= 1
    assert (float(shown[1]) > 0.999) == (method == "log8")
    text = refused("compress", folder, tmp_path / "b.safetensors", "--base", base, "--density", "3")
    assert "density: got 3.0, expected a number in (0, 1]" in text
    assert not (tmp_path / "b.safetensors").exists()


def test_compress_a_trainers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTA_HOME", str(tmp_path / "home"))
    folder, live = train(llama(), tmp_path / "run")
    parameters = sum(v.numel() for v in live.values())
    out = tmp_path / "new" / "rank1.safetensors"
    result = ota("compress", folder, out)
    stored = load_file(out)
    size = sum(tensor.nbytes for tensor in stored.values())
    assert f"{out}: rank1, {parameters:,} parameters, {size / parameters:.4f} bytes per parameter (float32: 4)" in result.stdout
    lost, total = 0.0, 0.0
    for name, v in live.items():
        if v.dim() == 1:
            assert torch.equal(stored[name], v)
            approximate = v.double()
        else:
            rows, cols = v.double().sum(1), v.double().sum(0)
            torch.testing.assert_close(stored[f"{name}#row"].double(), rows, rtol=1e-6, atol=0)
            torch.testing.assert_close(stored[f"{name}#col"].double(), cols, rtol=1e-6, atol=0)
            approximate = (rows / rows.sum())[:, None] * cols if rows.sum() > 0 else torch.zeros_like(v).double()
        lost += float(((v.double().sqrt() - approximate.sqrt()) ** 2).sum())
        total += float(v.double().sum())
    shown = float(result.stdout.split("relative error of the square root of v: ")[1])
    assert shown == pytest.approx((lost / total) ** 0.5, abs=6e-5) and shown > 0
    assert (open_compressed(out).beta2, open_compressed(out).step("model.norm.weight")) == (0.98, 3)

    ota("compress", folder, tmp_path / "none.safetensors", "--method", "none")
    whole = load_file(tmp_path / "none.safetensors")
    assert whole.keys() == live.keys() and all(torch.equal(whole[name], v) for name, v in live.items())
    # A file instead of its folder, and a compressed file made again from the written one: the same bytes.
    ota("compress", folder / "optimizer.pt", tmp_path / "b.safetensors")
    ota("compress", tmp_path / "none.safetensors", tmp_path / "c.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == out.read_bytes() == (tmp_path / "c.safetensors").read_bytes()
    assert f"{out} exists already" in invoke("compress", folder, out).stderr
    ota("compress", folder, out, "--overwrite", "--method", "none")
    assert out.read_bytes() == (tmp_path / "none.safetensors").read_bytes()
    assert "is compressed with rank1 already" in invoke("compress", tmp_path / "b.safetensors", tmp_path / "d").stderr
    assert "is a folder; name a file such as" in invoke("compress", folder, tmp_path, "--overwrite").stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "b.safetensors",
        "c.safetensors",
        "home",
        "new",
        "none.safetensors",
        "run",
    ]


def test_an_optimizer_state_without_its_configuration(tmp_path: Path) -> None:
    folder, _ = train(llama(), tmp_path / "run")
    (tmp_path / "alone").mkdir()
    alone = (folder / "optimizer.pt").rename(tmp_path / "alone" / "optimizer.pt")
    result = invoke("compress", alone, tmp_path / "out")
    assert (
        result.exit_code == 2
        and f"{alone} numbers its parameters" in result.stderr
        and "put the expert's config.json into its folder" in result.stderr
    )


def test_a_merge_from_trainer_folders_equals_one_from_named_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way of a user: optimizer.pt as the Trainer leaves it, in checkpoint folders."""
    monkeypatch.setenv("OTA_HOME", str(tmp_path / "home"))
    torch.manual_seed(1)
    base = llama()
    base.save_pretrained(tmp_path / "base")
    folder, live = train(base, tmp_path / "run")
    raw = {
        "merge_method": "ota",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(folder), "name": "a"}],
        "parameters": {"density": 0.5},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw))
    ota("merge", tmp_path / "r.yaml", tmp_path / "one")
    from safetensors.torch import save_file

    save_file({name: v.contiguous() for name, v in live.items()}, tmp_path / "v.safetensors")
    raw["models"] = [{"model": str(folder), "name": "a", "parameters": {"preconditioner_path": "v.safetensors"}}]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw))
    ota("merge", tmp_path / "r.yaml", tmp_path / "two")
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (tmp_path / "two" / "model.safetensors").read_bytes()
    assert not (tmp_path / "one" / "optimizer.pt").exists()


def test_mask_writes_the_masks_of_the_merge(recipe: Path, tmp_path: Path) -> None:
    ota("merge", recipe, tmp_path / "out")
    result = ota("mask", recipe, tmp_path / "masks")
    densities = json.loads((tmp_path / "masks" / "densities.json").read_text())
    assert densities == json.loads((tmp_path / "out" / "record.json").read_text())["results"]["densities"]
    base = load_file(tmp_path / "base" / "model.safetensors")
    for name in ("expert0", "expert1"):
        found = densities[name]
        assert (
            f"{name}: kept {found['kept']:,} of {found['total']:,} elements (density {found['density']:.6f}, threshold {found['threshold']})"
            in result.stdout
        )
        masks = MaskFile(tmp_path / "masks" / f"{name}.safetensors")
        expert, v = load_file(tmp_path / name / "model.safetensors"), load_file(tmp_path / name / "exp_avg_sq.safetensors")
        kept = 0
        for tensor, start in base.items():
            scores = (v[tensor].double().sqrt() * (expert[tensor].double() - start.double()).abs()).reshape(-1)
            mask = torch.from_numpy(masks.read(tensor, 0, start.shape[0])).reshape(-1)
            kept += int(mask.sum())
            clear = (scores - found["threshold"]).abs() > 1e-5 * found["threshold"]
            assert torch.equal(mask[clear], (scores >= found["threshold"])[clear])
        assert kept == found["kept"] == round(0.4 * found["total"])
    raw = yaml.safe_load(recipe.read_text()) | {"parameters": {}}
    recipe.write_text(yaml.safe_dump(raw))
    assert "the recipe has no FFG masks" in refused("mask", recipe, tmp_path / "none") and not (tmp_path / "none").exists()


def test_interrupting_a_merge_leaves_nothing(recipe: Path, tmp_path: Path) -> None:
    """Ctrl-C in a real process: no output, no temporaries, no traceback."""
    code = (
        "import signal, sys\nfrom ota_core.files.writer import SafetensorsWriter\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "def stop(*_):\n    import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(1)\n"
        "SafetensorsWriter.write_rows = stop\nfrom flows.cli.app import app\nsys.argv = ['ota', *sys.argv[1:]]\napp()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "merge", str(recipe), str(tmp_path / "out")], cwd=ROOT, env=os.environ | {"OTA_HOME": str(tmp_path / "home")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode not in (0, 2) and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "expert0", "expert1", "home", "recipe.yaml"]
