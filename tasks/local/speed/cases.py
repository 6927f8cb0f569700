"""What the benchmark runs: for every stage and method a command as a user would type it, its inputs, its output and its target."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ota_core.errors import OtaError
from tasks.local.speed.models import MOMENTS, Models
from tasks.local.speed.results import Target

OTA = [sys.executable, "-m", "flows.cli"]
DENSITY = 0.4
MEMORY_TARGET = 2**30  # bytes resident at the default --memory, mapped pages included

STAGES: dict[str, str] = {
    "compress": "ota compress, rank1, one expert's second moments",
    "compress-log8": "ota compress, log8, the same",
    "compress-rank_k": "ota compress, rank_k of rank 4, the same",
    "mask": f"ota mask, exact global density {DENSITY}, every expert",
    "staged": "fetch, compress, mask, merge through the artifact store, without Prefect",
    "ota-threshold": "ota merge, OTA, FFG by given thresholds",
    "ota-density": f"ota merge, OTA, exact global density {DENSITY}",
    "ota-rank1": f"ota merge, OTA, exact global density {DENSITY}, rank1 second moments",
    "linear": "ota merge, linear",
    "task_arithmetic": "ota merge, task arithmetic",
    "ties": f"ota merge, TIES, density {DENSITY}",
    "dare_ties": f"ota merge, DARE-TIES, density {DENSITY}",
    "breadcrumbs": f"ota merge, Breadcrumbs, density {DENSITY}, gamma 0.01",
    "fisher": "ota merge, Fisher",
    "mergekit-linear": "mergekit, linear",
    "mergekit-ties": f"mergekit, TIES, density {DENSITY}",
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
_SECONDS = {"help": 0.5, "flow-cached-temp": 30.0, "flow-cached-server": 12.0}
FLOW_OVERHEAD = 10.0  # seconds of a fresh flow beyond the sum of its stages


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
    needs = any(name.startswith("flow-fresh") for name in names)  # its overhead is over the sum of the stages
    return [name for name in known if name in names or (needs and name == "staged")]


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
    return [one if promised or one.target is None or one.target.kind == "seconds" else replace(one, target=None) for one in made]


class _Makers:
    def __init__(self, models: Models, experts: int, work: Path, device: str, prefect: dict[str, dict[str, str]]) -> None:
        self.models, self.work, self.device, self.prefect = models, work, device, prefect
        self.folders = [models.expert(m) for m in range(experts)]
        self.home = ["--home", str(work / "home")]  # digests of the inputs are remembered there

    def make(self, name: str) -> Case:
        if name.startswith("compress"):
            return self._compress(name)
        if name == "mask":
            recipe = self.recipe("mask", "ota", density=DENSITY)
            return self._case(name, ["mask"], recipe, [*self.weights(base=True), *self.moments()], ratio=None)
        if name == "staged":
            return self._staged()
        if name == "help":
            command = [sys.executable, "-m", "flows.cli", "--help"]
            return Case(name=name, what=STAGES[name], command=command, target=Target(kind="seconds", limit=_SECONDS[name]))
        if name.startswith("mergekit"):
            return self._mergekit(name)
        if name.startswith("flow"):
            return self._flow(name)
        return self._merge(name)

    def _compress(self, name: str) -> Case:
        source, out = self.folders[0] / MOMENTS, self.work / f"{name}.safetensors"
        method = name.partition("-")[2] or "rank1"
        command = [*OTA, "compress", str(source), str(out), "--method", method, "--json", *self.home]
        target = Target(kind="ratio", limit=_RATIOS[name]) if name in _RATIOS else None
        return Case(name=name, what=STAGES[name], command=command, inputs=[source], output=out, target=target)

    def _merge(self, name: str) -> Case:
        own: dict[str, dict[str, Any]] = {
            "ota-threshold": {"precond_threshold": self.models.threshold},
            "ota-density": {"density": DENSITY},
            "ota-rank1": {"density": DENSITY, "compression": "rank1"},
            "ties": {"density": DENSITY},
            "dare_ties": {"density": DENSITY, "seed": 0},
            "breadcrumbs": {"density": DENSITY, "gamma": 0.01},
        }
        method = "ota" if name.startswith("ota-") else name
        base = name not in {"linear", "fisher"}  # averages of the experts need none
        recipe = self.recipe(name, method, base=base, **own.get(name, {}))
        inputs = [*self.weights(base=base), *(self.moments() if method in {"ota", "fisher"} else [])]
        return self._case(name, ["merge"], recipe, inputs, ratio=_RATIOS.get(name))

    def _case(self, name: str, command: list[str], recipe: Path, inputs: list[Path], *, ratio: float | None) -> Case:
        out = self.work / name
        whole = [*OTA, *command, str(recipe), str(out), "--json", "--device", self.device, *self.home]
        target = Target(kind="ratio", limit=ratio) if ratio else None
        return Case(name=name, what=STAGES[name], command=whole, inputs=inputs, output=out, recipe=recipe, target=target)

    def _staged(self) -> Case:
        recipe, home = self.recipe("flow", "ota", density=DENSITY, compression="rank1"), self.work / "staged"
        command = [sys.executable, "-m", "tasks.local.speed.staged", str(recipe), str(home), self.device]
        inputs = [*self.weights(base=True), *self.moments()]
        return Case(name="staged", what=STAGES["staged"], command=command, inputs=inputs, output=home, recipe=recipe)

    def _flow(self, name: str) -> Case:
        _, age, server = name.split("-")
        recipe, home = self.recipe("flow", "ota", density=DENSITY, compression="rank1"), self.work / f"flow-{server}"
        command = [*OTA, "run", str(recipe), "--suite", "none", "--device", self.device, "--home", str(home)]
        # Prefect's own cached results lie in the home, so that a fresh home makes everything fresh.
        environment = {**self.prefect[server], "PREFECT_LOCAL_STORAGE_PATH": str(home / "prefect-results")}
        fresh, limit = age == "fresh", _SECONDS.get(name)
        target = Target(kind="overhead", limit=FLOW_OVERHEAD) if fresh else Target(kind="seconds", limit=limit or 0.0)
        return Case(
            name=name, what=FLOW_STAGES[name], command=command, environment=environment, target=target, recipe=recipe, output=home if fresh else None,
        )  # fmt: skip

    def _mergekit(self, name: str) -> Case:
        method = name.removeprefix("mergekit-")
        own = {"density": DENSITY} if method == "ties" else {}
        recipe = self.recipe(name, method, base=method != "linear", weight=1.0, **own)
        out, program = self.work / name, Path(sys.executable).with_name("mergekit-yaml")
        command = [str(program), str(recipe), str(out), "--no-copy-tokenizer", "--quiet"]
        why = "" if program.is_file() else "mergekit is not installed; it comes with the extra 'dev'"
        inputs = self.weights(base=method != "linear")
        return Case(name=name, what=STAGES[name], command=command, inputs=inputs, output=out, skipped=why)

    def recipe(self, name: str, method: str, *, base: bool = True, **parameters: Any) -> Path:
        """A recipe file of these experts."""
        content: dict[str, Any] = {"merge_method": method}
        if base:
            content["base_model"] = str(self.models.base)
        content["models"] = [{"model": str(folder)} for folder in self.folders]
        content |= {"parameters": parameters, "dtype": "bfloat16"}
        path = self.work / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return path

    def weights(self, *, base: bool) -> list[Path]:
        """Weight files of the models."""
        folders = [*([self.models.base] if base else []), *self.folders]
        return [file for folder in folders for file in sorted(folder.glob("model*.safetensors"))]

    def moments(self) -> list[Path]:
        """Files of second moments."""
        return [folder / MOMENTS for folder in self.folders]
