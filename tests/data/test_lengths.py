"""The length table and its folder of columns."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest

from longspan.core.columns import folder_kind
from longspan.core.errors import DataError
from longspan.data.store.lengths import LengthTable, summary_rows
from tests.data.made_stores import make_table


def test_a_saved_table_comes_back_memory_mapped(tmp_path: Path) -> None:
    """A table read by copying would cost 4 GB of memory for 100 million documents."""
    table = make_table([("a", 3), ("b", 1), ("a", 4)])
    table.save(tmp_path / "lengths")
    loaded = LengthTable.load(tmp_path / "lengths")
    assert isinstance(loaded.tokens, np.memmap)
    assert loaded.tokens.tolist() == [3, 1, 4]
    assert loaded.source_names == ("a", "b")
    assert loaded.fingerprint == table.fingerprint
    assert folder_kind(tmp_path / "lengths") == "length-table"


def test_an_empty_table_survives(tmp_path: Path) -> None:
    """numpy cannot memory-map an empty file."""
    make_table([]).save(tmp_path / "lengths")
    assert len(LengthTable.load(tmp_path / "lengths")) == 0


def test_saving_replaces_a_table_and_nothing_else(tmp_path: Path) -> None:
    """Saving must not delete a folder that happens to have the chosen name."""
    make_table([("text", 3)]).save(tmp_path / "lengths")
    make_table([("text", 5)]).save(tmp_path / "lengths")
    assert LengthTable.load(tmp_path / "lengths").tokens.tolist() == [5]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(DataError, match="already exists"):
        make_table([("text", 3)]).save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").exists()


def _truncate_column(folder: Path) -> None:
    data = (folder / "tokens.npy").read_bytes()
    (folder / "tokens.npy").write_bytes(data[:-2])


def _lose_column(folder: Path) -> None:
    (folder / "key.npy").unlink()


def _change_dtype(folder: Path) -> None:
    np.save(folder / "tokens.npy", np.array([3, 1, 4], np.int64))


def _change_length(folder: Path) -> None:
    np.save(folder / "tokens.npy", np.array([3, 1], np.uint32))


def _pickle_column(folder: Path) -> None:
    np.save(folder / "tokens.npy", np.array([3, "x", None], object), allow_pickle=True)


def _edit_head(folder: Path, **values: object) -> None:
    head = json.loads((folder / "head.json").read_text())
    (folder / "head.json").write_text(json.dumps(head | values))


def _other_kind(folder: Path) -> None:
    _edit_head(folder, kind="mixture-plan")


def _other_schema(folder: Path) -> None:
    _edit_head(folder, schema=99)


def _no_columns(folder: Path) -> None:
    _edit_head(folder, columns={})


def _no_names(folder: Path) -> None:
    _edit_head(folder, head={})


def _too_few_names(folder: Path) -> None:
    _edit_head(folder, head={"source_names": ["a"]})


def _no_json(folder: Path) -> None:
    (folder / "head.json").write_text("[")


def _list_head(folder: Path) -> None:
    (folder / "head.json").write_text("[]")


@pytest.mark.parametrize(
    "damage",
    [
        _truncate_column,
        _lose_column,
        _change_dtype,
        _change_length,
        _pickle_column,
        _other_kind,
        _other_schema,
        _no_columns,
        _no_names,
        _too_few_names,
        _no_json,
        _list_head,
    ],
)
def test_a_damaged_folder_is_refused(tmp_path: Path, damage: object) -> None:
    """A damaged table must not become a plan over wrong lengths, nor a traceback."""
    make_table([("a", 3), ("b", 1), ("a", 4)]).save(tmp_path / "lengths")
    damage(tmp_path / "lengths")  # type: ignore[operator]
    with pytest.raises(DataError):
        LengthTable.load(tmp_path / "lengths")


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    """The message names the folder instead of a missing file inside it."""
    with pytest.raises(DataError, match="nowhere is not a length-table"):
        LengthTable.load(tmp_path / "nowhere")


def test_joining_merges_sources_by_name_and_numbers_stores() -> None:
    """Two stores number their sources independently: id 0 of both is not the same source."""
    first = make_table([("web", 1), ("code", 2)])
    second = make_table([("code", 3), ("books", 4)], keys=[10, 11])
    third = LengthTable.concatenate([second, first])
    joined = LengthTable.concatenate([first, third])
    assert joined.source_names == ("web", "code", "books")
    assert [joined.source_names[s] for s in joined.source] == ["web", "code", "code", "books", "web", "code"]
    assert joined.store.tolist() == [0, 0, 1, 1, 2, 2]
    assert joined.position.tolist() == [0, 1, 0, 1, 0, 1]
    assert joined.tokens.tolist() == [1, 2, 3, 4, 1, 2]
    assert joined.num_stores == 3
    assert LengthTable.concatenate([first]) is first


def test_the_fingerprint_follows_content_not_shards() -> None:
    """Writing the same documents in smaller shards must not make plans stale; another length must."""
    table = make_table([("text", 3), ("text", 1), ("text", 4)])
    columns = {
        name: getattr(table, name) for name in ("source", "source_names", "key", "mask_offset", "position")
    }
    moved = LengthTable(**columns, tokens=table.tokens, shard=table.shard + 1, offset=table.offset + 100)  # type: ignore[arg-type]
    longer = LengthTable(**columns, tokens=table.tokens + 1, shard=table.shard, offset=table.offset)  # type: ignore[arg-type]
    assert moved.fingerprint == table.fingerprint
    assert longer.fingerprint != table.fingerprint


def test_summary_by_hand() -> None:
    """Shares are of tokens, not of documents: one book outweighs three short pages."""
    table = make_table([("web", 1), ("web", 2), ("web", 1021), ("web", 5000), ("books", 7)])
    summary = table.summary("before", "Before")
    assert (summary["name"], summary["title"]) == ("before", "Before")
    web = summary["sources"]["web"]
    assert (web["documents"], web["tokens"]) == (4, 6024)
    assert web["quantiles"] == {
        "p25": 1,
        "p50": 2,
        "p75": 1021,
        "p90": 5000,
        "p95": 5000,
        "p99": 5000,
        "max": 5000,
    }
    assert web["share_above"] == {"1024": 5000 / 6024, "4096": 5000 / 6024, "32768": 0.0, "131072": 0.0}
    edges, tokens = web["histogram"]["edges"], web["histogram"]["tokens"]
    assert edges == [2**b for b in range(14)]
    assert dict(zip(edges, tokens)) == {e: 0 for e in edges[:-1]} | {1: 1, 2: 2, 512: 1021, 4096: 5000}
    assert summary["sources"]["books"]["histogram"]["edges"] == edges
    json.dumps(summary, allow_nan=False)


def test_a_length_equal_to_a_limit_is_not_above_it() -> None:
    """`above 4096` means longer than 4096."""
    summary = make_table([("text", 4096), ("text", 4097)]).summary("x", "x")
    assert summary["sources"]["text"]["share_above"]["4096"] == 4097 / 8193
    assert summary["sources"]["text"]["histogram"]["tokens"][12] == 8193


def test_summary_of_a_plan_counts_repeats_and_leaves_absent_sources_out() -> None:
    """After mixing, a repeated document weighs twice; a source that vanished is missing, not zero."""
    table = make_table([("a", 10), ("b", 20), ("a", 30)])
    summary = table.summary("after", "After", documents=np.array([2, 2, 0], np.uint32))
    assert list(summary["sources"]) == ["a"]
    assert (summary["sources"]["a"]["documents"], summary["sources"]["a"]["tokens"]) == (3, 70)
    assert make_table([]).summary("empty", "Empty")["sources"] == {}


def test_rows_of_a_summary_end_with_their_total() -> None:
    """The table on the screen and the JSON must not disagree."""
    rows = summary_rows(make_table([("a", 100), ("a", 5000), ("b", 50)]).summary("x", "x"))
    assert [row["source"] for row in rows] == ["a", "b", "total"]
    assert rows[-1]["tokens"] == 5150 and rows[-1]["documents"] == 3 and rows[-1]["max"] == 5000
    assert rows[-1]["above_4096"] == pytest.approx(5000 / 5150)
    assert rows[-1]["p50"] is None
    assert sum(row["token_share"] for row in rows[:-1]) == pytest.approx(1)
    assert summary_rows(make_table([]).summary("x", "x"))[-1]["tokens"] == 0


def test_columns_that_do_not_fit_are_refused() -> None:
    """A column of another dtype or length would misalign every document behind it."""
    table = make_table([("text", 3), ("text", 1)])
    columns = {name: getattr(table, name) for name in table.__dataclass_fields__ if name != "tokens"}
    with pytest.raises(DataError, match="column tokens"):
        LengthTable(**columns, tokens=np.array([3, 1], np.int64))
    with pytest.raises(DataError, match="does not fit"):
        LengthTable(**columns, tokens=np.array([3], np.uint32))


def test_a_damaged_column_header_is_our_error(tmp_path: Path) -> None:
    """numpy raises TokenError, SyntaxError and others on a header that is no Python literal."""
    make_table([("a", 3), ("a", 5)]).save(tmp_path / "lengths")
    column = tmp_path / "lengths" / "tokens.npy"
    whole = column.read_bytes()
    for at in range(6, 60):
        column.write_bytes(whole[:at] + b"(" + whole[at + 1 :])
        with contextlib.suppress(DataError):
            LengthTable.load(tmp_path / "lengths")
