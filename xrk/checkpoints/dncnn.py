"""DnCNN as two public projects write it.

* KAIR (github cszn/KAIR, MIT): ``model.0``, ``model.2``, ..., released with the norms merged into the convolutions,
  trained with them apart (epsilon 1e-4). KAIR's IRCNN has the same names and shapes and dilated convolutions: nothing
  in such a file tells it from a DnCNN with 7 layers.
* DnCNN-PyTorch (github SaoYan/DnCNN-PyTorch): ``dncnn.0``, ``dncnn.2``, ..., convolutions without bias, which tells
  it, and norms apart (epsilon 1e-5).
"""

import re
from typing import Any

from xrk.checkpoints.fitting import Format, Shapes, dimension, width

__all__ = ["FORMAT"]


def _configuration(shapes: Shapes) -> dict[str, Any]:
    convolutions = sorted(index for name, shape in shapes.items() if len(shape) == 4 and (index := _layer(name)) >= 0)
    weights = [f"model.{index}.weight" for index in convolutions] or ["model.0.weight"]
    bias = any(f"model.{index}.bias" in shapes for index in convolutions)
    return {
        "in_channels": dimension(shapes, weights[0], 1, 1),
        "out_channels": dimension(shapes, weights[-1], 0, 1),
        "features": width(shapes, dict.fromkeys(weights[:-1], 1), 64),
        "depth": max(len(weights), 2),
        "batch_norm": any(name.endswith(".running_mean") for name in shapes),
        "bias": bias,
        "norm_eps": 1e-4 if bias else 1e-5,
    }


def _layer(name: str) -> int:
    """4 of ``model.4.weight``; -1 of other names."""
    match = re.fullmatch(r"model\.(0|[1-9][0-9]{0,5})\.weight", name)
    return int(match[1]) if match else -1


def _conventions(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "domain": "unit",
        "noise": "none",
        "size_multiple": 1,
        "output_scale": 1.0,
        "limits": "The network expects white Gaussian noise of one level, relative to levels mapped to [0, 1]; "
        "the file does not state that level.",
    }


def _rename(name: str) -> str:
    return "model." + name.removeprefix("dncnn.") if name.startswith("dncnn.") else name


FORMAT = Format("DnCNN of KAIR or DnCNN-PyTorch", "dncnn", _configuration, _conventions, _rename)
