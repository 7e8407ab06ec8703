"""Numbers from records: what is counted, what is left out, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import DataError
from longspan.core.intervals import wilson_interval
from longspan.eval.summaries import mean_score
from longspan.report import summarise
from longspan.report.layouts import Layout
from longspan.report.load import load_run
from longspan.report.samples import ScoredSample
from longspan.report.tables import RULER_SUBTASKS, Grid, difference, ruler_effective, score_grid
from tests.report.synthetic_run import header, write_lines, write_records


def needle(length: int, depth: float, sample: int, score: float | None, **fields: Any) -> dict[str, Any]:
    line = {
        "kind": "sample",
        "id": f"{length}-{depth}-{sample}",
        "length": length,
        "depth": depth,
        "sample": sample,
    }
    reason = "prompt too long" if score is None else None
    return {
        **line,
        "expected": "1",
        "output": "1",
        "score": score,
        "unscored": reason,
        "num_distractors": 0,
        **fields,
    }


def test_unscored_is_not_zero_and_an_absent_cell_is_none(needle_run: Callable[..., Path]) -> None:
    """Guards against failures that shrink a mean or turn into zeros."""
    lines = [
        needle(128, 0.0, 0, 1.0),
        needle(128, 0.0, 1, None),
        needle(128, 1.0, 0, None),
        needle(256, 0.0, 0, 0.0),
    ]
    result = summarise(needle_run(lines))["needle"]["after"]
    assert result["grid"] == [[1.0, 0.0], [None, None]]
    assert result["counts"] == [[1, 1], [0, 0]]
    assert (result["lengths"], result["depths"]) == ([128, 256], [0.0, 1.0])
    assert result["mean"] == 0.5
    assert result["by_length"] == {"128": 1.0, "256": 0.0}
    assert (result["scored"], result["unscored"], result["samples_per_cell"]) == (2, 2, 2)


def test_distractor_samples_stay_out_of_the_needle_map(needle_run: Callable[..., Path]) -> None:
    """Guards against a harder task lowering (or an easier one lifting) the headline number."""
    lines = [needle(128, 0.5, 0, 1.0), needle(128, 0.5, 1, 0.0, num_distractors=3)]
    result = summarise(needle_run(lines))
    assert result["needle"]["after"]["mean"] == 1.0
    assert result["needle_distractors"]["after"]["3"]["mean"] == 0.0


def test_a_mean_is_over_all_lengths_whatever_else_is_in_the_run(tmp_path: Path) -> None:
    """The command gave the mean of all samples, the report that of trained lengths, which another label could move."""
    lines = [needle(2048, 0.5, 0, 1.0)]
    write_records(tmp_path / "records/needle-after.jsonl", header("needle", "after"), lines)
    far = [needle(4096, 0.5, 0, 0.0)]
    write_records(tmp_path / "records/needle_far-after.jsonl", header("needle", "after"), far)
    alone = summarise(tmp_path)["needle"]["after"]
    assert alone["by_length"] == {"2048": 1.0, "4096": 0.0}
    assert (alone["mean"], alone["scored"]) == (mean_score([*lines, *far])["mean"], 2) == (0.5, 2)
    other = header("needle", "other", trained=8192)
    write_records(tmp_path / "records/needle-other.jsonl", other, [needle(8192, 0.5, 0, 1.0)])
    assert summarise(tmp_path)["needle"]["after"] == alone


def test_one_label_is_one_model(tmp_path: Path) -> None:
    """Guards against pooling a stale file of an earlier model."""
    other = header("needle", "after")
    other["model"]["fingerprint"] = "0"
    write_records(
        tmp_path / "records/needle-after.jsonl", header("needle", "after"), [needle(128, 0.5, 0, 1.0)]
    )
    write_records(tmp_path / "records/needle-old.jsonl", other, [needle(128, 0.5, 0, 0.0)])
    with pytest.raises(DataError, match="two models"):
        summarise(tmp_path)


def test_perplexity_weighs_tokens_not_windows(tmp_path: Path) -> None:
    """Guards against the mean of means: 1 token at nll 4 and 3 tokens at nll 0 is exp(1), not exp(2)."""

    def window(name: str, tokens: int, nll: float, length: int = 4) -> dict[str, Any]:
        bucket = {"start": 0, "end": length, "tokens": tokens, "nll": nll}
        return {
            "kind": "sample",
            "id": name,
            "source": name,
            "length": length,
            "buckets": [bucket],
            "unscored": None,
        }

    lost = {"kind": "sample", "id": "c", "source": "c", "length": 4, "buckets": [], "unscored": "too short"}
    lines = [
        header("ppl", "after"),
        window("a", 1, 4.0),
        window("b", 3, 0.0),
        window("a", 2, 2.0, length=2),
        lost,
    ]
    write_lines(tmp_path / "records/ppl-after.jsonl", lines)
    result = summarise(tmp_path)["ppl"]["after"]
    assert result["by_length"] == pytest.approx({"2": math.e, "4": math.e})
    assert result["by_position"] == pytest.approx({"0-4": math.e})
    assert result["by_source"] == pytest.approx({"a": math.exp(4), "b": 1.0})
    assert result["unscored"] == 1


def test_wilson_matches_a_published_value() -> None:
    """8 of 8: (0.676, 1.0); 0 of 0: no interval, not (0, 0)."""
    assert wilson_interval(8, 8) == pytest.approx((0.6756, 1.0), abs=1e-4)
    assert wilson_interval(0, 0) is None


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_mean_and_stays_in_range(case: tuple[int, int]) -> None:
    """Guards against intervals that leave 0..1 or exclude the estimate."""
    low, high = wilson_interval(*case) or (1.0, 0.0)
    assert 0.0 <= low <= case[0] / case[1] <= high <= 1.0
    assert high > low


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"score": 1.5}, "score"),
    ({"score": float("nan")}, "score"),
    ({"score": True}, "score"),
    ({"score": None, "unscored": None}, "score or a reason"),
    ({"length": "128"}, "length"),
    ({"length": 0}, "length"),
    ({"depth": 50}, "depth"),
    ({"id": 3}, "id"),
    ({"kind": "header"}, "sample line"),
]


@pytest.mark.parametrize(("fields", "word"), BROKEN)
def test_a_malformed_sample_names_its_file_and_line(
    needle_run: Callable[..., Path], fields: dict[str, Any], word: str
) -> None:
    """Guards against a broken record that is skipped, or an error that does not say where it is."""
    run = needle_run([needle(128, 0.0, 0, 1.0), {**needle(128, 0.0, 1, 1.0), **fields}])
    with pytest.raises(DataError, match=r"needle-after\.jsonl:3") as error:
        load_run(run)
    assert word in str(error.value)


def test_line_numbers_count_blank_lines(needle_run: Callable[..., Path]) -> None:
    """Guards against a number that an editor does not show for that record."""
    run = needle_run([needle(128, 0.0, 0, 1.0), needle(128, 2.0, 1, 1.0)])
    path = run / "records/needle-after.jsonl"
    path.write_text(path.read_text().replace("\n", "\n\n"))
    with pytest.raises(DataError, match=r"needle-after\.jsonl:5"):
        load_run(run)


def test_a_sample_is_not_counted_twice(needle_run: Callable[..., Path]) -> None:
    """Guards against a repeated line that would narrow every interval."""
    with pytest.raises(DataError, match="repeats"):
        load_run(needle_run([needle(128, 0.0, 0, 1.0)] * 2))


def test_broken_bucket_and_histogram_are_refused(tmp_path: Path) -> None:
    """Guards against half-read length summaries and buckets that run backwards."""
    bucket = {"start": 8, "end": 4, "tokens": 1, "nll": 1.0}
    line = {"kind": "sample", "id": "a", "source": "a", "length": 8, "buckets": [bucket], "unscored": None}
    write_lines(tmp_path / "ppl/records/ppl-after.jsonl", [header("ppl", "after"), line])
    with pytest.raises(DataError, match="ends before"):
        load_run(tmp_path / "ppl")
    (tmp_path / "len/lengths").mkdir(parents=True)
    (tmp_path / "len/lengths/before.json").write_text(
        '{"sources": {"a": {"histogram": {"edges": [1, 2], "tokens": [1, 2]}}}}'
    )
    with pytest.raises(DataError, match="one edge more"):
        load_run(tmp_path / "len")


def test_an_empty_or_missing_run_says_what_is_missing(tmp_path: Path) -> None:
    """Guards against an empty page that looks like a result."""
    with pytest.raises(DataError, match="nothing to report"):
        load_run(tmp_path)
    with pytest.raises(DataError, match="not a run folder"):
        load_run(tmp_path / "absent")


def answered(subtask: str, number: int, score: float | None) -> ScoredSample:
    unscored = None if score is not None else "no answer"
    return ScoredSample(
        f"{subtask}{number}", subtask=subtask, sample=str(number), score=score, unscored=unscored
    )


def test_a_difference_is_taken_over_the_same_questions() -> None:
    """Guards against a change that comes from comparing other questions: 1, 0 | lost against 1, 1 | 0."""
    before = [
        answered("law", 0, 1.0),
        answered("law", 1, 0.0),
        answered("law", 2, None),
        answered("art", 1, 0.0),
    ]
    after = [answered("law", 1, 1.0), answered("law", 0, 1.0), answered("law", 2, 0.0)]
    found = difference(before, after)
    assert found is not None and found.interval is not None
    assert (found.before, found.after, found.value, found.pairs) == (0.5, 1.0, 0.5, 2)
    assert found.interval[0] < 0 < found.interval[1], "two questions do not show a change"
    other = [sample._replace(sample="") for sample in after]
    unpaired = difference(before, other)
    assert unpaired is not None and unpaired.pairs == 0
    assert (unpaired.before, unpaired.after) == pytest.approx((1 / 3, 2 / 3))
    assert difference([answered("law", 0, None)], after) is None


RULER = Layout("ruler", rows="subtask", columns="length")


def ruler_grid(score: float, subtasks: tuple[str, ...] = RULER_SUBTASKS) -> Grid:
    samples = [
        ScoredSample(f"{name}-{length}-{n}", name, length, length, subtask=name, score=right)
        for name in subtasks
        for length, right in ((4096, 1.0), (8192, score))
        for n in range(2)
    ]
    return score_grid(samples, RULER)


def test_ruler_has_its_own_effective_length() -> None:
    """Guards against the published rule (mean of 13 at least 85.6 %) mixed up with ours, or used on 12 subtasks."""
    assert ruler_effective(ruler_grid(0.856)) == 8192
    assert ruler_effective(ruler_grid(0.85)) == 4096
    assert ruler_effective(ruler_grid(1.0, RULER_SUBTASKS[:12])) is None
    assert ruler_grid(1.0).effective.length == 8192
    assert ruler_grid(0.856).effective.length == 8192, "graded scores of no spread"
    assert ruler_grid(0.7).effective.length == 4096


def test_a_mean_of_13_subtasks_needs_13_at_each_length() -> None:
    """12 scored subtasks were called "all 13" where the thirteenth did not fit its length."""
    grid = ruler_grid(0.9)
    samples = [sample for group in grid.cells.values() for sample in group]
    lost = [
        s._replace(score=None, unscored="does not fit") if (s.subtask, s.length) == ("qa_2", 4096) else s
        for s in samples
    ]
    grid = score_grid(lost, RULER)
    assert grid.mean_of_rows(4096) is None and grid.mean_of_rows(8192) == pytest.approx(0.9)
    assert ruler_effective(grid) is None
    assert grid.total.reasons == {"does not fit": 2}


def test_contexts_of_one_number_of_topics_share_a_length(tmp_path: Path) -> None:
    """Guards against a column for every sample, whose lengths differ by some tokens, and lengths of other models."""
    lines = [
        {**needle(length, 0.5, n, 1.0), "num_topics": topics}
        for topics, lengths in ((5, (500, 510, 531)), (10, (1000, 1004, 1020)))
        for n, length in enumerate(lengths)
    ]
    write_records(tmp_path / "records/topics-after.jsonl", header("topics", "after"), lines)
    assert summarise(tmp_path)["topics"]["after"]["by_length"] == {"510": 1.0, "1004": 1.0}
    longer = [{**line, "length": line["length"] * 2} for line in lines]
    write_records(tmp_path / "records/topics-before.jsonl", header("topics", "before"), longer)
    both = summarise(tmp_path)["topics"]
    assert both["after"]["by_length"] == {"510": 1.0, "1004": 1.0}
    assert both["before"]["by_length"] == {"1020": 1.0, "2008": 1.0}


def test_a_broken_line_is_named_and_a_torn_last_one_is_not_counted(needle_run: Callable[..., Path]) -> None:
    """Guards against a traceback for a damaged file, and against half a line read as a record."""
    run = needle_run([needle(128, 0.0, n, 1.0) for n in range(3)])
    path = run / "records/needle-after.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert len(load_run(run).records[0].samples) == 3 and not load_run(run).records[0].complete
    path.write_bytes(whole.replace(b'"score": 1.0', b'"score": 1.', 1))
    with pytest.raises(DataError, match=r"needle-after\.jsonl:2 is not valid JSON"):
        load_run(run)
    path.write_bytes(whole.replace(b'"id"', b'"\xff"', 1))
    with pytest.raises(DataError, match=r"needle-after\.jsonl:2"):
        load_run(run)


def test_a_sample_tried_again_counts_once(needle_run: Callable[..., Path]) -> None:
    """Guards against a lost answer that stays lost after it was asked for again."""
    run = needle_run([needle(128, 0.0, 0, None), needle(128, 0.0, 0, 1.0)])
    assert summarise(run)["needle"]["after"]["scored"] == 1
    assert summarise(run)["needle"]["after"]["unscored"] == 0


def test_what_could_not_be_composed_is_counted(needle_run: Callable[..., Path]) -> None:
    """Guards against samples without length and depth that fall out of all counts, and holes that pass as reached."""
    lost = {"kind": "sample", "id": "lost", "score": None, "unscored": "the haystack is too short"}
    result = summarise(needle_run([needle(128, 0.0, n, 1.0) for n in range(40)] + [lost]))["needle"]["after"]
    assert (result["scored"], result["unscored"], result["effective_context"]) == (40, 1, 128)
