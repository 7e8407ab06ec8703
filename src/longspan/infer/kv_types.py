"""Types in which keys and values are held, smaller than those in which they are computed.

    int8    a scale for each token and head: off by 1/254 of its largest channel at most
    fp8     e4m3, as it is: what servers hold where a model brings no scales; beyond 448 it is cut

They are held so from the first token on, and each layer reads back what it held: a prompt's own tokens too see each
other's as they were held, so what a given answer or a perplexity shows is what generating would.

Shape legend: T = tokens, K = key/value heads, D = head dim.
"""

from __future__ import annotations

from typing import Literal

import torch

__all__ = ["KvDtype", "bytes_per_head", "held", "read_back"]

KvDtype = Literal["int8", "fp8"]

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def bytes_per_head(kind: KvDtype, head_dim: int) -> int:
    """Return the bytes of one token's key or value of one head."""
    return head_dim + (4 if kind == "int8" else 0)


def held(kind: KvDtype, x_TKD: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return what is held of keys or values: int8 [T, K, D], and their scales fp32 [T, K, 1] of int8."""
    if kind == "fp8":
        # Copied by index, which there is for whole bytes only.
        return (x_TKD.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).view(torch.int8),)
    scale_TK1 = x_TKD.float().abs().amax(dim=-1, keepdim=True) / 127
    steps = x_TKD / torch.where(scale_TK1 == 0, 1.0, scale_TK1)
    return steps.round().to(torch.int8), scale_TK1


def read_back(kind: KvDtype, parts: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return keys or values [T, K, D] of what `held` gave."""
    if kind == "fp8":
        return parts[0].view(torch.float8_e4m3fn).to(dtype)
    return (parts[0] * parts[1]).to(dtype)
