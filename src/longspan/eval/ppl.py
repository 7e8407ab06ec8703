"""Perplexity of held-out text by context length and by position in the context.

Four ways to cut documents into windows of `length` tokens:

    spans      spans of exactly the longest length, cut into windows of each length: all lengths are measured on
               the same text, save for the rest of a span that fills no window (1536 of 2048 leaves 512 out)
    sliding    whole documents, each window `stride` tokens further; what an earlier window measured is context
    truncate   the first `length` tokens of each document
    full       each document in one window, whatever its length

Every token is measured at most once for each length. Without a begin-of-text token the first token of a document,
and in `spans` and `truncate` of a window, is context only and has no loss; with one, it stands at the start of every
window, counts towards its length, and the first token of the text is predicted from it. For 10 tokens, windows of 4:

    sliding, stride 2        0 1 2 3 | 2 3 4 5 | 4 5 6 7 | 6 7 8 9     measured: 1 2 3 | 4 5 | 6 7 | 8 9
    sliding, stride 4        0 1 2 3 | 3 4 5 6 | 6 7 8 9               measured: 1 2 3 | 4 5 6 | 7 8 9
    the same with BOS        B 0 1 2 | B 3 4 5 | B 6 7 8 | B 9         measured: all

A stride of the whole length leaves no room for context, so a window then begins with the last token of the one
before: none is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pydantic
from numpy.typing import NDArray

from longspan.core.config import Config, Length
from longspan.core.errors import ArgumentError, DataError
from longspan.core.seeds import rng
from longspan.data.exchange.token_documents import TokenDocuments
from longspan.data.tokenizer import Tokenizer
from longspan.eval.grid import lengths_from, refuse_repeats
from longspan.eval.held_out import HeldOutDocument
from longspan.eval.ppl_documents import PplDocument, ppl_documents

WINDOWING_VERSION = 1
"""Raised whenever the same settings would cut other windows."""

Cut = Literal["spans", "sliding", "truncate", "full"]
Bos = Literal["auto", "always", "never"]


class PplConfig(Config):
    """Settings of a perplexity evaluation."""

    lengths: tuple[int, ...] = ()
    """Window lengths in tokens, such as 1k,4k,32k; none where whole documents are measured. The longest gives the curve
    by position."""
    num_spans: pydantic.PositiveInt = 16
    """Of spans: so many of the longest length for each source (fewer when the documents hold fewer), cut to each
    length."""
    num_buckets: pydantic.PositiveInt = 16
    """Points of the curve over positions: buckets of equal width of the longest length."""
    seed: int = 0
    """Seed of the choice of documents and spans."""
    split: str = "test"
    """Name of the share of the documents that the windows are cut from."""
    cut: Cut = "spans"
    """How documents are cut into windows. spans: drawn from all. sliding: whole documents, by `stride`. truncate: the
    first tokens of each, up to each length. full: each as one window."""
    stride: Length | None = pydantic.Field(None, ge=1)
    """Slide over whole documents, so many tokens further each time, at most the shortest length."""
    num_documents: pydantic.PositiveInt | None = None
    """Documents of each source, drawn by the seed. None: all."""
    first: bool = False
    """Take the first `num_documents` that are long enough, in the order of the data, not a draw."""
    min_tokens: Length = pydantic.Field(0, ge=0)
    """Leave out shorter documents."""
    max_tokens: Length | None = pydantic.Field(None, ge=1)
    """Leave out longer documents."""
    bos: Bos = "auto"
    """Whether each window begins with the begin-of-text token, as one of its tokens. auto: as the tokenizer itself
    would have it. Without, a first token is context only."""

    _read_lengths = pydantic.field_validator("lengths", mode="before")(lengths_from)

    @pydantic.field_validator("lengths")
    @classmethod
    def _something_to_predict(cls, lengths: tuple[int, ...]) -> tuple[int, ...]:
        if not lengths:
            return lengths
        refuse_repeats(lengths)
        if min(lengths) < 2:
            raise ValueError("a window has at least 2 tokens, one of them to be predicted")
        return lengths

    @pydantic.model_validator(mode="after")
    def _settings_fit_the_cut(self) -> PplConfig:
        if (self.cut == "full") == bool(self.lengths):
            raise ValueError(
                "whole documents have lengths of their own"
                if self.lengths
                else f"windows need lengths (cut: {self.cut})"
            )
        if self.first and self.num_documents is None:
            raise ValueError("the first of how many: set num_documents")
        if (self.stride is not None) != (self.cut == "sliding"):
            raise ValueError("a stride is for sliding windows, and they need one")
        if self.stride is not None and self.stride > min(self.lengths):
            raise ValueError(
                f"a stride of {self.stride} would skip tokens between windows of {min(self.lengths)}"
            )
        return self

    def params(self) -> dict[str, Any]:
        """Return the settings for the header, those of this module's later ways only where they are used."""
        later = ("cut", "stride", "num_documents", "first", "min_tokens", "max_tokens")
        unused = {name for name in later if getattr(self, name) == type(self).model_fields[name].default}
        return {name: value for name, value in self.to_dict().items() if name not in {*unused, "bos"}}


