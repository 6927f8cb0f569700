"""What the benchmark runs: for every stage and method a command as a user would type it, its inputs, its output and its target."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ota_core.errors import OtaError
from ota_core.recipe.methods import WITHOUT_BASE
from tasks.local.speed.models import MOMENTS, Models, with_vocabularies
from tasks.local.speed.results import Target

OTA = [sys.executable, "-m", "flows.cli"]
DENSITY = 0.4
MEMORY_TARGET = 2**30  # bytes resident at the default --memory, mapped pages included

OTHERS: dict[str, str] = {
    "passthrough": "passthrough, one model",
    "multislerp": "multislerp",
    "nuslerp": "nuslerp, two experts",
    "karcher": "Karcher mean",
    "model_stock": "Model Stock",
    "nearswap": "nearswap, one expert, t 0.0001",
    "arcee_fusion": "Arcee Fusion, one expert",
    "ram": "RAM",
    "ramplus_tl": "RAM+, tensor by tensor",
    "sce": f"SCE, density {DENSITY}",
    "della": f"DELLA, density {DENSITY}",
}
"""Methods that are measured beside mergekit's own."""
STAGES: dict[str, str] = {
    "compress": "ota compress, rank1, one expert's second moments",
    "compress-log8": "ota compress, log8, the same",
    "compress-rank_k": "ota compress, rank_k of rank 4, the same",
    "mask": f"ota mask, exact global density {DENSITY}, every expert",
    "staged": "fetch, compress, mask, merge through the artifact store, without Prefect",
    "ota-threshold": "ota merge, OTA, FFG by given thresholds",
    "ota-density": f"ota merge, OTA, exact global density {DENSITY}",
    "ota-rank1": f"ota merge, OTA, exact global density {DENSITY}, rank1 second moments",
    "ota-auto": f"ota merge, OTA, exact global density {DENSITY}, lambda: auto",
    "ota-rowspace": f"ota merge, OTA, exact global density {DENSITY}, refine: rowspace",
    "linear": "ota merge, linear",
    "task_arithmetic": "ota merge, task arithmetic",
    "ties": f"ota merge, TIES, density {DENSITY}",
    "dare_ties": f"ota merge, DARE-TIES, density {DENSITY}",
    "breadcrumbs": f"ota merge, Breadcrumbs, density {DENSITY}, gamma 0.01",
    "fisher": "ota merge, Fisher",
    **{name: f"ota merge, {what}" for name, what in OTHERS.items()},
    "slerp": "ota merge, slerp of the base and one expert",
    "ota-ties": f"ota merge, OTA, exact global density {DENSITY}, masked_merge: ties",
    "ota-rescale": f"ota merge, OTA, exact global density {DENSITY}, rescale: true, fallback: mean",
    "ota-normalise": "ota merge, OTA, normalise: global",
    "union-linear": "ota merge, linear, vocabularies that differ, tokenizer_source: union",
    "union-ties": f"ota merge, TIES, density {DENSITY}, the same",
    "union-ota": f"ota merge, OTA, exact global density {DENSITY}, the same",
    "moments-one": "one expert's second moments, read from one safetensors file",
    "moments-zero3": "the same from four ranks of DeepSpeed's ZeRO 3",
    "moments-fsdp": "the same from four ranks of FSDP",
    "mergekit-linear": "mergekit, linear",
    "mergekit-ties": f"mergekit, TIES, density {DENSITY}",
    **{f"mergekit-{name}": f"mergekit, {what}" for name, what in OTHERS.items()},
    "mergekit-slerp": "mergekit, slerp of the base and one expert",
    "mergekit-union": "mergekit, linear, vocabularies that differ, tokenizer_source: union",
    "help": "ota --help",
}
MERGES = tuple(name for name, what in STAGES.items() if what.startswith("ota merge"))
FLOW_STAGES: dict[str, str] = {
    "flow-fresh-temp": "ota run, everything fresh, temporary Prefect server",
    "flow-cached-temp": "ota run again, everything cached, temporary Prefect server",
    "flow-fresh-server": "ota run, everything fresh, running Prefect server",
    "flow-cached-server": "ota run again, everything cached, running Prefect server",
}

