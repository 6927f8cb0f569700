"""What wrappers of a model put into the names of its tensors, taken out again."""

from collections.abc import Iterable, Mapping

# Anywhere in a name: torch.compile, FSDP, that of XLA, and activation checkpointing wrap single blocks as well as a whole model.
PARTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_module"})
# At the front of every name: DistributedDataParallel and DeepSpeed; PEFT; trl.
FRONTS = ("module.", "base_model.model.", "pretrained_model.")
# trl's wrapper puts the model under pretrained_model, and its own head beside it.
_VALUE_HEAD = "v_head."


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Every name to itself without the wrappers' parts; ``module.`` and ``base_model.model.`` only where every name begins so.

    Two names may become one: the caller has to look.
    """
    plain = {name: _without_parts(name) for name in names}
    fronts = True
    while fronts and plain:
        fronts = False
        for front in FRONTS:
            own = [name for name in plain.values() if not name.startswith(_VALUE_HEAD)]
            if own and all(name.startswith(front) and len(name) > len(front) for name in own):
                plain = {name: short.removeprefix(front) for name, short in plain.items()}
                fronts = True
    return plain


def _without_parts(name: str) -> str:
    if PARTS.isdisjoint(parts := name.split(".")):
        return name
    return ".".join(part for part in parts if part not in PARTS)


def twice(plain: Mapping[str, str]) -> list[str]:
    """Names that become one and the same."""
    seen: dict[str, str] = {}
    return [name for name, short in plain.items() if seen.setdefault(short, name) != name]
