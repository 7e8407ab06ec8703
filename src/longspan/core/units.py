"""Numbers with units, read and written the way people say them.

Context lengths are binary (`128k` = 131072 tokens), token budgets are decimal (`5B` = 5,000,000,000).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal

from longspan.core.errors import ArgumentError

# A comma only separates thousands: "1,5B" is refused, because half of its readers mean 1.5B.
_NUMBER = re.compile(
    r"\s*((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9][0-9_]*)(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,2})?)\s*([A-Za-z]*)\s*",
    re.ASCII,
)
_LARGEST = 2**63 - 1  # what the int64 columns of plans and tables hold
_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_BINARY = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}


def parse_length(text: str | int) -> int:
    """Parse a context length in tokens: `4096`, `128k` (= 131072), `1M` (= 1048576)."""
    return _parse(text, _BINARY, kind="context length", examples="2048, 128k, 1M")


def parse_tokens(text: str | int) -> int:
    """Parse a token budget: `100m`, `1.5B`, `2e9`, `20000`."""
    return _parse(text, _DECIMAL, kind="token budget", examples="20000, 100m, 1.5B, 2e9")


def parse_count(text: str | int) -> int:
    """Parse a count of samples, documents or requests: `2000000`, `2e6`, `2M`."""
    return _parse(text, _DECIMAL, kind="count", examples="2000000, 2e6, 2M")


def _parse(text: str | int, suffixes: dict[str, int], *, kind: str, examples: str) -> int:
    match = _NUMBER.fullmatch(str(text))
    suffix = match.group(2).lower() if match else ""
    if match is None or suffix not in suffixes or isinstance(text, bool):
        raise ArgumentError(f"this is not a {kind}", found=repr(text), allowed=f"numbers such as {examples}")
    # Decimal, not float: 1.005k is 1005, and float would make it 1004.9999999999999.
    value = Decimal(match.group(1).replace("_", "").replace(",", "")) * suffixes[suffix]
    if value > _LARGEST:
        raise ArgumentError(f"this {kind} is too large", found=repr(text), allowed=f"at most {_LARGEST}")
    if value != int(value):
        raise ArgumentError(f"a {kind} is a whole number", found=repr(text), allowed=f"such as {examples}")
    return int(value)


def format_count(value: float) -> str:
    """Write a count for people: `987`, `12.3K`, `1.64M`, `5.00B`."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) < 9999.5:
        return f"{value:,.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.3g}"
    return "".join(_scaled(value, ((1e3, "K"), (1e6, "M"), (1e9, "B"), (1e12, "T"))))


def format_bytes(value: float) -> str:
    """Write a size for people in binary units: `306 MiB`."""
    if abs(value) < 1023.5:
        return f"{value:.0f} B"
    return " ".join(_scaled(value, ((2**10, "KiB"), (2**20, "MiB"), (2**30, "GiB"), (2**40, "TiB"))))


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> tuple[str, str]:
    """Return `value` with three digits in the first unit that needs no fourth one, and that unit.

    999.7 of one unit is 1.00 of the next, never "1e+03".
    """
    for scale, unit in units:
        scaled = value / scale
        for decimals in (2, 1, 0):
            text = f"{scaled:.{decimals}f}"
            if abs(float(text)) < 10 ** (3 - decimals):
                return text, unit
    return text, unit


def format_seconds(value: float) -> str:
    """Write a duration for people: `8.2 s`, `3 min 25 s`, `2 h 05 min`."""
    if value < 59.95:  # 59.97 is a minute, not 60.0 s
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
