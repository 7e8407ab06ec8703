"""Means of recorded scores with their intervals; samples without a score are counted apart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from longspan.core.intervals import clustered_interval, score_interval


def mean_score(samples: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean and 95 % interval of the scores that there are; None where there are none."""
    scores = [float(sample["score"]) for sample in samples if sample.get("score") is not None]
    mean = math.fsum(scores) / len(scores) if scores else None
    return {"mean": mean, "interval": score_interval(scores)}


def clustered(samples: Iterable[Mapping[str, Any]], field: str) -> dict[str, Any]:
    """Return `interval_by_cluster`: the 95 % interval of the mean where samples with one value of a field share a text.

    Empty where no field is named, or no score has it.
    """
    scored = [
        sample for sample in samples if sample.get("score") is not None and sample.get(field) is not None
    ]
    if not field or not scored:
        return {}
    scores = [float(sample["score"]) for sample in scored]
    return {"interval_by_cluster": clustered_interval(scores, [sample[field] for sample in scored])}


def cost_of_thoughts(samples: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return `thoughts`: samples that have such, their tokens and the most of one; empty where no model thought."""
    tokens = [int(sample["thought_tokens"]) for sample in samples if sample.get("thought_tokens")]
    return (
        {"thoughts": {"samples": len(tokens), "tokens": sum(tokens), "most": max(tokens)}} if tokens else {}
    )


def count_no_answer(samples: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many scored samples have an empty answer, by why that is; they count as wrong in every mean."""
    return dict(Counter(sample["no_answer"] for sample in samples if sample.get("no_answer")))


def means_of_means(rows: Iterable[Mapping[str, Any]], *, by: str | None = None) -> list[dict[str, Any]]:
    """Return the average of the means of several rows (`mean_by`) that have one value of `by` (None: of all).

    As LongBench, InfiniteBench and MMLU publish it: every set counts the same, however many questions it has. A
    group of one row is left out. An average holds `by`, sets (those with a mean), without (those without any score)
    and mean.
    """
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(None if by is None else row[by], []).append(row)
    averages = []
    for name, group in groups.items():
        means = [float(row["mean"]) for row in group if row["mean"] is not None]
        if len(group) > 1:
            averages.append(
                {
                    **({} if by is None else {by: name}),
                    "sets": len(means),
                    "without": len(group) - len(means),
                    "mean": math.fsum(means) / len(means) if means else None,
                }
            )
    return averages


def mean_by(samples: Iterable[Mapping[str, Any]], *fields: str) -> list[dict[str, Any]]:
    """Return one row for each combination of values of `fields`, in their order.

    A row holds the fields, samples, scored, mean and interval (95 %).
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for sample in samples:
        groups.setdefault(tuple(sample[field] for field in fields), []).append(sample)
    return [
        {
            **dict(zip(fields, values)),
            "samples": len(group),
            "scored": sum(sample["score"] is not None for sample in group),
            **mean_score(group),
        }
        for values, group in sorted(groups.items())
    ]
