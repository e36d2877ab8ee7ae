"""Convolutions with what follows them."""

from .depthwise_conv2d import depthwise_conv2d

__all__ = ["depthwise_conv2d"]
