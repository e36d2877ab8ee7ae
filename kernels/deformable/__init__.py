"""Convolutions whose taps are moved from pixel to pixel."""

from .deform_conv2d import deform_conv2d

__all__ = ["deform_conv2d"]
