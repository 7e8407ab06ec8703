"""Readers: canonical order, sources, and what happens to broken input."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from longspan.core.errors import DataError
from longspan.data.readers import READERS, ReadReport, read_documents
from longspan.data.readers.base import InputFile, RawRecord, SkippedRecordError
from longspan.data.readers.files import extension_of
from longspan.data.readers.jsonl import parse_line

Write = Callable[..., Path]


def test_order_depends_on_paths_alone(tmp_path: Path, write_jsonl: Write) -> None:
    """Guards against listing order or argument order deciding the order of documents."""
    write_jsonl("c/b.jsonl", {"text": "3"}, {"text": "4"})
    write_jsonl("c/a.jsonl", {"text": "1"}, {"text": "2"})
    write_jsonl("c/z/a.jsonl", {"text": "5"})
    expected = ["1", "2", "3", "4", "5"]
    assert [document.text for document in read_documents([tmp_path / "c"])] == expected
    shuffled = [tmp_path / "c/z", tmp_path / "c/b.jsonl", tmp_path / "c/a.jsonl", tmp_path / "c/b.jsonl"]
    assert [document.text for document in read_documents(shuffled)] == expected, (
        "a file named twice counts once"
    )


def test_source_from_the_place_of_the_file(tmp_path: Path, write_jsonl: Write) -> None:
    """Guards against one source per text file, which would make mixtures meaningless."""
    write_jsonl("corpus/arxiv.jsonl", {"text": "a"})
    write_jsonl("corpus/book/part/1.jsonl", {"text": "b"})
    for name in ("code/x/one.py", "note.txt"):
        (tmp_path / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "corpus" / name).write_text(name)
    sources = {Path(d.path).name: d.source for d in read_documents([tmp_path / "corpus"])}
    assert sources == {"arxiv.jsonl": "arxiv", "1.jsonl": "book", "one.py": "code", "note.txt": "corpus"}
    assert next(read_documents([tmp_path / "corpus/book/part/1.jsonl"])).source == "1"


def test_source_and_text_from_dotted_fields(write_jsonl: Write) -> None:
    """Guards against nested metadata of released corpora being out of reach."""
    path = write_jsonl("a.jsonl", {"doc": {"body": "x"}, "meta": {"redpajama_set_name": "RedPajamaBook"}})
    (document,) = read_documents([path], text_field="doc.body", source_field="meta.redpajama_set_name")
    assert (document.text, document.source, document.position) == ("x", "RedPajamaBook", 0)
    path = write_jsonl("b.jsonl", {"meta.name": "flat", "text": "x"})
    assert next(read_documents([path], source_field="meta.name")).source == "flat"


def test_missing_field_names_line_field_and_keys(write_jsonl: Write) -> None:
    """Guards against a typo in --text-field reading nothing without a word."""
    path = write_jsonl("a.jsonl", {"text": "fine"}, {"content": "x", "id": 1})
    with pytest.raises(DataError, match=r"a\.jsonl:2: no field 'text'(.|\n)*content, id"):
        list(read_documents([path], strict=True))
    with pytest.raises(DataError, match=r"a\.jsonl:1: no field 'texts'; did you mean 'text'"):
        list(read_documents([path], text_field="texts"))
    with pytest.raises(DataError, match=r"a\.jsonl:1: no field 'text\.name'"):
        list(read_documents([path], source_field="text.name"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": 5, "s": "b"}, "'text' is not text"),
        ({"text": "x", "s": [1]}, "does not name a source"),
        ({"text": "x", "s": ""}, "does not name a source"),
        ({"text": "x", "s": None}, "does not name a source(.|\\n)*null"),
        ({"text": "abc", "s": "b", "loss_weights": [[0, 4, 1]]}, "0 <= start <= end <= 3"),
        ({"text": "abc", "s": "b", "loss_weights": [[0, 2, 256]]}, "weight 0..255"),
        ({"text": "abc", "s": "b", "loss_weights": [[0, 2, True]]}, "loss_weights"),
        ({"text": "abc", "s": "b", "loss_weights": "all"}, "loss_weights"),
    ],
)
def test_record_of_another_shape(write_jsonl: Write, record: object, message: str) -> None:
    """Guards against wrong types flowing on as text, sources or weights."""
    path = write_jsonl("a.jsonl", {"text": "x", "s": "b"}, record, {"text": "y", "s": "b"})
    with pytest.raises(DataError, match=rf"a\.jsonl:2: (.|\n)*{message}"):
        list(read_documents([path], source_field="s", strict=True))
    report = ReadReport()
    assert [d.text for d in read_documents([path], source_field="s", report=report)] == ["x", "y"]
    assert (report.wrong_types, report.num_skipped) == (1, 1)
    assert re.search(rf"a\.jsonl:2: (.|\n)*{message}", str(report.warning()))


BROKEN = [
    (b'{"text": "cut', "broken_records"),
    (b"[1, 2]", "broken_records"),
    (b"[" * 100_000, "broken_records"),
    (b'{"text": "\xff\xfe"}', "invalid_text"),
    (b'{"text": "half \\ud83d"}', "invalid_text"),
    (b'{"text": ""}', "empty_documents"),
    (b'{"text": null}', "empty_documents"),
]


@pytest.mark.parametrize(("line", "counter"), BROKEN)
def test_broken_record_is_skipped_and_counted(
    write_jsonl: Write, caplog: pytest.LogCaptureFixture, line: bytes, counter: str
) -> None:
    """Guards against one bad line ending a corpus, and against it vanishing without a count."""
    path = write_jsonl("a.jsonl", {"text": "first"}, line, b"", {"text": "last"})
    report = ReadReport()
    with caplog.at_level(logging.WARNING):
        texts = [(d.text, str(d.place)) for d in read_documents([path], report=report)]
    assert texts == [("first", f"{path}:1"), ("last", f"{path}:4")]
    assert (report.documents, getattr(report, counter), report.num_skipped) == (2, 1, 1)
    assert "a.jsonl:2" in caplog.text
    if counter != "empty_documents":
        with pytest.raises(DataError, match=r"a\.jsonl:2"):
            list(read_documents([path], strict=True))


def test_empty_files_and_empty_corpus(tmp_path: Path, write_jsonl: Write) -> None:
    """Guards against a crash on an empty file, and against an empty corpus passing for a result."""
    write_jsonl("a.jsonl")
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(DataError, match=r"no documents in 2 input files(.|\n)*a\.jsonl(.|\n)*b\.txt"):
        list(read_documents([tmp_path]))
    write_jsonl("c.jsonl", {"text": "x"})
    report = ReadReport()
    assert len(list(read_documents([tmp_path], report=report))) == 1
    assert report.empty_files == 2


def test_missing_and_unknown_inputs(tmp_path: Path) -> None:
    """Guards against inputs that silently contribute nothing."""
    (tmp_path / "a.xyz").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="does not exist"):
        list(read_documents([tmp_path / "no"]))
    with pytest.raises(DataError, match=r"no reader for .*a\.xyz(.|\n)*\.jsonl(.|\n)*ending"):
        list(read_documents([tmp_path / "a.xyz"]))
    with pytest.raises(DataError, match="matches no file"):
        list(read_documents([str(tmp_path / "*.jsonl")]))
    with pytest.raises(DataError, match="no input files"):
        list(read_documents([tmp_path / "empty"]))


def test_compressed_and_remote(tmp_path: Path) -> None:
    """Guards against compressed files being read as their bytes, or only the first frame of several."""
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in ("one", "two", "three")]
    data = b"".join(lines)
    frames = b"".join(map(zstandard.ZstdCompressor().compress, lines))
    for name, content in {
        "a.jsonl.gz": gzip.compress(data),
        "b.jsonl.zst": frames,
        "c.jsonl.bz2": bz2.compress(data),
        "d.jsonl": b"\xef\xbb\xbf" + data,
    }.items():
        (tmp_path / name).write_bytes(content)
        assert [d.text for d in read_documents([tmp_path / name])] == ["one", "two", "three"], name
    remote = list(read_documents([f"file://{tmp_path}"]))
    assert len(remote) == 12
    assert {d.source for d in remote} == {"a", "b", "c", "d"}


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl.bz2"])
def test_cut_compressed_file_is_counted(tmp_path: Path, name: str) -> None:
    """Guards against the lost half of a cut download going unnoticed."""
    data = b"".join(json.dumps({"text": str(n**9)}).encode() + b"\n" for n in range(2000))
    compress = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress, "bz2": bz2.compress}
    whole = compress[name.rpartition(".")[2]](data)
    for content in (whole[: len(whole) // 2], b"not compressed at all"):
        (tmp_path / name).write_bytes(content)
        report = ReadReport()
        with contextlib.suppress(DataError):  # nothing at all was read
            list(read_documents([tmp_path / name], report=report))
        assert report.damaged_files == 1
        with pytest.raises(DataError, match="damaged or cut-off"):
            list(read_documents([tmp_path / name], strict=True))


def test_text_file_is_one_document(tmp_path: Path) -> None:
    """Guards against changed line ends or a byte-order mark in text."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    (document,) = read_documents(tmp_path)  # a single path is accepted as well
    assert document.text == "one\r\ntwo\n"


