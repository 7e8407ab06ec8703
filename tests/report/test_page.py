"""The page: whole, self-contained, safe, and honest about what is not there."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.core.errors import ArgumentError
from longspan.core.records import read_jsonl
from longspan.report import summarise, write_report
from longspan.report.html import render
from longspan.report.load import load_runs
from longspan.report.view import order_of
from tests.report.conftest import page_of
from tests.report.synthetic_run import LENGTHS, header, needle_lines, ppl_lines, write_lines, write_records

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def report(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_report(
        [finished_run], tmp_path_factory.mktemp("report") / "report.html", title="A small <job>"
    )


def test_the_headline_says_the_result_in_numbers(report: Any) -> None:
    """Guards against a headline that does not agree with the records."""
    page = report.page.read_text()
    lead = re.sub(r"<[^>]+>", "", re.search(r'<p class="lead">(.*?)</p>', page, re.DOTALL).group(1))  # type: ignore[union-attr]
    needle = next(iter(report.results.values()))["needle"]
    first, last = needle["before"]["by_length"]["2048"], needle["after"]["by_length"]["2048"]
    assert lead.startswith("256 \u2192 2,048 tokens (8\u00d7): ")
    assert f"needle accuracy at 2,048 tokens from {first:.0%} to {last:.0%}; perplexity at 256 tokens" in lead
    assert "<h1>A small &lt;job&gt;</h1>" in page


def test_every_section_is_there_in_order_with_figures_and_tables(report: Any) -> None:
    """Guards against a section that silently drops out."""
    page = report.page.read_text()
    assert re.findall(r'<section id="(\w+)"', page) == [
        "models", "needle", "needle_distractors", "perplexity", "data", "training", "controls", "method"
    ]  # fmt: skip
    names = (
        "needle_heatmaps",
        "needle_by_length",
        "needle_distractors_heatmaps",
        "perplexity",
        "lengths",
        "loss",
    )
    assert [path.name for path in report.figures] == [
        f"{n}.{k}" for n in names for k in ("png", "svg", "pdf")
    ]
    begins = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    assert all(path.read_bytes().startswith(begins[path.suffix]) for path in report.figures)
    assert len(report.tables[0].read_text().splitlines()) == 1 + 7 * 5 * len(LENGTHS)
    assert "more training alone does not extend the context" in page
    assert page.count('class="plot heat"') == (5 + 2) + (2 + 2), (
        "before and after are drawn for narrow pages too"
    )


def test_the_page_is_self_contained_small_and_reproducible(report: Any, finished_run: Path) -> None:
    """Guards against a page that needs a network, outgrows a mail, or changes from run to run."""
    page = report.page.read_text()
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"|url\(|@import|https?://', page)
    assert len(page) < 1_000_000
    assert render(load_runs([finished_run]), title="A small <job>") == page


@pytest.mark.usefixtures("png_alone")
def test_markup_in_records_stays_text(tmp_path: Path) -> None:
    """Guards against a needle, label, source, note or recipe that runs as script."""
    run = tmp_path / ATTACK.replace("/", "_")
    lines = [
        {**line, "expected": ATTACK, "output": ATTACK, "needle_window": ATTACK, "question": ATTACK}
        for line in needle_lines("after", np.random.default_rng(0))
    ]
    for number, label in enumerate(("after", f"ablate_{ATTACK}", ATTACK)):
        write_records(run / f"records/needle-{number}.jsonl", header("needle", label, note=ATTACK), lines)
    (run / "config.yaml").write_text(ATTACK)
    write_lines(run / "events.jsonl", [{"event": "phase", "phase": ATTACK, "seconds": 1.0}])
    page = write_report([run], tmp_path / "out/report.html", title=ATTACK).page.read_text()
    assert "<script>alert" not in page and "<img" not in page
    data = json.loads(re.search(r'id="sample-data">(.*?)</script>', page, re.DOTALL).group(1))  # type: ignore[union-attr]
    assert [data["texts"][n] for n in data["prompts"][0]] == [ATTACK, ATTACK, ATTACK]
    assert data["texts"].count(ATTACK) == 1, "every text stands once"


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    """Guards against a crash or an empty chart for a run that only evaluated one model."""
    rng = np.random.default_rng(0)
    write_records(
        tmp_path / "run/records/needle-after.jsonl", header("needle", "after"), needle_lines("after", rng)
    )
    page = page_of(tmp_path / "run")
    assert re.findall(r'<section id="(\w+)"', page) == ["models", "needle", "method", "missing"]
    for words in (
        "Needle accuracy before training",
        "Perplexity was not",
        "no metrics.jsonl",
        "no lengths",
    ):
        assert words in page


def test_training_alone_and_lengths_alone_make_a_page(finished_run: Path, tmp_path: Path) -> None:
    """Guards against sections that lean on each other."""
    for part in ("metrics.jsonl", "lengths"):
        run = tmp_path / part / "run"
        run.mkdir(parents=True)
        copy = shutil.copytree if (finished_run / part).is_dir() else shutil.copy
        copy(finished_run / part, run / part)
        page = page_of(run)
        assert "Needle accuracy was not measured" in page


def test_the_divergence_from_a_teacher_has_its_chart(finished_run: Path, tmp_path: Path) -> None:
    """A run that distilled showed its loss alone; one that did not has no empty chart."""
    lines = list(read_jsonl(finished_run / "metrics.jsonl"))
    (tmp_path / "run").mkdir()
    for line in lines[300:]:
        line["kl"] = 3.0 / line["stage_step"]
    write_lines(tmp_path / "run/metrics.jsonl", lines)
    assert "Divergence from the teacher" in page_of(tmp_path / "run")
    assert "Divergence from the teacher" not in page_of(finished_run)


def test_lengths_beyond_the_trained_one_are_called_out(tmp_path: Path) -> None:
    """Guards against 2,048 tokens counted as trained when the model was trained for 1,024."""
    rng = np.random.default_rng(0)
    head = header("needle", "after", trained=1024)
    write_records(tmp_path / "run/records/needle-after.jsonl", head, needle_lines("after", rng))
    page = page_of(tmp_path / "run")
    assert re.search(r"Beyond the trained 1,024 tokens: \d+% at 1,536, \d+% at 2,048", page)
    assert "needle accuracy at 1,024 tokens" in page, "the headline stays inside the trained length"


def test_an_unfinished_evaluation_is_said(tmp_path: Path) -> None:
    """Guards against half an evaluation shown like a whole one."""
    lines = needle_lines("after", np.random.default_rng(0))[:9]
    path = tmp_path / "run/records/needle-after.jsonl"
    write_lines(path, [header("needle", "after"), *lines])
    unfinished = (
        "needle-after.jsonl ends before its evaluation did: its numbers are over the 9 samples so far."
    )
    assert unfinished in page_of(tmp_path / "run")
    write_records(path, header("needle", "after"), lines)
    assert "ends before" not in page_of(tmp_path / "run")


def test_two_runs_share_a_page_and_keep_their_names(finished_run: Path, tmp_path: Path) -> None:
    """Guards against one run's label overwriting the other's, and an order by name where one was given."""
    second = tmp_path / "second"
    shutil.copytree(finished_run, second)
    page = page_of(second, finished_run)
    assert "After training (second)" in page and "After training (quickstart)" in page
    assert re.search(r'class="lead">second: <strong>256', page), (
        "the sentence is about the run that is named first"
    )
    assert "after (quickstart) \u2212 after (second)" in page
    names = re.findall(r'<figure class="heatmap">\s*<h3>(.*?) <span', page)[:4]
    assert names == [
        f"{name} training ({run})" for run in ("second", "quickstart") for name in ("Before", "After")
    ]


def test_runs_of_one_name_are_told_apart_by_their_folders(evaluated_run: Path, tmp_path: Path) -> None:
    """Guards against two folders called `run` whose results cannot be told apart, or a run counted twice."""
    for name in ("a", "b"):
        shutil.copytree(evaluated_run, tmp_path / name / "run")
    assert "After training (a/run)" in page_of(tmp_path / "a/run", tmp_path / "b/run")
    with pytest.raises(ArgumentError, match="named twice"):
        page_of(tmp_path / "a/run", tmp_path / "b/../a/run")


def section_of(page: str, name: str) -> str:
    found = re.search(rf'<section id="{name}">(.*?)</section>', page, re.DOTALL)
    return re.sub(r"<[^>]+>", " ", found.group(1)) if found else ""


@pytest.mark.usefixtures("png_alone")
def test_evaluations_alone_have_a_section_each(evaluated_run: Path, tmp_path: Path) -> None:
    """Guards against tasks that are dropped, an unknown one above all, and numbers that are not those of records."""
    result = write_report([evaluated_run], tmp_path / "report.html")
    page = result.page.read_text()
    assert re.findall(r'<section id="(\w+)"', page) == [
        "models", "needle", "needle_multikey", "passkey", "ruler", "topics", "perplexity", "short_context", "longqa",
        "harness", "haiku", "cost", "method", "missing",
    ]  # fmt: skip
    assert {path.stem for path in result.tables} == {
        "needle", "needle_multikey", "passkey", "ruler", "topics", "perplexity", "longqa", "harness", "haiku",
        "effective_context", "short_context",
    }  # fmt: skip
    assert {"passkey_heatmaps.png", "ruler_by_length.png", "short_context.png"} <= {
        p.name for p in result.figures
    }
    assert "syllables" in section_of(page, "haiku") and "4.5" in section_of(page, "haiku")
    assert "2 samples unscored (" in section_of(page, "passkey")
    # 2 x 30 questions, of which 2 subjects x 2 right answers were lost: 40 right before, 36 after.
    assert re.search(r"mmlu\s+acc\s+after . before\s+66.7\s+60.0\s+.6.7", section_of(page, "short_context"))
    benchmarks = " ".join(section_of(page, "harness").split())
    assert "longeval / topic_retrieval / 5 topics before contains 5 100.0" in benchmarks
    assert "longeval / topic_retrieval / 10 topics before contains 10 60.0" in benchmarks
    assert "mmlu_anatomy 66.7 60.0 mmlu_law 66.7 60.0 mean of 2 sets 66.7 60.0" in benchmarks
    assert "0.0180" in section_of(page, "cost")
    ruler = result.results["evaluated"]["ruler"]["after"]
    assert ruler["rows"][:2] == ["niah_single_1", "niah_single_2"] and ruler["rows"][-1] == "qa_2"


def test_a_rescored_evaluation_is_not_pooled_with_its_source(tmp_path: Path) -> None:
    """Guards against the same answers counted twice under two scorers."""
    lines = needle_lines("after", np.random.default_rng(0))
    write_records(tmp_path / "run/records/needle-after.jsonl", header("needle", "after"), lines)
    head = header("needle", "after")
    head["params"]["scorer"] = {"name": "rouge_l", "version": 1}
    half = [{**line, "score": 0.5} for line in lines]
    write_records(tmp_path / "run/records/needle-after-rouge_l.jsonl", head, half)
    result = summarise(tmp_path / "run")["needle"]
    assert set(result) == {"after", "after (rouge_l 1)"}
    assert result["after (rouge_l 1)"]["mean"] == 0.5 and result["after"]["scored"] == len(lines)


def test_an_empty_record_file_is_named_and_does_not_stop_the_report(tmp_path: Path) -> None:
    """Guards against one evaluation killed at its start taking away the report of all others."""
    lines = needle_lines("after", np.random.default_rng(0))
    write_records(tmp_path / "run/records/needle-after.jsonl", header("needle", "after"), lines)
    (tmp_path / "run/records/ppl-after.jsonl").write_text('{"kind": "head')
    page = page_of(tmp_path / "run")
    assert "ppl-after.jsonl holds no evaluation yet." in page


def test_two_thousand_samples_stay_small(tmp_path: Path) -> None:
    """Guards against texts that are written once for every cell, map and width."""
    rng = np.random.default_rng(0)
    for run in ("one", "two"):
        lines = [
            {**line, "needle_window": str(rng.bytes(200).hex()), "id": f"{line['id']}-{copy}"}
            for copy in range(9)
            for line in needle_lines("after", rng)
        ]
        write_records(tmp_path / run / "records/needle-after.jsonl", header("needle", "after"), lines)
    page = page_of(tmp_path / "one", tmp_path / "two")
    assert len(page.encode()) < 10_000_000
    data = json.loads(re.search(r'id="sample-data">(.*?)</script>', page, re.DOTALL).group(1))  # type: ignore[union-attr]
    assert sum(len(rows) for _, rows in data["cells"].values()) == 2 * 9 * 240, "all of them are there"


def test_arguments_are_checked(finished_run: Path, tmp_path: Path) -> None:
    """Guards against a page written over a folder, or a report of nothing."""
    with pytest.raises(ArgumentError, match="at least one"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(ArgumentError, match="one HTML file"):
        write_report([finished_run], tmp_path)
    with pytest.raises(ArgumentError, match=r"to mend it: --out \S*/page.html"):
        write_report([finished_run], tmp_path / "page.txt")


def words_of(page: str) -> str:
    page = re.sub(r"<script.*?</script>|<style.*?</style>|<svg.*?</svg>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def grid_lines(right: float, *, samples: int = 4, unscored: str | None = None) -> list[dict[str, Any]]:
    return [
        {
            "kind": "sample",
            "id": f"{n}-{d}-{s}",
            "length": n,
            "depth": d,
            "sample": s,
            "num_distractors": 0,
            "output": "x",
            "expected": "y",
            "unscored": unscored,
            "score": None if unscored else float(s < right * samples),
        }
        for n in (512, 1024)
        for d in (0.0, 0.5)
        for s in range(samples)
    ]


def needle_file(folder: Path, label: str, lines: list[dict[str, Any]], **changes: Any) -> None:
    head = header("needle", label, trained=1024)
    head["params"] |= {"needle": "The number is {number}.", "answer_digits": 5, "samples": 4}
    head["seed"] = changes.pop("seed", 7)
    head["params"] |= changes
    write_records(folder / f"records/needle-{label}.jsonl", head, lines)


def test_what_differs_stands_beside_every_change(tmp_path: Path) -> None:
    """An easier needle of two digits was reported as the gain of the extension."""
    needle_file(tmp_path / "same", "before", grid_lines(0.5))
    needle_file(tmp_path / "same", "after", grid_lines(1.0, samples=8), samples=8)
    assert "ot comparable" not in words_of(page_of(tmp_path / "same"))
    needle_file(tmp_path / "other", "before", grid_lines(0.5))
    needle_file(
        tmp_path / "other", "after", grid_lines(1.0), needle="Easy: {number}.", answer_digits=2, seed=8
    )
    page = words_of(page_of(tmp_path / "other"))
    claim = (
        "needle accuracy at 1,024 tokens from 50% to 100% (not comparable: digits, needle and seed differ)"
    )
    assert claim in page
    assert page.count("Not comparable: after and before differ in digits, needle and seed.") == 2
    assert "before 50%; not comparable: digits, needle and seed differ" in page, "the tile"


def test_labels_are_ordered_by_their_numbers() -> None:
    """Checkpoints stood as 100, 1000, 200."""
    labels = ["step-1000", "after", "step-200", "step-100", "before"]
    assert sorted(labels, key=order_of) == ["before", "after", "step-100", "step-200", "step-1000"]


def test_means_over_other_subtasks_are_not_compared(tmp_path: Path) -> None:
    """Two easy subtasks after, three before, were reported as a longer effective context."""
    line = {**grid_lines(1.0)[0], "metric": "string_match_all"}
    for label, subtasks in (("before", ("vt", "cwe", "fwe")), ("after", ("vt", "fwe"))):
        lines = [
            {**line, "id": f"{name}{n}", "subtask": name, "sample": n} for name in subtasks for n in range(20)
        ]
        write_records(tmp_path / f"records/ruler-{label}.jsonl", header("ruler", label), lines)
    assert "not comparable: subtasks differ" in words_of(page_of(tmp_path))


def test_characters_without_a_glyph_are_named_once(tmp_path: Path, caplog: Any) -> None:
    """Each character of a label that matplotlib's font lacks was a warning with a line of code."""
    needle_file(tmp_path / "run", "\U00012031\U00012032", grid_lines(1.0))
    with caplog.at_level("WARNING", logger="longspan.report"):
        write_report([tmp_path / "run"], tmp_path / "r.html")
    said = [record.getMessage() for record in caplog.records if "no glyphs" in record.getMessage()]
    assert said and all("\U00012031\U00012032" in text for text in said)


