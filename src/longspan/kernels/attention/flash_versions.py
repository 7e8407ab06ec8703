"""Which FlashAttention computes on CUDA: torch's own, the second, or a newer one that is installed.

`torch.nn.attention.activate_flash_attention_impl` puts an installed one in the place of the operators that
`cuda_varlen` calls. FlashAttention-3 is for Hopper (capability 9), FlashAttention-4 for that and Blackwell (10).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

from longspan.core.errors import ArgumentError
from longspan.core.log import get_logger

__all__ = ["FlashVersion", "use_flash"]

FlashVersion = Literal["auto", "fa2", "fa3", "fa4"]
MADE_FOR = {9: "fa3", 10: "fa4"}
"""The newest that is made for a compute capability."""

_chosen: dict[str, str] = {}


def use_flash(wanted: FlashVersion = "auto") -> str:
    """Let a FlashAttention compute from here on, and return its name and why; the log says so too.

    What was chosen stays if this is called again with `auto`, which is the one made for this GPU where it is installed,
    else torch's own.

    Raises:
        ArgumentError: the one that is wanted cannot be used here.
    """
    if wanted == "auto" and _chosen:
        return _chosen["why"]
    name: str = wanted
    major = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
    if wanted == "auto":
        name = MADE_FOR.get(major, "fa2")
    restore_flash_attention_impl(_raise_warn=False)
    why = f"{name}: asked for" if wanted != "auto" else f"{name}: made for this GPU"
    if name == "fa2":
        why = "fa2: torch's own" + (
            "" if wanted == "fa2" else f"; no newer one is made for capability {major}"
        )
    else:
        problem = _activate(name)
        if problem is not None and wanted != "auto":
            raise ArgumentError(
                f"runtime.flash: {name} cannot be used here",
                found=problem,
                allowed="auto, or fa2, torch's own",
            )
        if problem is not None:
            why = f"fa2: torch's own, because {name}, which is made for this GPU, cannot be used ({problem})"
    _chosen["why"] = why
    get_logger("kernels.attention").info("flash attention: %s", why)
    return why


def _activate(name: str) -> str | None:
    """Put a version in place; return what stands against it."""
    try:
        activate_flash_attention_impl(name.upper())
    # Whatever the package's import or registration says is the reason.
    except Exception as error:  # noqa: BLE001
        restore_flash_attention_impl(_raise_warn=False)
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None
