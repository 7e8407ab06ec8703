"""Run the perplexity evaluation: plan its windows, skip those recorded, write one record a window."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel

from longspan.core.log import get_logger
from longspan.core.progress import progress
from longspan.data.tokenizer import Tokenizer
from longspan.eval import ppl
from longspan.eval.documents import HeldOutDocument, describe_documents
from longspan.eval.records import RecordsWriter, make_header, sample_id
from longspan.eval.runner import NOT_FINITE, summarise_records
from longspan.infer.packed import plan_batches
from longspan.infer.perplexity import token_nll

BATCH_TOKENS = 16_384

_log = get_logger("eval")


class _Planned(NamedTuple):
    id: str
    tokens: int
    item: Any


def run_ppl(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    task: ppl.PplTask,
    *,
    documents: Sequence[HeldOutDocument],
    label: str,
    out: str | Path,
    model_info: Mapping[str, Any],
    note: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> dict[str, Any]:
    """Evaluate perplexity by length and position; write records to `out`, return a summary.

    `model_info` holds path, fingerprint, rope and trained_length for the header; other arguments are those of
    `run_task`.

    Returns:
        samples, scored, unscored (reason -> count), `by_length` with one row per source and length
        (tokens, nll in nats, perplexity), and samples_per_s of this call.

    Raises:
        ConfigError: `out` holds an evaluation with other settings.
        DataError: no document is as long as the longest length.
    """
    header = make_header(
        "ppl",
        label,
        model_info=model_info,
        note=note,
        tokenizer=tokenizer.fingerprint,
        seed=task.seed,
        params={
            **task.to_dict(),
            "documents": describe_documents(documents),
            "windowing_version": ppl.WINDOWING_VERSION,
            "first_token": "context only, no begin-of-text token",
        },
    )
    plan = [
        _Planned(
            sample_id(header, window.source, window.document, window.start, window.length),
            window.length,
            window,
        )
        for window in ppl.plan_windows(task, documents, tokenizer)
    ]
    width = ppl.bucket_width(task)

    def evaluate(batch: Sequence[_Planned]) -> list[dict[str, Any]]:
        return _ppl_records(model, batch, width=width, batch_tokens=batch_tokens)

    samples, rate = _run(
        plan, evaluate, title=f"ppl {label}", header=header, out=out, batch_tokens=batch_tokens
    )
    return {**summarise_records(header, out, samples, rate), "by_length": ppl.perplexities(samples)}


def _run(
    plan: Sequence[_Planned],
    evaluate: Callable[[Sequence[_Planned]], list[dict[str, Any]]],
    *,
    title: str,
    header: Mapping[str, Any],
    out: str | Path,
    batch_tokens: int,
) -> tuple[list[dict[str, Any]], float]:
    """Write what is missing of `plan`; return all its records in plan order and the rate in samples/s."""
    started = time.monotonic()
    with RecordsWriter(out, header) as writer:
        missing = [planned for planned in plan if planned.id not in writer.recorded]
        total = sum(planned.tokens for planned in plan)
        done = total - sum(planned.tokens for planned in missing)
        if done:
            _log.info("%s: %d of %d samples stand in %s", title, len(plan) - len(missing), len(plan), out)
        with progress(title, total=total, unit="tokens", done=done) as bar:
            for batch in plan_batches([planned.tokens for planned in missing], batch_tokens):
                planned_batch = [missing[index] for index in batch]
                for record in evaluate(planned_batch):
                    writer.write(record)
                bar.advance(sum(planned.tokens for planned in planned_batch))
        writer.finish()
        records = [writer.recorded[planned.id] for planned in plan]
    seconds = time.monotonic() - started
    return records, len(missing) / seconds if seconds > 0 else 0.0


def _ppl_records(
    model: PreTrainedModel, batch: Sequence[_Planned], *, width: int, batch_tokens: int
) -> list[dict[str, Any]]:
    windows: list[ppl.PplWindow] = [planned.item for planned in batch]
    runnable = [window.ids for window in windows if window.reason is None]
    losses = iter(token_nll(model, runnable, batch_tokens=batch_tokens))
    records = []
    for planned, window in zip(batch, windows):
        reason, buckets = window.reason, []
        if reason is None:
            nll = next(losses)
            if np.isfinite(nll).all():
                buckets = ppl.bucket_sums(nll, length=window.length, width=width)
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
