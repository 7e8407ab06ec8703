"""Means of recorded scores with their intervals; samples without a score are counted apart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from longspan.core.intervals import score_interval


def mean_score(samples: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean and 95 % interval of the scores that there are; None where there are none."""
    scores = [float(sample["score"]) for sample in samples if sample.get("score") is not None]
    mean = math.fsum(scores) / len(scores) if scores else None
    return {"mean": mean, "interval": score_interval(scores)}


def count_no_answer(samples: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many scored samples have an empty answer, by why that is; they count as wrong in every mean."""
    return dict(Counter(sample["no_answer"] for sample in samples if sample.get("no_answer")))


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