class PplWindow(NamedTuple):
    """A window of at most `length` tokens of a document; `reason` says why a source has none."""

    source: str
    document: str
    start: int
    """Its first token in the document."""
    length: int
    """Of the grid; the last window of a document may be shorter."""
    ids: NDArray[Any]
    """What the model reads, with the begin-of-text token if there is one."""
    scored: int = 0
    """How many of the last `ids` are measured."""
    reason: str | None = None


class WindowPlan(NamedTuple):
    """All windows of a task."""

    windows: list[PplWindow]
    width: int
    """Tokens in a position bucket."""
    first_token: str
    """What becomes of the first token, for the header."""


def bos_of(task: PplConfig, tokenizer: Tokenizer) -> int | None:
    """Return the begin-of-text token that windows begin with; None: without.

    Raises:
        ArgumentError: it is asked for and the tokenizer has none.
    """
    if task.bos == "never" or (task.bos == "auto" and not tokenizer.adds_bos):
        return None
    if tokenizer.bos_id is None:
        raise ArgumentError(
            f"the tokenizer {tokenizer.path} has no begin-of-text token", fix="leave it out: bos never"
        )
    return tokenizer.bos_id


def plan_windows(
    task: PplConfig, documents: Sequence[HeldOutDocument] | TokenDocuments, tokenizer: Tokenizer
) -> WindowPlan:
    """Choose the documents and cut them into windows of every length.

    A source without a document that is long enough gets one window without tokens per length, with the
    reason. Cost: every text is tokenised once; of tokenised documents those chosen are read.

    Raises:
        DataError: no source has a document that is long enough, or the documents have another tokenizer.
        ArgumentError: a begin-of-text token is asked for and the tokenizer has none.
    """
    bos = bos_of(task, tokenizer)
    by_source: dict[str, list[PplDocument]] = {}
    for document in ppl_documents(documents, tokenizer, bos=bos):
        by_source.setdefault(document.source, []).append(document)
    cutter = _Cutter(task, bos)
    chosen = {source: cutter.choose(source, found) for source, found in sorted(by_source.items())}
    everything = [document for found in chosen.values() for document in found]
    if not everything:
        longest = max(document.num_tokens for found in by_source.values() for document in found)
        raise DataError(
            "no held-out document is as long as the longest window"
            if task.cut == "spans"
            else "no held-out document has as many tokens as asked for",
            found=f"the longest has {longest:,} tokens",
            allowed=cutter.wanted,
            fix="give longer held-out documents or leave out the longest lengths",
        )
    lengths = task.lengths or (max(document.num_tokens for document in everything) + cutter.frame,)
    windows: list[PplWindow] = []
    for source, found in chosen.items():
        if found:
            windows += cutter.windows(source, found, lengths)
        else:
            most = max(document.num_tokens for document in by_source[source])
            reason = f"no document of {cutter.wanted}; the longest has {most}"
            windows += [
                PplWindow(source, "", 0, length, np.empty(0, np.uint32), 0, reason) for length in lengths
            ]
    width = max(1, math.ceil(max(lengths) / task.num_buckets))
    return WindowPlan(windows, width, cutter.first_token)


