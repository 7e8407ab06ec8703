"""Logging to stderr: one format, one place that sets it up, and messages that are said once."""

from __future__ import annotations

import logging
import re
import sys
from functools import lru_cache
from typing import TextIO

ROOT = "longspan"
_SURROGATE = re.compile("[\ud800-\udfff]")


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is now: a progress bar puts a stream there that lets lines pass above it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def printable(name: str) -> str:
    """Return a name in which what has no UTF-8 form (of a file's name, or half of a pair) is U+FFFD."""
    return name if name.isascii() else _SURROGATE.sub("\ufffd", name)


def _with_printable_names(record: logging.LogRecord) -> bool:
    """Make file names that are not UTF-8 printable, so that no handler fails on the message."""
    message = record.getMessage()
    if not message.isascii():
        record.msg, record.args = printable(message), None
    return True


def get_logger(name: str) -> logging.Logger:
    """Return the logger `longspan.<name>`, whose messages have a UTF-8 form."""
    logger = logging.getLogger(name if name.startswith(ROOT) else f"{ROOT}.{name}")
    logger.addFilter(_with_printable_names)  # one that is there already is not added again
    return logger


def setup_logging(*, verbose: bool = False) -> None:
    """Send longspan's messages to stderr; called by the command line, never at import."""
    logger = logging.getLogger(ROOT)
    if not logger.handlers:
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)


@lru_cache(maxsize=1024)
def log_once(name: str, message: str) -> None:
    """Say `message` at info level the first time it comes up in this process."""
    get_logger(name).info(message)
