"""The discrete wavelet transform of images: one level of analysis and of synthesis."""

from .wavelet2d import wavelet2d, wavelet2d_inverse

__all__ = ["wavelet2d", "wavelet2d_inverse"]
