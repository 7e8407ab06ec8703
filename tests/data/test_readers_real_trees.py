"""Folders as they are found: links, other files among the data, files put together, names that are not UTF-8."""

from __future__ import annotations

import gzip
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from longspan.core.errors import DataError
from longspan.core.files import atomic_dir
from longspan.data.exchange.token_documents import find_token_files
from longspan.data.readers import ReadReport, read_documents
from longspan.data.store import Column, MDSWriter
from longspan.data.tokenize import tokenize_corpus
from longspan.data.tokenizer import Tokenizer
from longspan.data.verify import verify

Write = Callable[..., Path]


def read(*inputs: Path | str, **settings: object) -> tuple[list[tuple[str, str]], ReadReport]:
    """Return (source, text) of every document, and what was left out."""
    report = ReadReport()
    found = [(d.source, d.text) for d in read_documents(list(inputs), report=report, **settings)]  # type: ignore[arg-type]
    return found, report


def test_links_are_followed(tmp_path: Path, write_jsonl: Write) -> None:
    """Linked folders were passed over without a word, and so were links to nothing; loops must end."""
    write_jsonl("far/books/b.jsonl", {"text": "b"})
    write_jsonl("in/a.jsonl", {"text": "a"})
    write_jsonl("in/deep/c.jsonl", {"text": "c"})
    links = {
        "books": "far/books",
        "gone.jsonl": "nowhere",
        "deep/up": "in",
        "again": "in/deep",
        "d.jsonl": "in/a.jsonl",
    }
    for name, target in links.items():
        (tmp_path / "in" / name).symlink_to(tmp_path / target)
    found, report = read(tmp_path / "in")
    assert found == [("a", "a"), ("books", "b"), ("deep", "c")], "a real path goes before a link to it"
    assert (report.dead_links, report.linked_loops, report.duplicate_files) == (1, 2, 1)
    for name in ("gone.jsonl", "deep/up", "again", "d.jsonl"):
        assert name in str(report.warning())
    with pytest.raises(DataError, match="is a link to nothing"):
        read(tmp_path / "in/gone.jsonl")
    assert read(str(tmp_path / "in/*.jsonl"))[1].dead_links == 1
    # A link to the folder around the input leads to more, but not to the input again.
    (tmp_path / "in/deep/up").unlink()
    (tmp_path / "in/deep/up").symlink_to(tmp_path)
    found, report = read(tmp_path / "in/deep")
    assert sorted(text for _, text in found) == ["a", "b", "c"]


def test_the_same_input_twice_is_said(tmp_path: Path, write_jsonl: Write) -> None:
    """An input given twice was read once, without a word."""
    path = write_jsonl("in/a.jsonl", {"text": "a"})
    found, report = read(tmp_path / "in", path, path)
    assert [text for _, text in found] == ["a"] and report.duplicate_files == 2
    # A pattern that stands for a folder and what is in it gives nothing twice.
    assert read(f"{tmp_path}/in/**")[1].duplicate_files == 0


def test_token_files_behind_links(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Linked folders of tokens were passed over as those of texts were."""
    (tmp_path / "far").mkdir()
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "far/a.npy", np.array([1, 3, 7, 8, 9]))
    (tmp_path / "in/books").symlink_to(tmp_path / "far")
    (tmp_path / "in/gone.npy").symlink_to(tmp_path / "nowhere")
    assert find_token_files(tmp_path / "in", (".npy",)) == [(f"{tmp_path}/in/books/a.npy", "books")]
    assert "1 links to nothing" in caplog.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("Pipfile", b'[[source]]\nurl = "x"\n'),
        ("server", b"[2026-01-02 10:00] start\n[2026-01-02 10:01] stop\n"),
        ("notes", b"[1] A footnote.\n"),
        ("block", b"{\n  int x;\n}\n"),
        ("article.gz", gzip.compress(b"[[Category: towns]] text", mtime=0)),
        ("deep", b"[" * 5000),
        ("quoted", b'["' + b"never closed " * 9000),
        ("tsconfig.json", b'{\n  // comment\n  "a": 1,\n}\n'),
        ("comment.json", b'// first\n{\n  "a": 1\n}\n'),
        ("points.json", b"[[1, 2], [3, 4]]"),
        ("app.json", b'{"name": "x"}\n// more\n'),
        ("magic", b"PAR1 is how a table begins"),
        ("erased", b"\xff" * 600),
        ("disk.mds", b"a picture of a disk"),
        ("twice.csv", b"a,a\n1,2\n"),
        ("open.csv", b'"never closed\n' * 3),
        ("translation.ts", b"\xff\xfe\x00not text"),
    ],
)
def test_a_file_that_is_something_else_ends_nothing(tmp_path: Path, name: str, content: bytes) -> None:
    """A log that begins like JSON, or settings with comments, ended the reading of a whole tree."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / name).write_bytes(content)
    (tmp_path / "x" / "a.txt").write_text("read")
    found, report = read(tmp_path)
    assert found == [("x", "read")] and name in str(report.warning())


@pytest.mark.parametrize("cut", [False, True])
def test_json_without_a_name_is_still_found(tmp_path: Path, cut: bool) -> None:
    """Telling logs from JSON must not lose data whose first 64 KiB end inside a record."""
    texts = ["x" * 100_000 if cut else "short", "two"]
    (tmp_path / "array").write_text(json.dumps([{"text": text} for text in texts], indent=1))
    (tmp_path / "lines").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "pretty").write_text("\n".join(json.dumps({"text": text}, indent=1) for text in texts))
    assert [text for _, text in read(tmp_path)[0]] == texts * 3


