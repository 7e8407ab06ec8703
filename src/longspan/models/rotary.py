"""What the rotary modules of a built model compute: frequencies of one length, and angles in fp64.

Dynamic NTK and LongRoPE have frequencies that depend on the length. transformers takes it from the largest position of
each forward pass, so a document would turn by what it is packed with, by the process that reads it and by what was
read before it. `hold_frequencies` gives a model those of one length, whatever it is given.

transformers multiplies position and frequency in fp32. The product is rounded to 24 bits, so a cos is off by up to
3e-8 times the position: 2e-3 at 64K, which is what bf16 rounds away anyhow, 1.6e-2 at 512K, which is not. Frequencies
stay the model's own, fp32, so a saved model means the same whoever runs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import nn

__all__ = [
    "EXACT_FROM",
    "VaryingRope",
    "depends_on_length",
    "exact_angles",
    "hold_frequencies",
    "varying_ropes",
]

EXACT_FROM = 65536
"""Positions from which the error of fp32 angles exceeds the rounding of a cos to bf16."""
BLOCK = 1 << 16
"""Positions worked on at a time: fp64 angles of all of them would be large."""
PROBE = 64
"""Small positions at which fp32 is exact enough to see how a module lays out its angles."""


class VaryingRope(NamedTuple):
    """Frequencies of a rotary module that depend on the length."""

    module: Any
    layer_type: str | None
    """Of several kinds of layer with frequencies of their own; None: all layers have these."""
    kind: str
    settings: Mapping[str, Any]
    """The `rope_parameters` of this kind."""

    def reset(self) -> None:
        """Forget the lengths that the module has seen."""
        prefix = "" if self.layer_type is None else f"{self.layer_type}_"
        device = getattr(self.module, f"{prefix}inv_freq").device
        first = getattr(self.module, f"{prefix}original_inv_freq").to(device).clone()
        setattr(self.module, f"{prefix}inv_freq", first)
        setattr(self.module, f"{prefix}max_seq_len_cached", self.module.original_max_seq_len)


def depends_on_length(kind: object) -> bool:
    """Return whether frequencies of this `rope_type` depend on the length."""
    return isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")


def varying_ropes(model: nn.Module) -> list[VaryingRope]:
    """Return the frequencies of a model that depend on the length; none after `hold_frequencies`."""
    return list(_varying(model))


def _varying(model: nn.Module) -> Iterator[VaryingRope]:
    modules: Iterable[Any] = model.modules()
    for module in modules:
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            if depends_on_length(kinds):
                yield VaryingRope(module, None, kinds, module.config.rope_parameters)
        elif isinstance(kinds, Mapping):
            for layer_type, kind in kinds.items():
                if depends_on_length(kind):
                    yield VaryingRope(module, layer_type, kind, module.config.rope_parameters[layer_type])


@torch.no_grad()
def hold_frequencies(model: nn.Module, tokens: int) -> None:
    """Give a model the frequencies of `tokens` positions from here on, whatever it is given.

    They are those of transformers' own rotary modules, called at that length; the model's config stays as it is.
    To be called when the model has values, on the device where it runs.
    """
    found = varying_ropes(model)
    for each in found:
        each.reset()
        buffer = next(each.module.buffers())
        last = torch.full((1, 1), tokens - 1, device=buffer.device)
        layer = {} if each.layer_type is None else {"layer_type": each.layer_type}
        each.module(buffer.new_zeros(1), last, **layer)
    # Of another type, the modules do not look at positions any more.
    for module in {each.module for each in found}:
        kind = module.rope_type
        module.rope_type = "default" if isinstance(kind, str) else dict.fromkeys(kind, "default")


def exact_angles(model: nn.Module) -> int:
    """Let the rotary modules of a model compute cos and sin from fp64 angles; return how many do.

    A module that lays out its angles otherwise than as two equal halves is left as it is. Calling it again is harmless.
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
