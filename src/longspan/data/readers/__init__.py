"""Readers: files in, documents out, streaming, in an order that depends on paths alone.

    report = ReadReport()
    for document in read_documents(["corpus/"], source_field="meta.redpajama_set_name", report=report):
        ...

In several processes, large files cut into parts:

    files = list_inputs(["corpus/"], report=report)
    for part in plan_parts(files):
        documents = read_part(part, Fields("text"), report=ReadReport())

A record that cannot be used never stops a corpus: broken, without a wanted field or with another type in it, it is
skipped, counted and named in one warning at the end (`strict=True` stops at the first). The same holds for files
among the data that are something else, and for damaged files and stretches of files. A field that nothing has stops at
once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from longspan.data.readers.base import (
    Document,
    Fields,
    FilePart,
    InputFile,
    Reader,
    ReadReport,
    RecordPlace,
)
from longspan.data.readers.grouping import Grouping, deal, read_bucket, read_grouped
from longspan.data.readers.reading import (
    PART_BYTES,
    READERS,
    check_fields,
    finish_reading,
    list_inputs,
    plan_parts,
    read_objects,
    read_part,
)


def read_documents(
    inputs: Sequence[str | os.PathLike[str]],
    *,
    text_field: str = "text",
    source_field: str | None = None,
    messages_field: str | None = None,
    variable_fields: Sequence[str] = (),
    group_by: str | None = None,
    order_by: str | None = None,
    header_field: str | None = None,
    strict: bool = False,
    report: ReadReport | None = None,
) -> Iterator[Document]:
    """Yield the documents of files, folders, globs or addresses in canonical order (path, position).

    Holds one record in memory at a time. What was left out is counted in `report` and logged once at the end.

    Args:
        inputs: see `files.find_files`.
        text_field: field that holds the text; dots reach into objects.
        source_field: field that names the source; None: the file's place names it.
        messages_field: field of conversations, read instead of the text.
        variable_fields: fields that belong to a conversation, where a record has them; see `ChatFormat.fields`.
        group_by: join the records with the same value of this field into one document; see `Grouping`.
        order_by: field that orders the records of a group; None: canonical order.
        header_field: field with a file name, put as a comment above each record of a group.
        strict: stop at the first record that cannot be used instead of skipping and counting it.
        report: counts of what was read and left out.

    Raises:
        DataError: see `reading.parse_record`; also a missing input, a field that nothing has, and a corpus without
            a single document.
    """
    report = ReadReport() if report is None else report
    files = list_inputs(inputs, report=report)
    fields = Fields(text_field, source_field, messages_field, tuple(variable_fields))
    grouping = None if group_by is None else Grouping(group_by, order_by, header_field)
    check_fields(files, fields.wanted if grouping is None else (*fields.wanted, *grouping.names))
    if grouping is not None:
        yield from read_grouped(files, fields, grouping, strict=strict, report=report)
    else:
        for file in files:
            yield from read_part(FilePart(file), fields, strict=strict, report=report)
    finish_reading(files, report)


__all__ = [
    "PART_BYTES",
    "READERS",
    "Document",
    "Fields",
    "FilePart",
    "Grouping",
    "InputFile",
    "ReadReport",
    "Reader",
    "RecordPlace",
    "check_fields",
    "deal",
    "finish_reading",
    "list_inputs",
    "plan_parts",
    "read_bucket",
    "read_documents",
    "read_grouped",
    "read_objects",
    "read_part",
]
