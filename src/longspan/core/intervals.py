"""Confidence intervals of proportions."""

from __future__ import annotations

import math

Z_95 = 1.959963984540054


def wilson_interval(correct: float, samples: int) -> tuple[float, float] | None:
    """Return the 95 % score interval of Wilson (1927) for a proportion; None for no samples.

    Unlike mean +- 1.96 s.e. it stays inside 0..1 and is not empty at 0 or at 1: 8 of 8 gives (0.676, 1).
    """
    if samples == 0:
        return None
    share, z2 = correct / samples, Z_95 * Z_95
    centre = (share + z2 / (2 * samples)) / (1 + z2 / samples)
    half = Z_95 / (1 + z2 / samples) * math.sqrt(share * (1 - share) / samples + z2 / (4 * samples**2))
    # At 0 and at 1 rounding can put a bound just inside of the share itself.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