def test_a_record_of_another_shape_first(tmp_path: Path, write_jsonl: Write) -> None:
    """The first record of a JSON array decided that the whole file holds no data."""
    rows = [None, {"meta": 1}, {"text": "a"}, {"text": 5}, {"text": "b"}]
    (tmp_path / "a.json").write_text(json.dumps(rows)[:-1] + ', {"text": "c", "n": ' + "9" * 5000 + "}]")
    found, report = read(tmp_path / "a.json")
    assert [text for _, text in found] == ["a", "b"]
    assert (report.broken_records, report.missing_fields, report.wrong_types) == (2, 1, 1)
    with pytest.raises(DataError, match=r"a\.json: record 1: a JSON NoneType"):
        read(tmp_path / "a.json", strict=True)


def test_damaged_text_files_are_counted(tmp_path: Path) -> None:
    """One text that cannot be unpacked is one record, and ended the reading of all others."""
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"whole" * 1000)[:30])
    (tmp_path / "b.txt").write_text("read")
    found, report = read(tmp_path)
    assert [text for _, text in found] == ["read"] and report.broken_records == 1
    with pytest.raises(DataError, match=r"a\.txt\.gz.*damaged"):
        read(tmp_path, strict=True)


def test_cards_of_data_sets(tmp_path: Path, write_jsonl: Write, caplog: pytest.LogCaptureFixture) -> None:
    """The README.md of a downloaded data set became a training document, or was warned of; that of a program is one."""
    caplog.set_level(logging.INFO)
    write_jsonl("set/data/a.jsonl", {"text": "a"})
    (tmp_path / "set/README.md").write_text("# card")
    (tmp_path / "set/LICENSE.txt").write_text("free")
    assert read(tmp_path / "set")[0] == [("data", "a")]
    assert read(tmp_path)[0] == [("set", "a")]
    assert "2 cards of data sets" in caplog.text and "WARNING" not in caplog.text
    (tmp_path / "code").mkdir()
    for name in ("README.md", "main.py"):
        (tmp_path / "code" / name).write_text(name)
    (tmp_path / "code/package.json").write_text('{"name": "x"}')
    found, report = read(tmp_path)
    assert found == [("code", "README.md"), ("code", "main.py"), ("set", "a")] and report.cards == 2
    assert "WARNING" in caplog.text
    # With a script beside it, its own head tells.
    (tmp_path / "set/load.py").write_text("code")
    (tmp_path / "set/README.md").write_text("---\nlicense: mit\nconfigs:\n- config_name: x\n---\n# card")
    assert [text for _, text in read(tmp_path / "set")[0]] == ["free", "a", "code"]
    with pytest.raises(DataError, match="no field 'messages'"):
        read(tmp_path / "set/README.md", messages_field="messages")


