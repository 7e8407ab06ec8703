"""Joining the files of a repository: nothing lost, a stable order, whatever the order of the input."""

from __future__ import annotations

import datetime
import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import DataError
from longspan.data.readers import ReadReport, grouping, read_documents

Write = Callable[..., Path]


def test_files_of_a_repository_become_one_document(write_jsonl: Write) -> None:
    """Guards against files in the order of the dump, and records without a repository being thrown together."""
    path = write_jsonl(
        "code.jsonl",
        {"text": "b()", "repo": "x", "path": "b.py"},
        {"text": "other", "repo": "y", "path": "m.c"},
        {"text": "a()", "repo": "x", "path": "a.py"},
        {"text": "alone", "repo": None, "path": "z"},
        {"text": "alone too", "repo": "", "path": "z"},
        {"text": "", "repo": "x", "path": "empty.py"},
    )
    report = ReadReport()
    found = list(read_documents([path], group_by="repo", order_by="path", report=report))
    assert sorted(d.text for d in found) == ["a()\n\nb()", "alone", "alone too", "other"]
    assert (report.documents, report.empty_documents) == (4, 1)
    assert {d.source for d in found} == {"code"}
    named = read_documents([path], group_by="repo", order_by="path", header_field="path")
    assert sorted(d.text for d in named)[0] == "# a.py\na()\n\n# b.py\nb()"
    assert "// m.c\nother" in {
        d.text for d in read_documents([path], group_by="repo", order_by="path", header_field="path")
    }


RECORDS = st.lists(
    st.tuples(st.sampled_from(["x", "y", "z", "caf\u00e9"]), st.integers(0, 3)), min_size=1, max_size=20
)


