"""Which tensor of the base an adapter's module means: by its name, or by the name that another version of the model's code gives it."""

from collections.abc import Iterable, Sequence

# Modules that hold the network, and that versions of a class put in or leave out.
_HOLDERS = frozenset({"model", "language_model", "text_model", "transformer", "base_model", "decoder"})
_SAME = {"block_sparse_moe": "mlp"}
_GATES, _UPS, _DOWNS = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")


class Places:
    """The base's tensors, to be found by the names that an adapter has for them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._short: dict[tuple[str, ...], list[str]] = {}
        for name in self._names:
            self._short.setdefault(_short(name), []).append(name)

    def find(self, name: str) -> str | None:
        """The tensor of this name, or the only one whose name differs by no more than the modules that hold the network."""
        if name in self._names:
            return name
        alike = self._short.get(_short(name), [])
        return alike[0] if len(alike) == 1 else None

    def experts(self, stack: str) -> list[list[str]]:
        """Where the base holds the experts of a stack one by one: for each expert the tensors that make its matrix, from the first row on.

        stack: ``….experts.gate_up_proj`` or ``….experts.down_proj``. Empty where they are not there.
        """
        module, _, parameter = stack.rpartition(".")
        kinds: Sequence[tuple[str, ...]] = (_GATES, _UPS) if parameter == "gate_up_proj" else (_DOWNS,)
        found: list[list[str]] = []
        while True:
            one = [
                next((hit for kind in kinds_of if (hit := self.find(f"{module}.{len(found)}.{kind}.weight")) is not None), None)
                for kinds_of in kinds
            ]
            parts = [part for part in one if part is not None]
            if len(parts) < len(kinds):
                return found
            found.append(parts)


def _short(name: str) -> tuple[str, ...]:
    return tuple(_SAME.get(part, part) for part in name.split(".") if part not in _HOLDERS)
