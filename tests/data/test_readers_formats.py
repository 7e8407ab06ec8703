"""Every format yields the same documents, in parts too, and damage is an error or a count, never data."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import DataError
from longspan.data.readers import (
    Document,
    Fields,
    FilePart,
    ReadReport,
    list_inputs,
    plan_parts,
    read_documents,
    read_objects,
    read_part,
)
from longspan.data.readers.json_values import BLOCK_CHARACTERS
from longspan.data.store import Column, MDSWriter

RECORDS = [
    {"text": f"text {number}, caf\u00e9", "meta": {"redpajama_set_name": f"set{number % 3}", "id": number}}
    for number in range(40)
]
TABLE = pa.Table.from_pylist([{**record, "junk": "x" * 50} for record in RECORDS])


def write_parquet(path: Path) -> None:
    pq.write_table(TABLE, path, row_group_size=7)


def write_arrow(path: Path, make: Callable[..., Any]) -> None:
    with pa.OSFile(str(path), "wb") as sink, make(sink, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=7)


def write_mds(path: Path) -> None:
    path.mkdir()
    writer = MDSWriter(path, [Column("text", "str"), Column("meta", "json")], size_limit=500)
    for record in RECORDS:
        writer.write(record)
    writer.finish()


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda path: path.write_text("".join(json.dumps(r) + "\n" for r in RECORDS)),
    "a.json": lambda path: path.write_text(json.dumps(RECORDS, indent=1)),
    "a.parquet": write_parquet,
    "file.arrow": lambda path: write_arrow(path, pa.ipc.new_file),
    "stream.arrow": lambda path: write_arrow(path, pa.ipc.new_stream),
    "mds": write_mds,
}
CUT_IN_PARTS = ("a.jsonl", "a.parquet", "file.arrow", "stream.arrow", "mds")


def read(path: Path, part_bytes: int = 1 << 30, **names: str) -> tuple[list[Document], int]:
    report = ReadReport()
    parts = list(plan_parts(list_inputs([path], report=report), part_bytes=part_bytes))
    return [d for part in parts for d in read_part(part, Fields(**names), report=report)], len(parts)


@pytest.mark.parametrize("name", WRITERS)
def test_format_yields_the_documents(tmp_path: Path, name: str) -> None:
    """Guards against lost rows, and against nested fields being out of reach in some format."""
    WRITERS[name](tmp_path / name)
    documents, _ = read(tmp_path / name, source="meta.redpajama_set_name")
    assert [d.text for d in documents] == [record["text"] for record in RECORDS]
    assert [d.source for d in documents[:4]] == ["set0", "set1", "set2", "set0"]
    if name != "a.jsonl":
        assert [d.position for d in documents] == list(range(1, 41))
        assert str(documents[1].place) == f"{tmp_path / name}: record 2"


@pytest.mark.parametrize("name", CUT_IN_PARTS)
@pytest.mark.parametrize("part_bytes", [1, 300, 1000])
def test_parts_are_the_whole(tmp_path: Path, name: str, part_bytes: int) -> None:
    """Guards against rows at a border being lost or read twice, and positions that count from the part."""
    WRITERS[name](tmp_path / name)
    whole, _ = read(tmp_path / name)
    parts, num_parts = read(tmp_path / name, part_bytes)
    assert parts == whole and num_parts > 1


@pytest.mark.parametrize("name", WRITERS)
def test_missing_field_names_the_fields(tmp_path: Path, name: str) -> None:
    """Guards against a typo reading nothing without a word."""
    WRITERS[name](tmp_path / name)
    with pytest.raises(DataError, match=r"no field 'texts'(.|\n)*meta"):
        list(read_documents([tmp_path / name], text_field="texts"))
    with pytest.raises(DataError, match=r"no field 'meta\.name'|has no field"):
        list(read_documents([tmp_path / name], text_field="text", source_field="meta.name"))


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow", "a.json"])
def test_cut_file_is_our_error(tmp_path: Path, name: str) -> None:
    """Guards against half a download passing for the whole, and against a traceback of a library."""
    WRITERS[name](tmp_path / name)
    data = (tmp_path / name).read_bytes()
    for size in (len(data) - 5, len(data) // 2, 20):
        (tmp_path / name).write_bytes(data[:size])
        report = ReadReport()
        with contextlib.suppress(DataError):  # nothing at all was read
            list(read_documents([tmp_path / name], report=report))
        assert report.damaged_files + report.not_json == 1
        with pytest.raises(DataError, match=f"{name}: .*(a damaged or cut-off|not valid JSON)"):
            list(read_documents([tmp_path / name], strict=True))


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow", "mds"])
def test_damage_loses_its_stretch_alone_and_is_counted(tmp_path: Path, name: str) -> None:
    """One damaged file of ten thousand must not end a job, nor take all of its rest with it, nor go unsaid; parts and
    the whole lose the same."""
    WRITERS[name](tmp_path / name)
    path = sorted((tmp_path / name).glob("*.mds"))[1] if name == "mds" else tmp_path / name
    data = path.read_bytes()
    (tmp_path / "good.jsonl").write_text('{"text": "good"}\n')
    lost = 0
    for place in range(0, len(data), max(1, len(data) // 25)):
        path.write_bytes(
            data[:place] + bytes(255 - byte for byte in data[place : place + 8]) + data[place + 8 :]
        )
        report = ReadReport()
        texts = [d.text for d in read_documents([tmp_path], report=report)]
        assert texts[-1] == "good" or texts[0] == "good"
        parts = ReadReport()
        cut = [
            document.text
            for part in plan_parts(list_inputs([tmp_path], report=ReadReport()), part_bytes=200)
            for document in read_part(part, Fields(), report=parts)
        ]
        assert cut == texts and (parts.damaged_files > 0) == (report.damaged_files > 0)
        lost += report.damaged_files > 0 and len(texts) > 1
        if report.damaged_files:
            assert (
                report.warning().startswith("left out: ") and "damaged or cut-off files" in report.warning()
            )
            with pytest.raises(DataError, match="leave the file out"):
                list(read_documents([tmp_path], strict=True))
    assert lost, "no damage left the rest of the file readable"


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow", "mds"])
def test_changed_bytes_never_crash(tmp_path: Path, name: str) -> None:
    """Guards against a wild read through a changed offset: only our error or text comes out."""
    WRITERS[name](tmp_path / name)
    path = next((tmp_path / name).glob("*.mds")) if name == "mds" else tmp_path / name
    data = bytearray(path.read_bytes())
    for number in range(60):
        changed = bytearray(data)
        place = number * 7919 % len(data)
        changed[place : place + 4] = (b"\xff\xff\xff\x7f", b"\x00\x00\x00\x00", b"\x80abc")[number % 3]
        path.write_bytes(changed)
        report = ReadReport()
        try:
            texts = [d.text for d in read_documents([tmp_path / name], report=report)]
        except DataError:
            continue
        assert all(isinstance(text, str) for text in texts) and len(texts) + report.num_skipped <= 40


def test_invalid_text_in_columns_is_counted(tmp_path: Path) -> None:
    """Guards against one bad string ending a table, or coming out as something else."""
    column = pa.array([b"good", b"\xff\xfe", None, b"fine"], pa.binary()).view(pa.string())
    table = pa.table({"text": column})
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        report = ReadReport()
        assert [d.text for d in read_documents([tmp_path / name], report=report)] == ["good", "fine"]
        assert (report.invalid_text, report.empty_documents) == (1, 1)
        assert f"{name}: record 2" in report.to_dict()["examples"][0]
        with pytest.raises(DataError, match="record 2: byte 0xff at 0 is not UTF-8"):
            list(read_documents([tmp_path / name], strict=True))


def test_only_wanted_columns_are_read(tmp_path: Path) -> None:
    """Guards against a wide table being decoded for one column, shown by a column that cannot be decoded."""
    path = tmp_path / "a.parquet"
    bad = pa.array([b"\xff"] * 3, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": ["a", "b", "c"], "bad": bad}), path)
    assert [d.text for d in read_documents([path])] == ["a", "b", "c"]


def test_any_fields_of_any_format(tmp_path: Path) -> None:
    """Guards against conversations and lists being readable from JSON lines alone."""
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    pq.write_table(pa.Table.from_pylist([{"messages": turns, "n": 1}]), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns, "n": 1}) + "\n")
    for name in ("a.parquet", "a.jsonl"):
        (file,) = list_inputs([tmp_path / name], report=ReadReport())
        ((_, values),) = read_objects(tmp_path / name, report=ReadReport())
        assert values == {"messages": turns, "n": 1}
        (document,) = read_part(FilePart(file), Fields(messages="messages"), report=ReadReport())
        assert document.messages == turns


FIELD = st.text(alphabet='ab ,;\t"\n\r\u00e9', max_size=8)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(FIELD, FIELD), min_size=1, max_size=6), tabs=st.booleans())
def test_csv_round_trip(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], tabs: bool
) -> None:
    """Guards against quoted line breaks, quotes or separators cutting a field."""
    path = tmp_path_factory.mktemp("csv") / ("a.tsv" if tabs else "a.csv")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_ALL)
        writer.writerows([("id", "text"), *rows])
    wanted = [(number, text) for number, (_, text) in enumerate(rows, 1) if text]
    if wanted:
        assert [(d.position, d.text) for d in read_documents([path])] == wanted


def test_broken_csv_rows(tmp_path: Path) -> None:
    """Guards against shifted columns passing for text, and line numbers that ignore quoted line breaks."""
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'id,text\n1,"two\nlines"\n2\n\n3,a,b\n4,"x"y\n5,caf\xe9\n6,fine\n7,"never closed\nand so on\n'
    )
    report = ReadReport()
    found = [(d.text, d.position) for d in read_documents([path], report=report)]
    assert found == [("two\nlines", 1), ("fine", 6)]
    assert (report.broken_records, report.invalid_text) == (4, 1)
    places = [example.split(": ")[0].rpartition(":")[2] for example in report.to_dict()["examples"]]
    assert places == ["4", "6", "7", "8", "10"]
    with pytest.raises(DataError, match=r"a\.csv:4: 1 fields, the header has 2"):
        list(read_documents([path], strict=True))
    path.write_text("id,text,text\n1,a,b\n")
    with pytest.raises(DataError, match="names a column twice"):
        list(read_documents([path]))
    path.write_text(",text,\n0,a,\n")
    assert [d.text for d in read_documents([path])] == ["a"], "spreadsheets write columns without a name"
    path.write_text("id,body\n1,a\n")
    with pytest.raises(DataError, match=r"a\.csv: no field 'text'(.|\n)*body, id"):
        list(read_documents([path]))


def test_json_that_is_lines_and_json_that_is_not(tmp_path: Path) -> None:
    """Guards against the extension .json deciding between one array, one object and an object a line."""
    texts = ["one", "two"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    cases = {
        "lines.json": lines,
        "broken-first-line.json": '{"text": "x\n' + lines,
        "array.json": json.dumps([{"text": text} for text in texts]),
        "pretty.json": json.dumps([{"text": text} for text in texts], indent=2),
        "objects.json": "\n".join(json.dumps({"text": text}, indent=2) for text in texts),
    }
    for name, content in cases.items():
        (tmp_path / name).write_text(content)
        assert [d.text for d in read_documents([tmp_path / name])] == texts, name
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
        assert [d.text for d in read_documents([tmp_path / f"{name}.gz"])] == texts, name
    (tmp_path / "one.json").write_text(json.dumps({"text": "single"}, indent=2))
    assert [d.text for d in read_documents([tmp_path / "one.json"])] == ["single"]


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a"}, {"text": "b"',
        '[{"text": "a"} {"text": "b"}]',
        '[{"text": "a"},]',
        '[{"text": "a"}] x',
    ],
)
def test_broken_json_array(tmp_path: Path, content: str) -> None:
    """Guards against the rest of a broken array vanishing without a word."""
    (tmp_path / "a.json").write_text(content)
    report = ReadReport()
    assert len(list(read_documents([tmp_path / "a.json"], report=report))) == 1 == report.damaged_files
    with pytest.raises(DataError, match=r"a\.json: not valid JSON from record 2 on"):
        list(read_documents([tmp_path / "a.json"], strict=True))


def test_json_values_across_blocks(tmp_path: Path) -> None:
    """Guards against a value that is cut by a block being lost or read again and again."""
    texts = ["x" * (BLOCK_CHARACTERS * 3 + 5), "short", "y" * (BLOCK_CHARACTERS - 20), "end"]
    (tmp_path / "a.json").write_text(json.dumps([7, *({"text": text} for text in texts)]))
    report = ReadReport()
    found = [d.text for d in read_documents([tmp_path / "a.json"], report=report)]
    assert found == texts and report.broken_records == 1


def test_settings_among_the_data_are_left_out_by_name(tmp_path: Path) -> None:
    """Guards against a package.json stopping a tree of code, and against it vanishing unnamed."""
    (tmp_path / "package.json").write_text(json.dumps({"name": "x", "version": 1}, indent=2))
    (tmp_path / "points.csv").write_text("x,y\n1,2\n")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "points.parquet")
    (tmp_path / "tsconfig.json").write_text('{\n  // settings\n  "strict": true,\n}\n')
    (tmp_path / "a.txt").write_text("text")
    report = ReadReport()
    assert [d.text for d in read_documents([tmp_path], report=report)] == ["text"]
    assert (report.other_files, report.not_json) == (3, 1)
    for name in ("package.json", "points.csv", "points.parquet", "tsconfig.json"):
        assert name in str(report.warning())
        with pytest.raises(DataError, match=rf"{name}: (.|\n)*leave out --strict"):
            list(read_documents([tmp_path / name, tmp_path / "a.txt"], strict=True))


def test_mds_shards_may_be_compressed_or_hold_no_text(tmp_path: Path) -> None:
    """Guards against compressed shards of other tools being unreadable, and ids passing for text."""
    write_mds(tmp_path / "mds")
    wanted = [d.text for d in read_documents([tmp_path / "mds"])]
    index = json.loads((tmp_path / "mds/index.json").read_text())
    for entry in index["shards"]:
        raw = tmp_path / "mds" / entry["raw_data"]["basename"]
        data = zstandard.ZstdCompressor().compress(raw.read_bytes())
        raw.with_name(raw.name + ".zstd").write_bytes(data)
        raw.unlink()
        entry["compression"] = "zstd:3"
        entry["zip_data"] = {"basename": raw.name + ".zstd", "bytes": len(data), "hashes": {}}
    (tmp_path / "mds/index.json").write_text(json.dumps(index))
    assert [d.text for d in read_documents([tmp_path])] == wanted
    for number, message in enumerate(("no documents in 1 input files", "no field 'text'(.|\n)*input_ids")):
        path = tmp_path / f"ids{number}"
        path.mkdir()
        writer = MDSWriter(path, [Column("input_ids", "ndarray:uint16")], size_limit=500)
        if number:
            writer.write({"input_ids": np.arange(3, dtype=np.uint16)})
        writer.finish()
        with pytest.raises(DataError, match=message):
            list(read_documents([path]))


def test_files_without_a_byte_are_empty_in_every_format(tmp_path: Path) -> None:
    """A table of no bytes ended the job, where every other empty file is counted."""
    for name in (*WRITERS, "a.csv", "a.jsonl.gz", "a.jsonl.zst", "a.txt"):
        (tmp_path / f"{name if '.' in name else name + '.mds'}").touch()
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    report = ReadReport()
    assert [d.text for d in read_documents([tmp_path], report=report)] == ["b"]
    assert report.empty_files == 9
    assert [d.text for d in read(tmp_path, part_bytes=1)[0]] == ["b"]


def test_compression_is_told_by_the_first_bytes(tmp_path: Path) -> None:
    """A zstd file named .gz was called damaged."""
    (tmp_path / "a.jsonl.gz").write_bytes(zstandard.compress(b'{"text": "a"}\n'))
    assert [d.text for d in read_documents([tmp_path])] == ["a"]


def test_long_line_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a file without a line break being taken into memory, and the line after it being lost."""
    from longspan.data.readers import jsonl

    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "' + "x" * 5000 + '"}\n{"text": "b"}\n')
    report = ReadReport()
    assert [d.text for d in read_documents([path], report=report)] == ["a", "b"]
    assert report.broken_records == 1 and "a.jsonl:2: a line of more than" in report.to_dict()["examples"][0]


@pytest.mark.slow
def test_line_of_200_megabytes(tmp_path: Path) -> None:
    """Guards against a book of a line costing time or memory that grows faster than its size."""
    path = tmp_path / "a.jsonl"
    text = "long words " * (200_000_000 // 11)
    path.write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "after"}) + "\n")
    documents, num_parts = read(path, 8 << 20)
    assert num_parts > 20 and [len(d.text) for d in documents] == [len(text), 5]
