"""JSON-lines records: appended whole, readable after a kill at any byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import DataError, RunError
from longspan.core.records import JsonlWriter, read_jsonl
from tests.patience import PATIENCE_SECONDS

RECORDS = [{"id": "a", "score": 1.0}, {"id": "\u00e9\u4e2d", "score": None}, {"id": "c\n", "list": [1, {}]}]


def test_records_come_back(tmp_path):
    with JsonlWriter(tmp_path / "new" / "r.jsonl") as writer:
        for record in RECORDS:
            writer.write(record)
    assert list(read_jsonl(tmp_path / "new" / "r.jsonl")) == RECORDS


def test_records_are_readable_while_they_grow(tmp_path):
    writer = JsonlWriter(tmp_path / "r.jsonl")
    writer.write(RECORDS[0])
    assert list(read_jsonl(tmp_path / "r.jsonl")) == RECORDS[:1]
    writer.close()
    writer.close()  # closing twice does no harm


def test_cut_at_every_byte(tmp_path):
    """Whatever byte a kill stops at, the whole lines before it stay and writing goes on behind them."""
    whole = tmp_path / "whole.jsonl"
    with JsonlWriter(whole) as writer:
        for record in RECORDS:
            writer.write(record)
    content = whole.read_bytes()
    path = tmp_path / "r.jsonl"
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        kept = content[: cut + 1].count(b"\n")  # a record that lacks only its line break is whole
        assert list(read_jsonl(path)) == RECORDS[:kept]
        with JsonlWriter(path) as writer:
            writer.write({"id": "next"})
        assert list(read_jsonl(path)) == [*RECORDS[:kept], {"id": "next"}]


def test_long_torn_line_is_cut(tmp_path):
    """The last line break is looked for in blocks from the end; here it stands several blocks before."""
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"a":1}\n' + b"x" * 200_000)
    JsonlWriter(path).close()
    assert path.read_bytes() == b'{"a":1}\n'
    path.write_bytes(b"x" * 200_000)
    JsonlWriter(path).close()
    assert path.read_bytes() == b""


@settings(max_examples=50, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=3), st.text() | st.integers() | st.none(), max_size=3)))
def test_any_text_comes_back(tmp_path_factory, records):
    """Line separators such as U+2028 inside a text must not end a record."""
    path = tmp_path_factory.mktemp("records") / "r.jsonl"
    with JsonlWriter(path) as writer:
        for record in records:
            writer.write(record)
    assert list(read_jsonl(path)) == records


def test_half_of_a_surrogate_pair(tmp_path):
    """A file name that is not UTF-8 reaches Python as a lone surrogate; writing it ended in a traceback."""
    with JsonlWriter(tmp_path / "r.jsonl") as writer:
        writer.write({"path": "a\udce9.txt"})
    assert list(read_jsonl(tmp_path / "r.jsonl")) == [{"path": "a\udce9.txt"}]


def test_nan_is_null_and_ends_nothing(tmp_path):
    """A loss of NaN ended a run while it wrote its record; NaN itself is not JSON."""
    with JsonlWriter(tmp_path / "r.jsonl") as writer:
        writer.write({"loss": float("nan"), "by": {"web": float("-inf")}, "cells": (1.5, float("nan"))})
    assert list(read_jsonl(tmp_path / "r.jsonl")) == [
        {"loss": None, "by": {"web": None}, "cells": [1.5, None]}
    ]


def test_full_disk_takes_no_half_line(tmp_path):
    """The system takes the first part of a line without an error and refuses only the rest.

    The half line used to stay, and the next record was glued to it. The file may grow to 100 bytes here.
    """
    code = """
        import resource, sys
        from longspan.core.errors import RunError
        from longspan.core.records import JsonlWriter
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        writer = JsonlWriter(sys.argv[1])
        writer.write({"id": "a" * 50})
        try:
            writer.write({"id": "b" * 80})
        except RunError as error:
            print(error)
        writer.write({"id": "c"})
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "r.jsonl")],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.stderr == ""
    assert "cannot write" in done.stdout
    assert [record["id"][0] for record in read_jsonl(tmp_path / "r.jsonl")] == ["a", "c"]


@pytest.mark.parametrize("line", ["{", "[1]", "3", "nope"])
def test_broken_line_is_named(tmp_path, line):
    path = tmp_path / "r.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"a": 2}}\n', encoding="utf-8")
    reader = read_jsonl(path)
    assert next(reader) == {"a": 1}
    with pytest.raises(DataError, match=r"r\.jsonl:2 "):
        next(reader)


def test_empty_lines_are_no_records(tmp_path):
    (tmp_path / "r.jsonl").write_text('\n{"a": 1}\n  \n')
    assert list(read_jsonl(tmp_path / "r.jsonl")) == [{"a": 1}]


def test_missing_file_and_impossible_place(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        next(read_jsonl(tmp_path / "none.jsonl"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="choose another place"):
        JsonlWriter(tmp_path / "file" / "r.jsonl")


def test_two_writers_do_not_mix_lines(tmp_path):
    """events.jsonl is opened anew for each event while metrics may hold another handle: lines stay whole."""
    path = tmp_path / "r.jsonl"
    first, second = JsonlWriter(path), JsonlWriter(path)
    for i in range(20):
        (first if i % 2 else second).write({"i": i, "pad": "x" * 1000})
    first.close()
    second.close()
    assert [record["i"] for record in read_jsonl(path)] == list(range(20))
    assert all(json.loads(line) for line in path.read_text().splitlines())
    assert os.path.getsize(path) > 20_000


def test_one_of_two_lone_writers_is_refused_until_the_other_ends(tmp_path):
    """Two processes that find the same samples missing write every one of them twice."""
    path = tmp_path / "r.jsonl"
    with JsonlWriter(path, alone=True) as first:
        first.write({"i": 0})
        with pytest.raises(RunError, match="another process writes"):
            JsonlWriter(path, alone=True)
    with JsonlWriter(path, alone=True) as second:
        second.write({"i": 1})
    assert [record["i"] for record in read_jsonl(path)] == [0, 1]


def test_a_folder_is_no_file_of_records(tmp_path):
    """A folder in place of a file was a traceback in every command that reads records."""
    with pytest.raises(DataError, match="is a folder"):
        next(read_jsonl(tmp_path))


def test_whole_last_line_without_its_break_is_a_record(tmp_path):
    """An editor takes the last line break: the record before it was lost, and then cut off."""
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"a":1}\n{"a":2}')
    assert list(read_jsonl(path)) == [{"a": 1}, {"a": 2}]
    with JsonlWriter(path) as writer:
        writer.write({"a": 3})
    assert list(read_jsonl(path)) == [{"a": 1}, {"a": 2}, {"a": 3}]
    for torn in (b'{"a":2', b"2", b'{"a":{}', b'["a"]'):
        path.write_bytes(b'{"a":1}\n' + torn)
        assert list(read_jsonl(path)) == [{"a": 1}], torn
        JsonlWriter(path).close()
        assert path.read_bytes() == b'{"a":1}\n'