_RATIOS = {
    "compress": 2.0, "ota-threshold": 3.0, "ota-density": 4.0, "linear": 2.0, "ties": 4.0, "dare_ties": 4.0, "breadcrumbs": 4.0,
}  # fmt: skip
TARGETS = {
    **{name: Target(kind="ratio", limit=limit) for name, limit in _RATIOS.items()},
    **dict.fromkeys(("flow-fresh-temp", "flow-fresh-server"), Target(kind="overhead", limit=10.0)),
    **dict.fromkeys(("moments-zero3", "moments-fsdp"), Target(kind="against", limit=1.5)),
    "flow-cached-temp": Target(kind="seconds", limit=30.0),
    "flow-cached-server": Target(kind="seconds", limit=12.0),
    "help": Target(kind="seconds", limit=0.5),
}
_PARAMETERS: dict[str, dict[str, Any]] = {
    "mask": {"density": DENSITY},
    "flow": {"density": DENSITY, "compression": "rank1"},
    "ota-density": {"density": DENSITY},
    "ota-rank1": {"density": DENSITY, "compression": "rank1"},
    "ota-auto": {"density": DENSITY, "lambda": "auto"},
    "ota-rowspace": {"density": DENSITY, "refine": "rowspace"},
    "ties": {"density": DENSITY},
    "dare_ties": {"density": DENSITY, "seed": 0},
    "breadcrumbs": {"density": DENSITY, "gamma": 0.01},
    "nearswap": {"t": 1e-4},
    "sce": {"density": DENSITY},
    "della": {"density": DENSITY},
    "mergekit-multislerp": {"weight": 1.0},
    "mergekit-nuslerp": {"weight": 1.0},
    "mergekit-nearswap": {"t": 1e-4},
    "mergekit-sce": {"select_topk": DENSITY},
    "mergekit-della": {"weight": 1.0, "density": DENSITY},
    "slerp": {"t": 0.4},
    "ota-ties": {"density": DENSITY, "masked_merge": "ties"},
    "ota-rescale": {"density": DENSITY, "rescale": True, "fallback": "mean"},
    "ota-normalise": {"normalise": "global"},
    "union-ties": {"density": DENSITY},
    "union-ota": {"density": DENSITY},
    "mergekit-slerp": {"t": 0.4},
    "mergekit-union": {"weight": 1.0},
    "mergekit-linear": {"weight": 1.0},
    "mergekit-ties": {"weight": 1.0, "density": DENSITY},
}
"""Of the recipes; a name that is not here has none."""
_WITHOUT_BASE = {*WITHOUT_BASE, "fisher", "multislerp", "nuslerp"}
"""Methods whose recipes name no base: averages of the experts need none."""
_MODELS = {"slerp": 1, "passthrough": 1, "nuslerp": 2, "nearswap": 1, "arcee_fusion": 1}
"""Experts that a method takes, where it does not take any number."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to measure."""

    name: str
    what: str
    command: list[str]
    inputs: list[Path] = field(default_factory=list)
    """Files that the floor reads."""
    output: Path | None = None
    """File or folder that the command writes."""
    fresh: list[Path] = field(default_factory=list)
    """Removed before every run, beside the output."""
    environment: dict[str, str] = field(default_factory=dict)
    recipe: Path | None = None
    target: Target | None = None
    skipped: str = ""
    """Why it cannot be run here."""

    def clear(self) -> None:
        """Remove what an earlier run left."""
        for path in [*([self.output] if self.output else []), *self.fresh]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def output_bytes(self) -> int:
        """Size of what was written."""
        if self.output is None or not self.output.exists():
            return 0
        files = self.output.rglob("*") if self.output.is_dir() else [self.output]
        return sum(file.stat().st_size for file in files if file.is_file())


def chosen(stages: Sequence[str] | None, *, flow: bool, mergekit: bool) -> list[str]:
    """The names of the cases to run, in their order. Raises OtaError for a name that is none."""
    known = {**STAGES, **FLOW_STAGES}
    unknown = [name for name in stages or () if name not in known]
    if unknown:
        raise OtaError(f"stages: got {', '.join(unknown)}; expected some of {', '.join(known)}")
    names = [name for name in known if name in (stages or known)]
    names = [name for name in names if (flow or name not in FLOW_STAGES) and (mergekit or not name.startswith("mergekit"))]
    needed = set()
    if any(name.startswith("flow-fresh") for name in names):  # its overhead is over the sum of the stages
        needed.add("staged")
    if any(name.startswith("moments-") for name in names):  # shards are compared with the one file
        needed.add("moments-one")
    return [name for name in known if name in names or name in needed]


def cases_of(
    names: Sequence[str],
    models: Models,
    experts: int,
    work: Path,
    *,
    device: str,
    prefect: dict[str, dict[str, str]],
    promised: bool,
) -> list[Case]:
    """The cases of these names for the first ``experts`` experts.

    work: folder for recipes, outputs and the homes of the flows. prefect: environment of the flows by kind of server,
    ``temp`` and ``server``. promised: whether this is the size that ratios to the floor are promised for; seconds are for any.
    """
    work.mkdir(parents=True, exist_ok=True)
    makers = _Makers(models, experts, work, device, prefect)
    made = [makers.make(name) for name in names]
    held = {name: target for name, target in TARGETS.items() if promised or target.kind == "seconds"}
    return [replace(one, target=held.get(one.name)) for one in made]


