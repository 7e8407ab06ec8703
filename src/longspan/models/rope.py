"""Rotary angles in fp64, for positions at which fp32 no longer tells neighbours apart.

transformers multiplies position and frequency in fp32. The product is rounded to 24 bits, so a cos is off by up to
3e-8 times the position: 2e-3 at 64K, which is what bf16 rounds away anyhow, 1.6e-2 at 512K, which is not. Frequencies
stay the model's own, fp32, so a saved model means the same whoever runs it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

__all__ = ["EXACT_FROM", "exact_angles"]

EXACT_FROM = 65536
"""Positions from which the error of fp32 angles exceeds the rounding of a cos to bf16."""
BLOCK = 1 << 16
"""Positions worked on at a time: fp64 angles of all of them would be large."""
PROBE = 64
"""Small positions at which fp32 is exact enough to see how a module lays out its angles."""


def exact_angles(model: nn.Module) -> int:
    """Let the rotary modules of a model compute cos and sin from fp64 angles; return how many do.

    A module that lays out its angles otherwise than as two equal halves is left as it is. Twice is as once.
    """
    count = 0
    for module in model.modules():
        if not isinstance(getattr(module, "inv_freq", None), torch.Tensor):
            continue
        if _from_fp64 not in module._forward_hooks.values() and _has_halves(module):
            module.register_forward_hook(_from_fp64, with_kwargs=True)
            count += 1
    return count


def _has_halves(module: nn.Module) -> bool:
    device = cast(torch.Tensor, module.inv_freq).device
    positions = torch.arange(PROBE, device=device)[None]
    try:
        cos, sin = module(torch.zeros(1, device=device), positions)
    except TypeError:
        # A rotary module with other arguments, such as one for several layer types.
        return False
    wanted = _cos_sin(module, positions, torch.float32)
    return cos.shape == wanted[0].shape and all(
        torch.allclose(a, b, atol=1e-4) for a, b in zip((cos, sin), wanted)
    )


def _from_fp64(
    module: nn.Module,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    output: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    positions = keywords["position_ids"] if "position_ids" in keywords else arguments[1]
    # After the module's own forward pass, which may have changed its frequencies.
    return _cos_sin(module, positions, output[0].dtype)


@torch.no_grad()
def _cos_sin(
    module: nn.Module, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin [..., 2 * frequencies] of `positions`, from angles in fp64."""
    scaling = float(getattr(module, "attention_scaling", 1.0))
    frequencies = cast(torch.Tensor, module.inv_freq).to(positions.device).double()
    parts = []
    for block in positions.split(BLOCK, dim=-1):
        angles = block.double()[..., None] * frequencies
        parts.append([(function(angles) * scaling).to(dtype) for function in (torch.cos, torch.sin)])
    cos, sin = (torch.cat([part[index] for part in parts], dim=-2) for index in (0, 1))
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