def test_nothing_scored_is_said_with_its_reason(tmp_path: Path) -> None:
    """A server that was down made "effective context < 512" and an accuracy of a dash."""
    needle_file(tmp_path / "run", "down", grid_lines(1.0, unscored="endpoint: failed"))
    page = words_of(page_of(tmp_path / "run"))
    assert "needle accuracy at 1,024 tokens not measured: 8 samples unscored (endpoint: failed)" in page
    assert "Effective context, needle not measured 16 samples unscored (endpoint: failed)" in page
    assert "< 512" not in page


def test_too_few_samples_are_said_with_the_number_needed(tmp_path: Path) -> None:
    """A perfect model had an effective context of "< 512" because 8 of 8 show no more than 68 %."""
    needle_file(tmp_path / "run", "perfect", grid_lines(1.0))
    page = words_of(page_of(tmp_path / "run"))
    assert "Effective context, needle not shown 8 samples at 512 tokens, at least 16 are needed" in page
    assert "< 512" not in page


def test_means_say_what_they_are_over(tmp_path: Path) -> None:
    """ "All cells" was the mean of trained lengths."""
    lines = [{**line, "score": float(line["length"] == 512)} for line in grid_lines(1.0)]
    head = header("needle", "small", trained=512)
    write_records(tmp_path / "run/records/needle-small.jsonl", head, lines)
    page = words_of(page_of(tmp_path / "run"))
    assert "small mean 50%" in page and "Samples 16 scored" in page and "All cells 50%" in page
    assert re.search(r"Up to the trained 512 tokens 100%, 95% interval \d+% to 100%, n = 8", page)


