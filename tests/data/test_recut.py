"""Published packed rows: every form is opened, an index is made once, and longer rows become rows of a stage."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ConfigError, DataError
from longspan.data.exchange.convert import convert
from longspan.data.packed import row_index
from longspan.data.packed.packed_rows import PackedRows
from longspan.data.packed.recut import recut
from longspan.data.packed.row_files import JsonlRows, ParquetRows
from longspan.data.plans.packing import PAD_DOCUMENT
from longspan.data.rows.loader import PackedRow, StreamMixer
from longspan.data.rows.read_otherwise import WholeRows
from longspan.data.verify import verify
from tests.data.hub_stand_in import hub_at
from tests.data.published_rows import FORMS, chunk, publish
from tests.data.test_materialize import TOKENIZER

ROWS = [
    chunk(100, ("book", 10)),
    chunk(200, ("arxiv", 3), ("arxiv", 7)),
    chunk(300, ("book", 6), ("book", 4)),
    chunk(400, ("arxiv", 9), ("arxiv", 1)),
]


def pieces(row: PackedRow) -> list[list[int]]:
    """Return the ids of each document of a row, padding left out."""
    bounds = row.cu_seqlens.tolist()
    spans = zip(bounds, bounds[1:], row.documents.tolist())
    return [row.input_ids[low:high].tolist() for low, high, number in spans if number != PAD_DOCUMENT]


@pytest.mark.parametrize("form", FORMS)
def test_every_published_form_is_opened(tmp_path: Path, form: str) -> None:
    """Guards against a data set that must be moved about by hand first: as downloaded it has its files under `data/`,
    of several splits; saved, in Arrow files that a list names."""
    rows = PackedRows(publish(tmp_path / "rows", ROWS, form))
    assert (rows.num_rows, rows.length, set(rows.source_names)) == (4, 10, {"book", "arxiv", "padding"})
    assert [rows.row(number).input_ids.tolist() for number in range(4)] == [row["input_ids"] for row in ROWS]
    assert pieces(rows.row(2)) == [list(range(300, 306)), list(range(306, 310))]
    assert rows.index.lengths.tolist() == [10] * 4 and rows.index.starts.tolist() == [0, 0, 3, 0, 6, 0, 9]


@pytest.mark.parametrize("form", FORMS)
def test_longer_rows_become_rows_of_the_stage(tmp_path: Path, form: str) -> None:
    """Guards against refusing what was published at another length, and against documents that run together."""
    rows = recut(PackedRows(publish(tmp_path / "rows", ROWS, form)), length=4)
    assert (rows.num_rows, rows.length) == (10, 4)
    assert np.concatenate([rows.row(number).input_ids for number in range(10)]).tolist() == [
        id for row in ROWS for id in row["input_ids"]
    ]
    assert pieces(rows.row(2)) == [[108, 109], [200, 201]]
    assert rows.left_out == {"cut_documents": 6, "tail_tokens": 0}
    row = rows.row(4)
    assert [row.source_names[source] for source in row.sources] == ["arxiv"] and row.continuation[0]


def test_rows_can_give_their_first_tokens(tmp_path: Path) -> None:
    """EasyContext reads the first tokens of each row: rows cut in two are other data. What is behind is counted."""
    short = {"input_ids": [1, 2, 3], "labels": 4, "source": [{"source": "book", "start": 0, "end": 3}]}
    rows = recut(
        PackedRows(publish(tmp_path / "rows", [*ROWS, short], "jsonl")), length=8, overflow="drop_tail"
    )
    assert [rows.row(number).input_ids.tolist() for number in range(4)] == [
        row["input_ids"][:8] for row in ROWS
    ]
    assert pieces(rows.row(2)) == [list(range(300, 306)), [306, 307]] and pieces(rows.row(3)) == [
        list(range(400, 408))
    ]
    assert rows.left_out == {"short_rows": 1, "tail_tokens": 8} and rows.num_rows == 4
    with pytest.raises(ConfigError, match="does not fill one row"):
        recut(PackedRows(tmp_path / "rows"), length=11, overflow="drop_tail")


def test_short_documents_are_joined_again(tmp_path: Path) -> None:
    """Guards against cutting short documents only because the row they were published in ended elsewhere."""
    rows = recut(PackedRows(publish(tmp_path / "rows", ROWS, "parquet")), length=10, strategy="best_fit")
    found = [piece for number in range(rows.num_rows) for piece in pieces(rows.row(number))]
    assert sorted(map(len, found)) == [1, 3, 4, 6, 7, 9, 10]
    assert rows.left_out == {"cut_documents": 0, "tail_tokens": 0}


@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=5),
    length=st.integers(1, 12),
    strategy=st.sampled_from(["concat", "best_fit"]),
)
@settings(deadline=None, max_examples=25)
def test_no_token_is_lost_or_seen_twice(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[list[int]], length: int, strategy: Any
) -> None:
    """Rows of any lengths, cut at any length: each token stands once, beside the ones that it was published with."""
    made = [chunk(100 * number, *(("a", n) for n in row)) for number, row in enumerate(lengths)]
    folder = publish(tmp_path_factory.mktemp("rows") / "rows", made, "jsonl")
    total = sum(map(sum, lengths))
    if strategy == "concat" and total < length:
        return
    rows = recut(PackedRows(folder), length=length, strategy=strategy)
    found = [piece for number in range(rows.num_rows) for piece in pieces(rows.row(number))]
    seen = Counter(id for piece in found for id in piece)
    assert set(seen.values()) == {1} and len(seen) + rows.left_out["tail_tokens"] == total
    documents = {
        id: (number, span["start"])
        for number, row in enumerate(made)
        for span in row["source"]
        for id in row["input_ids"][span["start"] : span["end"]]
    }
    assert all(len({documents[id] for id in piece}) == 1 for piece in found)


def test_an_index_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against reading every row at each opening, and against an index of files that have changed since."""
    monkeypatch.setattr(row_index, "KEPT_BYTES", 0)
    folder = publish(tmp_path / "rows", ROWS, "jsonl")
    first = PackedRows(folder)
    assert (folder / ".longspan-rows" / "head.json").is_file()
    with monkeypatch.context() as patched:
        patched.setattr(JsonlRows, "table", lambda self: pytest.fail("read again"))
        again = PackedRows(folder)
    assert again.fingerprint == first.fingerprint and again.source_names == first.source_names
    assert [again.row(number).input_ids.tolist() for number in range(4)] == [row["input_ids"] for row in ROWS]
    with open(folder / "train-00001-of-00002.jsonl", "a") as file:
        file.write("\n" + json.dumps(chunk(500, ("wiki", 10))))
    changed = PackedRows(folder)
    assert (changed.num_rows, "wiki" in changed.source_names) == (5, True)
    (folder / ".longspan-rows" / "starts.npy").write_bytes(b"damaged")
    assert PackedRows(folder).num_rows == 5


