"""The largest page that readers have asked for: 20 tasks, 5 models of long names, 12 lengths, few samples a cell."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tests.report.synthetic_run import header, sample_line, write_records

LENGTHS = tuple(1024 << n for n in range(12))
MODELS = tuple(
    f"{family}-extended-to-two-million-tokens-{method}-step-{step}"
    for family, method, step in (
        ("quick-llama-3.2-1b-instruct", "yarn-factor-16-continued", 12000),
        ("quick-llama-3.2-1b-instruct", "theta-64m-from-scratch-mixture", 12000),
        ("smol-lm3-3b-base", "theta-64m", 4000),
        ("a_model_of_one_unbroken_name_without_any_hyphen_or_space_to_break_it_at", "ntk", 800),
        ("qwen3-0.6b", "position-interpolation", 64000),
    )
)
_SUBTASKS = tuple(f"a_subtask_with_a_long_descriptive_name_{n}" for n in range(1, 8))
_SETS = tuple(f"data_set_of_questions_on_long_documents_{n}" for n in range(1, 13))


def _axes(columns: str, rows: str | None) -> dict[str, Any]:
    return {"axes": {"columns": columns, "rows": rows}, "higher_is_better": True}


def build_stress(path: Path, *, models: int = 5, lengths: int = 12, tasks: int = 20) -> Path:
    """Write a run folder of `tasks` tasks of every shape, each evaluated with every model at every length."""
    rng = np.random.default_rng(5)
    shapes = ("map", "words", "scores", "columns")
    for number in range(tasks):
        shape = shapes[number % len(shapes)]
        task = f"retrieval_of_facts_in_documents_{shape}_{number}"
        for place, label in enumerate(MODELS[:models]):
            head = header(task, label, trained=131072) | {
                "title": "A fact that stands once in a long document is asked for in other words.",
                "heading": f"Retrieval of facts in long documents, {shape} number {number}",
                "short": f"retrieval of facts, {shape} {number}",
            }
            head["model"] |= {"path": f"models/{label}", "fingerprint": f"{place:016x}"}
            lines = _lines(shape, rng, place, LENGTHS[:lengths])
            fields = {
                "map": _axes("length", "depth"),
                "words": _axes("length", "subtask"),
                "columns": _axes("length", None),
                "scores": {"axes": None},
            }[shape]
            write_records(path / f"records/{task}-{place}.jsonl", head | fields, lines)
    for place, label in enumerate(MODELS[:models]):
        lines = [_window(length, place) for length in LENGTHS[:lengths]]
        write_records(path / f"records/ppl-{place}.jsonl", header("ppl", label, trained=131072), lines)
    return path


def _lines(
    shape: str, rng: np.random.Generator, model: int, lengths: tuple[int, ...]
) -> list[dict[str, Any]]:
    def line(row: object, column: object, sample: int, chance: float, **fields: Any) -> dict[str, Any]:
        right = float(rng.random() < chance)
        return sample_line(f"{row}-{column}-{sample}", right, sample=sample, **fields)

    chances = [0.98 - 0.06 * place - 0.08 * model for place in range(len(lengths))]
    if shape == "scores":
        return [
            line(
                name,
                "",
                n,
                0.3 + 0.1 * model,
                dataset=name,
                metric="a_metric_of_overlap",
                category=f"category {k % 3}",
            )
            for k, name in enumerate(_SETS)
            for n in range(4)
        ]
    rows: tuple[Any, ...] = {"map": (0.0, 0.25, 0.5, 0.75, 1.0), "words": _SUBTASKS, "columns": (None,)}[
        shape
    ]
    axis = {"map": "depth", "words": "subtask", "columns": "group"}[shape]
    return [
        line(row, length, n, chance, length=length, **{axis: row})
        for row in rows
        for length, chance in zip(lengths, chances)
        for n in range(2 if shape != "columns" else 6)
    ]


def _window(length: int, model: int) -> dict[str, Any]:
    edges = (0, *(n for n in LENGTHS if n <= length))
    buckets = [
        {"start": a, "end": b, "tokens": b - a, "nll": (2.4 + 0.1 * model) * (b - a), "bytes": 4 * (b - a)}
        for a, b in pairwise(edges)
    ]
    return {
        "kind": "sample",
        "id": "w",
        "source": "books_of_a_long_source_name",
        "length": length,
        "buckets": buckets,
        "unscored": None,
    }
