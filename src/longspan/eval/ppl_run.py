"""Run the perplexity evaluation: plan its windows, skip those recorded, write one record a window."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from longspan.core.progress import Progress
from longspan.data.exchange.token_documents import TokenDocuments
from longspan.data.tokenizer import Tokenizer
from longspan.eval import ppl
from longspan.eval.held_out import HeldOutDocument
from longspan.eval.ppl_documents import describe
from longspan.eval.records import RecordsWriter, make_header, sample_id
from longspan.eval.runner import fill_records
from longspan.infer.packed import plan_batches
from longspan.infer.requests import NOT_FINITE

BATCH_TOKENS = 16_384
_BYTES_OF_A_CHARACTER = 4

Measure = Callable[[Sequence[NDArray[Any]]], Sequence[NDArray[np.float32]]]
"""From windows of n token ids to the n - 1 losses of each, in nats."""


class _PlannedText(NamedTuple):
    id: str
    tokens: int
    window: ppl.PplWindow


def run_ppl(
    measure: Measure,
    tokenizer: Tokenizer,
    task: ppl.PplConfig,
    *,
    documents: Sequence[HeldOutDocument] | TokenDocuments,
    label: str,
    out: str | Path,
    model_info: Mapping[str, Any],
    note: str | None = None,
    used: Mapping[str, Any] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    copies: int = 1,
) -> dict[str, Any]:
    """Evaluate perplexity by length and position; write records to `out`, return a summary.

    Args:
        measure: gives the losses of windows, `infer.perplexity.token_nll` of a model say.
        documents: texts, or documents in the ids of this tokenizer.
        model_info: path, fingerprint, rope and trained_length for the header.
        batch_tokens: tokens that are measured, and recorded, at a time.
        copies: so many such batches at a time, for a model of several replicas.

    Other arguments are those of `run_task`.

    Returns:
        samples, scored, unscored (reason -> count), `by_length` with one row per source and length
        (tokens, nll in nats, perplexity), and samples_per_s of this call.

    Raises:
        ConfigError: `out` holds an evaluation with other settings.
        DataError: no document is as long as the longest length.
    """
    windows, width, first_token = ppl.plan_windows(task, documents, tokenizer)
    header = make_header(
        "ppl",
        label,
        model_info=model_info,
        note=note,
        used=used,
        tokenizer=tokenizer.fingerprint,
        seed=task.seed,
        params={
            **task.params(),
            "documents": describe(documents),
            "windowing_version": ppl.WINDOWING_VERSION,
            "first_token": first_token,
        },
    )
    plan = [
        _PlannedText(
            sample_id(header, window.source, window.document, window.start, window.length),
            max(1, len(window.ids)),
            window,
        )
        for window in windows
    ]

    def ask(missing: Sequence[_PlannedText], writer: RecordsWriter, bar: Progress) -> None:
        batches = plan_batches([planned.tokens for planned in missing], batch_tokens)
        for first in range(0, len(batches), copies):
            batch = [index for each in batches[first : first + copies] for index in each]
            planned_batch = [missing[index] for index in batch]
            for record in _ppl_records(measure, planned_batch, tokenizer, width=width):
                writer.write(record)
            bar.advance(sum(planned.tokens for planned in planned_batch))

    summary, samples = fill_records(header, out, plan, ask)
    return {**summary, "by_length": ppl.perplexities(samples)}


def _ppl_records(
    measure: Measure, batch: Sequence[_PlannedText], tokenizer: Tokenizer, *, width: int
) -> list[dict[str, Any]]:
    windows = [planned.window for planned in batch]
    losses = iter(measure([window.ids for window in windows if window.reason is None]))
    records = []
    for planned, window in zip(batch, windows):
        reason, buckets = window.reason, []
        if reason is None:
            nll = next(losses)
            if np.isfinite(nll[len(nll) - window.scored :]).all():
                buckets = ppl.bucket_sums(nll, length=window.length, width=width, scored=window.scored)
                _add_bytes(buckets, window, tokenizer)
            else:
                reason = NOT_FINITE
        records.append(
            {
                "kind": "sample",
                "id": planned.id,
                "source": window.source,
                "document": window.document,
                "start": window.start,
                "length": window.length,
                "buckets": buckets,
                "unscored": reason,
            }
        )
    return records


def _add_bytes(buckets: list[dict[str, Any]], window: ppl.PplWindow, tokenizer: Tokenizer) -> None:
    """Add to each bucket the UTF-8 bytes of its text, by which models of different tokenizers are compared."""

    def size(ids: NDArray[Any]) -> int:
        return len(tokenizer.decode(ids).encode("utf-8", "replace"))

    first = len(window.ids) - window.scored
    for bucket in buckets:
        start = max(first, bucket["start"])
        # With what stands before it: no space at its start is lost, and a character that is cut counts once.
        before, end = window.ids[max(0, start - _BYTES_OF_A_CHARACTER) : start], start + bucket["tokens"]
        bucket["bytes"] = size(np.concatenate([before, window.ids[start:end]])) - size(before)
