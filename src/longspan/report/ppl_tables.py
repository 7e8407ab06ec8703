"""Perplexity from records: sums over tokens by window length, position and source, and changes on the same windows."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from longspan.core.intervals import clustered_ratio
from longspan.report.samples import PplSample


class Sums(NamedTuple):
    """Sums over tokens of a group: their number, negative log-likelihood in nats, and UTF-8 bytes of their text."""

    tokens: int = 0
    nll: float = 0.0
    bytes: int | None = 0
    """None where a record does not say."""


@dataclass
class PplTable:
    """One label's sums; perplexity = exp(nll / tokens)."""

    by_length: dict[int, Sums] = field(default_factory=dict)
    by_position: dict[tuple[int, int], Sums] = field(default_factory=dict)
    by_source: dict[str, Sums] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    """Windows without a score, by reason."""
    windows: dict[int, dict[tuple[object, ...], tuple[str, Sums]]] = field(default_factory=dict)
    """By length and text: the document that it was cut out of, and its sums."""

    @property
    def unscored(self) -> int:
        """Windows without a score."""
        return self.reasons.total()

    def short(self, length: int) -> Sums:
        """Sums of windows of `length` tokens; without such windows, of the positions below `length`."""
        if length in self.by_length:
            return self.by_length[length]
        return _summed([sums for (_, end), sums in self.by_position.items() if end <= length])

    def reach(self, length: int) -> int | None:
        """How far `short` sums up: to `length`, or to the last position before it that was measured."""
        if length in self.by_length:
            return length
        return max((end for _, end in self.by_position if end <= length), default=None)

    def last(self) -> tuple[tuple[int, int], Sums] | None:
        """The last position bucket and its sums."""
        if not self.by_position:
            return None
        bucket = max(self.by_position)
        return bucket, self.by_position[bucket]


def ppl_table(samples: Iterable[PplSample]) -> PplTable:
    """Sum tokens and nll by window length; by position and by source over the longest windows alone."""
    samples = list(samples)
    longest = max((sample.length for sample in samples if sample.buckets), default=0)
    by_length: dict[int, list[Sums]] = defaultdict(list)
    by_position: dict[tuple[int, int], list[Sums]] = defaultdict(list)
    by_source: dict[str, list[Sums]] = defaultdict(list)
    windows: dict[int, dict[tuple[object, ...], tuple[str, Sums]]] = defaultdict(dict)
    for sample in samples:
        if sample.buckets:
            whole = _summed([Sums(bucket.tokens, bucket.nll, bucket.bytes) for bucket in sample.buckets])
            windows[sample.length][sample.window] = (sample.document or sample.id, whole)
        for bucket in sample.buckets:
            sums = Sums(bucket.tokens, bucket.nll, bucket.bytes)
            by_length[sample.length].append(sums)
            if sample.length == longest:
                by_position[bucket.start, bucket.end].append(sums)
                by_source[sample.source].append(sums)
    return PplTable(
        by_length={key: _summed(parts) for key, parts in sorted(by_length.items())},
        by_position={key: _summed(parts) for key, parts in sorted(by_position.items())},
        by_source={key: _summed(parts) for key, parts in sorted(by_source.items())},
        reasons=Counter(sample.unscored for sample in samples if sample.unscored is not None),
        windows=dict(windows),
    )


def _summed(parts: Sequence[Sums]) -> Sums:
    sizes = [part.bytes for part in parts]
    known = None if None in sizes else sum(size or 0 for size in sizes)
    return Sums(sum(part.tokens for part in parts), math.fsum(part.nll for part in parts), known)


def perplexity(sums: Sums) -> float | None:
    """Return exp(nll / tokens), None without tokens or beyond what a float holds."""
    if sums.tokens == 0 or sums.nll / sums.tokens > 700:
        return None
    return math.exp(sums.nll / sums.tokens)


class PplChange(NamedTuple):
    """A relative change of perplexity on the same windows: 0.02 is 2 % more."""

    value: float
    interval: tuple[float, float]
    windows: int
    p: float


def perplexity_change(before: PplTable, after: PplTable, length: int) -> PplChange | None:
    """Compare windows of one length that both have with as many tokens, those of one document taken together.

    None where fewer than two documents are shared: the spread between them is not known.
    """
    old, new = (table.windows.get(length, {}) for table in (before, after))
    common = [key for key in old if key in new and old[key][1].tokens == new[key][1].tokens]
    parts = [(new[key][1].nll - old[key][1].nll, float(old[key][1].tokens)) for key in common]
    found = clustered_ratio(parts, [(key[0], old[key][0]) for key in common])
    if found is None or max(map(abs, found.interval)) > 700:
        return None
    low, high = found.interval
    return PplChange(math.expm1(found.value), (math.expm1(low), math.expm1(high)), len(common), found.p)


def bits_per_byte(sums: Sums) -> float | None:
    """Return the bits that a byte of the text costs, whatever the tokenizer; None where bytes are not recorded."""
    return sums.nll / math.log(2) / sums.bytes if sums.bytes else None
