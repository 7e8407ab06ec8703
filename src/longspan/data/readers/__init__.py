"""Readers: files in, documents out, streaming, in an order that depends on paths alone.

    report = ReadReport()
    for document in read_documents(["corpus/"], source_field="meta.redpajama_set_name", report=report):
        ...

A broken record never stops a corpus: it is skipped, counted and named in one warning at the end
(`strict=True` stops at the first). A record of another shape than asked, a missing field say, stops at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

from longspan.core.errors import DataError
from longspan.core.log import get_logger
from longspan.data.readers.base import (
    Document,
    Fields,
    InputFile,
    RawRecord,
    Reader,
    ReadReport,
    SkippedRecordError,
)
from longspan.data.readers.files import find_files, open_input
from longspan.data.readers.jsonl import JSONL
from longspan.data.readers.text import TEXT

READERS: dict[str, Reader] = {
    ".jsonl": JSONL,
    ".ndjson": JSONL,
    ".txt": TEXT,
    ".text": TEXT,
    ".md": TEXT,
    ".rst": TEXT,
    ".py": TEXT,
    ".c": TEXT,
    ".h": TEXT,
    ".cpp": TEXT,
    ".js": TEXT,
    ".java": TEXT,
    ".go": TEXT,
    ".rs": TEXT,
    ".tex": TEXT,
    ".html": TEXT,
}


def list_inputs(inputs: Sequence[str | os.PathLike[str]], *, report: ReadReport) -> list[InputFile]:
    """Return the files under `inputs` in canonical order; see `files.find_files`."""
    if isinstance(inputs, (str, os.PathLike)):
        inputs = [inputs]
    files, report.ignored_files = find_files(inputs, extensions=tuple(READERS))
    return files


def read_records(files: Iterable[InputFile], *, report: ReadReport) -> Iterator[RawRecord]:
    """Yield the raw records of `files` in order; files without a record are counted."""
    for file in files:
        report.files += 1
        empty = True
        with open_input(file.path) as stream:
            for position, data in READERS[file.extension].split(stream):
                empty = False
                yield RawRecord(file, position, data)
        if empty:
            report.skip("empty_files", file.path, "empty file")


def parse_record(record: RawRecord, fields: Fields, *, strict: bool, report: ReadReport) -> Document | None:
    """Read one record; a broken or empty one is counted in `report` and gives None.

    Raises:
        DataError: a field is missing or of another type, or (`strict`) the record is broken.
    """
    place = f"{record.file.path}:{record.position}"
    try:
        document = READERS[record.file.extension].parse(record, fields)
    except SkippedRecordError as error:
        if strict:
            raise DataError(
                f"{place}: {error}", fix="mend the record, or leave out --strict to skip it"
            ) from None
        report.skip(error.kind, place, str(error))
        return None
    if not document.text:
        report.skip("empty_documents", place, "no text")
        return None
    report.documents += 1
    return document


def read_documents(
    inputs: Sequence[str | os.PathLike[str]],
    *,
    text_field: str = "text",
    source_field: str | None = None,
    messages_field: str | None = None,
    strict: bool = False,
    report: ReadReport | None = None,
) -> Iterator[Document]:
    """Yield the documents of files, folders, globs or addresses in canonical order (path, record number).

    Holds one record in memory at a time. What was left out is counted in `report` and logged once at the end.

    Raises:
        DataError: see `parse_record`; also a missing input, and a corpus without a single document.
    """
    report = ReadReport() if report is None else report
    files = list_inputs(inputs, report=report)
    fields = Fields(text_field, source_field, messages_field)
    for record in read_records(files, report=report):
        document = parse_record(record, fields, strict=strict, report=report)
        if document is not None:
            yield document
    finish_reading(files, report)


def finish_reading(files: Sequence[InputFile], report: ReadReport) -> None:
    """Log what was left out.

    Raises:
        DataError: nothing at all was read; the files are named.
    """
    if not report.documents:
        names = [file.path for file in files[:5]] + ["..."] * (len(files) > 5)
        raise DataError(
            f"no documents in {len(files)} input files: {', '.join(names)}",
            found=report.warning() or "files without records",
        )
    warning = report.warning()
    if warning:
        get_logger("data.readers").warning(warning)


__all__ = [
    "READERS",
    "Document",
    "Fields",
    "InputFile",
    "RawRecord",
    "ReadReport",
    "Reader",
    "finish_reading",
    "list_inputs",
    "parse_record",
    "read_documents",
    "read_records",
]
