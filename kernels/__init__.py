"""The operators of xrk's networks, each with a plain PyTorch reference: imported as ``xrk.kernels``.

The folder lies beside ``xrk/`` in the source tree and is mapped into the package by ``setup.py``.
"""
