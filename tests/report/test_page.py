"""The page: whole, self-contained, safe, and honest about what is not there."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.core.errors import ArgumentError
from longspan.report import write_report
from tests.report.synthetic_run import LENGTHS, header, needle_lines, write_lines, write_records

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>"
CHROMIUM = "/usr/bin/chromium"
CHROMIUM_ARGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


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
        "needle", "perplexity", "data", "training", "controls", "distractors", "method"
    ]  # fmt: skip
    assert [path.name for path in report.figures] == [
        "needle_heatmaps.png", "needle_by_length.png", "perplexity.png", "lengths.png", "loss.png"
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in report.figures)
    assert len(report.tables[0].read_text().splitlines()) == 1 + 7 * 5 * len(LENGTHS)
    assert "more training alone does not extend the context" in page
    assert page.count('class="plot heat"') == 5 + 1, "five labels, the main one also for narrow pages"


def test_the_page_is_self_contained_small_and_reproducible(
    report: Any, finished_run: Path, tmp_path: Path
) -> None:
    """Guards against a page that needs a network, outgrows a mail, or changes from run to run."""
    page = report.page.read_text()
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"|url\(|@import|https?://', page)
    assert len(page) < 1_000_000
    assert write_report([finished_run], tmp_path / "r.html", title="A small <job>").page.read_text() == page


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
    assert data["prompts"][0] == [ATTACK, ATTACK, ATTACK]


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    """Guards against a crash or an empty chart for a run that only evaluated one model."""
    rng = np.random.default_rng(0)
    write_records(
        tmp_path / "run/records/needle-after.jsonl", header("needle", "after"), needle_lines("after", rng)
    )
    page = write_report([tmp_path / "run"], tmp_path / "report.html").page.read_text()
    assert re.findall(r'<section id="(\w+)"', page) == ["needle", "method", "missing"]
    for words in (
        "Needle accuracy before training",
        "Perplexity was not",
        "no metrics.jsonl",
        "no lengths",
        "distractors",
    ):
        assert words in page


def test_training_alone_and_lengths_alone_make_a_page(finished_run: Path, tmp_path: Path) -> None:
    """Guards against sections that lean on each other."""
    for part in ("metrics.jsonl", "lengths"):
        run = tmp_path / part / "run"
        run.mkdir(parents=True)
        copy = shutil.copytree if (finished_run / part).is_dir() else shutil.copy
        copy(finished_run / part, run / part)
        page = write_report([run], tmp_path / part / "report.html").page.read_text()
        assert "Needle accuracy was not measured" in page


def test_lengths_beyond_the_trained_one_are_called_out(tmp_path: Path) -> None:
    """Guards against 2,048 tokens counted as trained when the model was trained for 1,024."""
    rng = np.random.default_rng(0)
    head = header("needle", "after", trained=1024)
    write_records(tmp_path / "run/records/needle-after.jsonl", head, needle_lines("after", rng))
    page = write_report([tmp_path / "run"], tmp_path / "report.html").page.read_text()
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
    assert unfinished in write_report([tmp_path / "run"], tmp_path / "report.html").page.read_text()
    write_records(path, header("needle", "after"), lines)
    assert "ends before" not in write_report([tmp_path / "run"], tmp_path / "report.html").page.read_text()


def test_two_runs_share_a_page_and_keep_their_names(finished_run: Path, tmp_path: Path) -> None:
    """Guards against one run's label overwriting the other's."""
    second = tmp_path / "second"
    shutil.copytree(finished_run, second)
    result = write_report([finished_run, second], tmp_path / "report.html")
    assert set(result.results) == {"quickstart", "second"}
    assert "after (second)" in result.page.read_text()


def test_arguments_are_checked(finished_run: Path, tmp_path: Path) -> None:
    """Guards against a page written over a folder, or a report of nothing."""
    with pytest.raises(ArgumentError, match="at least one"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(ArgumentError, match="one HTML file"):
        write_report([finished_run], tmp_path)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install playwright")
    found = shutil.which("chromium") or (CHROMIUM if Path(CHROMIUM).exists() else None)
    if found is None:
        pytest.skip("no chromium to look at the page with: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=CHROMIUM_ARGS)
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_reader_can_hover_click_and_type(report: Any, browser: Any, width: int, scheme: str) -> None:
    """Guards against dead tooltips, a dialog that does not open, sideways scrolling, and requests that leave."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    requests: list[str] = []
    problems: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(report.page.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cell = page.locator('[data-cell="m1/2/3"]:visible').first
    cell.scroll_into_view_if_needed()
    cell.hover()
    assert re.search(
        r"1,024 tokens, depth 50%: \d of 8 correct .* 95% interval", page.locator("#tip").inner_text()
    )
    cell.click()
    dialog = page.locator("#samples")
    assert dialog.is_visible() and dialog.locator("li").count() == 8
    assert "The magic number of" in dialog.locator(".window").first.inner_text()
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.cell") == "m1/2/4"
    page.keyboard.press("Enter")
    assert dialog.is_visible()
    assert "1,536 tokens" in page.locator("#samples-title").inner_text()
    assert problems == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    context.close()


def test_no_label_is_clipped_and_no_names_overlap(report: Any, browser: Any) -> None:
    """Guards against text that leaves its drawing or is printed over other text."""
    for width in (1280, 390):
        context = browser.new_context(viewport={"width": width, "height": 900})
        page = context.new_page()
        page.goto(report.page.as_uri())
        found = page.evaluate(
            """() => [...document.querySelectorAll("svg.plot")].filter(s => s.getClientRects().length).flatMap(svg => {
              const frame = svg.getBoundingClientRect();
              const boxes = [...svg.querySelectorAll("text")].filter(t => t.textContent)
                .map(t => [t.textContent, t.getBoundingClientRect()]);
              const out = boxes.filter(([, b]) => b.left < frame.left - 6 || b.right > frame.right + 12)
                .map(([text]) => ["clipped", svg.getAttribute("aria-label"), text]);
              for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
                const [a, b] = [boxes[i][1], boxes[j][1]];
                const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
                const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
                if (across > 1 && down > 4) out.push(["overlap", boxes[i][0], boxes[j][0]]);
              }
              return out;
            })"""
        )
        assert found == []
        context.close()
