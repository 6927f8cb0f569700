"""Which tensors of a checkpoint become which parameters of a model, by the conversions that transformers itself makes on loading.

Names go forward, as in ``from_pretrained``: what a tensor of the checkpoint is called in the model. What is stacked or fused goes backward,
as in ``save_pretrained``: transformers' own reverse operations run on tensors without storage (``meta``), and where each element of their
results would come from is read off strides and offsets. No weight and no v is touched.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ota_core.moments.base import Shape, Stored, View
from ota_core.moments.converted import whole


@dataclass(frozen=True)
class Conversion:
    """How the checkpoint and the model go together."""

    own: dict[str, str]
    """Tensor of the checkpoint to the parameter that it is, whatever each is called."""
    made: dict[str, Stored]
    """Tensor of the checkpoint to the parts of parameters that make it."""

    def tensors(self) -> dict[str, list[str]]:
        """Parameter to the tensors of the checkpoint that hold it, or parts of it."""
        found: dict[str, list[str]] = {}
        for tensor, parameter in self.own.items():
            found.setdefault(parameter, []).append(tensor)
        for tensor, one in self.made.items():
            for view in one.views:
                found.setdefault(view.parameter, []).append(tensor)
        return found


def conversion_of(model: Any, held: Mapping[str, Shape], shapes: Mapping[str, Shape], tied: Mapping[str, str]) -> Conversion:
    """held: the checkpoint's tensors. shapes, tied: the model's parameters, as in a ``ParameterLayout``."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    in_model = dict.fromkeys([*shapes, *tied], True)
    prefix = model.base_model_prefix

    own: dict[str, str] = {}
    parts: dict[str, str] = {}  # what a converter takes: its name with all else renamed, to its name in the checkpoint
    for tensor in sorted(held, key=dot_natural_key):  # the order in which transformers reads them: some renamings go by it
        renamed, _ = rename_source_key(tensor, renamings, [])
        name, converted = rename_source_key(tensor, renamings, converters, prefix, in_model)
        if converted is None:
            if name in in_model:
                own[tensor] = tied.get(name, name)
            continue
        plain, _ = rename_source_key(renamed, [], converters)
        if name == f"{prefix}.{plain}":
            renamed = f"{prefix}.{renamed}"
        elif plain == f"{prefix}.{name}":
            renamed = renamed.removeprefix(f"{prefix}.")
        parts[renamed] = tensor
    missing = {name: shape for name, shape in shapes.items() if name not in set(own.values())}
    made: dict[str, Stored] = {}
    for those in _reversed(model, converters, missing):
        if parts.keys() >= those.keys():  # a stack of which a part is not there is missing altogether
            made |= {parts[name]: one for name, one in those.items()}
    return Conversion(own, made)


def _reversed(model: Any, converters: list[Any], missing: Mapping[str, Shape]) -> Iterator[dict[str, Stored]]:
    """For each stack or fusion, name before the converters to the parts of parameters that make it. What cannot be followed is left out."""
    from transformers.core_model_loading import dot_natural_key

    backward = [one.reverse_transform() for one in reversed(converters)] if missing else []
    groups: dict[str, Any] = {}
    empty = {name: torch.empty(shape, device="meta") for name, shape in missing.items()}
    for name in sorted(missing, key=dot_natural_key):
        for converter in backward:
            target, pattern = converter.rename_source_key(name)
            if pattern is not None:
                groups.setdefault(target, deepcopy(converter)).add_tensor(target, name, pattern, empty[name])
                break
    parameters = {_storage(tensor): name for name, tensor in empty.items()}
    for target, converter in groups.items():
        # An operation that computes or copies leaves what ``_Following`` knows, and its results belong to no parameter.
        found: dict[str, Stored] | None = None
        with suppress(_NotMoved, TypeError, AttributeError, RuntimeError, ValueError), _Following():
            results = converter.convert(target, model=model, config=model.config)
            found = {name: _stored(result, parameters) for name, result in results.items()}
        if found is not None:
            yield found


class _NotMoved(Exception):
    """A result is more than elements of parameters in another order."""


@dataclass(frozen=True)
class _Joined:
    """Tensors one after another, or the elements of one in its own order, under another shape."""

    shape: Shape
    pieces: tuple[torch.Tensor, ...]

    def contiguous(self) -> "_Joined":
        return self

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """torch takes these where a tensor is expected when they have this; ``_Following`` is asked first."""
        raise _NotMoved(str(function))


class _Following(TorchFunctionMode):
    """Keeps every result a view of what it was made from: what would copy the elements only says where they lie."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.Tensor.contiguous:
            return args[0]
        if function in (torch.cat, torch.concat):
            return _cat(*args, **kwargs)
        if function is torch.Tensor.reshape:
            return _reshape(args[0], args[1:])
        return function(*args, **kwargs)


def _cat(tensors: Any, dim: int = 0) -> _Joined:
    if dim != 0:
        raise _NotMoved("joined along an inner axis")
    shapes = [tuple(one.shape) for one in tensors]
    pieces = tuple(piece for one in tensors for piece in (one.pieces if isinstance(one, _Joined) else (one,)))
    return _Joined((sum(shape[0] for shape in shapes), *shapes[0][1:]), pieces)


def _reshape(tensor: torch.Tensor, sizes: Any) -> Any:
    shape = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else tuple(sizes)
    try:
        return tensor.view(shape)
    except RuntimeError:
        return _Joined(tuple(torch.empty(tensor.shape, device="meta").view(shape).shape), (tensor,))


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _stored(result: Any, parameters: Mapping[int, str]) -> Stored:
    result = result[0] if isinstance(result, list) else result
    pieces = result.pieces if isinstance(result, _Joined) else (result,)
    views = []
    for piece in pieces:
        parameter = parameters.get(_storage(piece))
        if parameter is None:
            raise _NotMoved("a new tensor")
        shape = tuple(piece.shape) or (1,)
        views.append(View(parameter, int(piece.storage_offset()), shape, tuple(piece.stride()) or (1,)))
    return Stored(tuple(result.shape), tuple(views))


def under_other_names(conversion: Conversion, shapes: Mapping[str, Shape]) -> dict[str, Stored]:
    """What second moments must be given to bear the checkpoint's names: renamed parameters and parts of parameters."""
    renamed = {tensor: whole(name, shapes[name]) for tensor, name in conversion.own.items() if tensor != name}
    kept = {tensor for tensor, name in conversion.own.items() if tensor == name}
    return {tensor: one for tensor, one in renamed.items() if one.views[0].parameter not in kept} | conversion.made