def test_perplexities_of_two_tokenizers_are_compared_in_bits_per_byte(tmp_path: Path) -> None:
    """ "Short contexts did not get worse": a token of a smaller vocabulary is less text, so each is easier."""

    def write(folder: str, label: str, tokenizer: str, tokens: int, nll: float, size: int | None) -> None:
        bucket = {"start": 0, "end": 128, "tokens": tokens, "nll": nll, "bytes": size}
        bucket = {key: value for key, value in bucket.items() if value is not None}
        line = {
            "kind": "sample",
            "id": "a",
            "source": "s",
            "length": 256,
            "buckets": [bucket],
            "unscored": None,
        }
        head = {**header("ppl", label), "tokenizer": tokenizer}
        write_records(tmp_path / folder / f"records/ppl-{label}.jsonl", head, [line])

    write("one", "before", "t", 100, 100 * math.log(8), 300)
    write("one", "after", "t", 100, 100 * math.log(4), 300)
    page = words_of(page_of(tmp_path / "one"))
    assert "perplexity at 256 tokens 8.00 \u2192 4.00" in page and "Short contexts did not get worse." in page
    assert "Bits per byte by window length 256 before 1.00 after 0.67" in page
    write("two", "before", "t", 100, 100 * math.log(8), 300)
    write("two", "after", "u", 300, 300 * math.log(4), 300)
    page = words_of(page_of(tmp_path / "two"))
    assert "bits per byte at 256 tokens 1.00 \u2192 2.00 (not comparable: tokenizer differs)" in page
    assert "perplexity at" not in page and "did not get worse" not in page
    write("old", "before", "t", 100, 100 * math.log(8), None)
    write("old", "after", "u", 300, 300 * math.log(4), None)
    page = words_of(page_of(tmp_path / "old"))
    assert "Bits per byte of before and after are not known" in page
    assert (
        "\u2192" not in page.partition("Perplexity")[0].partition("256")[2]
        and "did not get worse" not in page
    )