class _Cutter:
    """Chooses documents of a source and cuts them; `frame` is 1 where a begin-of-text token is put in front."""

    def __init__(self, task: PplConfig, bos: int | None) -> None:
        self._task, self._bos = task, bos
        self.frame = 0 if bos is None else 1
        # Without a token in front, the first token of the text is not predicted: at least two are needed.
        shortest = max(task.lengths) - self.frame if task.cut == "spans" else 2 - self.frame
        self._least = max(shortest, task.min_tokens)
        most = "or more" if task.max_tokens is None else f"to {task.max_tokens}"
        self.wanted = f"{self._least} tokens {most}"
        self.first_token = (
            "context only, no begin-of-text token"
            if bos is None
            else f"predicted from the begin-of-text token {bos}, which counts towards the length"
        )

    def choose(self, source: str, documents: Sequence[PplDocument]) -> list[PplDocument]:
        """Return the documents that are long enough, or as many of them as are asked for, in their order."""
        task = self._task
        most = math.inf if task.max_tokens is None else task.max_tokens
        fitting = [document for document in documents if self._least <= document.num_tokens <= most]
        if task.num_documents is None or task.first:
            return fitting[: task.num_documents]
        drawn = rng(task.seed, "ppl documents", source).permutation(len(fitting))[: task.num_documents]
        return [fitting[number] for number in sorted(drawn)]

    def windows(
        self, source: str, documents: Sequence[PplDocument], lengths: Sequence[int]
    ) -> Iterator[PplWindow]:
        """Yield the windows of a source."""
        if self._task.cut == "spans":
            yield from self._spans(source, documents, lengths)
            return
        for document in documents:
            ids = document.ids()
            for length in lengths:
                room, advance = length - self.frame, min(self._task.stride or length, length - 1)
                measured = 1 - self.frame  # tokens of the document before this one are done with
                for start in range(0, len(ids), advance if self._task.cut == "sliding" else len(ids)):
                    end = min(start + room, len(ids))
                    if end > measured:
                        yield self._window(document, ids, start, end, length, scored=end - measured)
                        measured = end

    def _spans(
        self, source: str, documents: Sequence[PplDocument], lengths: Sequence[int]
    ) -> Iterator[PplWindow]:
        longest = max(lengths) - self.frame
        spans = [
            (index, start)
            for index, document in enumerate(documents)
            for start in range(0, document.num_tokens - longest + 1, longest)
        ]
        chosen = rng(self._task.seed, "ppl", source).permutation(len(spans))[: self._task.num_spans]
        for index, span_start in (spans[number] for number in sorted(chosen)):
            ids = documents[index].ids()
            for length in lengths:
                room = length - self.frame
                for start in range(span_start, span_start + longest - room + 1, room):
                    yield self._window(documents[index], ids, start, start + room, length, scored=length - 1)

    def _window(
        self, document: PplDocument, ids: NDArray[Any], start: int, end: int, length: int, *, scored: int
    ) -> PplWindow:
        part = ids[start:end]
        if self._bos is not None:
            part = np.concatenate([np.array([self._bos], part.dtype), part])
        return PplWindow(document.source, document.id, start, length, part, scored)


def bucket_sums(
    nll: NDArray[Any], *, length: int, width: int, scored: int | None = None
) -> list[dict[str, Any]]:
    """Sum the losses of one window by position, in buckets of `width` positions of `length`.

    `nll[i]` belongs to position i + 1, as position 0 is not predicted: a window of 5 tokens with width 4 has
    buckets 0-4 (3 tokens) and 4-5 (1 token). Of `nll` the last `scored` count (None: all); buckets without such
    are left out.
    """
    first = len(nll) + 1 - (len(nll) if scored is None else scored)
    buckets = []
    for start in range(first // width * width, len(nll) + 1, width):
        part = nll[max(first, start) - 1 : start + width - 1].astype(np.float64)
        end = min(start + width, length)
        if len(part):
            buckets.append({"start": start, "end": end, "tokens": len(part), "nll": math.fsum(part)})
    return buckets


def perplexities(samples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sum window records by source and length; perplexity = exp(sum of nll / tokens), None without tokens.

    perplexity_by_window = exp(mean over windows of the mean of each), in which the tokens of a short window weigh more.
    bits_per_byte = sum of nll / ln 2 / bytes of the text, whatever the tokenizer; None where records hold no bytes.
    """
    sums: dict[tuple[str, int], list[tuple[int, float, int | None]]] = {}
    means: dict[tuple[str, int], list[float]] = {}
    for sample in samples:
        part = sums.setdefault((sample["source"], sample["length"]), [])
        window = [(bucket["tokens"], bucket["nll"], bucket.get("bytes")) for bucket in sample["buckets"]]
        part += window
        if window:
            mean = math.fsum(nll for _, nll, _ in window) / sum(tokens for tokens, _, _ in window)
            means.setdefault((sample["source"], sample["length"]), []).append(mean)
    rows = []
    for (source, length), part in sorted(sums.items()):
        tokens, nll = sum(count for count, _, _ in part), math.fsum(value for _, value, _ in part)
        size = None if any(each is None for _, _, each in part) else sum(each or 0 for _, _, each in part)
        rows.append(
            {
                "source": source,
                "length": length,
                "tokens": tokens,
                "nll": nll,
                "perplexity": _perplexity(nll, tokens),
                "perplexity_by_window": _perplexity(
                    math.fsum(means.get((source, length), [])), len(means.get((source, length), []))
                ),
                "bits_per_byte": nll / math.log(2) / size if size else None,
            }
        )
    return rows


def _perplexity(nll: float, tokens: int) -> float | None:
    # exp overflows a double at 709 nats a token, far beyond any model that was trained at all.
    return math.exp(min(nll / tokens, 700.0)) if tokens else None
