"""Published scores in the report: drawn beside the same, never among what was measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from longspan.report.published import MOST_LINES, published_scores
from longspan.report.tables import RULER_SUBTASKS
from tests.report.conftest import page_of
from tests.report.synthetic_run import header, sample_line, write_records

DRAWN = "Beside published scores"


def run_of(
    path: Path,
    task: str = "ruler",
    *,
    field: str = "subtask",
    rows: Sequence[str] = RULER_SUBTASKS,
    lengths: Sequence[int] = (4096, 131072),
    **params: Any,
) -> Path:
    lines = [
        sample_line(f"{row}-{length}-{n}", float(n), length=length, sample=n, **{field: row})
        for row in rows
        for length in lengths
        for n in range(2)
    ]
    head = header(task, "after")
    head = {**head, "params": {**head.get("params", {}), **params}}
    write_records(path / f"records/{task}-after.jsonl", head, lines)
    return path


def test_published_rows_stand_in_grey_with_their_source(tmp_path: Path) -> None:
    """Numbers of a README that nobody can tell from those of this run."""
    page = page_of(run_of(tmp_path))
    assert DRAWN in page
    assert "Llama-3.1-8B-Instruct, 128k: 77.0%, published in RULER&#x27;s README" in page
    assert "4,096: 50.0%, measured here" in page
    # Once for wide pages, once for narrow ones, and in the legend of these.
    assert page.count('class="line r0"') == 3 * MOST_LINES
    assert "Qwen3-8B, 128k: 77.4%, published in Qwen3" in page, "of each source some"
    # Of other lengths nothing is shown: 64K was not asked here.
    assert "84.7" not in page
    tables = re.findall(r"<table.*?</table>", page, re.S)
    own = [table for table in tables if "77.0" in table]
    assert len(own) == 1 and "Published by others, not measured here" in own[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": RULER_SUBTASKS[:12]},
        {"lengths": (2048, 5000)},
        {"release": "2025"},
        {"task": "nolima", "field": "question_type", "rows": ("onehop", "twohop"), "lengths": (4096,)},
        {"task": "nolima", "field": "question_type", "rows": ("onehop",), "lengths": (4000,), "samples": 2},
    ],
)
def test_what_is_not_the_same_is_not_drawn(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A mean over twelve easy subtasks above a published one over thirteen; 4,096 tokens beside 4,000."""
    assert DRAWN not in page_of(run_of(tmp_path, **changes))


def test_the_release_of_ruler_is_named(tmp_path: Path) -> None:
    """Scores of two releases of the generators that a reader takes for one."""
    assert "its 13 subtasks were measured, by the generators of 2025." in page_of(
        run_of(tmp_path, release="2025")
    )


def test_nolima_has_its_own_rows(tmp_path: Path) -> None:
    """Every benchmark got RULER's lines."""
    page = page_of(
        run_of(tmp_path, "nolima", field="question_type", rows=("onehop", "twohop"), lengths=(4000, 32000))
    )
    assert "Llama-3.1-8B-Instruct, 4,000: 44.1%, published in NoLiMa" in page
    assert "Qwen3-8B" not in page


def test_the_file_says_what_is_published() -> None:
    """A slip in a number would be a false claim about others: averages as their table has them."""
    averages = {
        "Llama-3.1-8B-Instruct": 88.3, "ProLong-8B-512K-Instruct": 88.9, "Llama-3-8B-Gradient-1048K": 82.4,
        "Phi-3-mini-128K": 84.8, "GLM-4-9B-1M": 89.9, "MegaBeam-Mistral-7B-512K": 89.1, "LWM-7B-1M": 72.8,
        "Llama-3.1-70B-Instruct": 89.6, "GPT-4-1106": 91.6, "Qwen3-8B": 89.1, "Qwen3-4B": 85.2, "Qwen3-14B": 94.6,
        "Qwen2.5-7B-1M": 91.8,
    }  # fmt: skip
    found = {
        name: sum(row) / len(row)
        for each in published_scores()
        if each.task == "ruler" and each.lengths[-1] == 131072
        for name, row in each.rows.items()
    }
    assert found == pytest.approx(averages, abs=0.1)
    assert all(each.source and each.what for each in published_scores())