def test_every_extension_finds_its_reader() -> None:
    """Guards against a reader that no file name reaches."""
    assert all(extension_of(f"dir.x/name{extension}.zst") == extension for extension in READERS)


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "a", "n": 18446744073709551616}',
        '{"text": "a", "deep": {"list": [1, [-9223372036854775809]]}}',
        '{"text": "a", "n": [NaN, 1e400, -Infinity, -0.0, 1e-400, 12345678901234567890.5]}',
        '{"text": "a", "text": "b", "lone": "\\ud83d", "\\ud83d": 1}',
        '{"text": "a", "n": 1' + "0" * 5000 + "}",
        '{"text": "a"} x',
        '{"text": "\x01"}',
        '\ufeff{"text": "a"}',
        "[" * 5000,
        "",
    ],
)
def test_the_fast_parser_reads_what_pythons_does(line: str) -> None:
    """Integers beyond 64 bits became floats, and NaN, lone surrogates or other messages came with a parser."""
    record = RawRecord(InputFile("a.jsonl", ".jsonl", "", 0), 0, line.encode())
    try:
        wanted = repr(json.loads(line))
    except (ValueError, RecursionError) as error:
        with pytest.raises(SkippedRecordError) as raised:
            parse_line(record)
        assert str(raised.value) == f"not valid JSON ({error})"
    else:
        assert repr(parse_line(record)) == wanted
