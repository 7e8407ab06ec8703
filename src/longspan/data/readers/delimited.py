"""CSV and TSV with a header line; fields may hold line breaks inside quotes."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from longspan.core.errors import DataError
from longspan.data.readers.base import (
    OPTIONAL_FIELDS,
    Part,
    RawRecord,
    Reader,
    SkippedRecordError,
    parse_values,
    whole_file,
)
from longspan.data.readers.fields import lookup
from longspan.data.readers.opening import open_input, reading

MAX_FIELD_CHARACTERS = 1 << 28
"""A quote that is never closed would otherwise take the rest of the file into memory."""


def read_delimited(part: Part, wanted: Sequence[str] | None, *, delimiter: str) -> Iterator[RawRecord]:
    """Yield the rows below the header; the position is the number of the row, from 1.

    A row with more or fewer fields than the header, or with quotes that do not match, is broken.
    """
    file = part.file
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    with open_input(file.path) as stream, reading(file.path):
        # Bytes that are not UTF-8 become lone surrogates, which are found with the field that holds them.
        lines = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        header = _header(rows, file.path)
        for name in wanted or ():
            if name not in OPTIONAL_FIELDS:
                lookup(dict.fromkeys(header), name, place=f"{file.path}:1")
        number, line = 0, rows.line_num
        while True:
            data: Any
            try:
                row = next(rows)
                data = dict(zip(header, row))
                if len(row) != len(header):
                    found = f"{len(row)} fields, the header has {len(header)}"
                    data = SkippedRecordError("broken_records", found)
            except StopIteration:
                return
            except csv.Error as error:
                row, data = [""], SkippedRecordError("broken_records", f"not valid CSV ({error})")
            if row:
                number += 1
                yield RawRecord(file, number, data, line + 1)
            line = rows.line_num


def _header(rows: Iterator[list[str]], path: str) -> list[str]:
    try:
        header = next(rows, [])
    except csv.Error as error:
        raise DataError(f"{path}:1: the header is not valid CSV", found=str(error)) from None
    if len(set(header)) != len(header):
        raise DataError(f"{path}:1: the header names a column twice", found=", ".join(header)[:200])
    return header


CSV = Reader(partial(read_delimited, delimiter=","), parse_values, whole_file)
TSV = Reader(partial(read_delimited, delimiter="\t"), parse_values, whole_file)
