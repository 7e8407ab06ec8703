"""Attention over bands: one description of who sees whom, several kernels that obey it."""

from longspan.kernels.attention.api import AttentionKernel, attention, check_shapes, choose_kernel, merge
from longspan.kernels.attention.bands import NO_LIMIT, Bands

__all__ = ["NO_LIMIT", "AttentionKernel", "Bands", "attention", "check_shapes", "choose_kernel", "merge"]
