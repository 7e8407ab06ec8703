"""English words and topics that generated tests are made of, shipped so that samples never depend on a machine."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import numpy as np

from longspan.core.files import sha256_bytes

LISTS = ("adjectives", "nouns", "verbs", "topics")


@cache
def word_list(name: str) -> tuple[str, ...]:
    """Return a list in alphabetical order (topics: as written); no word stands in two lists."""
    text = files("longspan.eval").joinpath("lists", f"{name}.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


@cache
def lists_fingerprint() -> str:
    """Return 16 hex characters that change with any list."""
    content = "\n\n".join("\n".join(word_list(name)) for name in LISTS)
    return sha256_bytes(content.encode())[:16]


def draw_compounds(generator: np.random.Generator, count: int) -> list[str]:
    """Draw different words such as `brisk-lantern`; there are 370 thousand."""
    adjectives, nouns = word_list("adjectives"), word_list("nouns")
    chosen = generator.choice(len(adjectives) * len(nouns), size=count, replace=False, shuffle=False)
    return [f"{adjectives[index // len(nouns)]}-{nouns[index % len(nouns)]}" for index in chosen.tolist()]
