"""Convolutions with what follows them."""

from .conv2d import conv2d, fold_batch_norm
from .conv2d_pair import conv2d_pair
from .depthwise_conv2d import depthwise_conv2d
from .packed_conv2d import PackedConv2d, PackedDoubledConv2d, packed_values

__all__ = [
    "PackedConv2d",
    "PackedDoubledConv2d",
    "conv2d",
    "conv2d_pair",
    "depthwise_conv2d",
    "fold_batch_norm",
    "packed_values",
]
