"""From an adapter's tensors to the edits of its base's tensors, every shape checked."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

import numpy as np

from ota_core.errors import CheckpointError, raise_all
from ota_core.files.checkpoint import Checkpoint
from ota_core.files.lora.config import AdapterConfig
from ota_core.files.lora.edits import Added, Edit, Factors, LowRank, Numbers, TokenRows, whole_matrix
from ota_core.files.lora.places import Places
from ota_core.files.lora.tensors import AdapterTensors, numbers
from ota_core.files.rows import Rows

_SHOWN = 8
# Layers whose class stores weights as (in, out); the configuration says so, unless layers of both kinds were trained.
CONV1D = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
# Models whose experts' stacks PEFT takes as (E, in, out), as their classes say (is_transposed).
STACKS_BY_INPUT = frozenset({"gpt_oss", "openai_privacy_filter", "aria", "aria_text"})


@dataclass
class FoundEdits:
    """What an adapter does, by the base's names."""

    edits: dict[str, list[Edit]] = field(default_factory=dict)
    """In the order in which they are made."""
    whole: dict[str, str] = field(default_factory=dict)
    """Tensor to the name in the adapter's file of what takes its place; tensors that the base lacks are among them."""
    notes: list[str] = field(default_factory=list)


def find_edits(config: AdapterConfig, tensors: AdapterTensors, base: Checkpoint) -> FoundEdits:
    """Raises CheckpointError that lists everything that does not fit the base."""
    finder = _Finder(config, tensors, base)
    finder.take_whole()
    stacks: dict[str, list[str]] = {}
    for module in tensors.modules:
        inner = module.replace(".base_layer", "")
        if config.target_parameters and finder.parameters_of(inner):
            stacks.setdefault(inner, []).append(module)
        else:
            finder.take_module(module)
    for inner, wrappers in stacks.items():
        finder.take_parameters(inner, wrappers)
    if finder.problems:
        shown = finder.problems[:_SHOWN]
        more = len(finder.problems) - len(shown)
        raise_all(
            [
                f"{config.folder}, a LoRA adapter, does not fit its base {base.path}: {'; '.join(shown)}"
                + (f"; and {more} more" if more else "")
                + (f". The adapter says that it was trained on {config.base}" if config.base else "")
            ],
            CheckpointError,
        )
    return finder.found


def innermost_first(parameter: str) -> tuple[bool, str]:
    """Sorts the parameters of one module as PEFT wraps them, in the order in which classes register them: what leads out comes last."""
    return any(part in parameter for part in ("down", "w2")), parameter


def _gathered(*shapes: tuple[int, ...]) -> str:
    """Why factors are empty, where they are."""
    return (
        " (saved under ZeRO-3 or FSDP without being gathered: save the adapter again)"
        if any(0 in shape for shape in shapes)
        else ""
    )


