"""The samples behind the cells, as the page carries them: every text once, read when a cell is first opened.

    {"texts": ["The magic number of ...", "48213"],
     "prompts": [[0, 2, 1]],                            window, question, expected as indices of texts
     "maps": {"m1": {"task": "needle", "label": "after", "rows": ["50%"], "columns": ["2,048"]}},
     "cells": {"m1/0/0": [8, [[0, "2048-0.5-3", 1, 1.0], ...]],       samples in all; those shown
              "m2/4/1": "m1/0/0"}}                     the same samples in another table

A sample is [prompt, id, output, score, reason, achieved length, achieved depth, seconds, how it ended, thoughts], the
last two as indices of texts; trailing nulls are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longspan.report.samples import ScoredSample
from longspan.report.tables import Grid

SAMPLES_SHOWN = 6000  # over the whole page; with the cuts below it stays under 10 MB
WINDOW_CHARS, QUESTION_CHARS, EXPECTED_CHARS, OUTPUT_CHARS = 480, 240, 240, 400


class SampleData:
    """Collects the samples of all cells of a page."""

    def __init__(self) -> None:
        self._maps: dict[str, dict[str, Any]] = {}
        self._cells: dict[str, Sequence[ScoredSample]] = {}
        self._same: dict[str, str] = {}
        self._first: dict[tuple[int, ...], str] = {}

    def add_map(self, task: str, label: str, rows: Sequence[str], columns: Sequence[str]) -> str:
        """Begin a map or a table; return its key. A cell's key is `key/row/column`, both counted from 0."""
        key = f"m{len(self._maps)}"
        self._maps[key] = {"task": task, "label": label, "rows": list(rows), "columns": list(columns)}
        return key

    def add_cell(self, key: str, row: int, column: int, samples: Sequence[ScoredSample]) -> str:
        """Add the samples of a cell; return its key, empty when there are none."""
        if not samples:
            return ""
        cell = f"{key}/{row}/{column}"
        first = self._first.setdefault(tuple(map(id, samples)), cell)
        if first == cell:
            self._cells[cell] = samples
        else:
            self._same[cell] = first
        return cell

    def add_grid(self, task: str, label: str, grid: Grid, rows: Sequence[str], columns: Sequence[str]) -> str:
        """Add all cells of a grid; return the key of its map."""
        key = self.add_map(task, label, rows, columns)
        if not grid.layout.higher_is_better:
            self._maps[key]["lower"] = True
        for (row, column), samples in grid.cells.items():
            self.add_cell(key, grid.rows.index(row), grid.columns.index(column), samples)
        return key

    def to_json(self) -> dict[str, Any]:
        """Return what the page carries; wrong answers first, and as many in each cell as the page has room for."""
        texts: dict[str, int] = {}
        prompts: dict[tuple[int, int, int], int] = {}
        most = self._most_per_cell()

        def index(text: str) -> int:
            return texts.setdefault(text, len(texts))

        cells: dict[str, Any] = dict(self._same)
        for key, samples in self._cells.items():
            ordered = sorted(samples, key=lambda s: s.score if s.score is not None else 0.5)
            if self._maps[key.partition("/")[0]].get("lower"):
                ordered.reverse()
            rows = []
            for sample in ordered[:most]:
                expected = "\n".join(_cut(text, EXPECTED_CHARS) for text in sample.expected)
                question = _cut(sample.question, QUESTION_CHARS)
                parts = (index(_around(sample)), index(question), index(expected))
                row: list[Any] = [
                    prompts.setdefault(parts, len(prompts)),
                    sample.id,
                    index(_cut(sample.output, OUTPUT_CHARS)),
                    sample.score,
                    sample.unscored,
                    sample.achieved_length or sample.prompt_tokens,
                    sample.achieved_depth,
                    sample.seconds,
                    index(sample.no_answer or sample.finish) if _ended_oddly(sample) else None,
                    index(_cut(sample.thoughts, OUTPUT_CHARS)) if sample.thoughts else None,
                ]
                while row[-1] is None:
                    row.pop()
                rows.append(row)
            cells[key] = [len(samples), rows]
        return {
            "texts": list(texts),
            "prompts": [list(parts) for parts in prompts],
            "maps": self._maps,
            "cells": cells,
        }

    def _most_per_cell(self) -> int:
        """Return how many samples a cell may show so that the page has at most SAMPLES_SHOWN, at least one."""
        sizes = sorted(len(samples) for samples in self._cells.values())
        left = SAMPLES_SHOWN
        for number, size in enumerate(sizes):
            cells = len(sizes) - number
            if size * cells > left:
                return max(1, left // cells)
            left -= size
        return max(sizes, default=1)


def _ended_oddly(sample: ScoredSample) -> bool:
    return bool(sample.no_answer) or sample.finish == "length"


def _cut(text: str, chars: int) -> str:
    return text if len(text) <= chars else text[:chars] + "\u2026"


def _around(sample: ScoredSample) -> str:
    """Cut a prompt window to WINDOW_CHARS around the expected answer."""
    text = sample.window
    if len(text) <= WINDOW_CHARS:
        return text
    place = next((found for answer in sample.expected if (found := text.find(answer)) >= 0), 0)
    start = min(max(0, place - WINDOW_CHARS // 2), len(text) - WINDOW_CHARS)
    end = start + WINDOW_CHARS
    return ("\u2026" if start else "") + text[start:end] + ("\u2026" if end < len(text) else "")
