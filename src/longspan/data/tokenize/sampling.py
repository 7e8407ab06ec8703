"""Sampling while reading: a corpus too large to tokenize whole is read until every source's budget is filled.

Units are read in an order drawn from the seed. Of every document the length is estimated from its bytes;
sources that have enough, and short documents that the coin drops, are not tokenized. The coin is the one of
`mixture`, so `data mix` on the store, with the same seed, drops no other short document than these.

What is read depends on no timing: units are taken in waves, and which sources are full, and whether to go on,
is decided between waves from what all units so far gave. A wave is as long as the rest seems to be, at most
as long as all before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from longspan.core.seeds import derive_seed
from longspan.data.plans.mixture import keep_coin, source_shares
from longspan.data.plans.mixture_config import MixtureConfig
from longspan.data.readers import InputFile

FIRST_WAVE = 16
MARGIN = 1.1
"""What is sampled beyond a budget: shares are estimated, and exact counts are made later."""
SURELY_SHORT = 0.7
"""A document this much below the threshold, by estimate, is not tokenized to know that it is short."""


class NumberedUnit(Protocol):
    """What is known of a unit of work: its number, and the files it reads."""

    @property
    def number(self) -> int: ...

    @property
    def files(self) -> list[InputFile]: ...


AnyUnit = TypeVar("AnyUnit", bound=NumberedUnit)


class SourceCounts(NamedTuple):
    """What was read and taken of one source."""

    documents: int = 0
    size: int = 0
    """Bytes of text read."""
    taken_documents: int = 0
    taken_tokens: int = 0

    def plus(self, other: SourceCounts) -> SourceCounts:
        """Return the sum."""
        return SourceCounts(*(a + b for a, b in zip(self, other)))


class Sampling(NamedTuple):
    """What decides whether a document is taken; the same for all units of a wave."""

    spec: MixtureConfig
    seed: int
    bytes_per_token: float
    full: frozenset[str] = frozenset()
    """Sources of which enough was taken."""

    def wants(self, source: str) -> bool:
        """Whether documents of a source are taken at all."""
        spec = self.spec
        if spec.sources is not None and source not in spec.sources:
            return False
        if spec.mode == "proportions" and not spec.weights.get(source):
            return False
        return source not in self.full

    def takes(self, key: int, tokens: float) -> bool:
        """Whether a document of so many tokens is taken."""
        if tokens >= self.spec.threshold or self.spec.keep_probability >= 1:
            return True
        return bool(keep_coin(np.array([key], np.uint64), self.spec.keep_probability, self.seed)[0])

    def length(self, tokens: int, characters: int) -> float:
        """Return how long a document counts, in tokens."""
        ratio = self.spec.characters_per_token
        return tokens if ratio is None else characters / ratio

    def may_take(self, key: int, size: int, characters: int) -> bool:
        """Whether a document of so many bytes may be taken, before its tokens are known."""
        if self.spec.characters_per_token is not None:
            return self.takes(key, self.length(0, characters))
        tokens = size / self.bytes_per_token
        return tokens >= SURELY_SHORT * self.spec.threshold or self.takes(key, 0)


class Budgets(NamedTuple):
    """How far sampling has come."""

    wanted: dict[str, int]
    """Tokens wanted of each source, or of "" where only their sum counts."""
    taken: dict[str, int]

    @property
    def full(self) -> frozenset[str]:
        """Sources of which enough was taken."""
        return frozenset(name for name, tokens in self.wanted.items() if self.taken[name] >= MARGIN * tokens)

    @property
    def filled(self) -> float:
        """Part of its budget that the emptiest source has; 1 and more: all are full."""
        parts = [self.taken[name] / (MARGIN * tokens) for name, tokens in self.wanted.items() if tokens]
        return min(parts, default=1.0)


def budgets(spec: MixtureConfig, seen: dict[str, SourceCounts]) -> Budgets:
    """Return what is wanted and taken of each source, its share estimated from what was read so far."""
    assert spec.tokens is not None
    taken = {name: counts.taken_tokens for name, counts in seen.items()}
    if spec.mode in ("none", "global"):
        return Budgets({"": spec.tokens}, {"": sum(taken.values())})
    names = sorted(set(seen) | set(spec.weights))
    if spec.sources is not None:
        names = [name for name in names if name in spec.sources]
    sizes = np.array([seen.get(name, SourceCounts()).size for name in names], np.float64)
    if not sizes.sum():
        return Budgets(dict.fromkeys(names, spec.tokens), dict.fromkeys(names, 0))
    shares = source_shares(spec, names, sizes)
    wanted = {name: math.ceil(spec.tokens * share) for name, share in zip(names, shares) if share > 0}
    return Budgets(wanted, {name: taken.get(name, 0) for name in wanted})


def sampling_order(units: Sequence[AnyUnit], seed: int) -> list[AnyUnit]:
    """Return the units in an order that depends on the seed and on the files' names and order."""

    def place(unit: AnyUnit) -> tuple[int, int]:
        name = unit.files[0].name if unit.files else ""
        return derive_seed(seed, "sample-units", name, unit.number), unit.number

    return sorted(units, key=place)


def next_wave(done: int, filled: float) -> int:
    """Return how many units to read next, after `done` filled that part of the emptiest budget."""
    rest = math.ceil(done * (1 / filled - 1)) if filled > 0 else done
    return max(FIRST_WAVE, min(rest, done))


def add_counts(total: dict[str, SourceCounts], more: Iterable[tuple[str, SourceCounts]]) -> None:
    """Add counts by source to `total`."""
    for source, counts in more:
        total[source] = total.get(source, SourceCounts()).plus(counts)


def describe(spec: MixtureConfig, seed: int, seen: dict[str, SourceCounts]) -> dict[str, Any]:
    """Return what was sampled, for the manifest, and the settings of `data mix` that make the exact mixture."""
    found = budgets(spec, seen)
    sizes = sum(counts.size for counts in seen.values())
    sources = {
        name: {
            "documents_read": counts.documents,
            "share_read": counts.size / sizes if sizes else 0.0,
            "documents": counts.taken_documents,
            "tokens": counts.taken_tokens,
            "wanted": found.wanted.get(name),
            "shortfall": max(0, found.wanted.get(name, 0) - counts.taken_tokens),
        }
        for name, counts in sorted(seen.items())
    }
    mixture = spec.to_dict()
    if spec.mode in ("per_source", "upsample"):
        # The store holds another mixture than the corpus: the wanted shares are written out.
        mixture |= {
            "mode": "proportions",
            "weights": {name: tokens / sum(found.wanted.values()) for name, tokens in found.wanted.items()},
            "keep_short": spec.keep_probability,
        }
    return {"seed": seed, "sources": sources, "mixture": mixture}


def mix_command(out: str, sampled: dict[str, Any]) -> list[str]:
    """Return the command line that makes the exact mixture of the sampled store `out`; see `describe`."""
    spec = sampled["mixture"]
    words = ["longspan", "data", "mix", out, "--mode", spec["mode"], "--tokens", str(spec["tokens"])]
    if spec["keep_short"] is not None:
        words += ["--keep-short", str(spec["keep_short"])]
    if spec["characters_per_token"] is not None:
        words += ["--characters-per-token", str(spec["characters_per_token"])]
    words += ["--threshold", str(spec["threshold"]), "--seed", str(sampled["seed"])]
    for name, weight in spec["weights"].items():
        words += ["--weight", f"{name}={weight:.6g}"]
    return [*words, "--out", f"{out}.mix"]
