"""Which share of a GPU's bf16 peak its kernels reach, by generation and by FlashAttention's version.

Attention: TFLOPS that the papers measure for causal attention with heads of 128 on long sequences, over the peak, a
tenth lower in a training step. FlashAttention-2: arXiv:2307.08691, figures 4 to 6 (A100); its share of an H100, and all
of FlashAttention-3: arXiv:2407.08608, figures 5 and 6. FlashAttention-4 on a B200: Dao-AILab's announcement of
its forward pass (71%). Ada and CDNA 3: no such figure, the A100's are taken.

Matrices: of all that is not attention, memory traffic of norms and activations included. Fitted to one published row a
generation (`CALIBRATED_BY`); where there is none, the nearest generation's is taken.
"""

from __future__ import annotations

from typing import NamedTuple

from longspan.core.errors import ArgumentError
from longspan.plan.hardware import Gpu

__all__ = ["CALIBRATED_BY", "KERNELS", "PeakShares", "default_kernel", "gpu_shares", "shares_of"]

KERNELS = ("fa2", "fa3", "fa4")


class PeakShares(NamedTuple):
    """Shares of the bf16 peak."""

    linear: float
    forward: float
    """Attention, forward."""
    backward: float


LINEAR = {"ampere": 0.55, "ada": 0.55, "hopper": 0.49, "blackwell": 0.49, "cdna3": 0.49, "cpu": 1.0}
CALIBRATED_BY = {
    "ampere": "EasyContext, Llama-2-7B at 64K, data parallel on 8 A100: 10,240 tokens/s",
    "hopper": "UPipe (arXiv:2602.21196), Llama-3-8B at 128K on 8 H100: 2,280 tokens/s a GPU",
}
ATTENTION = {
    ("ampere", "fa2"): (0.60, 0.55),
    ("hopper", "fa2"): (0.34, 0.29),
    ("hopper", "fa3"): (0.60, 0.51),
    ("hopper", "fa4"): (0.60, 0.51),
    ("blackwell", "fa2"): (0.17, 0.14),
    ("blackwell", "fa3"): (0.17, 0.14),
    ("blackwell", "fa4"): (0.64, 0.48),
    ("cpu", "fa2"): (0.5, 0.5),
}


def default_kernel(family: str) -> str:
    """Return the FlashAttention that is made for a generation; the second where none is."""
    return {"hopper": "fa3", "blackwell": "fa4"}.get(family, "fa2")


def shares_of(family: str, kernel: str | None = None) -> PeakShares:
    """Return the shares of a generation with a FlashAttention; None: the one that is made for it.

    Raises:
        ArgumentError: a version that does not run there.
    """
    name = default_kernel(family) if kernel is None else kernel
    known = family if family in LINEAR else "ampere"
    attention = ATTENTION.get((known, name)) or (ATTENTION["ampere", "fa2"] if name == "fa2" else None)
    if attention is None:
        able = [other for other in KERNELS if (known, other) in ATTENTION or other == "fa2"]
        raise ArgumentError(
            f"{name} does not run on GPUs of this kind", found=family, allowed=", ".join(able)
        )
    return PeakShares(LINEAR[known], *attention)


def gpu_shares(gpu: Gpu, kernel: str | None = None) -> PeakShares:
    """Return the shares of a GPU: those measured on it, else those of its generation; see `shares_of`."""
    if gpu.measured is not None:
        return PeakShares(gpu.measured.linear, gpu.measured.forward, gpu.measured.backward)
    return shares_of(gpu.family, kernel)