def test_long_labels_leave_room_for_the_drawing(tmp_path: Path) -> None:
    """A label of a hundred characters squeezed the curve to a sixth and ran off the page."""
    label = (
        "a-model-of-eight-billion-weights-extended-to-one-million-tokens-with-yarn-factor-32-at-step-12000"
    )
    needle_file(tmp_path / "run", label, grid_lines(1.0))
    needle_file(tmp_path / "run", "short", grid_lines(0.5))
    drawings = re.findall(r"<svg.*?</svg>", page_of(tmp_path / "run"), re.DOTALL)
    texts = [html.unescape(text) for svg in drawings for text in re.findall(r"<text[^>]*>(.*?)</text>", svg)]
    assert max(map(len, texts)) < 60
    assert any(text.startswith("a-model-of-eigh") and text.endswith("step-12000") for text in texts)


def test_answers_cut_while_thinking_are_counted_beside_the_mean(tmp_path: Path) -> None:
    """Half of the answers had no room: the mean alone says that the model did not find the needle."""
    lines = grid_lines(0.5)
    for line in lines:
        line |= {"finish": "stop", "thoughts": "Is it 7?"}
        if not line["score"]:
            line |= {"output": "", "finish": "length", "no_answer": "cut while thinking"}
    needle_file(tmp_path / "run", "thinker", lines)
    page = page_of(tmp_path / "run")
    assert "mean 50%, 28% to 72%, 8 cut while thinking" in words_of(page)
    assert "Empty answers cut while thinking: 8; each counts as wrong" in words_of(page)
    assert "Is it 7?" in page, "the samples show thoughts"
    assert summarise(tmp_path / "run")["needle"]["thinker"]["no_answer"] == {"cut while thinking": 8}


def test_perplexity_below_the_trained_length_says_how_far_it_was_measured(tmp_path: Path) -> None:
    """Windows of 2,048 tokens were called "perplexity at 8,192 tokens" of a model that was trained for so many."""
    for label in ("before", "after"):
        head = header("ppl", label, trained=8192)
        write_records(tmp_path / "run" / "records" / f"ppl-{label}.jsonl", head, ppl_lines(label))
    page = page_of(tmp_path / "run")
    assert "perplexity at 2,048 tokens" in page and "Perplexity at 8,192" not in page
    assert "at 2,048 tokens, of the original 8,192" in page
