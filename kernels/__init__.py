"""The operators of xrk's networks, each with a plain PyTorch reference: imported as ``xrk.kernels``.

The folder lies beside ``xrk/`` in the source tree and is mapped into the package by ``setup.py``.
"""

from .convolution import (
    PackedConv2d,
    PackedDoubledConv2d,
    conv2d,
    conv2d_pair,
    depthwise_conv2d,
    fold_batch_norm,
    packed_values,
)
from .deformable import deform_conv2d
from .normalization import group_norm, group_norm_apply, group_norm_merge, group_norm_summarise, layer_norm
from .scan import backward as _backward  # noqa: F401  registers the scans' gradients
from .scan.selective_scan import selective_scan
from .scan.selective_scan_2d import carry_lines, scan_lines, selective_scan_2d, summarise_lines
from .wavelet import wavelet2d, wavelet2d_inverse

__all__ = [
    "PackedConv2d",
    "PackedDoubledConv2d",
    "carry_lines",
    "conv2d",
    "conv2d_pair",
    "deform_conv2d",
    "depthwise_conv2d",
    "fold_batch_norm",
    "group_norm",
    "group_norm_apply",
    "group_norm_merge",
    "group_norm_summarise",
    "layer_norm",
    "packed_values",
    "scan_lines",
    "selective_scan",
    "selective_scan_2d",
    "summarise_lines",
    "wavelet2d",
    "wavelet2d_inverse",
]
