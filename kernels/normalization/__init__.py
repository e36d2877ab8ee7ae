"""Normalisation over channels and over groups of them."""

from .group_norm import group_norm, group_norm_apply, group_norm_merge, group_norm_summarise
from .layer_norm import layer_norm

__all__ = ["group_norm", "group_norm_apply", "group_norm_merge", "group_norm_summarise", "layer_norm"]
