"""Runs of several seeds summed up: means, spread, and changes that another seed could have made."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest

from longspan.core.errors import ArgumentError
from longspan.report import write_report
from longspan.report.groups import RunGroup, group_runs, paired_change, welch_change
from longspan.report.load import load_runs
from longspan.report.summary import summarise
from tests.report.synthetic_run import header, sample_line, write_records

pytestmark = pytest.mark.usefixtures("png_alone")


def make_run(
    path: Path, seed: int, right: dict[str, int], *, settings: str = "steps: 3", config: bool = True
) -> Path:
    """A run whose models answer so many of 10 questions at 1,024 tokens."""
    for label, count in right.items():
        lines = [sample_line(f"s{i}", float(i < count), length=1024, depth=0.5, index=i) for i in range(10)]
        write_records(path / "records" / f"needle-{label}.jsonl", header("needle", label), lines)
    if config:
        (path / "config.yaml").write_text(
            f"seed: {seed}\ntrain:\n  seed: {seed}\n  {settings}\nout: {path}\n"
        )
    return path


def grouped(*paths: Path) -> list[RunGroup]:
    runs = load_runs(paths)
    return group_runs(runs, {run.name: summarise(run) for run in runs})


def test_names_and_scores_of_groups(tmp_path: Path) -> None:
    """Guards against a length cut off a group's name, and counts shown as 450 %."""
    runs = [make_run(tmp_path / f"ext-512-{seed}", seed, {"after": 8}) for seed in (1, 10)]
    for run in runs:
        lines = [sample_line(f"h{n}", 3.0 + n, subtask="syllables", sample=n) for n in range(4)]
        write_records(run / "records" / "haiku-after.jsonl", header("haiku", "after"), lines)
    (group,) = grouped(*runs)
    assert group.name == "ext-512"
    shares = {(quantity.task, quantity.measure): quantity.is_share for quantity in group.values["after"]}
    assert shares == {("needle", "mean"): True, ("needle", "1,024"): True, ("haiku", "syllables"): False}


def test_changes_of_counts_are_not_called_points(tmp_path: Path) -> None:
    """Guards against a caption by the last measure of a task: +2.00 syllables beside a share were points."""
    runs = [make_run(tmp_path / f"r{seed}", seed, {"before": 2, "after": 8}) for seed in (1, 2)]
    for run in runs:
        for label, more in (("before", 0.0), ("after", 2.0)):
            lines = [sample_line(f"h{n}", 3.0 + n + more, subtask="counted", sample=n) for n in range(4)]
            lines += [sample_line(f"r{n}", float(n < 2 + more), subtask="rhymes", sample=n) for n in range(4)]
            write_records(run / "records" / f"haiku-{label}.jsonl", header("haiku", label), lines)
    page = write_report(runs, tmp_path / "report.html", group=True).page.read_text()
    captions = re.findall(r"<span>([^<]*: change[^<]*half of its 95% interval)</span>", page)
    assert captions == [
        "Needle in a haystack: change in points \u00b1 half of its 95% interval",
        "Haiku: change \u00b1 half of its 95% interval",
    ]


def test_intervals_are_those_of_student_and_welch() -> None:
    """Guards against normal intervals, three times too narrow for two seeds; values of scipy.stats 1.17."""
    a, b = [0.5, 0.6, 0.55], [0.7, 0.82, 0.71]
    paired = paired_change([y - x for x, y in zip(a, b)])
    assert paired.interval == pytest.approx((0.1174417, 0.2692250), rel=1e-3)
    assert welch_change(a, b).interval == pytest.approx((0.0556641, 0.3310026), rel=1e-2)
    wide = welch_change([0.1, 0.9], [0.7, 0.82, 0.71, 0.75, 0.7])
    assert wide.interval == pytest.approx((-4.7768, 5.2488), rel=1e-2) and "inside" in wide.verdict
    assert welch_change([0.5], a).interval is None and paired_change([0.1]).interval is None
    assert welch_change([0.5, 0.5], [0.6, 0.6]).interval == pytest.approx((0.1, 0.1))


def rows_of(path: Path) -> list[dict[str, Any]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_seeds_of_one_training_are_summed_up_and_trainings_compared(tmp_path: Path) -> None:
    """Guards against seeds of different trainings pooled, and changes within noise told as results."""
    runs = [
        make_run(tmp_path / f"long-seed{seed}", seed, {"before": 2, "after": after})
        for seed, after in enumerate((8, 9, 8))
    ]
    runs += [
        make_run(tmp_path / f"short-seed{seed}", seed, {"before": 2, "after": after}, settings="steps: 4")
        for seed, after in enumerate((8, 7, 9))
    ]
    result = write_report(runs, tmp_path / "report.html", group=True)
    page = result.page.read_text()
    assert "Across seeds" in page and "83%\u00a0\u00b1\u00a05.8" in page
    assert "long, 3 seeds: " in page, "the result is that of the group, not of one of its runs"
    assert "change +63.3\u00a0\u00b1\u00a014.3 points, beyond training noise" in page
    values = [r for r in rows_of(tmp_path / "tables" / "seeds.csv") if r["measure"] == "1,024"]
    assert {(r["group"], r["label"]) for r in values} == {
        (group, label) for group in ("long", "short") for label in ("before", "after")
    }
    noise = {
        (r["what"], r["from"], r["to"]): r
        for r in rows_of(tmp_path / "tables" / "noise.csv")
        if r["measure"] == "1,024"
    }
    assert noise["long", "before", "after"]["verdict"] == "beyond training noise"
    assert noise["after", "long", "short"]["verdict"] == "inside training noise"
    assert float(noise["after", "long", "short"]["change"]) == pytest.approx(-1 / 30)


def test_one_seed_says_that_its_noise_is_not_known(tmp_path: Path) -> None:
    """Guards against an interval of one value."""
    run = make_run(tmp_path / "only", 0, {"before": 2, "after": 8})
    page = write_report([run], tmp_path / "report.html", group=True).page.read_text()
    assert "(one seed)" in page and "its noise is not known" in page


def test_runs_that_cannot_be_grouped_are_refused(tmp_path: Path) -> None:
    """Guards against a run of unknown training in a group, and one run counted as two seeds."""
    first = make_run(tmp_path / "a", 0, {"after": 8})
    with pytest.raises(ArgumentError, match="one training with one seed"):
        grouped(first, make_run(tmp_path / "b", 0, {"after": 8}))
    alone = make_run(tmp_path / "c", 0, {"after": 8}, config=False)
    with pytest.raises(ArgumentError, match="does not say how it was trained"):
        write_report([first, alone], tmp_path / "report.html", group=True)
    assert not (tmp_path / "report.html").exists()
