"""Every operator that is known: importing this registers them."""

from xrk.runtime import (
    nodes_convolution,
    nodes_deformable,
    nodes_elementwise,
    nodes_global,
    nodes_interpolation,
    nodes_matmul,
    nodes_pooling,
    nodes_scan,
    nodes_shape,
    nodes_view,
)

__all__ = [
    "nodes_convolution",
    "nodes_deformable",
    "nodes_elementwise",
    "nodes_global",
    "nodes_interpolation",
    "nodes_matmul",
    "nodes_pooling",
    "nodes_scan",
    "nodes_shape",
    "nodes_view",
]