@settings(max_examples=30, deadline=None)
@given(records=RECORDS, seed=st.integers(0, 9))
def test_order_of_input_does_not_show(
    tmp_path_factory: pytest.TempPathFactory, records: list[tuple[str, int]], seed: int
) -> None:
    """Guards against groups or members in the order in which they were met, and against lost members."""
    folder = tmp_path_factory.mktemp("group")
    # Every record is another text, so that the order is told apart where `n` leaves it open.
    rows = [{"repo": repo, "n": n, "text": f"{repo}{n}-{index}"} for index, (repo, n) in enumerate(records)]
    shuffled = random.Random(seed).sample(rows, len(rows))
    for name, some in (("a", rows), ("b", shuffled)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    one, two = (
        [
            d.text.split("\n\n")
            for d in read_documents([folder / f"{name}.jsonl"], group_by="repo", order_by="n")
        ]
        for name in "ab"
    )
    assert [sorted(texts) for texts in one] == [sorted(texts) for texts in two]
    assert sorted(text for texts in one for text in texts) == sorted(row["text"] for row in rows)
    for texts in one + two:
        assert [text.split("-")[0] for text in texts] == sorted(text.split("-")[0] for text in texts)


def test_number_of_buckets_does_not_show(write_jsonl: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against the way texts are dealt to files deciding the order of documents."""
    path = write_jsonl("a.jsonl", *({"text": f"t{n}", "repo": f"r{n % 40}"} for n in range(100)))
    orders = []
    for count in (1, 4, 256):
        monkeypatch.setattr(grouping, "NUM_BUCKETS", count)
        orders.append([d.text for d in read_documents([path], group_by="repo")])
    assert orders[0] == orders[1] == orders[2] and len(orders[0]) == 40


def test_group_across_files_and_formats(tmp_path: Path, write_jsonl: Write) -> None:
    """Guards against a repository being cut where its shards are."""
    write_jsonl("corpus/a.jsonl", {"text": "2", "meta": {"repo": "x"}, "n": 2})
    table = pa.Table.from_pylist([{"text": "1", "meta": {"repo": "x"}, "n": 1}])
    pq.write_table(table, tmp_path / "corpus/b.parquet")
    (document,) = read_documents([tmp_path / "corpus"], group_by="meta.repo", order_by="n")
    assert document.text == "1\n\n2" and document.path.endswith("b.parquet")


def test_tree_of_text(tmp_path: Path) -> None:
    """Guards against a checked-out repository being readable only as single files."""
    for name in ("x/src/b.py", "x/a.py", "y/c.py"):
        (tmp_path / "code" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "code" / name).write_text(name)
    found = list(read_documents([tmp_path / "code"], group_by="folder", order_by="path", header_field="path"))
    assert sorted(d.text for d in found) == [
        "# x/a.py\nx/a.py\n\n# x/src/b.py\nx/src/b.py",
        "# y/c.py\ny/c.py",
    ]
    assert {d.source for d in found} == {"code"}, "the folder is the document, not the source"


def test_weights_move_with_their_text(write_jsonl: Write) -> None:
    """Guards against loss weights of a later file falling on an earlier one."""
    path = write_jsonl(
        "a.jsonl", {"text": "ab", "r": 1}, {"text": "cde", "r": 1, "loss_weights": [[0, 1, 0], [2, 3, 9]]}
    )
    (document,) = read_documents([path], group_by="r")
    assert document.weights is not None
    assert [(document.text[start:end], weight) for start, end, weight in document.weights] == [
        ("c", 0),
        ("e", 9),
    ]


@pytest.mark.parametrize(
    ("record", "arguments", "message"),
    [
        ({"text": "a"}, {"group_by": "repo"}, "no field 'repo'"),
        ({"text": "a", "repo": [1]}, {"group_by": "repo"}, "does not name a group"),
        ({"text": "a", "repo": "x", "n": []}, {"group_by": "repo", "order_by": "n"}, "does not order"),
    ],
)
def test_fields_that_do_not_group(write_jsonl: Write, record: object, arguments: dict, message: str) -> None:
    """Guards against everything landing in one group."""
    with pytest.raises(DataError, match=message):
        list(read_documents([write_jsonl("a.jsonl", record)], strict=True, **arguments))
    report = ReadReport()
    path = write_jsonl("b.jsonl", record, {"text": "good", "repo": "y", "n": 1})
    assert [d.text for d in read_documents([path], report=report, **arguments)] == ["good"]
    assert report.num_skipped == 1 and "b.jsonl:1" in str(report.warning())


def test_nothing_is_left_behind(tmp_path: Path, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against texts filling the disk after the reader stopped early, or after an error."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    path = write_jsonl("a.jsonl", {"text": "a", "repo": 1}, {"text": "b", "repo": 2}, {"text": "c"})
    with pytest.raises(DataError):
        list(read_documents([path], group_by="repo", strict=True))
    path = write_jsonl("b.jsonl", {"text": "a", "repo": 1}, {"text": "b", "repo": 2})
    documents = read_documents([path], group_by="repo")
    next(documents)
    documents.close()  # type: ignore[attr-defined]
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "wanted", "mixed"),
    [
        (["10", "9", "1", "11", " 2"], ["1", " 2", "9", "10", "11"], 0),
        ([10, "9", 1.5, None, "-3"], [None, "-3", 1.5, "9", 10], 0),
        (["part 10", "part 9", "part 1"], ["part 1", "part 9", "part 10"], 0),
        (["2.10", "2.9", "1"], ["1", "2.9", "2.10"], 1),
        (["10", "9a", 9, "b", None], [None, 9, "9a", "10", "b"], 1),
        (["b", "a", "\ud83d"], ["a", "b", "\ud83d"], 0),
        (["9" * 2000, "1" * 2000, "5"], ["5", "1" * 2000, "9" * 2000], 1),
    ],
)
def test_numbers_written_as_text_are_numbers(
    write_jsonl: Write, values: list[object], wanted: list[object], mixed: int
) -> None:
    """Chapters "1" to "11" came as 1, 10, 11, 2, 9."""
    path = write_jsonl("a.jsonl", *({"text": repr(value), "r": 1, "n": value} for value in values))
    report = ReadReport()
    (document,) = read_documents([path], group_by="r", order_by="n", report=report)
    assert document.text.split("\n\n") == list(map(repr, wanted))
    assert report.mixed_orders == mixed
    assert ("numbers and texts to order by" in str(report.warning())) == bool(mixed)


def test_what_orders_nothing_is_left_out(tmp_path: Path, write_jsonl: Write) -> None:
    """A number that is none has no place in an order: the result would depend on the order of the input."""
    path = write_jsonl("a.jsonl", *({"text": str(n), "r": 1, "n": n} for n in (2, float("nan"), 1)))
    report = ReadReport()
    (document,) = read_documents([path], group_by="r", order_by="n", report=report)
    assert document.text == "1\n\n2" and report.wrong_types == 1
    days = [datetime.date(2026, 1, day) for day in (10, 9)]
    pq.write_table(pa.table({"text": ["b", "a"], "r": [1, 1], "n": days}), tmp_path / "a.parquet")
    assert next(read_documents([tmp_path / "a.parquet"], group_by="r", order_by="n")).text == "a\n\nb"
