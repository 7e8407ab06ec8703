"""One line of a record file as a typed sample, refused by file and line where a field makes no sense.

What its layout says must be there; of a task without one what is there is taken.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from longspan.core.errors import DataError
from longspan.report.layouts import Layout

Place = float | int | str
"""A value on an axis."""
_TEXTS = (
    "sample",
    "question",
    "output",
    "dataset",
    "subtask",
    "metric",
    "finish",
    "thoughts",
    "no_answer",
    "category",
)
_COUNTS = ("achieved_length", "num_topics", "prompt_tokens", "completion_tokens", "thought_tokens")
_NUMBERS = ("achieved_depth", "seconds", "cost")


class ScoredSample(NamedTuple):
    """One question; `score` is None when it could not be scored, which is not a score of zero."""

    id: str
    row: Place | None = None
    column: Place | None = None
    """Where the layout puts it; None: it could not be composed, or there are no such axes."""
    length: int | None = None
    depth: float | None = None
    sample: str = ""
    score: float | None = None
    unscored: str | None = None
    question: str = ""
    expected: tuple[str, ...] = ()
    output: str = ""
    window: str = ""
    achieved_length: int | None = None
    achieved_depth: float | None = None
    distractors: int = 0
    dataset: str = ""
    subtask: str = ""
    metric: str = ""
    category: str = ""
    """Of the data set, where its benchmark has categories."""
    num_topics: int | None = None
    seconds: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost: float | None = None
    finish: str = ""
    """How a generated answer ended: stop, length."""
    thoughts: str = ""
    """What the model wrote before its answer; it has no part in the score."""
    thought_tokens: int | None = None
    no_answer: str = ""
    """Why an answer that is scored is empty, such as `cut while thinking`."""
    cluster: str = ""
    """Names the text that it shares with others; empty: it has its own."""


class PositionBucket(NamedTuple):
    """Summed negative log-likelihood (nats) of the tokens at positions [start, end)."""

    start: int
    end: int
    tokens: int
    nll: float
    bytes: int | None = None
    """UTF-8 bytes of its text; None in older records."""


class PplSample(NamedTuple):
    """One perplexity window of `length` tokens."""

    id: str
    source: str
    length: int
    buckets: tuple[PositionBucket, ...]
    unscored: str | None
    seconds: float | None = None
    document: str = ""
    """Names the text that it was cut out of; empty in records of other tools."""
    start: int | None = None

    @property
    def window(self) -> tuple[object, ...]:
        """What is the same text in the records of two models, at one length."""
        return (self.source, self.document, self.start) if self.document else (self.source, self.id)


def parse_sample(layout: Layout, line: dict[str, Any], where: str) -> ScoredSample | PplSample:
    """Return the sample on one line of a record file.

    Raises:
        DataError: a field is missing, of another type or out of range; `where` is named.
    """
    if layout.task == "ppl":
        return _ppl_sample(line, where)
    score, unscored = _score(line, where) if layout.said else _any_score(line)
    # What could not be composed may have no place; it is counted all the same.
    row, column = (
        _place(line, axis, where, needed=score is not None) for axis in (layout.rows, layout.columns)
    )
    length = None if line.get("length") is None else count(line, "length", where, least=1)
    read: dict[str, Any] = {name: _words(line.get(name)) for name in _TEXTS}
    read |= {name: _whole(line, name) for name in _COUNTS}
    read |= {name: _optional(line, name) for name in _NUMBERS}
    return ScoredSample(
        id=text(line, "id", where),
        row=row,
        column=column,
        length=length,
        depth=_place(line, "depth", where, needed=False) if is_number(line.get("depth")) else None,
        score=score,
        unscored=unscored,
        expected=_texts(line.get("expected")),
        window=_words(line.get("needle_window")),
        distractors=_whole(line, "num_distractors") or 0,
        cluster=_words(line.get(layout.cluster)) if layout.cluster else "",
        **read,
    )


def _place(line: dict[str, Any], axis: str | None, where: str, *, needed: bool) -> Any:
    """Return where a sample stands on an axis; None where it need not stand anywhere and does not."""
    value = None if axis is None else line.get(axis)
    if axis is None or (value in (None, "") and not needed):
        return None
    if axis == "length":
        return count(line, axis, where, least=1)
    if isinstance(value, str) and value and axis != "depth":
        return value
    place = round(number(line, axis, where), 4)
    if axis == "depth" and not 0 <= place <= 1:
        raise DataError(f"{where} field 'depth' is out of range", found=repr(place), allowed="0 to 1")
    return int(place) if axis != "depth" and place == int(place) else place


def _score(line: dict[str, Any], where: str) -> tuple[float | None, str | None]:
    score, unscored = line.get("score"), line.get("unscored")
    if score is not None and not (is_number(score) and 0 <= score <= 1):
        raise DataError(
            f"{where} field 'score' is out of range", found=repr(score), allowed="0 to 1, or null"
        )
    if (score is None) == (unscored is None):
        raise DataError(
            f"{where} a sample has either a score or a reason why it has none",
            found=f"score={score!r}, unscored={unscored!r}",
        )
    return (None if score is None else float(score)), (None if unscored is None else str(unscored))


def _any_score(line: dict[str, Any]) -> tuple[float | None, str | None]:
    """Return the score of a task that the report does not know; any number will do."""
    score, unscored = line.get("score"), line.get("unscored")
    if unscored is not None or not is_number(score):
        return None, str(unscored or "no score")
    return float(score), None  # type: ignore[arg-type]


def _ppl_sample(line: dict[str, Any], where: str) -> PplSample:
    raw = line.get("buckets", [])
    if not isinstance(raw, list) or not all(isinstance(bucket, dict) for bucket in raw):
        raise DataError(f"{where} field 'buckets' is not a list of objects", found=repr(raw)[:80])
    buckets = []
    for bucket in raw:
        start, end = count(bucket, "start", where), count(bucket, "end", where)
        if end <= start:
            raise DataError(f"{where} a bucket ends before it starts", found=f"{start}-{end}")
        size = None if bucket.get("bytes") is None else count(bucket, "bytes", where)
        tokens, nll = count(bucket, "tokens", where), number(bucket, "nll", where)
        buckets.append(PositionBucket(start, end, tokens, nll, size))
    unscored = line.get("unscored")
    return PplSample(
        id=text(line, "id", where),
        source=str(line.get("source") or "unknown"),
        length=count(line, "length", where, least=1),
        buckets=tuple(buckets) if unscored is None else (),
        unscored=None if unscored is None else str(unscored),
        seconds=_optional(line, "seconds"),
        document=_words(line.get("document")),
        start=_whole(line, "start"),
    )


def is_number(value: object) -> bool:
    """Return whether a JSON value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(line: dict[str, Any], name: str, where: str) -> float:
    """Return a finite number. Raises DataError."""
    value = line.get(name)
    if not is_number(value):
        raise DataError(f"{where} field {name!r} is not a number", found=repr(value)[:80])
    return float(value)  # type: ignore[arg-type]


def count(line: dict[str, Any], name: str, where: str, least: int = 0) -> int:
    """Return a whole number that is at least `least`. Raises DataError."""
    value = number(line, name, where)
    if value != int(value) or value < least:
        raise DataError(f"{where} field {name!r} is not a whole number >= {least}", found=repr(value))
    return int(value)


def text(line: dict[str, Any], name: str, where: str) -> str:
    """Return a text that is not empty. Raises DataError."""
    value = line.get(name)
    if not isinstance(value, str) or not value:
        raise DataError(f"{where} field {name!r} is missing or not text", found=repr(value)[:80])
    return value


def _optional(line: dict[str, Any], name: str) -> float | None:
    value = line.get(name)
    return float(value) if is_number(value) else None  # type: ignore[arg-type]


def _whole(line: dict[str, Any], name: str) -> int | None:
    value = _optional(line, name)
    return None if value is None else int(value)


def _words(value: object) -> str:
    return "" if value is None else str(value)


def _texts(value: object) -> tuple[str, ...]:
    """Return the right answer, or all of several."""
    if isinstance(value, list):
        return tuple(_words(item) for item in value)
    return () if value is None or value == "" else (_words(value),)
