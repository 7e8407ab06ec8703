"""Data streams as ProLong writes them: `path@0.3` is a share of what is trained on, `path#2` two uses.

    stores/code@0.3 stores/book@0.7      shares, normalised; they need a number of tokens or the scarcest decides
    stores/code#2   stores/book          every store whole, code twice; #0.5 takes half of it

Shares and uses are not mixed: a share says how much of the whole, uses say how much of the store. An "@" or
"#" that is not followed by a number, or that is part of a path that exists, belongs to the path.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longspan.core.errors import ArgumentError

_SUFFIX = re.compile(r"(?P<path>.+)(?P<sign>[@#])(?P<number>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")


class Stream(NamedTuple):
    """A store and how much of it is used: a share, or so many times."""

    path: str
    proportion: float | None = None
    repeat: float | None = None


def parse_stream(text: str) -> Stream:
    """Parse `path`, `path@0.3` or `path#2`. Raises ArgumentError for a number that is not above 0."""
    match = _SUFFIX.fullmatch(text)
    if match is None or Path(text).exists():
        return Stream(text)
    number = float(match["number"])
    if not 0 < number < math.inf:
        raise ArgumentError("a stream has a share or a number of uses above 0", found=text)
    if match["sign"] == "@":
        return Stream(match["path"], proportion=number)
    return Stream(match["path"], repeat=number)


def stream_settings(streams: Sequence[Stream]) -> dict[str, Any]:
    """Return the settings of a `MixtureConfig` that mixes stores as written; {} if every store is plain.

    Raises:
        ArgumentError: some streams have a share and others not.
    """
    shares = [stream.proportion for stream in streams]
    if any(share is not None for share in shares):
        if None in shares:
            raise ArgumentError(
                "either every stream has a share or none",
                found=", ".join(stream.path for stream in streams if stream.proportion is None),
                fix="write path@SHARE for each",
            )
        return {"mode": "proportions", "group": "store", "weights": {str(n): s for n, s in enumerate(shares)}}
    repeats = {str(n): stream.repeat for n, stream in enumerate(streams) if stream.repeat is not None}
    return {"mode": "repeat", "group": "store", "weights": repeats} if repeats else {}
