"""Reading parts of files: which reader reads what, and what becomes of a record that cannot be used."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import Any, Literal, cast

from longspan.core.errors import DataError
from longspan.data.readers.base import (
    OF_FILES,
    Document,
    Fields,
    FilePart,
    InputFile,
    MissingFieldError,
    OptionalField,
    RawRecord,
    Reader,
    ReadReport,
    RecordPlace,
    SkippedRecordError,
    damaged,
    extension_of,
    whole_file,
)
from longspan.data.readers.columnar import ARROW, PARQUET
from longspan.data.readers.delimited import CSV, TSV
from longspan.data.readers.fields import document_of, lookup
from longspan.data.readers.files import find_files
from longspan.data.readers.json_values import JSON
from longspan.data.readers.jsonl import JSONL
from longspan.data.readers.mds_folder import MDS
from longspan.data.readers.opening import DamagedFileError, is_remote
from longspan.data.readers.sniff import sniff_json
from longspan.data.readers.text import TEXT

PART_BYTES = 64 << 20
PROBED_RECORDS = 1000
"""Records at the head of a file that are looked at before a field is said to be nowhere."""

# fmt: off
_TEXT_EXTENSIONS = (
    ".txt", ".text", ".md", ".rst", ".tex", ".html", ".htm",
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".cu", ".cuh", ".js", ".jsx", ".mjs",
    ".ts", ".tsx", ".java", ".kt", ".scala", ".go", ".rs", ".rb", ".php", ".cs", ".swift", ".r", ".jl", ".lua",
    ".pl", ".pm", ".sh", ".sql", ".hs", ".ml", ".ex", ".exs", ".erl", ".clj", ".lisp", ".el", ".f90", ".zig",
)
# fmt: on

READERS: dict[str, Reader] = {
    ".jsonl": JSONL,
    ".ndjson": JSONL,
    ".json": JSON,
    ".parquet": PARQUET,
    ".pq": PARQUET,
    ".arrow": ARROW,
    ".feather": ARROW,
    ".ipc": ARROW,
    ".csv": CSV,
    ".tsv": TSV,
    ".mds": MDS,
    **dict.fromkeys(_TEXT_EXTENSIONS, TEXT),
}


def list_inputs(inputs: Sequence[str | os.PathLike[str]], *, report: ReadReport) -> list[InputFile]:
    """Return the files under `inputs` in canonical order; see `files.find_files`."""
    if isinstance(inputs, (str, os.PathLike)):
        inputs = [inputs]
    return find_files(inputs, readers=READERS, report=report)


def plan_parts(files: Iterable[InputFile], *, part_bytes: int = PART_BYTES) -> Iterator[FilePart]:
    """Cut files into parts of about `part_bytes` that are read independently, in canonical order.

    The cuts depend on the files and `part_bytes` alone. What `read_part` yields for all parts in turn is what
    it yields for the whole files, positions included, whatever `part_bytes` is. Cheap: a line format is cut
    at multiples of `part_bytes` without being read, of parquet and arrow only the table of contents is read.
    """
    for file in files:
        try:
            yield from READERS[file.extension].split(file, part_bytes)
        except DamagedFileError:  # what can be read of it is, from its start
            yield from whole_file(file, part_bytes)


def read_part(
    part: FilePart, fields: Fields, *, strict: bool = False, report: ReadReport
) -> Iterator[Document]:
    """Yield the documents of one part, one record in memory at a time; what is left out counts in `report`.

    Raises:
        DataError: see `parse_record`; also a vanished file.
    """
    for record in records_of(part, fields.wanted, report=report):
        document = parse_record(record, fields, strict=strict, report=report)
        if document is not None:
            yield document


def read_objects(
    path: str | os.PathLike[str], *, strict: bool = False, report: ReadReport
) -> Iterator[tuple[RecordPlace, dict[str, Any]]]:
    """Yield place and all fields of every record of one file; broken ones are skipped and counted.

    JSON lines, whatever its name, unless its ending is that of another format of records.

    Raises:
        DataError: there is no such file; (`strict`) it is damaged, or a record is broken.
    """
    name = os.fspath(path)
    if not is_remote(name) and not os.path.isfile(name):
        is_folder = os.path.isdir(name)
        raise DataError(
            f"{name} is a folder" if is_folder else f"{name} does not exist", allowed="a file of records"
        )
    extension = extension_of(name)
    if extension == ".json":
        extension = sniff_json(name)
    elif extension == ".mds" or extension not in READERS or READERS[extension].one_text:
        extension = ".jsonl"
    part = FilePart(InputFile(name, extension, "", 0))
    for record in records_of(part, None, report=report):
        values = parse_values_of(record, strict=strict, report=report)
        if values is not None:
            yield record.place, values


def records_of(part: FilePart, names: Sequence[str] | None, *, report: ReadReport) -> Iterator[RawRecord]:
    """Yield the records of a part unparsed; only the named fields need be read. Counts files in `report`."""
    empty, position = True, 0
    try:
        for record in READERS[part.file.extension].records(part, names):
            empty, position = False, record.position
            yield record
    except DamagedFileError as error:
        empty = False
        yield damaged(part.file, position + 1, error)
    # A file counts once, with its first part.
    if part.start == 0:
        report.files += 1
        if empty and part.stop is None:
            report.skip("empty_files", part.file.path, "empty file")


def parse_record(record: RawRecord, fields: Fields, *, strict: bool, report: ReadReport) -> Document | None:
    """Read one record; one that cannot be used is counted in `report` and gives None.

    Raises:
        DataError: (`strict`) the record cannot be used.
    """
    values = parse_values_of(record, strict=strict, report=report)
    return None if values is None else make_document(values, record, fields, strict=strict, report=report)


def make_document(
    values: dict[str, Any], record: RawRecord, fields: Fields, *, strict: bool, report: ReadReport
) -> Document | None:
    """Make a document of the fields of a record; an empty one is counted in `report` and gives None."""
    try:
        document = document_of(values, record, fields)
    except SkippedRecordError as error:
        skip_record(record, error, strict=strict, report=report)
        return None
    if not document.text:
        report.skip("empty_documents", record.place, "no text")
        return None
    report.documents += 1
    return document


def parse_values_of(record: RawRecord, *, strict: bool, report: ReadReport) -> dict[str, Any] | None:
    """Return the fields of a record; a broken one is counted in `report` and gives None."""
    try:
        return _parsed(record)
    except SkippedRecordError as error:
        skip_record(record, error, strict=strict, report=report)
        return None


def _parsed(record: RawRecord) -> dict[str, Any]:
    if isinstance(record.data, SkippedRecordError):
        raise record.data
    return READERS[record.file.extension].parse(record)


def skip_record(record: RawRecord, error: SkippedRecordError, *, strict: bool, report: ReadReport) -> None:
    """Count a record, or a whole file, that cannot be used. Raises DataError instead if `strict`."""
    of_file = error.kind in OF_FILES
    place: RecordPlace | str = record.file.path if of_file else record.place
    if strict:
        mend = "leave the file out of the input" if of_file else "mend the record"
        raise DataError(
            f"{place}: {error.reason}", found=error.found, fix=f"{mend}, or leave out --strict to skip it"
        ) from None
    report.skip(error.kind, place, str(error))


def check_fields(files: Sequence[InputFile], names: Sequence[str]) -> None:
    """Refuse fields that none of the first records of any file has, before hours of reading.

    Raises:
        DataError: no record has them; the message names the place and fields of the first one.
    """
    first: tuple[RecordPlace | str, MissingFieldError] | None = None
    for file in files:
        try:
            found = _look_for(file, names)
        except DamagedFileError:
            continue  # who reads it says so
        except DataError:
            return
        if found is True:
            return
        first = first or found
    if first is not None:
        raise DataError(
            f"{first[0]}: {first[1].reason}",
            found=first[1].found,
            fix="name the field by its option, such as --text-field, or --messages-field of `data tokenize`",
        )


def _look_for(
    file: InputFile, names: Sequence[str]
) -> tuple[RecordPlace | str, MissingFieldError] | Literal[True] | None:
    """Return True if a record at the head of a file has all fields, else where the first one lacks them."""
    first: tuple[RecordPlace | str, MissingFieldError] | None = None
    # The iterators of readers are generators, which hold files open.
    with closing(
        cast(Generator[RawRecord], READERS[file.extension].records(FilePart(file), names))
    ) as records:
        for record in islice(records, PROBED_RECORDS):
            try:
                values = _parsed(record)
                for name in names:
                    if not isinstance(name, OptionalField):
                        lookup(values, name)
                return True
            except MissingFieldError as error:
                place = file.path if error.kind in OF_FILES else record.place
                first = first or (place, error.with_traceback(None))
            except SkippedRecordError:
                continue
    return first


def finish_reading(files: Sequence[InputFile], report: ReadReport) -> None:
    """Log what was left out, and remarks.

    Raises:
        DataError: nothing at all was read; the files are named.
    """
    if not report.documents:
        names = [file.path for file in files[:5]] + ["..."] * (len(files) > 5)
        raise DataError(
            f"no documents in {len(files)} input files: {', '.join(names)}",
            found=report.warning() or "files without records",
        )
    report.log()
