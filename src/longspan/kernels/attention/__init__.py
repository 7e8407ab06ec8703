"""Attention over bands: one description of who sees whom, several kernels that obey it."""

from longspan.kernels.attention.api import (
    AttentionForm,
    AttentionKernel,
    attention,
    check_shapes,
    choose_kernel,
    merge,
)
from longspan.kernels.attention.bands import NO_LIMIT, Bands, Places, cut_documents
from longspan.kernels.attention.merging import sink_gradient, with_sinks
from longspan.kernels.attention.trees import DocumentTree

__all__ = [
    "NO_LIMIT",
    "AttentionForm",
    "AttentionKernel",
    "Bands",
    "DocumentTree",
    "Places",
    "attention",
    "check_shapes",
    "choose_kernel",
    "cut_documents",
    "merge",
    "sink_gradient",
    "with_sinks",
]
