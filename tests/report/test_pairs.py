"""Changes between models: on the same questions, with what is dependent taken together, corrected for their number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longspan.core.intervals import clustered_interval, clustered_ratio, paired_difference
from longspan.report import summarise
from longspan.report.comparison import same_questions
from longspan.report.pairs_view import corrected_p, emphasis
from longspan.report.samples import ScoredSample
from longspan.report.tables import difference
from tests.report.conftest import page_of
from tests.report.synthetic_run import header, sample_line, write_records
from tests.report.test_benchmarks import rows_of
from tests.report.test_page import words_of

LENGTHS = (512, 1024)


def needles(right: dict[int, set[int]], samples: int = 10, others: int = 0) -> list[dict[str, Any]]:
    """Return two depths of `samples` haystacks a length; at both depths those in `right` are answered right."""
    return [
        sample_line(f"{n}-{d}-{s}", float(s in right[n]), length=n, depth=d, sample=s, num_distractors=others)
        for n in LENGTHS
        for d in (0.0, 0.5)
        for s in range(samples)
    ]


BEFORE = {512: {0, 1, 2, 3, 4}, 1024: {0, 1}}
AFTER = {512: {0, 1, 2, 3, 4, 5}, 1024: {0, 1, 2, 3, 4, 5, 6, 7, 8}}


def write(run: Path, label: str, right: dict[int, set[int]], others: int = 0, **params: Any) -> None:
    head = header("needle", label, trained=1024)
    head["seed"] = params.pop("seed", 7)
    head["params"] |= params
    write_records(run / f"records/needle-{label}.jsonl", head, needles(right, others=others))


def changes_of(page: str, section_id: str = "needle") -> list[list[str]]:
    """Return the rows of the first table of changes of a section."""
    section = page[page.index(f'<section id="{section_id}"') :]
    table = section[section.rindex("<table", 0, section.index("change in points [95% interval]</span>")) :]
    return rows_of(f'<section id="x">{table}', "x")


def test_a_change_is_paired_by_question_and_clustered_by_haystack(tmp_path: Path) -> None:
    """Page and JSON gave two means whose intervals overlap for a change that every question shows."""
    write(tmp_path, "before", BEFORE)
    write(tmp_path, "after", AFTER)
    differences = [
        float(s in AFTER[n]) - float(s in BEFORE[n]) for n in LENGTHS for d in range(2) for s in range(10)
    ]
    texts = [str(s) for n in LENGTHS for d in range(2) for s in range(10)]
    expected = paired_difference(differences, texts)
    assert expected is not None and expected != paired_difference(differences)
    found = summarise(tmp_path)["needle"]["after"]
    assert found["difference"]["value"] == pytest.approx(0.4) and found["difference"]["texts"] == 10
    assert found["difference"]["confidence"] == pytest.approx(expected)
    page = page_of(tmp_path)
    head, row = changes_of(page)
    assert head == ["change", "512", "1,024", "all"] and row[0] == "after \u2212 before"
    low, high = (f"{100 * end:+.1f}".replace("-", "\u2212") for end in expected)
    assert row[3] == f"+40.0 [{low}, {high}]" and row[2].startswith("+70.0 [")
    assert "change +70.0 points, 95% interval" in words_of(page), "the tile says it too"
    by_length = found["difference_by_length"]["1024"]
    assert by_length["p"] < by_length["p_corrected"] <= 2 * by_length["p"] and by_length["pairs"] == 20
    scores = [float(s in AFTER[n]) for n in LENGTHS for d in range(2) for s in range(10)]
    pooled = clustered_interval(scores, texts)
    assert pooled is not None
    assert f"({pooled[0]:.0%} to {pooled[1]:.0%} with samples on one text taken together)" in page


@pytest.mark.parametrize(
    ("params", "differs"),
    [({"seed": 8}, "seed"), ({"answer_begun": "The magic number of {key} is"}, "answer begun")],
)
@pytest.mark.parametrize("others", [0, 3])
def test_other_questions_are_not_paired_by_their_numbers(
    tmp_path: Path, params: dict[str, Any], differs: str, others: int
) -> None:
    """Sample 3 of another seed is another question: a "paired" interval was that of chance pairs.

    Among other needles it stayed so: the header was looked for under the name of the section, not of the task.
    """
    write(tmp_path, "before", BEFORE, others=others)
    write(tmp_path, "after", AFTER, others=others, **params)
    row = changes_of(page_of(tmp_path), "needle_distractors" if others else "needle")[1]
    assert row[0] == f"after \u2212 before (not comparable: {differs} differs)" and row[3].endswith(
        "] unpaired"
    )
    found = summarise(tmp_path)
    assert "difference" not in (
        found["needle_distractors"]["after"]["3"] if others else found["needle"]["after"]
    )
    assert same_questions(("thinking", "max new tokens", "scorer")) and not same_questions(("documents",))


def test_models_of_one_role_in_two_runs_are_compared(tmp_path: Path) -> None:
    """The page of two trainings compared each with its own start, and never with each other."""
    for run, right in (("one", BEFORE), ("two", AFTER)):
        write(tmp_path / run, "before", BEFORE)
        write(tmp_path / run, "after", right)
    names = [row[0] for row in changes_of(page_of(tmp_path / "one", tmp_path / "two"))[1:]]
    assert names == [
        "after (one) \u2212 before (one)",
        "after (two) \u2212 after (one)",
        "after (two) \u2212 before (two)",
    ]


def test_one_change_of_many_is_not_taken_for_real() -> None:
    """With 12 lengths every other table showed a change of nothing."""

    def change(better: int) -> Any:
        sides = (
            [ScoredSample(f"{n}", sample=f"{n}", score=float(flip and n < better)) for n in range(40)]
            for flip in (False, True)
        )
        return difference(*sides)

    found = [change(better) for better in (7, *[0] * 11)]
    corrected = corrected_p(found)
    assert found[0].p < 0.05 < corrected[0] and emphasis(found[0], corrected[0]) == ""
    assert emphasis(found[1], corrected[1]) == "muted"
    assert emphasis(found[0], corrected_p(found[:1])[0]) == "strong"


def test_scores_that_are_no_shares_have_a_change_without_an_interval(tmp_path: Path) -> None:
    """A perplexity of 30 beside one of 20 ended the page, or had an interval of -1 to 1."""
    for label, score in (("before", 30.0), ("after", 20.0)):
        lines = [
            sample_line(f"{n}", score + n, dataset="wikitext", metric="word_perplexity") for n in range(3)
        ]
        write_records(tmp_path / f"records/own-{label}.jsonl", header("own", label), lines)
    assert "wikitext" in page_of(tmp_path)
    paired = [[ScoredSample(f"{n}", sample=f"{n}", score=v + n) for n in range(3)] for v in (30.0, 20.0)]
    found = difference(*paired)
    assert found is not None and (found.value, found.interval, found.pairs) == (-10.0, None, 3)


def thinking_lines(thinks: bool) -> list[dict[str, Any]]:
    lines = needles(
        {512: {0, 1, 2, 3}, 1024: {0, 1}} if not thinks else {512: set(range(9)), 1024: set(range(7))}
    )
    for line in lines if thinks else []:
        line |= {
            "thoughts": "Hm.",
            "thought_tokens": 300 if line["length"] == 1024 else 100,
            "finish": "stop",
        }
        if not line["score"] and line["length"] == 1024:
            line |= {"output": "", "finish": "length", "no_answer": "cut while thinking"}
        elif not line["score"]:
            line |= {"output": "", "no_answer": "thoughts without an answer"}
    return lines


def test_thinking_off_and_on_stand_side_by_side(tmp_path: Path) -> None:
    """What thinking brought and what it cost had to be worked out from two records."""
    for how, run in (("off", tmp_path / "off"), ("on", tmp_path / "on")):
        head = header("needle", "after")
        head["params"] |= {"thinking": how, "thinks": how == "on", "chat_template": how}
        write_records(run / "records/needle-after.jsonl", head, thinking_lines(how == "on"))
    other = header("needle", "other")
    other["model"]["fingerprint"] = "1"
    write_records(tmp_path / "on/records/needle-other.jsonl", other, thinking_lines(True))
    head, off, on = rows_of(page_of(tmp_path / "off", tmp_path / "on"), "thinking")
    off_row, on_row = (dict(zip(head, row)) for row in (off, on))
    assert (off_row["thinking"], off_row["score"], off_row["cut while thinking"]) == ("off", "30%", "\u2013")
    assert (on_row["thinking"], on_row["score"], on_row["pairs"]) == ("on", "80%", "40")
    assert on_row["change, points"] == "+50.0" and on_row["model"] == "after (on)"
    assert (on_row["cut while thinking"], on_row["thoughts without an answer"]) == ("6", "2")
    assert (on_row["tokens of thoughts per answer"], on_row["the longest"]) == ("200", "300")


def test_a_change_of_perplexity_is_over_the_same_windows(tmp_path: Path) -> None:
    """Perplexities of 10 and 9.9 stood side by side, without a word on whether other texts would say the same."""

    def write(label: str, shift: float, spread: float) -> None:
        lines = []
        for n in range(12):
            nll = 128 * (2.0 + 0.3 * n + shift + spread * (-1) ** n)
            bucket = {"start": 0, "end": 128, "tokens": 128, "nll": nll}
            place = {"document": n // 2, "start": n % 2, "length": 256, "unscored": None}
            lines.append({"kind": "sample", "id": f"{label}{n}", "source": "s", "buckets": [bucket], **place})
        write_records(tmp_path / f"records/ppl-{label}.jsonl", header("ppl", label), lines)

    write("before", 0.0, 0.0)
    write("after", -0.01, 0.001)
    page = words_of(page_of(tmp_path))
    assert (
        "Perplexity: relative change by window length [95% interval] change 256 after \u2212 before \u22121.0% ["
        in page
    )
    assert "windows). Short contexts did not get worse." in page, "12 windows that agree are sure of 1 %"
    write("after", -0.01, 0.5)  # the windows of a document move against each other: documents agree
    assert "did not get worse" in words_of(page_of(tmp_path))
    found = clustered_ratio([(1.0, 2.0), (3.0, 2.0), (2.0, 4.0)], [0, 1, 2])
    assert found is not None and found.value == 0.75
    # Residuals -0.5, 1.5, -1: error = sqrt(3 / 2 * 3.5) / 8; t of two degrees of freedom is 4.3027.
    assert found.interval[1] - found.value == pytest.approx(4.3027 * (1.5 * 3.5) ** 0.5 / 8)
    assert clustered_ratio([(1.0, 2.0), (3.0, 2.0)], [0, 0]) is None


def test_models_that_always_think_have_no_such_table(tmp_path: Path) -> None:
    """Two labels of one model that both think, or two models, were shown as off and on."""
    for label in ("a", "b"):
        head = header("needle", label)
        head["params"] |= {"thinking": "auto", "thinks": True}
        write_records(tmp_path / f"records/needle-{label}.jsonl", head, thinking_lines(True))
    assert 'id="thinking"' not in page_of(tmp_path)
