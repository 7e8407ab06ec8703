"""The page as a reader has it: in a browser, with mouse and keyboard, on screens and on paper."""

from __future__ import annotations

import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.report.conftest import page_of
from tests.report.stress_run import build_stress

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip(
        "playwright.sync_api", reason="no playwright to look at the report with: pip install playwright"
    )
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium to look at the report with: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page_of(finished_run), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def evaluations(evaluated_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two runs that evaluated everything and trained nothing."""
    folder = tmp_path_factory.mktemp("evaluations")
    shutil.copytree(evaluated_run, folder / "second")
    path = folder / "report.html"
    path.write_text(page_of(evaluated_run, folder / "second"), encoding="utf-8")
    return path


def opened(
    browser: Any, page_file: Path, *, width: int = 1280, scheme: str = "light"
) -> tuple[Any, list[str]]:
    """Open a page; the list fills with whatever goes wrong: errors, and requests that leave."""
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    page.set_default_timeout(120_000)  # ms: a busy machine
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on(
        "request",
        lambda request: None if request.url.startswith(("file:", "data:")) else problems.append(request.url),
    )
    page.goto(page_file.as_uri())
    return page, problems


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_reader_can_hover_click_and_type(report: Path, browser: Any, width: int, scheme: str) -> None:
    """Guards against dead tooltips, a dialog that does not open, sideways scrolling, and requests that leave."""
    page, problems = opened(browser, report, width=width, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cell = page.locator('[data-cell="m1/2/3"]:visible').first
    cell.scroll_into_view_if_needed()
    cell.hover()
    tip = page.locator("#tip").inner_text()
    assert re.search(r"After training, 1,024 tokens, depth 50%: \d of 8 correct .* 95% interval", tip)
    assert "The magic number of" in tip and "expected" in tip and "answer" in tip and "score" in tip
    cell.click()
    dialog = page.locator("#samples")
    assert dialog.is_visible() and dialog.locator("li").count() == 8
    assert "The magic number of" in dialog.locator(".window").first.inner_text()
    assert "before" in dialog.locator(".answers").first.inner_text(), (
        "what the other model said to this prompt"
    )
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert page.evaluate("document.activeElement.dataset.cell") == "m1/2/3", "focus comes back"
    walked = []
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "Home", "End", "ArrowRight"):
        page.keyboard.press(key)
        walked.append(page.evaluate("document.activeElement.dataset.cell"))
    assert walked == ["m1/2/4", "m1/3/4", "m1/3/3", "m1/2/3", "m1/2/0", "m1/2/5", "m1/2/5"]
    page.keyboard.press("Enter")
    assert dialog.is_visible()
    assert "2,048 tokens" in page.locator("#samples-title").inner_text()
    assert problems == []
    page.context.close()


def test_the_keyboard_reaches_every_map_once(evaluations: Path, browser: Any) -> None:
    """Guards against 200 tab stops to the next section, and cells that only a mouse can reach."""
    page, problems = opened(browser, evaluations)
    stops = page.evaluate(
        """() => [...document.querySelectorAll(".heat,[data-grid]")].filter(m => m.getClientRects().length)
          .map(m => [...m.querySelectorAll('[data-cell]')])
          .map(cells => [cells.length, cells.filter(cell => cell.tabIndex === 0).length])"""
    )
    assert len(stops) > 10 and all(count == 1 for cells, count in stops if cells)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("[data-cell]")].filter(c => !c.getAttribute("aria-label")
          || !(c.getAttribute("role") === "button" || c.tagName === "BUTTON")).length"""
    )
    assert unnamed == 0
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.dataset.cell"):
            break
    assert page.evaluate("document.activeElement.closest('section').id") == "needle"
    assert page.locator("#tip").is_visible(), "focus says what hovering says"
    assert problems == []
    page.context.close()


def test_cells_of_tables_open_their_samples(evaluations: Path, browser: Any) -> None:
    """Guards against RULER and question-answering scores whose answers cannot be read."""
    page, problems = opened(browser, evaluations)
    for section, words in (("ruler", "niah_single_1"), ("longqa", "gov_report"), ("haiku", "syllables")):
        page.locator(f"#{section} [data-cell]").first.click()
        title = page.locator("#samples-title").inner_text()
        assert words in title
        assert page.locator("#samples li").count() > 0
        page.keyboard.press("Escape")
    assert problems == []
    page.context.close()


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of long names: 12 tasks of 5 models at 12 lengths."""
    folder = tmp_path_factory.mktemp("stress")
    path = folder / "report.html"
    path.write_text(page_of(build_stress(folder / "run", tasks=12)), encoding="utf-8")
    return path


@pytest.mark.parametrize("which", ["report", "evaluations", "stress"])
def test_no_label_is_clipped_and_no_names_overlap(
    which: str, browser: Any, request: pytest.FixtureRequest
) -> None:
    """Guards against text that leaves its drawing or is printed over other text, and pages wider than the screen."""
    for width in (1280, 400):
        page, _ = opened(browser, request.getfixturevalue(which), width=width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator(".scroll:not([tabindex='0'])").count() == 0, "boxes scroll by keyboard too"
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
        page.context.close()


def test_pictures_and_paper(report: Path, browser: Any, tmp_path: Path) -> None:
    """Guards against an empty picture, one theme for both, and a print that drops what is folded away."""
    pictures = {}
    for scheme in ("light", "dark"):
        page, problems = opened(browser, report, scheme=scheme)
        pictures[scheme] = page.screenshot(path=tmp_path / f"{scheme}.png", full_page=True)
        width, height = struct.unpack(">II", pictures[scheme][16:24])
        assert width == 1280 and height > 5000 and len(pictures[scheme]) > 100_000
        assert problems == []
        page.context.close()
    assert pictures["light"] != pictures["dark"]
    page, _ = opened(browser, report)
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".contents").is_hidden() and page.locator(".hint").first.is_hidden()
    assert page.locator("#method pre").first.is_visible(), "settings are printed open"
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.context.close()
