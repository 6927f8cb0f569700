"""Gradients that are used and let go of one parameter at a time, so that at most about one layer's are in memory."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch

Take = Callable[[str, torch.Tensor], None]
"""Called with a parameter's name and its complete gradient, of the parameter's shape, type and device."""


@contextmanager
def each_gradient(network: torch.nn.Module, parameters: Mapping[str, torch.Tensor], take: Take) -> Iterator[None]:
    """Inside, a backward pass hands ``take`` each of these parameters' gradients as soon as it is complete, and frees it.

    Nothing else of the network has a gradient. A parameter that is used in several places, such as a tied one, is given once, with the sum.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    before = [(parameter, parameter.requires_grad) for parameter in network.parameters()]

    def hook(parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        take(names[id(parameter)], gradient)

    with ExitStack() as stack:
        for parameter, had in before:
            stack.callback(parameter.requires_grad_, had)
            parameter.requires_grad_(id(parameter) in names)
            if id(parameter) in names:
                stack.callback(parameter.register_post_accumulate_grad_hook(hook).remove)
        yield
