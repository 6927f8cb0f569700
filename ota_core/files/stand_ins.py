"""Files of torch.save that hold objects of a trainer's own classes: those become empty stand-ins, and nothing of the trainer is run.

``weights_only`` refuses every class that it does not know. A stand-in takes the place of a class whose name begins as the caller says;
it keeps what the pickle gives it and does nothing. Everything else is refused as before, whatever could run code above all.
"""

import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self


class StandIn:
    """In place of an object of an unknown class: the arguments and the attributes that the pickle has for it."""

    arguments: tuple[Any, ...]

    def __new__(cls, *arguments: Any) -> Self:
        made = super().__new__(cls)
        made.arguments = arguments
        return made

    def __init__(self, *arguments: Any) -> None:
        pass


@contextmanager
def stand_ins(path: Path, modules: Sequence[str]) -> Iterator[None]:
    """While this lasts, torch.load with ``weights_only`` makes stand-ins for classes of these modules (``deepspeed.``) in this file.

    Files that are no zip, or are damaged, are left to torch.load, which says what is wrong with them.
    """
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    try:
        unknown = get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
    except Exception:  # a damaged pickle can raise anything; torch.load meets it again and is heard there
        unknown = []
    with safe_globals([(StandIn, name) for name in unknown if name.startswith(tuple(modules))]):
        yield
