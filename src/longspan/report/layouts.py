"""How the samples of a task are laid out, and the words for it: by the header of the records, not by their name.

The header says title and axes (`eval.registry.TaskEntry.described`). Records from before it did are laid out by the
registry's entry of their name, and those of an unregistered task by their fields: where every scored sample
has a length and a depth, or only a length, these are its axes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from longspan.core.errors import DataError
from longspan.eval.registry import TaskEntry, entries, entry_of

_MOST_DIGITS = 20
_LONGEST_LINK = 24
_NAMED = ("dataset", "subtask", "metric")
"""Fields of samples that are put into a table by what they are of."""


class Layout(NamedTuple):
    """A task as a report shows it."""

    task: str
    title: str = ""
    heading: str = ""
    short: str = ""
    columns: str | None = None
    """Field of a sample; None: a table of scores by data set and metric."""
    rows: str | None = None
    higher_is_better: bool = True
    cluster: str = ""
    """Field of a sample that names the text which it shares with others."""
    said: bool = True
    """Whether header or registry say so; where the fields do, any number may be a score."""

    @property
    def capital(self) -> str:
        """The short name at the beginning of a line."""
        return self.short[:1].upper() + self.short[1:]

    @property
    def link(self) -> str:
        """What a link to its section says: the heading, where that is not long."""
        return self.heading if len(self.heading) <= _LONGEST_LINK else self.capital

    @property
    def order(self) -> tuple[int, str]:
        """Sort key: as the registry has them, then the others by name."""
        names = list(entries())
        return (names.index(self.task) if self.task in names else len(names), by_value(self.task))


def layout_of(header: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], where: str) -> Layout:
    """Return the layout of one records file. Raises DataError: the header's axes are no names of fields."""
    task = str(header["task"])
    entry = None if "axes" in header else entry_of(task)
    known = {**(entry or TaskEntry(task, "")).described(), **header}
    said = "axes" in header or entry is not None
    axes = known["axes"] if said else _axes_of(lines)
    if axes is not None and not (
        isinstance(axes, Mapping)
        and isinstance(axes.get("columns"), str)
        and isinstance(axes.get("rows"), str | None)
    ):
        raise DataError(
            f"{where} field 'axes' names no fields",
            found=repr(axes)[:80],
            allowed='{"columns": "length", "rows": "depth"}, rows may be null',
        )
    columns, rows = (None, None) if axes is None else (axes["columns"], axes.get("rows"))
    title, heading, short = (str(known.get(name) or "") for name in ("title", "heading", "short"))
    higher, cluster = known["higher_is_better"] is not False, str(known.get("cluster") or "")
    return Layout(task, title, heading, short, columns, rows, higher, cluster, said)


def _axes_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    scored = [line for line in lines if line.get("kind") == "sample" and line.get("score") is not None]
    if not scored or any(line.get(name) for line in scored for name in _NAMED):
        return None
    placed = [name for name in ("length", "depth") if all(_is_place(line.get(name)) for line in scored)]
    if "length" not in placed or not all(0 <= line["score"] <= 1 for line in scored):
        return None
    return {"columns": "length", "rows": "depth" if "depth" in placed else None}


def _is_place(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def length_text(tokens: float) -> str:
    """Write a context length for people: 2,048 below 16k, then 32k, 128k, 1M where that is exact."""
    tokens = int(tokens)
    for unit, suffix in ((2**20, "M"), (2**10, "k")):
        if tokens >= 16 * 1024 and tokens % unit == 0:
            return f"{tokens // unit}{suffix}"
    return f"{tokens:,}"


def by_value(name: str) -> str:
    """Return a name so that its numbers sort by their value: qa2 before qa10."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(_MOST_DIGITS), name)


def axis_words(field: str | None) -> str:
    """Name an axis: `number of needles` of num_needles; empty where there is none."""
    if field == "length":
        return "context length in tokens"
    name = (field or "").replace("_", " ")
    return f"number of {name.removeprefix('num ')}" if name.startswith("num ") else name


def value_text(field: str | None, value: Any, *, compact: bool = False) -> str:
    """Write a place on an axis, where the axis has its name: 2,048, 50%, 3; compact 1.5k for 1,536."""
    if field == "length":
        text = length_text(value)
        return f"{value / 1024:g}k" if compact and "," in text and value % 256 == 0 else text
    if field == "depth":
        return f"{value:.0%}"
    return f"{value:,g}" if isinstance(value, int | float) else str(value)


def value_words(field: str | None, value: Any) -> str:
    """Write a place by itself: `2,048 tokens`, `depth 50%`, `3 needles`, `hops 2`, `niah_single_1`."""
    text = value_text(field, value)
    if field == "length":
        return f"{text} tokens"
    if field is None or isinstance(value, str):
        return text
    name = field.replace("_", " ")
    return f"{text} {name.removeprefix('num ')}" if name.startswith("num ") else f"{name} {text}"
