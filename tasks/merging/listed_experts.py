"""Stacks of experts that other programs save as lists of linear layers: gpt-oss as unsloth and GPTQModel quantise it.

``….experts.gate_up_projs.3.weight`` is a matrix (out, in), the third of the stack ``….experts.gate_up_proj`` (E, in, out) turned; ``….bias`` is its row of
``gate_up_proj_bias``. The router's numbers lie under ``router.linear``. transformers' own tables do not know these names.
"""

import re
from collections.abc import Collection, Mapping

from ota_core.files.layouts.stored import Shape, Stored, View

_EXPERT = re.compile(r"(?P<stack>.+\.experts\.(?:gate_up|down)_proj)s\.(?P<number>\d+)\.(?P<kind>weight|bias)")
_ROUTER = re.compile(r"(?P<router>.+\.router)\.linear\.(?P<kind>weight|bias)")


def listed(names: Collection[str], shapes: Mapping[str, Shape]) -> tuple[dict[str, str], dict[str, Stored]]:
    """Tensors to the parameters that they are, and to the parts of parameters that they hold. shapes: of the model's parameters."""
    own, made = {}, {}
    for name in names:
        if router := _ROUTER.fullmatch(name):
            parameter = f"{router['router']}.{router['kind']}"
            if parameter in shapes:
                own[name] = parameter
        elif expert := _EXPERT.fullmatch(name):
            parameter = expert["stack"] + ("_bias" if expert["kind"] == "bias" else "")
            shape, number = shapes.get(parameter, ()), int(expert["number"])
            if len(shape) == 3 and number < shape[0]:
                _, ins, outs = shape
                made[name] = Stored((outs, ins), (View(parameter, number * ins * outs, (outs, ins), (1, outs)),))
            elif len(shape) == 2 and number < shape[0]:
                made[name] = Stored(shape[1:], (View(parameter, number * shape[1], shape[1:], (1,)),))
    return own, made
