"""Parts of files: together the whole, whatever their size, in every format that can be cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import DataError
from longspan.data.readers import Document, Fields, FilePart, ReadReport, list_inputs, plan_parts, read_part


def read_in_parts(path: Path, part_bytes: int) -> tuple[list[Document], ReadReport, int]:
    """Return documents, report and number of parts."""
    report = ReadReport()
    parts = list(plan_parts(list_inputs([path], report=report), part_bytes=part_bytes))
    return [d for part in parts for d in read_part(part, Fields(), report=report)], report, len(parts)


LINES = st.lists(
    st.sampled_from([
        b'{"text": "a"}',
        b'{"text": "caf\xc3\xa9"}',
        b"",
        b"  \r",
        b"{broken",
        b'{"text": "\xff"}',
        b'{"text": ""}',
        b'{"text": "' + b"x" * 60 + b'"}',
    ]),
    min_size=1,
    max_size=12,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(lines=LINES, part_bytes=st.integers(1, 40), last=st.sampled_from([b"", b"\n"]), bom=st.booleans())
def test_parts_of_lines_are_the_whole(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], part_bytes: int, last: bytes, bom: bool
) -> None:
    """Guards against a line at a border being lost, read twice or given another position."""
    path = tmp_path_factory.mktemp("parts") / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" * bom + b"\n".join(lines) + last)
    whole, whole_report, _ = read_in_parts(path, 1 << 20)
    parts, report, _ = read_in_parts(path, part_bytes)
    assert parts == whole
    assert [str(d.place) for d in parts] == [str(d.place) for d in whole]
    # A file without a single record is noted as empty only where it is read whole.
    if not whole_report.empty_files:
        assert report.to_dict() == whole_report.to_dict()


def test_line_longer_than_parts(tmp_path: Path) -> None:
    """Guards against parts in the middle of a long line reading on to its end, or yielding its tail."""
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("a", "x" * 3_000, "b")))
    documents, report, num_parts = read_in_parts(path, 100)
    assert [len(d.text) for d in documents] == [1, 3000, 1] and num_parts > 25
    assert report.files == 1


def test_error_in_a_later_part_names_the_line(tmp_path: Path) -> None:
    """Guards against a message with a line number that counts from the part's start."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": str(n)}) + "\n" for n in range(20)) + "{broken\n")
    _, report, num_parts = read_in_parts(path, 50)
    assert num_parts > 3 and str(report.examples[0]).startswith(f"{path}:21: not valid JSON")
    last = list(plan_parts(list_inputs([path], report=report), part_bytes=50))[-1]
    with pytest.raises(DataError, match=r"a\.jsonl:21: not valid JSON"):
        list(read_part(last, Fields(), strict=True, report=report))


def test_compressed_file_is_one_part(tmp_path: Path) -> None:
    """Guards against seeking in a file that can only be read from its start, also one that hides it."""
    import gzip

    data = gzip.compress(b'{"text": "a"}\n' * 100, mtime=0)
    for name in ("a.jsonl.gz", "b.jsonl"):
        (tmp_path / name).write_bytes(data)
        documents, _, num_parts = read_in_parts(tmp_path / name, 10)
        assert (len(documents), num_parts) == (100, 1)


def test_vanished_file_is_our_error(tmp_path: Path) -> None:
    """Guards against a traceback when a file goes between planning and reading."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    (file,) = list_inputs([path], report=ReadReport())
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read .*a\.jsonl"):
        list(read_part(FilePart(file), Fields(), report=ReadReport()))
