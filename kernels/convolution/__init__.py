"""Convolutions with what follows them."""

from .conv2d import conv2d, fold_batch_norm
from .depthwise_conv2d import depthwise_conv2d

__all__ = ["conv2d", "depthwise_conv2d", "fold_batch_norm"]