def test_tsv_has_no_quotes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Quotes in TSV joined rows to one and lost others."""
    rows = [
        "first",
        '"Hello, he said',
        "third",
        'and "bye"',
        '"Well',
        "line\u2028sep\x85\x1c",
        'last"',
        '"whole"',
    ]
    path = tmp_path / "a.tsv"
    path.write_bytes(
        "".join(f"{n}\t{row}\r\n" for n, row in enumerate(["text", *rows])).encode().rstrip(b"\r\n")
    )
    with caplog.at_level(logging.WARNING):
        assert [text for _, text in read(path)[0]] == rows
    assert "1 lines have a field in quotes" in caplog.text
    path.write_text("id\ttext\n1\ta\tb\n\n2\n\ufeffid\ttext\n3\tgood\n", encoding="utf-8")
    found, report = read(path)
    assert [text for _, text in found] == ["good"] and report.broken_records == 3
    # The same under the name .csv, and with quoted names: tabs between fields, quotes as in CSV.
    for name, header in (("b.csv", "id\ttext"), ("b.tsv", '"id"\t"text"')):
        (tmp_path / name).write_text(header + '\n1\t"two\nlines"\n2\t"a ""b"", c"\n')
        assert [text for _, text in read(tmp_path / name)[0]] == ["two\nlines", 'a "b", c'], name


def test_csv_with_carriage_returns_alone(tmp_path: Path) -> None:
    """Lines of CSV may end as on old machines."""
    (tmp_path / "a.csv").write_bytes(b"text\rone\rtwo\r")
    assert [text for _, text in read(tmp_path)[0]] == ["one", "two"]


def test_shards_of_several_writers_and_damaged_values(tmp_path: Path) -> None:
    """A shard without the column of text, or one value that is no JSON, ended the reading of an MDS folder."""
    shards = []
    for name, column, value in (("a", Column("text", "str"), "good"), ("b", Column("ids", "int"), 5)):
        writer = MDSWriter(tmp_path / "in", [column], size_limit=1 << 20)
        (tmp_path / "in").mkdir(exist_ok=True)
        for _ in range(2):
            writer.write({column.name: value})
        writer.finish()
        (shard,) = json.loads((tmp_path / "in/index.json").read_text())["shards"]
        (tmp_path / "in/shard.00000.mds").rename(tmp_path / "in" / name)
        shards.append({**shard, "raw_data": {**shard["raw_data"], "basename": name}})
    (tmp_path / "in/index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    found, report = read(tmp_path / "in")
    assert [text for _, text in found] == ["good", "good"] and report.missing_fields == 2
    (tmp_path / "json").mkdir()
    writer = MDSWriter(tmp_path / "json", [Column("row", "json")], size_limit=1 << 20)
    writer.write({"row": {"text": "first"}})
    writer.write({"row": {"text": "second"}})
    writer.finish()
    path = tmp_path / "json/shard.00000.mds"
    path.write_bytes(path.read_bytes().replace(b'"first"', b'"first '))
    found, report = read(tmp_path / "json", text_field="row.text")
    assert [text for _, text in found] == ["second"] and report.broken_records == 1


def test_dates_that_python_has_not(tmp_path: Path) -> None:
    """One value of a table that cannot become an object of Python ended in a traceback."""
    days = pa.array([1 << 40, 0], pa.int64()).cast(pa.timestamp("s"))
    pq.write_table(pa.table({"text": ["a", "b"], "r": ["x", "x"], "n": days}), tmp_path / "a.parquet")
    found, report = read(tmp_path / "a.parquet", group_by="r", order_by="n")
    assert [text for _, text in found] == ["b"] and report.broken_records == 1


def test_lines_lost_with_a_quote_are_counted(tmp_path: Path) -> None:
    """A quote that is never closed takes the rest of a file, which was counted as one record."""
    (tmp_path / "a.csv").write_text('text\ngood\n"open\n1\n2\n3\n')
    found, report = read(tmp_path / "a.csv")
    assert [text for _, text in found] == ["good"] and "4 lines are lost with it" in str(report.warning())


def test_byte_order_marks_in_the_middle(tmp_path: Path) -> None:
    """Files that begin with a mark, put together, lost the first record of each but the first."""
    mark = b"\xef\xbb\xbf"
    lines = mark + b'{"text": "a"}\n'
    (tmp_path / "a.jsonl").write_bytes(lines + lines)
    (tmp_path / "a.json").write_bytes((mark + b'{\n"text": "a"\n}\n') * 2)
    for name in ("a.jsonl", "a.json"):
        assert [text for _, text in read(tmp_path / name)[0]] == ["a", "a"], name


def test_only_line_feeds_end_lines(tmp_path: Path, write_jsonl: Write) -> None:
    """Other line separators may stand inside a JSON string, and a last line needs no end."""
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"
    line = json.dumps({"text": text}, ensure_ascii=False).encode()
    (tmp_path / "a.jsonl").write_bytes(line + b"\r\n" + line)
    (tmp_path / "a.json").write_bytes(b"[" + line + b"\n,\n" + line + b"]")
    (tmp_path / "a.csv").write_text(f'text\n"{text}"\n{text}', encoding="utf-8")
    for name in ("a.jsonl", "a.json", "a.csv"):
        assert [found for _, found in read(tmp_path / name)[0]] == [text, text], name
    (tmp_path / "list").write_text(f"a.jsonl\n{tmp_path}/\u2028.jsonl", encoding="utf-8")
    (tmp_path / "\u2028.jsonl").write_text('{"text": "named"}')
    assert ("\u2028", "named") in read(f"@{tmp_path}/list")[0]


def test_long_windows_of_zstd(tmp_path: Path) -> None:
    """A file written with `zstd --long=31` was called damaged."""
    settings = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=settings)
    stream = compressor.compressobj()  # without a known size, the frame names the whole window
    line = b'{"text": "far"}\n'
    (tmp_path / "a.jsonl.zst").write_bytes(stream.compress(line) + stream.flush())
    assert read(tmp_path / "a.jsonl.zst")[0] == [("a", "far")]


def test_names_that_are_not_utf8(
    tmp_path: Path, tokenizer: Tokenizer, write_jsonl: Write, caplog: pytest.LogCaptureFixture
) -> None:
    """A file's name that is not UTF-8 ended in a traceback when the store was sealed, or the message was passed on."""
    names = [os.fsdecode(b"caf\xe9.jsonl"), os.fsdecode(b"gr\xfc\xdfe")]
    write_jsonl(f"in/{names[0]}", {"text": "one"}, b"{", {"text": "two"})
    write_jsonl(f"in/{names[1]}/b.txt", {"text": "three"})
    table = pa.table({"text": ["four"]})
    with open(tmp_path / "in" / os.fsdecode(b"\xe9.parquet"), "wb") as file:
        pq.write_table(table, file)
    with (
        open(tmp_path / "in" / os.fsdecode(b"\xe8.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as writer,
    ):
        writer.write_table(table)
    store = tokenize_corpus([tmp_path / "in"], tokenizer, tmp_path / "out")
    assert sorted(store.lengths.source_names) == ["caf\ufffd", "gr\ufffd\ufffde", "\ufffd"]
    assert store.manifest.config["inputs"][0]["name"] == names[0], "names come back as they are"
    assert tokenize_corpus([tmp_path / "in"], tokenizer, tmp_path / "out").fingerprint == store.fingerprint
    grouped = tokenize_corpus(
        [tmp_path / "in" / names[1]], tokenizer, tmp_path / "g", group_by="path", order_by="path"
    )
    assert len(grouped) == 1
    assert verify(tmp_path / "out", against=[str(tmp_path / "in")]).missing == []
    assert "caf\ufffd.jsonl:2" in caplog.text
    caplog.text.encode()


def test_stores_below_the_input_are_passed_over(
    tmp_path: Path, tokenizer: Tokenizer, write_jsonl: Write
) -> None:
    """A job that wrote into its input took its own store for data the next time."""
    write_jsonl("in/a.jsonl", {"text": "one"})
    out = tmp_path / "in/store"
    first = tokenize_corpus([tmp_path / "in"], tokenizer, out)
    again = tokenize_corpus([tmp_path / "in"], tokenizer, out)
    assert again.fingerprint == first.fingerprint
    other = tokenize_corpus([tmp_path / "in"], tokenizer, tmp_path / "in/other")
    assert other.fingerprint == first.fingerprint and other.manifest.counts["token_stores"] == 1
    with pytest.raises(DataError, match=r"no input files(.|\n)*holds tokens, no text"):
        read(out)


@pytest.mark.parametrize("there", [True, False])
def test_out_may_be_a_link(tmp_path: Path, tokenizer: Tokenizer, write_jsonl: Write, there: bool) -> None:
    """A link to a folder on a larger disk was an error when all the work was done."""
    write_jsonl("in/a.jsonl", {"text": "one"})
    place = tmp_path / "in/large"
    (tmp_path / "store").symlink_to(place)
    (tmp_path / "rows").symlink_to(tmp_path / "in/rows")
    if there:
        place.mkdir()
    first = tokenize_corpus([tmp_path / "in"], tokenizer, tmp_path / "store")
    assert tokenize_corpus([tmp_path / "in"], tokenizer, tmp_path / "store").fingerprint == first.fingerprint
    with atomic_dir(tmp_path / "rows") as aside:
        (aside / "row").touch()
    assert (tmp_path / "store").is_symlink() and (place / "index.json").is_file()
    assert (tmp_path / "rows").is_symlink() and (tmp_path / "in/rows/row").is_file()


def test_a_field_that_nothing_has_is_refused_at_once(
    tmp_path: Path, tokenizer: Tokenizer, write_jsonl: Write
) -> None:
    """A misspelt field must not cost the reading of a whole corpus, nor leave anything behind."""
    write_jsonl("in/a.jsonl", *({"text": "x"} for _ in range(20)))
    write_jsonl("in/b.jsonl", {"body": "y"})
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: no field 'txt'; did you mean 'text'\?(.|\n)*--text-field"
    ):
        tokenize_corpus([tmp_path / "in"], tokenizer, tmp_path / "out", text_field="txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    store = tokenize_corpus([tmp_path / "in"], tokenizer, tmp_path / "out", text_field="body")
    assert len(store) == 1 and store.manifest.counts["missing_fields"] == 20
