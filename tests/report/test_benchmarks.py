"""Benchmarks of several sets, and pages of many tasks, models and lengths with long names."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from longspan.report.charts import cut_names
from tests.report.conftest import page_of
from tests.report.stress_run import MODELS
from tests.report.synthetic_run import header, sample_line, write_records


def rows_of(page: str, section: str) -> list[list[str]]:
    """Return the cells of the first table of a section."""
    found = re.search(rf'<section id="{section}">.*?<table.*?</table>', page, re.DOTALL)
    assert found is not None
    rows = re.findall(r"<tr>(.*?)</tr>", found.group(0), re.DOTALL)
    cells = [re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL) for row in rows]
    return [[" ".join(html.unescape(re.sub(r"<[^>]+>", "", cell)).split()) for cell in row] for row in cells]


def answers(scores: dict[tuple[str, str, str], list[float | None]]) -> list[dict[str, Any]]:
    return [
        sample_line(
            f"{dataset}-{subtask}-{n}",
            score,
            dataset=dataset,
            subtask=subtask,
            category=category or None,
            sample=n,
        )
        for (dataset, subtask, category), values in scores.items()
        for n, score in enumerate(values)
    ]


def test_a_benchmark_has_a_table_of_its_categories_and_its_mean(tmp_path: Path) -> None:
    """A set whose server was down was a zero in the mean, or silently no part of it."""
    both = {("hotpotqa", "", "several documents"): [1.0, 0.0], ("qasper", "", "one document"): [1.0, 1.0]}
    whole = {**both, ("narrativeqa", "", "one document"): [0.5, 0.0]}
    part = {**both, ("narrativeqa", "", "one document"): [None, None]}
    for label, scores in (("before", whole), ("after", part)):
        write_records(tmp_path / f"records/longqa-{label}.jsonl", header("longqa", label), answers(scores))
    assert rows_of(page_of(tmp_path), "longqa") == [
        ["set", "before", "after"],
        ["one document", "62.5", "100.0 (1 of 2)"],
        ["narrativeqa", "25.0", "n/s"],
        ["qasper", "100.0", "100.0"],
        ["several documents", "50.0", "50.0"],
        ["hotpotqa", "50.0", "50.0"],
        ["mean of 3 sets", "58.3", "75.0 (2 of 3)"],
    ]


def test_the_mean_of_helmet_is_over_its_categories(tmp_path: Path) -> None:
    """Three sets of recall counted three times as much as the one of re-ranking."""
    sets = {("helmet_recall", name, ""): [1.0] for name in ("json_kv", "niah_multikey_2", "niah_multivalue")}
    lines = answers({**sets, ("helmet_rerank", "msmarco", ""): [0.0]})
    write_records(tmp_path / "records/harness-after.jsonl", header("harness", "after"), lines)
    rows = dict(rows_of(page_of(tmp_path), "harness"))
    assert (rows["recall"], rows["rerank"], rows["mean of 2 categories"]) == ("100.0", "0.0", "50.0")


def test_a_page_of_many_long_names_stays_short_and_whole(stress_run: Path) -> None:
    """20 tasks of 5 models filled half the screen with links, and every row of a table was fourteen lines high."""
    page = page_of(stress_run)
    assert len(page.encode()) < 5_000_000
    sections = re.findall(r'<section id="\w+_(\w+_\d+)"', page)
    for kind in ("map", "words", "columns", "scores"):
        numbers = [int(name.rpartition("_")[2]) for name in sections if name.startswith(kind)]
        assert len(numbers) == 5 and numbers == sorted(numbers), "10 stood before 2"
    assert 'class="contents many"' in page
    effective = rows_of(page, "models")
    assert set(effective[0][1:]) == set(MODELS) and len(effective) > 15, "a row for each task"
    texts = re.findall(r"<text[^>]*>(.*?)</text>", page)
    assert max(len(html.unescape(text)) for text in texts) < 60
    assert "2048k" not in texts and "2M" in texts
    assert len(rows_of(page, "cost")) == 1 + len(MODELS) + 1


def test_names_that_are_cut_stay_apart() -> None:
    """Two models of one family and one step had one name in the drawing."""
    names = [f"llama-3.2-1b-instruct-extended-with-{way}-to-128k-at-step-12000" for way in ("yarn", "ntk")]
    cut = cut_names(names)
    assert "yarn" in cut[names[0]] and "ntk" in cut[names[1]] and max(map(len, cut.values())) <= 36
    assert cut_names(["a", "a", "b"]) == {"a": "a", "b": "b"}
