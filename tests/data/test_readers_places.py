"""Where documents may lie: lists, trees, saved and hub data sets, addresses, files whose name says nothing."""

from __future__ import annotations

import gzip
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

from longspan.core.errors import ArgumentError, DataError, MissingDependencyError
from longspan.data.readers import Fields, ReadReport, list_inputs, plan_parts, read_documents, read_part
from longspan.data.readers.hub import choose_split, parse_address
from tests.data.hub_stand_in import hub_at

Write = Callable[..., Path]


def texts(*inputs: str | Path, **settings: Any) -> list[tuple[str, str]]:
    """Return (source, text) of every document."""
    return [(d.source, d.text) for d in read_documents(list(inputs), **settings)]


def write_arrow(path: Path, *rows: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": list(rows)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def write_saved(folder: Path, *shards: list[str]) -> None:
    """Write what `datasets.Dataset.save_to_disk` writes, and a cache file it leaves there."""
    names = [f"data-{number:05}-of-{len(shards):05}.arrow" for number in range(len(shards))]
    for name, rows in zip(names, shards):
        write_arrow(folder / name, *rows)
    write_arrow(folder / "cache-1f0c9a2e.arrow", "stale")
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "x", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"text": {"dtype": "string"}}}))


def test_list_of_inputs(tmp_path: Path, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against entries being looked for in the current folder, and comments being taken for files."""
    write_jsonl("lists/here.jsonl", {"text": "here"})
    write_jsonl("far/away.jsonl", {"text": "away"})
    (tmp_path / "lists/more.txt").write_text("../far/*.jsonl")
    (tmp_path / "lists/files.txt").write_text(
        f"# the corpus\n\nhere.jsonl\n@more.txt\n  {tmp_path}/far/away.jsonl\r\n"
    )
    monkeypatch.chdir("/")
    assert texts(f"@{tmp_path}/lists/files.txt") == [("away", "away"), ("here", "here")]
    (tmp_path / "lists/more.txt").write_text("@files.txt")
    with pytest.raises(DataError, match="names itself"):
        texts(f"@{tmp_path}/lists/files.txt")
    (tmp_path / "lists/more.txt").write_text("no.jsonl")
    with pytest.raises(DataError, match=r"lists/no\.jsonl does not exist"):
        texts(f"@{tmp_path}/lists/files.txt")
    with pytest.raises(DataError, match="cannot read"):
        texts(f"@{tmp_path}/nothing.txt")


def test_folder_of_folders_in_many_formats(tmp_path: Path, write_jsonl: Write) -> None:
    """Guards against sources named after shards, and against one format deciding for all files."""
    write_jsonl("corpus/book/part/0.jsonl", {"text": "1"})
    write_saved(tmp_path / "corpus/arxiv", ["2", "3"], ["4"])
    pq.write_table(pa.table({"text": ["5"]}), tmp_path / "corpus/code-00000-of-00002.parquet")
    pq.write_table(pa.table({"text": ["6"]}), tmp_path / "corpus/code-00001-of-00002.parquet")
    pq.write_table(pa.table({"text": ["7"]}), tmp_path / "corpus/train-00000-of-00001.parquet")
    (tmp_path / "corpus/wiki").mkdir()
    (tmp_path / "corpus/wiki/a.csv").write_text("text\n8\n")
    (tmp_path / "corpus/logo.png").write_bytes(b"\x89PNG")
    (tmp_path / "corpus/book/cover.jpg").write_bytes(b"\xff\xd8\xff\xe0" * 9)
    report = ReadReport()
    assert sorted(texts(tmp_path / "corpus", report=report)) == [
        ("arxiv", "2"), ("arxiv", "3"), ("arxiv", "4"), ("book", "1"), ("code", "5"), ("code", "6"),
        ("corpus", "7"), ("wiki", "8"),
    ]  # fmt: skip
    assert report.ignored_files == 2
    assert "2 files of unknown kind" in str(report.warning())
    assert "logo.png" in str(report.warning()) and "cover.jpg" in str(report.warning())


def test_saved_data_sets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against test data being trained on, stale cache files, and a lost shard going unnoticed."""
    for split, rows in {"train": ["a"], "test": ["t"]}.items():
        write_saved(tmp_path / "set" / split, rows)
    (tmp_path / "set/dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    with caplog.at_level(logging.INFO):
        assert texts(tmp_path / "set") == [("set", "a")]
    assert "the split train of train, test is read" in caplog.text
    assert texts(tmp_path) == [("set", "a")], "the same below another folder"
    assert texts(tmp_path / "set/test") == [("test", "t")]
    (tmp_path / "set/dataset_dict.json").write_text(json.dumps({"splits": ["dev", "test"]}))
    with pytest.raises(DataError, match=r"none of them called train(.|\n)*name one"):
        texts(tmp_path / "set")
    write_saved(tmp_path / "two", ["a"], ["b"])
    (tmp_path / "two/data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"without its file data-00001-of-00002\.arrow"):
        texts(tmp_path / "two")


def test_format_by_content(tmp_path: Path, write_jsonl: Write) -> None:
    """Guards against files without a telling name being left out, and pictures being read as text."""
    line = b'{"text": "x"}\n'
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "table")
    write_arrow(tmp_path / "stream.bin", "x")
    cases = {
        "lines": line,
        "array": b'[{"text": "x"}]',
        "packed": zstandard.ZstdCompressor().compress(line),
        "dump.gz": gzip.compress(line),
        "named.data": line,
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    for name in (*cases, "table", "stream.bin"):
        (document,) = read_documents([tmp_path / name])
        assert (document.text, document.source) == ("x", name.partition(".")[0]), name
    # In a folder the ending of named.data says that it is something else.
    assert len(texts(tmp_path)) == 6
    (tmp_path / "noise").write_bytes(os.urandom(100))
    with pytest.raises(DataError, match=r"no reader for .*noise"):
        texts(tmp_path / "noise")


def test_several_inputs_and_addresses(tmp_path: Path, write_jsonl: Write) -> None:
    """Guards against a remote tree being read otherwise than the same tree on disk."""
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/corpus/book/a.jsonl", b'{"text": "1"}\n')
    memory.pipe_file("/corpus/wiki.jsonl.zst", zstandard.ZstdCompressor().compress(b'{"text": "2"}\n'))
    memory.pipe_file("/corpus/.hidden.jsonl", b'{"text": "3"}\n')
    write_jsonl("local.jsonl", {"text": "0"})
    pq.write_table(pa.table({"text": ["4", "5"]}), tmp_path / "t.parquet", row_group_size=1)
    memory.pipe_file("/corpus/book/t.parquet", (tmp_path / "t.parquet").read_bytes())
    write_arrow(tmp_path / "s.arrow", "6")
    memory.pipe_file("/corpus/book/s.arrow", (tmp_path / "s.arrow").read_bytes())
    found = texts("memory://corpus", tmp_path / "local.jsonl")
    assert sorted(found) == [
        ("book", "1"), ("book", "4"), ("book", "5"), ("book", "6"), ("local", "0"), ("wiki", "2"),
    ]  # fmt: skip
    assert texts("memory://corpus/*.zst") == [("wiki", "2")]
    report = ReadReport()
    parts = list(plan_parts(list_inputs(["memory://corpus"], report=report), part_bytes=1))
    assert len(parts) > 10
    in_parts = [d.text for part in parts for d in read_part(part, Fields(), report=report)]
    assert sorted(in_parts) == ["1", "2", "4", "5", "6"]
    memory.pipe_file("/bad.jsonl", b'{"text": "1"}\n{broken\n')
    with pytest.raises(DataError, match=r"memory:///bad\.jsonl:2: not valid JSON"):
        texts("memory://bad.jsonl", strict=True)


def test_files_that_are_read_by_ranges(tmp_path: Path) -> None:
    """Guards against the files of S3, GCS and the hub, which are no ordinary streams, being unreadable."""

    class Ranged(AbstractBufferedFile):
        def _fetch_range(self, start: int, end: int) -> bytes:
            return self.fs.cat_file(self.path, start, end)

    class Store(MemoryFileSystem):
        protocol = "ranged"
        cachable = False

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return MemoryFileSystem._strip_protocol(path.replace("ranged://", "memory://"))

        def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
            return Ranged(self, path, mode, block_size=100, size=self.info(path)["size"])

    fsspec.register_implementation("ranged", Store, clobber=True)
    lines = b"".join(json.dumps({"text": f"{number} " * 30}).encode() + b"\n" for number in range(20))
    table = pa.table({"text": [f"{number} " * 30 for number in range(20)]})
    pq.write_table(table, tmp_path / "t.parquet")
    write_arrow(tmp_path / "s.arrow", *table["text"].to_pylist())
    memory = fsspec.filesystem("memory")
    for name, content in {
        "a.jsonl": lines,
        "b.jsonl.gz": gzip.compress(lines),
        "c.jsonl.zst": zstandard.ZstdCompressor().compress(lines),
        "d.parquet": (tmp_path / "t.parquet").read_bytes(),
        "e.arrow": (tmp_path / "s.arrow").read_bytes(),
        "f.csv": b"text\n" + b"".join(b"%d\n" % number for number in range(20)),
    }.items():
        memory.pipe_file(f"/ranged/{name}", content)
        report = ReadReport()
        parts = plan_parts(list_inputs([f"ranged://ranged/{name}"], report=report), part_bytes=500)
        found = [d.text.split()[0] for part in parts for d in read_part(part, Fields(), report=report)]
        assert found == [str(number) for number in range(20)], name


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Path]:
    """A folder that stands for the hub."""
    with hub_at(tmp_path / "hub") as folder:
        yield folder


def test_hub_data_sets(hub: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against the README being read as a document, and against test data being trained on."""
    data = hub / "datasets/org/set/data"
    data.mkdir(parents=True)
    for split, rows in {"train": ["a", "b"], "validation": ["v"]}.items():
        pq.write_table(pa.table({"text": rows}), data / f"{split}-00000-of-00001.parquet")
    (data.parent / "README.md").write_text("# about")
    (data.parent / "extra").mkdir()
    (data.parent / "extra/notes.jsonl").write_text('{"text": "n"}\n')
    with caplog.at_level(logging.INFO):
        assert texts("hf://org/set") == [("set", "a"), ("set", "b")]
    assert "1 of 3 data files are read" in caplog.text
    assert texts("hf://datasets/org/set") == texts("hf://org/set/train")
    assert texts("hf://org/set/validation") == [("set", "v")]
    assert texts("hf://org/set/extra") == [("notes", "n")]
    assert texts("hf://org/set/extra/notes.jsonl") == [("notes", "n")]
    assert texts("hf://org/set/data/val*") == [("validation", "v")]
    with pytest.raises(DataError, match=r"nothing to read at hf://org/set/test"):
        texts("hf://org/set/test")
    with pytest.raises(DataError, match=r"(cannot list|nothing to read at) hf://org/other"):
        texts("hf://org/other")


def test_hub_revision(hub: Path) -> None:
    """Guards against the revision being lost on the way to the files."""
    for revision, text in {"": "main", "@v2": "two", "@refs/convert/parquet": "made"}.items():
        folder = hub / f"datasets/org/set{revision}"
        folder.mkdir(parents=True)
        (folder / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    assert texts("hf://org/set@v2") == [("set", "two")]
    assert texts("hf://org/set@refs/convert/parquet") == [("set", "made")]
    assert parse_address("hf://org/set@refs/convert/parquet/default/train").path == "default/train"
    with pytest.raises(ArgumentError, match="not the address of a data set"):
        texts("hf://set")


def test_split_is_a_word() -> None:
    """Guards against "constraints" or "test" inside other words being taken for splits."""
    paths = ["/constrain.jsonl", "/data/train-00000-of-00001.parquet", "/en/test.jsonl", "/latest.jsonl"]
    assert choose_split(paths, "") == paths[1:2]
    assert choose_split(paths, "test") == paths[2:3]
    assert choose_split(paths[2:], "") == paths[2:]


def test_missing_package_is_named() -> None:
    """Guards against an ImportError where one line says what to install."""
    try:
        import s3fs  # noqa: F401
    except ImportError:
        with pytest.raises(MissingDependencyError, match=r"longspan\[s3\]"):
            texts("s3://bucket/prefix")