def test_an_index_of_data_that_cannot_be_written_is_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data sets are shared and read-only: a run must not fail there, nor read all rows each time."""
    monkeypatch.setattr(row_index, "KEPT_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = publish(tmp_path / "rows", ROWS, "parquet")
    monkeypatch.setattr(
        "os.access", lambda path, mode: mode == os.R_OK or not str(path).startswith(str(folder))
    )
    PackedRows(folder)
    assert not (folder / ".longspan-rows").exists()
    assert len(list((tmp_path / "cache" / "longspan" / "rows").iterdir())) == 1
    monkeypatch.setattr(
        "longspan.data.packed.packed_rows.make_index", lambda *_, **__: pytest.fail("made again")
    )
    assert PackedRows(folder).num_rows == 4


@pytest.mark.parametrize(
    "spans",
    [
        {"source": ["a", "b"], "start": [0, 2], "end": [2, 5]},  # as `datasets` keeps a list of objects
        [{"source": "a", "start": 0, "end": 2}, {"source": "b", "start": 2, "end": 5}],
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_both_forms_of_spans_are_read(tmp_path: Path, spans: Any, suffix: str) -> None:
    """A list of objects becomes an object of lists on its way through `datasets`: the same documents."""
    record = {"input_ids": [1, 2, 3, 4, 5], "source": spans}
    if suffix == "jsonl":
        (tmp_path / "x.jsonl").write_text(json.dumps(record))
    else:
        pq.write_table(pa.Table.from_pylist([record]), tmp_path / "x.parquet")
    rows = PackedRows(tmp_path)
    assert pieces(rows.row(0)) == [[1, 2], [3, 4, 5]] and rows.source_names == ("a", "b", "padding")
    assert rows.index.ends.tolist() == [2, 5]


def test_rows_of_several_lengths_in_parquet_are_measured(tmp_path: Path) -> None:
    """Row groups tell the number of values: rows of 3 and 6 are no two rows of 4."""
    pq.write_table(pa.table({"input_ids": [[1] * 4, [2] * 3, [3] * 6]}), tmp_path / "x.parquet")
    rows = PackedRows(tmp_path)
    assert not rows.lengths_are(4) and rows.longest == 6
    assert rows.index.lengths.tolist() == [4, 3, 6]


def test_names_in_lists_of_ids_are_left_alone(tmp_path: Path) -> None:
    """Ids are skipped when lines are indexed: a source whose name looks like one must keep it."""
    name = 'x "input_ids": [1, 2]'
    (tmp_path / "x.jsonl").write_text(json.dumps(chunk(7, (name, 3))))
    assert PackedRows(tmp_path).source_names == (name, "padding")


@pytest.mark.parametrize("form", ["saved", "hub"])
def test_published_rows_become_a_store(tmp_path: Path, form: str) -> None:
    """A folder that trains converts too."""
    folder = publish(tmp_path / "rows", ROWS, form)
    convert(folder, tmp_path / "store", format="store", tokenizer=TOKENIZER)
    from longspan.data.store import TokenStore

    store = TokenStore(tmp_path / "store")
    assert sorted(map(len, map(store.tokens, range(len(store))))) == [1, 3, 4, 6, 7, 9, 10]


def test_published_rows_are_verified(tmp_path: Path) -> None:
    """What trains can be checked before; each damaged row is named, and the others are read."""
    folder = publish(tmp_path / "rows", ROWS, "hub")
    assert verify(folder).counts == {"rows": 4, "tokens": 40} and verify(folder).is_whole
    wrong = [*ROWS, {**chunk(5, ("a", 4)), "source": [{"source": "a", "start": 3, "end": 9}]}]
    report = verify(publish(tmp_path / "wrong", wrong, "saved"))
    assert len(report.problems) == 1 and "row 4" in report.problems[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="not something that can be verified"):
        verify(tmp_path / "empty")


def test_folders_of_several_data_sets_say_which(tmp_path: Path) -> None:
    """A root with a folder for each source is no stream: the message names them."""
    for name in ("book", "arxiv"):
        publish(tmp_path / "all" / name, ROWS, "mds")
    with pytest.raises(DataError, match="arxiv, book"):
        PackedRows(tmp_path / "all")


def test_a_shuffled_stream_reads_few_row_groups_at_a_time(tmp_path: Path) -> None:
    """A row of parquet costs decoding its group: an order without regard to groups would decode one for every row."""
    rows = PackedRows(
        publish(tmp_path / "rows", [chunk(100 * n, ("a", 4)) for n in range(80)], "parquet", group=4)
    )
    assert rows.blocks.tolist() == [4] * 20
    mixer = StreamMixer({"a": (rows, 1.0)}, 3, orders={"a": "shuffled"})
    order = [mixer.locate(position).row for position in range(80)]
    assert sorted(order) == list(range(80)) and order != list(range(80))
    for first in range(0, 80, 16):
        assert len({row // 4 for row in order[first : first + 16]}) == 4
    cut = recut(rows, length=2)
    assert cut.blocks.tolist() == [8] * 20


def test_rows_without_a_mask_are_one_document(tmp_path: Path) -> None:
    """Positions, labels and attention follow from borders; padding stays apart, sources are those of the tokens."""
    row = WholeRows(PackedRows(publish(tmp_path / "rows", ROWS, "jsonl"))).row(1)
    assert row.cu_seqlens.tolist() == [0, 10] and row.documents.shape == row.sources.shape == (1,)
    padded = recut(PackedRows(tmp_path / "rows"), length=12, strategy="best_fit")
    whole = [WholeRows(padded).row(number) for number in range(padded.num_rows)]
    for number, row in enumerate(whole):
        apart = padded.row(number)
        tokens = len(row.input_ids) - int((apart.weights == 0).sum())
        assert row.cu_seqlens.tolist() == ([0, tokens, 12] if tokens < 12 else [0, 12])
        assert row.token_sources is not None
        assert row.token_sources.tolist() == np.repeat(apart.sources, np.diff(apart.cu_seqlens)).tolist()


def test_a_data_set_of_the_hub_is_read_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a download before the first step, against reading a group of rows once for each of its rows, and
    against another order after a restart: the position alone says which row comes."""
    made = [chunk(100 * n, ("book", 4), ("arxiv", 4)) for n in range(1, 41)]
    publish(tmp_path / "hub/datasets/org/set", made, "hub", group=4)
    read: list[int] = []
    group = ParquetRows._read_group
    monkeypatch.setattr(ParquetRows, "_read_group", lambda self, n: (read.append(n), group(self, n))[1])
    with hub_at(tmp_path / "hub"):
        rows = PackedRows("hf://org/set")
        assert (rows.num_rows, rows.source_names, rows.length) == (40, ("book", "arxiv", "padding"), 8)
        mixer = StreamMixer({"set": (rows, 1.0)}, 5, orders={"set": "shuffled"})
        read.clear()
        order = [row.input_ids.tolist() for row in mixer.rows(0, 40)]
        assert len(read) <= 10 + 1 and sorted(order) == [row["input_ids"] for row in made] != order
        again = StreamMixer({"set": (PackedRows("hf://org/set"), 1.0)}, 5, orders={"set": "shuffled"})
        assert again.check_state(mixer.state(17)) == 17
        assert [row.input_ids.tolist() for row in again.rows(17, 23)] == order[17:]
        publish(tmp_path / "hub/datasets/org/lines", made, "jsonl")
        lines = PackedRows("hf://org/lines")
        assert [lines.row(n).input_ids.tolist() for n in (39, 0)] == [made[n]["input_ids"] for n in (39, 0)]
        publish(tmp_path / "hub/datasets/org/saved", made, "saved")
        with pytest.raises(DataError, match="longspan data fetch hf://org/saved"):
            PackedRows("hf://org/saved")
