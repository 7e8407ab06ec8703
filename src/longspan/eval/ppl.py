"""Perplexity of held-out text by context length and by position in the context.

Spans of exactly the longest length are cut from documents that are at least that long. For each shorter
length the same spans are cut into windows of that length, so all lengths are measured on the same text, save
for the rest of a span that fills no window (1536 of 2048 leaves 512 out). No begin- or end-of-text token is
added: the first token of a window is context only and has no loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pydantic

from longspan.core.config import Config
from longspan.core.errors import DataError
from longspan.core.seeds import rng
from longspan.data.tokenizer import Tokenizer
from longspan.eval.documents import HeldOutDocument
from longspan.eval.needle import lengths_from, refuse_repeats

WINDOWING_VERSION = 1
"""Raised whenever the same settings would cut other windows."""


class PplTask(Config):
    """Settings of a perplexity evaluation."""

    lengths: tuple[int, ...]
    """Window lengths in tokens, each at least 2 (`4k` = 4096). The longest gives the curve by position."""
    num_spans: pydantic.PositiveInt = 16
    """Spans of the longest length per source (fewer when the documents hold fewer)."""
    num_buckets: pydantic.PositiveInt = 16
    """Position buckets of equal width that the longest length is divided into."""
    seed: int = 0
    """Seed of the choice of spans."""
    split: str = "test"
    """Name of the share of the documents that the windows are cut from."""

    _read_lengths = pydantic.field_validator("lengths", mode="before")(lengths_from)
    _no_repeats = pydantic.field_validator("lengths")(refuse_repeats)

    @pydantic.field_validator("lengths")
    @classmethod
    def _something_to_predict(cls, lengths: tuple[int, ...]) -> tuple[int, ...]:
        if min(lengths) < 2:
            raise ValueError("a window has at least 2 tokens, one of them to be predicted")
        return lengths


class PplWindow(NamedTuple):
    """`length` tokens of a document; `reason` says why a source has none."""

    source: str
    document: str
    start: int
    length: int
    ids: np.ndarray
    reason: str | None = None


def plan_windows(
    task: PplTask, documents: Sequence[HeldOutDocument], tokenizer: Tokenizer
) -> list[PplWindow]:
    """Choose the spans and cut them into windows of every length.

    A source without a document of the longest length gets one window without tokens per length, with the
    reason. Cost: every document is tokenised once.

    Raises:
        DataError: no source has a document of the longest length.
    """
    longest = max(task.lengths)
    by_source: dict[str, list[HeldOutDocument]] = {}
    for document in documents:
        by_source.setdefault(document.source, []).append(document)
    windows: list[PplWindow] = []
    longest_found = 0
    for source in sorted(by_source):
        tokens = tokenizer.encode_batch([document.text for document in by_source[source]])
        spans = [
            (index, start)
            for index, ids in enumerate(tokens)
            for start in range(0, len(ids) - longest + 1, longest)
        ]
        found = max(len(ids) for ids in tokens)
        longest_found = max(longest_found, found)
        if not spans:
            reason = f"no document of {longest} tokens or more; the longest has {found}"
            windows += [
                PplWindow(source, "", 0, length, np.empty(0, dtype=np.uint32), reason)
                for length in task.lengths
            ]
            continue
        chosen = rng(task.seed, "ppl", source).permutation(len(spans))[: task.num_spans]
        for index, span_start in (spans[number] for number in sorted(chosen)):
            name, ids = by_source[source][index].id, tokens[index]
            windows += [
                PplWindow(source, name, start, length, ids[start : start + length])
                for length in task.lengths
                for start in range(span_start, span_start + longest - length + 1, length)
            ]
    if all(window.reason for window in windows):
        raise DataError(
            "no held-out document is as long as the longest window",
            found=f"the longest has {longest_found:,} tokens",
            allowed=f"at least one of {longest:,} tokens",
            fix="give longer held-out documents or leave out the longest lengths",
        )
    return windows


def bucket_sums(nll: np.ndarray, *, length: int, width: int) -> list[dict[str, Any]]:
    """Sum the losses of one window by position, in buckets of `width` positions.

    `nll[i]` belongs to position i + 1, as position 0 is not predicted: a window of 5 tokens with width 4 has
    buckets 0-4 (3 tokens) and 4-5 (1 token).
    """
    buckets = []
    for start in range(0, length, width):
        end = min(start + width, length)
        part = nll[max(0, start - 1) : end - 1].astype(np.float64)
        buckets.append({"start": start, "end": end, "tokens": len(part), "nll": math.fsum(part)})
    return buckets


def bucket_width(task: PplTask) -> int:
    """Return the width of a position bucket in tokens."""
    return max(1, math.ceil(max(task.lengths) / task.num_buckets))


def perplexities(samples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sum window records by source and length; perplexity = exp(sum of nll / tokens), None without tokens."""
    sums: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for sample in samples:
        part = sums.setdefault((sample["source"], sample["length"]), [])
        part += [(bucket["tokens"], bucket["nll"]) for bucket in sample["buckets"]]
    rows = []
    for (source, length), part in sorted(sums.items()):
        tokens, nll = sum(count for count, _ in part), math.fsum(value for _, value in part)
        rows.append(
            {
                "source": source,
                "length": length,
                "tokens": tokens,
                "nll": nll,
                "perplexity": _perplexity(nll, tokens),
            }
        )
    return rows


def _perplexity(nll: float, tokens: int) -> float | None:
    # exp overflows a double at 709 nats a token, far beyond any model that was trained at all.
    return math.exp(min(nll / tokens, 700.0)) if tokens else None
