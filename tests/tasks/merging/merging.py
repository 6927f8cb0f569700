"""Checkpoints of small real models as people have them, and merges of them by the command line."""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flows.cli.app import app

State = dict[str, torch.Tensor]


def jittered(model: Any, seed: int, scale: float = 0.02) -> Any:
    """A fine-tuned copy, as far as a merge can tell."""
    made, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return made


def family(root: Path, model: Any) -> None:
    """``base``, ``e1`` and ``e2`` below ``root``, as transformers saves them."""
    model.save_pretrained(root / "base")
    for seed in (1, 2):
        jittered(model, seed).save_pretrained(root / f"e{seed}")


def weights(folder: Path) -> State:
    found: State = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= load_file(file)
    return found


def rewrite(folder: Path, change: Callable[[State], State]) -> None:
    """Other weights in a folder."""
    save_file(
        {name: one.contiguous().clone() for name, one in change(weights(folder)).items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def configure(folder: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    """Other settings in a folder's config.json."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))


def recipe(root: Path, method: str = "linear", experts: tuple[str, ...] = ("e1", "e2"), **more: Any) -> Path:
    path = root / "recipe.yaml"
    path.write_text(
        json.dumps({"merge_method": method, "base_model": "base", "models": [{"model": one} for one in experts]} | more)
    )
    return path


def ota(command: str, root: Path, method: str = "linear", *options: str, **more: Any) -> Result:
    """``ota merge`` or ``ota plan`` of the family below ``root``, into ``out``."""
    out = [str(root / "out")] if command == "merge" else []
    return CliRunner().invoke(app, [command, str(recipe(root, method, **more)), *out, "--home", str(root / "home"), *options])


def merged(root: Path, method: str = "linear", *options: str, **more: Any) -> tuple[State, str]:
    """The merged weights and what the command said."""
    result = ota("merge", root, method, *options, **more)
    assert result.exit_code == 0, result.output
    return weights(root / "out"), " ".join(result.output.split())


def refused(root: Path, method: str = "linear", *options: str, **more: Any) -> str:
    """What the command says when it refuses; nothing may be written."""
    result = ota("merge", root, method, *options, **more)
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    assert not [one for one in root.iterdir() if one.name.startswith((".out", "out"))]
    return " ".join(result.output.split())


def average(root: Path, names: Mapping[str, str] | None = None) -> State:
    """The mean of both experts; names: those of ``e1`` by ``e2``'s, where they differ."""
    one, other = weights(root / "e1"), weights(root / "e2")
    return {
        name: (one[(names or {}).get(name, name)].double() + x.double()) / 2 for name, x in other.items() if x.is_floating_point()
    }


def check(got: State, wanted: State) -> None:
    assert set(got) >= set(wanted)
    for name, x in wanted.items():
        torch.testing.assert_close(got[name].double(), x, rtol=1e-6, atol=1e-7)


def loads(folder: Path, made: Any) -> None:
    """transformers loads the folder as this class, with nothing missing, left over or of another shape."""
    model, info = made.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
