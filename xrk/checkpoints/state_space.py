"""What all networks of state-space blocks share: the two layouts of an SS2D's tensors, and its sizes read from them.

MambaIR and VMamba's released files stack the four scans' matrices: ``x_proj_weight (4, R + 2N, D)`` and
``dt_projs_weight (4, D, R)``. VMamba's present code writes one under the other and names the module ``op``:
``op.x_proj.weight (4 (R + 2N), D)``, ``op.dt_projs.weight (4 D, R)``. The numbers lie in the same order.
"""

import math
import re
from collections.abc import Mapping

from torch import Tensor

from xrk.checkpoints.fitting import Shapes, differences, dimension, vote
from xrk.errors import CheckpointError
from xrk.models.ss2d import SS2D

__all__ = ["count", "expansion", "rename", "reshape", "ss2d", "states"]

_STACKED = ("x_proj", "dt_projs")


def rename(name: str) -> str:
    """VMamba's name of a tensor -> MambaIR's."""
    name = re.sub(r"(^|\.)op\.(?=\w+(\.weight|\.bias)?$)", r"\1self_attention.", name)
    return re.sub(rf"(^|\.)({'|'.join(_STACKED)})\.weight$", r"\1\2_weight", name)


def reshape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a tensor of MambaIR's name has there, given the one in the file; the order of numbers stays."""
    if len(shape) == 2 and shape[0] % 4 == 0 and name.endswith(tuple(f"{part}_weight" for part in _STACKED)):
        return (4, shape[0] // 4, shape[1])
    if shape[2:] == (1, 1) and name.endswith(("in_proj.weight", "out_proj.weight")):
        return shape[:2]  # VMamba's layout for maps with the channels first: a 1x1 convolution
    return shape


def count(shapes: Shapes, prefix: str) -> int:
    """Number of blocks ``prefix0.``, ``prefix1.``, ...; also where one of them is missing in between."""
    pattern = re.compile(re.escape(prefix) + r"(0|[1-9][0-9]{0,2})\.")
    found = {int(match[1]) for name in shapes if (match := pattern.match(name))}
    highest = max(found, default=-1) + 1
    return highest if highest <= 2 * len(found) else len(found)


def states(shapes: Shapes, default: int) -> int:
    """N, which most of the ``A_logs`` speak for."""
    return vote((dimension(shapes, name, 1, 0) for name in shapes if name.endswith("A_logs")), default)


def expansion(shapes: Shapes, widths: Mapping[str, int], default: float) -> float:
    """The least ``expand`` with int(expand * width) channels in the blocks under each prefix of ``widths``."""
    found = default
    least = 0.0
    for prefix, width in widths.items():
        norms = (name for name in shapes if name.startswith(prefix) and name.endswith("out_norm.weight"))
        inner = vote((dimension(shapes, name, 0, 0) for name in norms), 0)
        ratio = inner / width
        if int(ratio * width) < inner:
            ratio = math.nextafter(ratio, math.inf)
        if ratio > least:
            found = least = ratio
    return found


def ss2d(state: Mapping[str, Tensor], prefix: str = "") -> SS2D:
    """The SS2D whose tensors lie under ``prefix`` ("layers.0.blocks.1.op."), in either layout, in eval mode.

    All its sizes follow from the shapes, with or without the gate and the convolution's bias.

    Raises:
        CheckpointError: a tensor is missing, or one has a shape that does not go with the others.
    """
    own = {rename(name.removeprefix(prefix)): tensor for name, tensor in state.items() if name.startswith(prefix)}
    own = {name: tensor.reshape(reshape(name, tuple(tensor.shape))) for name, tensor in own.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    channels = dimension(shapes, "out_proj.weight", 0, 1)
    inner = dimension(shapes, "out_norm.weight", 0, 1)
    module = SS2D(
        channels,
        dimension(shapes, "A_logs", 1, 1),
        expansion(shapes, {"": channels}, 1.0),
        scans=dimension(shapes, "x_proj_weight", 0, 4),
        gate=dimension(shapes, "in_proj.weight", 0, inner) > inner,
        conv_bias="conv2d.bias" in shapes,
        rank=dimension(shapes, "dt_projs_weight", 2, 1),
    )
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if problems := differences(shapes, expected):
        raise CheckpointError(f"The tensors under {prefix!r} are no SS2D: {'; '.join(problems)}.")
    module.load_state_dict(own, strict=True)
    return module.eval().requires_grad_(False)