class _Finder:
    def __init__(self, config: AdapterConfig, tensors: AdapterTensors, base: Checkpoint) -> None:
        self._config, self._tensors, self._base = config, tensors, base
        self._places = Places(base.names())
        self._model = str(base.config.get("model_type", ""))
        self.found, self.problems = FoundEdits(), list[str]()

    def take_whole(self) -> None:
        """Tensors that were trained whole: ``modules_to_save``, biases, embeddings of another vocabulary."""
        for name, stored in self._tensors.whole.items():
            place = self._places.find(name) or name
            if place in self._base:
                seen, expected = self._tensors.shape(stored), self._base.info(place).shape
                # A vocabulary may have grown.
                if seen[1:] != expected[1:] or (seen != expected and len(seen) < 2):
                    self._problem(f"{name} has the shape {list(seen)}, the base's is {list(expected)}{_gathered(seen)}")
            self.found.whole[place] = stored

    def take_module(self, module: str) -> None:
        """A layer with factors, its DoRA magnitude, the bias of B, and the rows of trained tokens."""
        kinds = self._tensors.modules[module]
        inner = module.replace(".base_layer", "")
        place = self._places.find(f"{inner}.weight")
        if place is None:
            self._problem(f"it edits {inner}.weight, which the base does not hold" + self._tied(inner))
            return
        shape = self._shape(place)
        if "rows" in kinds:
            self._take_rows(inner, place, shape, kinds["rows"])
        for a, b, turned in (("A", "B", False), ("embedding A", "embedding B", True)):
            if a in kinds and b in kinds:
                self._take_factors(inner, place, shape, kinds, a, b, turned)
            elif a in kinds or b in kinds:
                self._problem(f"of {inner} only one of its two factors is there")
        if "bias" in kinds:
            self._take_bias(inner, kinds["bias"])
        if "magnitude" in kinds and not {"A", "embedding A"} & kinds.keys():
            self._problem(f"of {inner} there is a magnitude and no factors")

    def _take_factors(
        self, inner: str, place: str, shape: tuple[int, ...], kinds: dict[str, str], a: str, b: str, turned: bool
    ) -> None:
        seen_a, seen_b = self._tensors.shape(kinds[a]), self._tensors.shape(kinds[b])
        rank, ins, outs = (seen_a or (0,))[0], prod(seen_a[1:]), (seen_b or (0,))[0]
        if 0 in (*seen_a, *seen_b) or len(seen_a) < 2 or len(seen_b) < 2 or prod(seen_b[1:]) != rank:
            self._problem(
                f"the factors of {inner} have the shapes {list(seen_a)} and {list(seen_b)}, which do not multiply"
                + _gathered(seen_a, seen_b)
            )
            return
        if not self._rank_fits(inner, rank):
            return
        turned = turned or (len(shape) == 2 and self._stored_turned(inner, shape, outs, ins))
        matrix = (1, ins, outs) if turned else whole_matrix(shape)
        if (matrix[1:] != shape) if turned else (matrix[1:] != (outs, ins)):
            self._problem(f"the product of {inner}'s factors is {outs} × {ins}, the base's {place} has the shape {list(shape)}")
            return
        if self._config.dora and "magnitude" not in kinds:
            self._problem(f"its configuration says use_dora, and of {inner} there is no magnitude")
            return
        magnitude = self._magnitude(inner, kinds.get("magnitude"), outs)
        self.found.edits.setdefault(place, []).append(
            LowRank(
                shape=shape, matrix=matrix, scale=self._config.scale_of(inner), factors=self._factors(kinds[a], kinds[b], rank, turned),
                magnitude=magnitude, by_column=turned,
            )
        )  # fmt: skip

    def _factors(self, a: str, b: str, rank: int, turned: bool) -> Callable[[], Factors]:
        def read() -> Factors:
            right = numbers(self._tensors.read(a)).held.reshape(rank, -1)
            left = numbers(self._tensors.read(b)).held.reshape(-1, rank)
            if turned:
                left, right = np.ascontiguousarray(right.T), np.ascontiguousarray(left.T)
            return left[None], right[None]

        return read

    def _magnitude(self, inner: str, stored: str | None, outs: int) -> Callable[[], Numbers] | None:
        if stored is None:
            return None
        if prod(self._tensors.shape(stored)) != outs:
            self._problem(f"the magnitude of {inner} has {prod(self._tensors.shape(stored))} numbers, expected {outs}")
        return lambda: numbers(self._tensors.read(stored)).held.reshape(-1)

    def _stored_turned(self, inner: str, shape: tuple[int, ...], outs: int, ins: int) -> bool:
        if shape == (outs, ins) != (ins, outs):
            return False
        if shape == (ins, outs) != (outs, ins):
            return True
        conv1d = inner.rsplit(".", 1)[-1] in CONV1D and self._model in CONV1D_MODELS
        return conv1d or (self._config.fan_in_fan_out and self._model not in CONV1D_MODELS)

    def _take_rows(self, inner: str, place: str, shape: tuple[int, ...], stored: str) -> None:
        indices, seen = self._config.tokens_of(inner), self._tensors.shape(stored)
        if indices is None or len(indices) != seen[0] or seen[1:] != shape[1:] or not all(0 <= row < shape[0] for row in indices):
            self._problem(
                f"of {inner} {seen[0]} rows of {list(seen[1:])} numbers were trained; trainable_token_indices names "
                f"{'none' if indices is None else len(indices)}, and the base has {list(shape)}"
            )
            return
        values = lambda: numbers(self._tensors.read(stored)).held  # noqa: E731
        self.found.edits.setdefault(place, []).append(TokenRows(shape=shape, indices=indices, values=values))

    def _take_bias(self, inner: str, stored: str) -> None:
        place = self._places.find(f"{inner}.bias")
        if place is None:
            self._problem(f"it adds a bias to {inner}, which has none in the base (lora_bias)")
            return
        shape = self._shape(place)
        if self._tensors.shape(stored) != shape:
            self._problem(f"the bias of {inner} has the shape {list(self._tensors.shape(stored))}, the base's {list(shape)}")
            return
        values = lambda: numbers(self._tensors.read(stored)).held  # noqa: E731
        self.found.edits.setdefault(place, []).append(Added(shape=shape, scale=self._config.scale_of(inner), values=values))

    def parameters_of(self, module: str) -> list[str]:
        """The names (last part) of the parameters of a module that ``target_parameters`` names, as the model registers them."""
        targets = [
            name.rpartition(".")[2]
            for name in self._config.target_parameters
            if f".{module}.{name.rpartition('.')[2]}".endswith(f".{name}")
        ]
        return sorted(set(targets), key=innermost_first)

    def take_parameters(self, module: str, wrappers: list[str]) -> None:
        """Parameters of a module, stacks of experts above all: PEFT wraps the module once for each, the first parameter innermost."""
        targets = self.parameters_of(module)
        wrappers = sorted(wrappers, key=lambda name: -name.count(".base_layer"))
        if len(targets) != len(wrappers):
            self._problem(f"{module} has factors for {len(wrappers)} parameters, target_parameters names {', '.join(targets)}")
            return
        for parameter, wrapper in zip(targets, wrappers, strict=True):
            self._take_parameter(f"{module}.{parameter}", self._tensors.modules[wrapper])

    def _take_parameter(self, name: str, kinds: dict[str, str]) -> None:
        if kinds.keys() != {"A", "B"}:
            self._problem(f"of {name} there are {', '.join(sorted(kinds))}, expected two factors")
            return
        place, experts = self._places.find(name), self._places.experts(name)
        (rows, ins), (outs, _) = self._tensors.shape(kinds["A"]), self._tensors.shape(kinds["B"])
        if place is not None:
            shape = self._shape(place)
            count = shape[0] if len(shape) == 3 else 1
        elif experts:
            shape, count = (), len(experts)
        else:
            self._problem(f"it edits {name}, which the base does not hold")
            return
        if rows % count or not self._rank_fits(name, rows // count):
            if rows % count:
                self._problem(f"A of {name} has {rows} rows, which {count} experts cannot share")
            return
        scale = self._config.scale_of(name)
        if place is None:
            self._take_experts(name, experts, kinds, rows // count, scale)
            return
        turned = len(shape) == 3 and self._stack_turned(shape[1:], outs, ins)
        if shape[-2:] != ((ins, outs) if turned else (outs, ins)):
            self._problem(f"the products of {name}'s factors are {outs} × {ins}, the base's {place} has the shape {list(shape)}")
            return
        read = self._stack_factors(kinds, count, turned)
        self.found.edits.setdefault(place, []).append(
            LowRank(shape=shape, matrix=(count, *shape[-2:]), scale=scale, factors=read)  # type: ignore[arg-type]
        )

    def _stack_turned(self, matrix: tuple[int, ...], outs: int, ins: int) -> bool:
        if outs != ins:
            return matrix == (ins, outs)
        return self._model in STACKS_BY_INPUT

    def _stack_factors(self, kinds: dict[str, str], count: int, turned: bool) -> Callable[[], Factors]:
        """A is (E·r, in), expert by expert; B is (out, r·E), whose columns run through the experts first."""

        def read() -> Factors:
            a, b = numbers(self._tensors.read(kinds["A"])).held, numbers(self._tensors.read(kinds["B"])).held
            right = a.reshape(count, -1, a.shape[1])
            left = np.ascontiguousarray(b.reshape(b.shape[0], -1, count).transpose(2, 0, 1))
            if turned:
                left, right = np.ascontiguousarray(right.transpose(0, 2, 1)), np.ascontiguousarray(left.transpose(0, 2, 1))
            return left, right

        return read

    def _take_experts(self, name: str, experts: list[list[str]], kinds: dict[str, str], rank: int, scale: float) -> None:
        """A stack's edit on a base that holds every expert's matrices by themselves."""
        (_, ins), (outs, _) = self._tensors.shape(kinds["A"]), self._tensors.shape(kinds["B"])
        for number, parts in enumerate(experts):
            first = 0
            for place in parts:
                shape = self._shape(place)
                if len(shape) != 2 or shape[1] != ins or first + shape[0] > outs:
                    self._problem(
                        f"the products of {name}'s factors are {outs} × {ins}, the base's {place} has the shape {list(shape)}"
                    )
                    return
                read = self._expert_factors(kinds, number, len(experts), rank, first, first + shape[0])
                self.found.edits.setdefault(place, []).append(
                    LowRank(shape=shape, matrix=whole_matrix(shape), scale=scale, factors=read)
                )
                first += shape[0]
            if first != outs:
                self._problem(f"the products of {name}'s factors have {outs} rows, the base's {', '.join(parts)} have {first}")
                return

    def _expert_factors(
        self, kinds: dict[str, str], number: int, count: int, rank: int, first: int, last: int
    ) -> Callable[[], Factors]:
        def read() -> Factors:
            a = self._tensors.file.read_rows(kinds["A"], number * rank, (number + 1) * rank)
            b = self._tensors.file.read_rows(kinds["B"], first, last)
            left = numbers(Rows(b.dtype, np.ascontiguousarray(b.held[:, number::count]))).held
            return left[None], numbers(a).held[None]

        return read

    def _rank_fits(self, module: str, seen: int) -> bool:
        if seen == self._config.rank_of(module):
            return True
        self._problem(f"its configuration gives {module} the rank {self._config.rank_of(module)}, its factors have {seen}")
        return False

    def _shape(self, place: str) -> tuple[int, ...]:
        stored = self.found.whole.get(place)
        return self._base.info(place).shape if stored is None else self._tensors.shape(stored)

    def _tied(self, inner: str) -> str:
        if inner.rsplit(".", 1)[-1] in ("lm_head", "embed_out") and self._base.config.get("tie_word_embeddings"):
            return (
                ": it is tied to the embedding there, and an edit of it alone cannot be kept in a tied model. Untie the base "
                "(tie_word_embeddings: false, with the embedding stored as lm_head.weight, too), or merge the adapter with PEFT"
            )
        return ""

    def _problem(self, text: str) -> None:
        self.problems.append(text)
