"""Mixtures of experts as transformers before version 5 had them in memory: each expert's matrices were parameters of their own.

Today's classes stack them. An optimizer's numbers from then follow the order from then: today's order, with a stack's tensors of the
checkpoint in its place, expert by expert, each in the order in which its module defined them. Whether the router came before the experts
or after them has changed in some classes, so that both are possible.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ota_core.moments.base import ParameterLayout, Shape

# Mixtral, Phi-MoE and MiniMax; all others.
_ORDERS = (("w1", "w2", "w3"), ("gate_proj", "up_proj", "down_proj"))
_EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<number>\d+)\.(?P<part>\w+)\.weight")


def with_single_experts(layout: ParameterLayout) -> list[ParameterLayout]:
    """The same model with every expert's matrices by their names in the checkpoint, the router before and after them; none where it has no
    stacks of known parts."""
    stacks: dict[str, dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    parameters: dict[str, set[str]] = defaultdict(set)
    for name, stored in layout.stored.items():
        if match := _EXPERT.fullmatch(name):
            stacks[match["stack"]][int(match["number"])][match["part"]] = name
            parameters[match["stack"]] |= {view.parameter for view in stored.views}
    stack_of = {parameter: stack for stack, own in parameters.items() for parameter in own}
    orders = {stack: _order(experts) for stack, experts in stacks.items()}
    if not stack_of or any(order is None for order in orders.values()):
        return []
    shapes: dict[str, Shape] = {}
    for name, shape in layout.shapes.items():
        stack = stack_of.get(name)
        if stack is None:
            shapes[name] = tuple(shape)
            continue
        for number in sorted(stacks[stack]):  # at the place of the stack's first parameter
            for part in orders[stack] or ():
                one = stacks[stack][number][part]
                shapes.setdefault(one, layout.stored[one].shape)

    def expanded(names: Iterable[str]) -> frozenset[str]:
        chosen = set(names)
        singles = {one for one in layout.stored if _EXPERT.fullmatch(one) and layout.stored[one].views[0].parameter in chosen}
        return frozenset(chosen - stack_of.keys() | singles)

    changed = layout.changed
    single = replace(
        layout,
        stored={},
        shapes=shapes,
        decayed=expanded(layout.decayed),
        rules={title: expanded(names) for title, names in layout.rules.items()},
        changed=None if changed is None else lambda: expanded(changed()),
    )
    return [replace(single, shapes=_with_routers(shapes, stacks.keys(), parameters, first=first)) for first in (True, False)]


def _with_routers(
    shapes: Mapping[str, Shape], stacks: Iterable[str], parameters: Mapping[str, Iterable[str]], *, first: bool
) -> dict[str, Shape]:
    """The same parameters, each block's router before its experts or after them."""
    order = list(shapes)
    for stack in stacks:
        blocks = {f"{name.rpartition('.experts.')[0]}." for name in (f"{stack}.", *parameters[stack])}
        routers = [name for name in order if any(name.startswith((f"{block}gate.", f"{block}router.")) for block in blocks)]
        order = [name for name in order if name not in set(routers)]
        own = [i for i, name in enumerate(order) if name.startswith(f"{stack}.")]
        place = own[0] if first else own[-1] + 1
        order[place:place] = routers
    return {name: shapes[name] for name in order}


def _order(experts: dict[int, dict[str, str]]) -> tuple[str, ...] | None:
    return next((order for order in _ORDERS if all(own.keys() == set(order) for own in experts.values())), None)
