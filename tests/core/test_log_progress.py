"""Log lines and progress on stderr, and the wording for packages that are not there."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from longspan.core import progress as progress_module
from longspan.core.errors import MissingDependencyError
from longspan.core.log import get_logger, log_once, setup_logging
from longspan.core.optional import require
from longspan.core.progress import progress


@pytest.fixture(autouse=True)
def fresh_logger():
    """Give each test the logger as it is at import and put it back afterwards."""
    logger = logging.getLogger("longspan")
    before = (logger.handlers[:], logger.level, logger.propagate)
    logger.handlers[:], logger.propagate = [], True
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


class Clock:
    """Stands in for time.monotonic: time passes when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def test_log_goes_to_stderr_once(capsys):
    setup_logging()
    setup_logging()
    get_logger("data").info("read %d files", 3)
    get_logger("data").debug("hidden")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("read 3 files") == 1
    assert "hidden" not in captured.err


def test_log_follows_a_replaced_stderr(monkeypatch):
    """A progress bar replaces sys.stderr while it runs; a handler that keeps the old one spoils the bar."""
    setup_logging()
    other = io.StringIO()
    monkeypatch.setattr(sys, "stderr", other)
    get_logger("x").info("hello")
    assert "hello" in other.getvalue()


def test_verbose(capsys):
    setup_logging(verbose=True)
    get_logger("x").debug("detail")
    assert "detail" in capsys.readouterr().err


def test_said_once(capsys):
    setup_logging()
    log_once("x", "the kernel is plain: 100%")
    log_once("x", "the kernel is plain: 100%")
    assert capsys.readouterr().err.count("the kernel is plain: 100%") == 1


def test_lines_off_a_terminal(capsys, clock):
    """Off a terminal there is one line per ten seconds, not one per step and not none."""
    setup_logging()
    with progress("tokenise", total=1000, unit="docs") as bar:
        for _ in range(100):
            clock.now += 0.5
            bar.advance(10)
            bar.note("loss 2.5")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6  # after 10, 20, 30, 40 and 50 seconds, and at the end
    assert lines[0].endswith("tokenise: 20%, 200 docs, 20 docs/s, 40.0 s left, loss 2.5")
    assert lines[-1].endswith("tokenise: done, 1,000 docs in 50.0 s (20 docs/s), loss 2.5")


def test_lines_without_a_total_and_with_earlier_work(capsys, clock):
    """Work done before a resume is not part of the rate."""
    setup_logging()
    with progress("pack", total=None, unit="rows", done=500) as bar:
        clock.now += 10
        bar.advance(100)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("pack: 600 rows, 10 rows/s")
    assert "left" not in lines[0]


def test_failure_is_not_called_done(capsys, clock):
    setup_logging()
    with pytest.raises(ZeroDivisionError), progress("pack", total=5, unit="rows"):
        raise ZeroDivisionError
    assert "done" not in capsys.readouterr().err


def test_bar_on_a_terminal_takes_brackets_as_text(monkeypatch):
    """rich reads "[/x]" as markup: a file name with brackets in a note ended the run with an error."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress("read [a]", total=None, unit="docs") as bar:
        bar.advance(3)
        bar.note("file[/x].txt")
    assert "read [a]" in terminal.getvalue()
    assert "file[/x].txt" in terminal.getvalue()


def test_missing_package_says_what_to_install():
    with pytest.raises(MissingDependencyError) as caught:
        require("longspan_no_such_package", extra="lora", feature="LoRA")
    assert "LoRA needs the package 'longspan_no_such_package'" in str(caught.value)
    assert "pip install 'longspan[lora]'" in str(caught.value)


def test_present_package_is_returned():
    assert require("json", extra="x", feature="x").loads("1") == 1


def test_broken_package_is_not_called_missing(tmp_path, monkeypatch):
    """An installed package whose own import fails was reported as not installed."""
    (tmp_path / "longspan_broken_a.py").write_text("import longspan_no_such_dependency")
    (tmp_path / "longspan_broken_b.py").write_text("raise ImportError('libfoo.so: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="longspan_no_such_dependency"):
        require("longspan_broken_a", extra="x", feature="x")
    with pytest.raises(ImportError, match="libfoo"):
        require("longspan_broken_b", extra="x", feature="x")