class _Makers:
    def __init__(self, models: Models, experts: int, work: Path, device: str, prefect: dict[str, dict[str, str]]) -> None:
        self.models, self.work, self.device, self.prefect = models, work, device, prefect
        self.folders = [models.expert(m) for m in range(experts)]
        self.moments = [folder / MOMENTS for folder in self.folders]
        self.home = ["--home", str(work / "home")]  # digests of the inputs are remembered there

    def make(self, name: str) -> Case:
        kind, _, variant = name.partition("-")
        if kind == "help":
            return Case(name=name, what=STAGES[name], command=[*OTA, "--help"])
        if kind == "compress":
            return self._compress(name, variant or "rank1")
        if kind == "staged":
            return self._staged(name)
        if kind == "flow":
            return self._flow(name, *variant.split("-"))
        if kind == "moments":
            return self._moments(name, variant)
        if kind == "mergekit":
            return self._mergekit(name, variant)
        if kind == "union":
            return self._merge(name, variant)
        return self._merge(name, "ota" if kind in {"ota", "mask"} else name)

    def _compress(self, name: str, method: str) -> Case:
        source, out = self.moments[0], self.work / f"{name}.safetensors"
        command = [*OTA, "compress", str(source), str(out), "--method", method, "--json", *self.home]
        return Case(name=name, what=STAGES[name], command=command, inputs=[source], output=out)

    def _merge(self, name: str, method: str) -> Case:
        own = {"precond_threshold": self.models.threshold} if name == "ota-threshold" else _PARAMETERS.get(name, {})
        recipe, out = self.recipe(name, method, **own), self.work / name
        inputs = [*self.weights(name), *(self.moments if method in {"ota", "fisher"} else [])]
        command = ["mask" if name == "mask" else "merge", str(recipe), str(out), "--json", "--device", self.device]
        return Case(name=name, what=STAGES[name], command=[*OTA, *command, *self.home], inputs=inputs, output=out, recipe=recipe)

    def _staged(self, name: str) -> Case:
        recipe, home = self.recipe("flow", "ota", **_PARAMETERS["flow"]), self.work / name
        command = [sys.executable, "-m", "tasks.local.speed.staged", str(recipe), str(home), self.device]
        inputs = [*self.weights("flow"), *self.moments]
        return Case(name=name, what=STAGES[name], command=command, inputs=inputs, output=home, recipe=recipe)

    def _flow(self, name: str, age: str, server: str) -> Case:
        recipe, home = self.recipe("flow", "ota", **_PARAMETERS["flow"]), self.work / f"flow-{server}"
        command = [*OTA, "run", str(recipe), "--suite", "none", "--device", self.device, "--home", str(home)]
        # Prefect's own cached results lie in the home, so that a fresh home makes everything fresh.
        environment = {**self.prefect[server], "PREFECT_LOCAL_STORAGE_PATH": str(home / "prefect-results")}
        out = home if age == "fresh" else None
        return Case(name=name, what=FLOW_STAGES[name], command=command, environment=environment, recipe=recipe, output=out)

    def _mergekit(self, name: str, method: str) -> Case:
        recipe = self.recipe(name, "linear" if method == "union" else method, **_PARAMETERS.get(name, {}))
        out, program = self.work / name, Path(sys.executable).with_name("mergekit-yaml")
        command = [str(program), str(recipe), str(out), "--no-copy-tokenizer", "--quiet"]
        why = "" if program.is_file() else "mergekit is not installed; it comes with the extra 'dev'"
        return Case(name=name, what=STAGES[name], command=command, inputs=self.weights(name), output=out, skipped=why)

    def _moments(self, name: str, variant: str) -> Case:
        source, shards = self.moments[0], self.work / name
        if variant != "one" and not shards.exists():
            from tasks.local.speed.shards import write_fsdp, write_zero3

            (write_zero3 if variant == "zero3" else write_fsdp)(source, shards)
        path = source if variant == "one" else shards
        inputs = [source] if variant == "one" else sorted(file for file in shards.iterdir())
        return Case(
            name=name, what=STAGES[name], command=[sys.executable, "-m", "tasks.local.speed.shards", str(path)], inputs=inputs
        )

    def recipe(self, name: str, method: str, **parameters: Any) -> Path:
        """A recipe file of these experts."""
        base, *others = self.folders_of(name)
        content = {
            "merge_method": method,
            **({} if method in _WITHOUT_BASE else {"base_model": str(base)}),
            "models": [{"model": str(folder)} for folder in ([base, *others] if method == "slerp" else others)],
            "parameters": parameters,
            "dtype": "bfloat16",
            **({"tokenizer_source": "union"} if "union" in name.split("-") else {}),
        }
        path = self.work / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return path

    def folders_of(self, name: str) -> list[Path]:
        """The base and the experts of a case: those with vocabularies of their own, one expert, or all."""
        if "union" in name.split("-"):
            return with_vocabularies(self.models, self.work / "vocabularies", len(self.folders))
        return [self.models.base, *self.folders[: _MODELS.get(name.split("-")[-1])]]

    def weights(self, name: str) -> list[Path]:
        """Weight files that a case reads."""
        averages = name.split("-")[-1] in {*_WITHOUT_BASE, "union"}
        folders = self.folders_of(name)[1 if averages else 0 :]
        return [file for folder in folders for file in sorted(folder.glob("model*.safetensors"))]
