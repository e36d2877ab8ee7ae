"""Convolutions with what follows them."""

from .conv2d import conv2d, fold_batch_norm
from .conv2d_pair import conv2d_pair
from .depthwise_conv2d import depthwise_conv2d

__all__ = ["conv2d", "conv2d_pair", "depthwise_conv2d", "fold_batch_norm"]
