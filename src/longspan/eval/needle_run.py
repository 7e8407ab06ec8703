"""Run the needle evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel

from longspan.core.errors import DataError
from longspan.core.files import sha256_bytes
from longspan.core.intervals import wilson_interval
from longspan.core.log import get_logger
from longspan.core.progress import progress
from longspan.data.tokenizer import Tokenizer
from longspan.eval.documents import HeldOutDocument, describe_documents
from longspan.eval.needle import PROMPT_VERSION, NeedleBuilder, NeedleSample, NeedleTask
from longspan.eval.records import RecordsWriter, make_header, sample_id
from longspan.eval.runner import NOT_FINITE, summarise_records
from longspan.eval.scorers import Scorer, scorer_named
from longspan.infer.packed import plan_batches
from longspan.infer.score import ScoreRequest, ScoreResult, score

BATCH_TOKENS = 16_384

_log = get_logger("eval")


class _Planned(NamedTuple):
    id: str
    tokens: int
    item: Any


def run_needle(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    task: NeedleTask,
    *,
    documents: Sequence[HeldOutDocument],
    label: str,
    out: str | Path,
    model_info: Mapping[str, Any],
    note: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> dict[str, Any]:
    """Evaluate needle retrieval by teacher-forced scoring; write records to `out`, return a summary.

    `model` is any causal LM that `models.load_model` returns, with whatever RoPE it was loaded;
    `model_info` holds path, fingerprint, rope and trained_length for the header. `label` names the state of
    the model (`before`, `after`, `theta_only`, ...); `note` is a remark that goes into the header.

    Returns:
        samples, scored, unscored (reason -> count), mean score, `cells` with one row per length and depth
        (samples, scored, mean, 95 % Wilson interval), and samples_per_s of this call.

    Raises:
        ConfigError: `out` holds an evaluation with other settings.
        DataError: the documents are too few or too short.
    """
    scorer = scorer_named("exact_match")
    header = make_header(
        "needle",
        label,
        model_info=model_info,
        note=note,
        tokenizer=tokenizer.fingerprint,
        seed=task.seed,
        params={
            **task.to_dict(),
            "documents": describe_documents(documents),
            "prompt_version": PROMPT_VERSION,
            "mode": "teacher_forced",
            "scorer": {"name": scorer.name, "version": scorer.version},
        },
    )
    plan = [_Planned(sample_id(header, *cell), cell[0], cell) for cell in task.cells()]
    builder: list[NeedleBuilder] = []

    def evaluate(batch: Sequence[_Planned]) -> list[dict[str, Any]]:
        if not builder:
            builder.append(NeedleBuilder(task, documents, tokenizer))
        return _needle_records(model, tokenizer, builder[0], scorer, batch)

    samples, rate = _run(
        plan, evaluate, title=f"needle {label}", header=header, out=out, batch_tokens=batch_tokens
    )
    return {**summarise_records(header, out, samples, rate), **_needle_means(samples)}


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


def _needle_records(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    builder: NeedleBuilder,
    scorer: Scorer,
    batch: Sequence[_Planned],
) -> list[dict[str, Any]]:
    built: list[NeedleSample] = []
    reasons: list[str | None] = []
    for planned in batch:
        try:
            built.append(builder.build(*planned.item))
            reasons.append(None)
        except DataError as error:
            reasons.append(str(error))
    requests = [ScoreRequest(sample.prompt_ids, sample.answer_ids) for sample in built]
    longest = sum(sample.achieved_length for sample in built)
    results = iter(zip(built, score(model, requests, batch_tokens=max(1, longest))))
    records = []
    for planned, reason in zip(batch, reasons):
        length, depth, number = planned.item
        record = {"kind": "sample", "id": planned.id, "length": length, "depth": depth, "sample": number}
        if reason is None:
            record |= _scored(*next(results), tokenizer=tokenizer, scorer=scorer)
        else:
            record |= _unscored(reason)
        records.append(record | {"num_distractors": builder.task.num_distractors})
    return records


def _unscored(reason: str) -> dict[str, Any]:
    return {
        "prompt_sha256": "",
        "achieved_length": None,
        "achieved_depth": None,
        "question": "",
        "expected": "",
        "output": "",
        "score": None,
        "unscored": reason,
        "needle_window": "",
    }


def _scored(
    sample: NeedleSample, result: ScoreResult, *, tokenizer: Tokenizer, scorer: Scorer
) -> dict[str, Any]:
    finite = bool(np.isfinite(result.nll).all())
    output = tokenizer.decode(result.argmax_ids) if finite else ""
    return {
        "prompt_sha256": sha256_bytes(sample.prompt.encode()),
        "achieved_length": sample.achieved_length,
        "achieved_depth": round(sample.achieved_depth, 6),
        "question": sample.question,
        "expected": sample.expected,
        "output": output,
        "score": scorer.score(sample.expected, output) if finite else None,
        "unscored": None if finite else NOT_FINITE,
        "needle_window": sample.needle_window,
    }


def _needle_means(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    cells: dict[tuple[int, float], list[float | None]] = {}
    for sample in samples:
        cells.setdefault((sample["length"], sample["depth"]), []).append(sample["score"])
    rows = []
    for (length, depth), scores in sorted(cells.items()):
        known = [value for value in scores if value is not None]
        rows.append(
            {
                "length": length,
                "depth": depth,
                "samples": len(scores),
                "scored": len(known),
                "mean": _mean(known),
                "interval": wilson_interval(sum(known), len(known)),
            }
        )
    return {
        "mean": _mean([sample["score"] for sample in samples if sample["score"] is not None]),
        "cells": rows,
    }


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
