"""CSV and TSV with a header line.

Fields of CSV may hold line breaks and separators inside quotes. TSV has no quotes: a record is a line, and a quote
is a character like others, unless the header itself stands in quotes. CSV whose fields are parted by tabs is read under
the name .csv.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain

from longspan.core.log import get_logger
from longspan.data.readers.base import (
    FilePart,
    RawRecord,
    Reader,
    SkippedRecordError,
    parse_values,
    whole_file,
)
from longspan.data.readers.fields import missing_column
from longspan.data.readers.opening import open_input, reading

MAX_FIELD_CHARACTERS = 1 << 28
"""A quote that is never closed would otherwise take the rest of the file into memory."""
_BOM = "\ufeff"
_QUOTED = re.compile('".*"', re.DOTALL)


class _Broken(Exception):
    """A row that cannot be cut into fields."""


Rows = Iterator[tuple[int, list[str] | _Broken]]
"""Line number from 1 and fields of each row; [] of an empty line."""


def read_delimited(
    part: FilePart,
    wanted: Sequence[str] | None,
    *,
    cut: Callable[[io.TextIOWrapper, str], Rows],
    newline: str,
) -> Iterator[RawRecord]:
    """Yield the rows below the header; the position is the number of the row, from 1.

    A row with more or fewer fields than the header, or with quotes that do not match, is broken. A header in the
    middle (files put together) is no record. A file whose header cannot be used is left out.
    """
    file = part.file
    with open_input(file.path) as stream, reading(file.path):
        # Bytes that are not UTF-8 become lone surrogates, which are found with the field that holds them.
        lines = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline=newline)
        rows = cut(lines, file.path)
        header = next((row for _, row in rows if row), [])
        problem = _header_problem(header, wanted)
        if problem is not None:
            yield RawRecord(file, 1, problem, 1)
        if isinstance(header, _Broken) or problem is not None:
            return
        number = 0
        for line, row in rows:
            if not row:
                continue
            number += 1
            yield RawRecord(file, number, _values(row, header), line)


def _header_problem(header: list[str] | _Broken, wanted: Sequence[str] | None) -> SkippedRecordError | None:
    """Return why a file cannot be read by its header; an empty file has none, and nothing to read."""
    if isinstance(header, _Broken):
        return SkippedRecordError("other_files", f"the header is {header}")
    # Spreadsheets write columns without a name; what no one asked for may stand there twice.
    twice = {name for name in header if header.count(name) > 1} & set(wanted or header)
    if twice:
        found = ", ".join(header)[:200]
        return SkippedRecordError("other_files", "the header names a column twice", found=found)
    return missing_column(dict.fromkeys(header), wanted or ()) if header else None


def _values(row: list[str] | _Broken, header: list[str]) -> dict[str, str] | SkippedRecordError:
    if isinstance(row, _Broken):
        return SkippedRecordError("broken_records", str(row))
    if len(row) != len(header):
        return SkippedRecordError("broken_records", f"{len(row)} fields, the header has {len(header)}")
    if [row[0].removeprefix(_BOM), *row[1:]] == header and (len(row) > 1 or row != header):
        return SkippedRecordError("broken_records", "the header again")
    return dict(zip(header, row))


def _cut_csv(lines: io.TextIOWrapper, path: str) -> Rows:
    head = lines.readline()
    yield from _cut_quoted(chain([head], lines), "\t" if "\t" in head and "," not in head else ",")


def _cut_quoted(lines: Iterable[str], delimiter: str) -> Rows:
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    line = 0
    while True:
        try:
            row: list[str] | _Broken = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            lost = rows.line_num - line
            more = f"; {lost} lines are lost with it" if lost > 1 else ""
            row = _Broken(f"not valid CSV ({error}{more})")
        yield line + 1, row
        line = rows.line_num


def _cut_tsv(lines: io.TextIOWrapper, path: str) -> Rows:
    head = lines.readline(MAX_FIELD_CHARACTERS)
    if all(map(_QUOTED.fullmatch, head.strip("\r\n").split("\t"))):
        # Whoever quotes the names of columns quotes fields as well.
        yield from _cut_quoted(chain([head], lines), "\t")
        return
    line = num_quoted = 0
    text = head
    while text:
        line += 1
        row: list[str] | _Broken
        if len(text) == MAX_FIELD_CHARACTERS and not text.endswith("\n"):
            row = _Broken(f"a line of more than {MAX_FIELD_CHARACTERS} characters")
            while (rest := lines.readline(1 << 20)) and not rest.endswith("\n"):
                pass
        else:
            text = text.removesuffix("\n").removesuffix("\r")
            row = text.split("\t") if text else []
            num_quoted += any(map(_QUOTED.fullmatch, row))
        yield line, row
        text = lines.readline(MAX_FIELD_CHARACTERS)
    if num_quoted:
        get_logger("data.readers").warning(
            "%s: %d lines have a field in quotes, which are kept: TSV has no quoting. If the file was written as CSV "
            "with tabs, call it .csv",
            path,
            num_quoted,
        )


CSV = Reader(partial(read_delimited, cut=_cut_csv, newline=""), parse_values, whole_file)
TSV = Reader(partial(read_delimited, cut=_cut_tsv, newline="\n"), parse_values, whole_file)
