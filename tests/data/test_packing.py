"""Pack plans: every token has one place, or is counted as left out."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ArgumentError, ConfigError, DataError
from longspan.data.plans import packing
from longspan.data.plans.cutting import cut_to_rows
from longspan.data.plans.mixture import plan_mixture
from longspan.data.plans.mixture_config import MixtureConfig
from longspan.data.plans.pack_config import STRATEGIES, PackConfig, Strategy
from longspan.data.plans.packing import PAD_DOCUMENT, PackPlan, plan_packing
from longspan.data.store.lengths import LengthTable
from tests.data.made_stores import make_table

Span = tuple[int, int, int]
PAD = PAD_DOCUMENT


def rows_of(plan: PackPlan) -> list[list[Span]]:
    """Return (document, start, tokens) of every row."""
    spans = list(zip(plan.span_document.tolist(), plan.span_start.tolist(), plan.span_tokens.tolist()))
    return [spans[low:high] for low, high in pairwise(plan.row_offsets.astype(int).tolist())]


def pack(tokens: list[int], documents: list[int] | None = None, **values: object) -> PackPlan:
    """Pack documents of one source in the given order, rows unshuffled unless asked."""
    spec = PackConfig.from_dict({"shuffle": False} | values)
    chosen = np.array(range(len(tokens)) if documents is None else documents, np.uint32)
    return plan_packing(spec, make_table([("text", n) for n in tokens]), chosen, 1)


def test_concat_cuts_where_a_row_ends() -> None:
    """A document longer than several rows must come back as one sequence of spans that join exactly."""
    plan = pack([3, 9, 4], length=4)
    assert rows_of(plan) == [[(0, 0, 3), (1, 0, 1)], [(1, 1, 4)], [(1, 5, 4)], [(2, 0, 4)]]
    assert plan.report.model_dump() == {
        "rows": 4,
        "documents_in": 3,
        "documents": 3,
        "continuations": 2,
        "tokens_in": 16,
        "tokens_packed": 16,
        "special_tokens": 0,
        "padding_tokens": 0,
        "dropped": {"short": 0, "tail": 0, "remainder": 0},
        "sources": {"text": 16},
        "repeated_tokens": 0,
    }


def test_the_last_row_is_dropped_and_counted_or_padded() -> None:
    """The tail of the data must not vanish without a number (and padding is a document of its own)."""
    dropped = pack([3, 3], length=4)
    assert rows_of(dropped) == [[(0, 0, 3), (1, 0, 1)]]
    assert dropped.report.dropped["remainder"] == 2
    padded = pack([3, 3], length=4, remainder="pad", pad_id=0)
    assert rows_of(padded) == [[(0, 0, 3), (1, 0, 1)], [(1, 1, 2), (PAD, 0, 2)]]
    assert (padded.report.padding_tokens, padded.report.dropped["remainder"]) == (2, 0)
    assert pack([4], length=4, remainder="pad", pad_id=0).report.padding_tokens == 0


@pytest.mark.parametrize(
    ("tokens", "rows", "left"),
    [([3, 5], 1, 4), ([3, 6], 2, 1), ([3, 4], 1, 3), ([4], 0, 4), ([3], 0, 3), ([], 0, 0)],
)
def test_a_last_row_that_is_just_full_is_dropped_on_request(tokens: list[int], rows: int, left: int) -> None:
    """slimpajama_packing.py writes a row of n tokens when n + 1 are there; rows are those of its `while`."""
    report = pack(tokens, length=4, remainder="drop_last").report
    assert (report.rows, report.dropped["remainder"], report.tokens_packed) == (rows, left, 4 * rows)
    by_source = pack(tokens, length=4, remainder="drop_last", by_source=True).report
    assert by_source == report
    with pytest.raises(ConfigError, match="goes with remainder drop or pad, not drop_last"):
        pack([3], length=4, strategy="intact", remainder="drop_last")


def test_documents_follow_the_given_order_and_may_repeat() -> None:
    """The mixture's order is the training order; a repeated document is packed again."""
    plan = pack([2, 3], documents=[1, 0, 1], length=4)
    assert rows_of(plan) == [[(1, 0, 3), (0, 0, 1)], [(0, 1, 1), (1, 0, 3)]]


def test_min_length_leaves_whole_documents_out() -> None:
    """A minimum that is applied to overflowing pieces only lets short documents through."""
    plan = pack([3, 8, 3, 5], length=4, min_length=4)
    assert {document for row in rows_of(plan) for document, _, _ in row} == {1, 3}
    assert plan.report.dropped == {"short": 6, "tail": 0, "remainder": 1}


def test_a_short_tail_is_dropped_and_the_next_document_moves_up() -> None:
    """A row that begins with one token of a document teaches nothing about that document."""
    plan = pack([5, 4, 6], length=4, min_tail=2)
    assert rows_of(plan) == [[(0, 0, 4)], [(1, 0, 4)], [(2, 0, 4)]]
    assert plan.report.dropped == {"short": 0, "tail": 1, "remainder": 2}
    # A short beginning is not a tail, nor is a short document.
    assert rows_of(pack([3, 4, 1], length=4, min_tail=2)) == [[(0, 0, 3), (1, 0, 1)], [(1, 1, 3), (2, 0, 1)]]


@pytest.mark.parametrize(
    ("specials", "expected"),
    [
        ("none", "0:0-8 0:8-16 1:0-3,2:0-5 3:0-8 4:0-8 4:8-16 5:0-2,6:0-2,7:0-4 7:4-12 7:12-20 7:20-28 8:0-7,9:0-1 "
         "10:0-8 10:8-16"),
        ("both", "0:0-8 0:8-16 1:0-5,2:0-3 2:3-11 3:0-8 4:0-8 4:8-16 5:0-4,6:0-4 7:0-8 7:8-16 7:16-24 7:24-32 8:0-8 "
         "9:0-3,10:0-5 10:5-13"),
    ],
)  # fmt: skip
def test_min_tail_packs_as_datatools_with_min_length(specials: str, expected: str) -> None:
    """Guards the line that stands beside `pack --pack_length 8 --min_length 8` for users of datatools.

    The rows are those that its pack_fn (github.com/CodeCreator/datatools, 2024) yields for these documents, without
    and with `--bos_id 1 --eos_id 2`, written as document:start-end.
    """
    ids = {} if specials == "none" else {"bos_id": 1, "eos_id": 2}
    lengths = [20, 3, 9, 8, 17, 2, 2, 30, 7, 1, 16, 5]
    plan = pack(lengths, length=8, min_tail=8, specials=specials, **ids)
    found = [",".join(f"{doc}:{start}-{start + count}" for doc, start, count in row) for row in rows_of(plan)]
    assert " ".join(found) == expected


def test_intact_never_mixes_documents() -> None:
    """A row with two documents would break the promise of the strategy."""
    full = pack([9, 4, 3], length=4, strategy="intact")
    assert rows_of(full) == [[(0, 0, 4)], [(0, 4, 4)], [(1, 0, 4)]]
    assert full.report.dropped == {"short": 0, "tail": 0, "remainder": 4}
    padded = pack([9, 4, 3], length=4, strategy="intact", remainder="pad", pad_id=0)
    assert rows_of(padded) == [
        [(0, 0, 4)],
        [(0, 4, 4)],
        [(0, 8, 1), (PAD, 0, 3)],
        [(1, 0, 4)],
        [(2, 0, 3), (PAD, 0, 1)],
    ]
    tails = pack([9, 4, 1], length=4, strategy="intact", remainder="pad", pad_id=0, min_tail=2)
    assert rows_of(tails) == [[(0, 0, 4)], [(0, 4, 4)], [(1, 0, 4)], [(2, 0, 1), (PAD, 0, 3)]]
    assert tails.report.dropped["tail"] == 1


def test_specials_frame_documents_and_are_counted_apart() -> None:
    """Specials counted as document tokens would falsify the budget."""
    plan = pack([2, 3], length=3, specials="both", bos_id=1, eos_id=2)
    assert rows_of(plan) == [[(0, 0, 3)], [(0, 3, 1), (1, 0, 2)], [(1, 2, 3)]]
    assert (plan.report.tokens_packed, plan.report.special_tokens) == (5, 4)
    # Row 2 is dropped: it held token 1 and 2 of the second document; its EOS is no document token.
    dropped = pack([2, 3], length=4, specials="both", bos_id=1, eos_id=2)
    assert rows_of(dropped) == [[(0, 0, 4)], [(1, 0, 4)]]
    assert (dropped.report.special_tokens, dropped.report.dropped["remainder"]) == (3, 0)


def test_shuffling_moves_rows_and_nothing_else() -> None:
    """The rows of one book must not follow one another, and no row may be lost or repeated on the way."""
    tokens = [400, 3, 3, 50]
    plain = rows_of(pack(tokens, length=4))
    mixed = rows_of(pack(tokens, length=4, shuffle=True))
    assert mixed != plain
    assert sorted(mixed) == sorted(plain)


def test_empty_input_gives_an_empty_plan(tmp_path: Path) -> None:
    """No row is a result to report, not a crash."""
    for strategy in ("concat", "intact"):
        for remainder in ("drop", "pad"):
            plan = pack([0, 0], length=4, strategy=strategy, remainder=remainder, pad_id=0, shuffle=True)
            assert plan.num_rows == 0 and plan.report.tokens_in == 0
            plan.save(tmp_path / "plan")
            assert PackPlan.load(tmp_path / "plan").num_rows == 0
    assert pack([], length=4).num_rows == 0


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 20), max_size=12),
    length=st.integers(2, 9),
    overlap=st.integers(1, 8),
    remainder=st.sampled_from(["drop", "pad"]),
    specials=st.sampled_from(["none", "both"]),
)
def test_rows_that_overlap_across_documents_follow_one_stream(
    tokens: list[int], length: int, overlap: int, remainder: str, specials: str
) -> None:
    """A row that repeats too few or too many tokens, or a short last row that is lost or holds nothing new."""
    overlap = min(overlap, length - 1)
    plan = pack(tokens, length=length, overlap=overlap, overlap_across=True, remainder=remainder, specials=specials,
                bos_id=1, eos_id=2, pad_id=0)  # fmt: skip
    frame = 2 * (specials == "both")
    stream = [(n, at) for n, size in enumerate(tokens) if size for at in range(size + frame)]
    wanted, start = [], 0
    while stream and (start == 0 or start + overlap < len(stream)):
        wanted.append(stream[start : start + length])
        start += length - overlap
    if wanted and remainder == "drop" and len(wanted[-1]) < length:
        wanted.pop()
    found = [
        [
            (document, at)
            for document, first, count in row
            if document != PAD
            for at in range(first, first + count)
        ]
        for row in rows_of(plan)
    ]
    assert found == wanted
    assert plan.report.tokens_in == plan.report.tokens_packed + sum(plan.report.dropped.values())
    assert plan.report.repeated_tokens == overlap * max(0, len(wanted) - 1)


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 40), max_size=25),
    length=st.integers(1, 17),
    strategy=st.sampled_from(["concat", "intact"]),
    remainder=st.sampled_from(["drop", "pad"]),
    specials=st.sampled_from(["none", "bos", "eos", "both"]),
    min_length=st.integers(1, 6),
    min_tail=st.integers(1, 6),
    shuffle=st.booleans(),
    block=st.integers(1, 7),
)
def test_no_strategy_loses_repeats_or_reorders_tokens(
    tokens: list[int], length: int, strategy: str, remainder: str, min_tail: int, block: int, **values: object
) -> None:
    """Each token of each document stands in one place or is counted; rows are full; blocks leave no trace."""
    values |= {"length": length, "strategy": strategy, "remainder": remainder}
    values["min_tail"] = min_tail = min(min_tail, length)
    values |= {"bos_id": 1, "eos_id": 2, "pad_id": 0}
    whole = pack(tokens, **values)
    before, packing.BLOCK = packing.BLOCK, block
    try:
        plan = pack(tokens, **values)
    finally:
        packing.BLOCK = before
    assert rows_of(plan) == rows_of(whole) and plan.report == whole.report

    rows = rows_of(plan)
    assert all(sum(count for _, _, count in row) == length for row in rows)
    assert all(count > 0 for row in rows for _, _, count in row)
    assert all(document != PAD for row in rows for document, _, _ in row[:-1])
    frame = plan.spec.num_bos + plan.spec.num_eos
    places: dict[int, list[tuple[int, int]]] = {}
    for row in rows:
        real = [span for span in row if span[0] != PAD]
        assert real
        assert strategy == "concat" or len(real) == 1
        for document, start, count in real:
            places.setdefault(document, []).append((start, start + count))
    packed = 0
    for document, spans in places.items():
        spans.sort()
        assert spans[0][0] == 0
        assert all(low_end == high for (_, low_end), (high, _) in pairwise(spans))
        assert spans[-1][1] <= tokens[document] + frame
        packed += min(spans[-1][1], tokens[document] + plan.spec.num_bos) - plan.spec.num_bos
    report = plan.report
    assert report.tokens_packed == packed
    assert report.tokens_in == sum(tokens) == packed + sum(report.dropped.values())
    kept = [n for n in tokens if n >= plan.spec.min_length]
    assert report.dropped["short"] == sum(tokens) - sum(kept)
    if remainder == "pad":
        assert report.dropped["remainder"] == 0 and report.documents == len(kept)
    elif strategy == "concat":
        assert report.dropped["remainder"] < length
    if min_tail == 1:
        assert report.dropped["tail"] == 0


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 40), max_size=25), length=st.integers(1, 17), min_tail=st.integers(1, 17)
)
def test_concat_equals_a_walk_token_by_token(tokens: list[int], length: int, min_tail: int) -> None:
    """The arithmetic over whole columns must agree with packing one document after another."""
    min_tail = min(min_tail, length)
    rows: list[list[Span]] = [[]]
    room = length
    for document, total in enumerate(tokens):
        start = 0
        while start < total:
            count = min(room, total - start)
            if start and start + count == total and count < min_tail:
                break
            rows[-1].append((document, start, count))
            start, room = start + count, room - count
            if not room:
                rows.append([])
                room = length
    assert rows_of(pack(tokens, length=length, min_tail=min_tail)) == rows[:-1]


def test_rows_of_long_documents_only_come_from_the_mixture() -> None:
    """Documents longer than the row are chosen by the threshold, so every row is one span."""
    table = make_table([("text", n) for n in (3, 9, 4, 12, 5)])
    chosen = plan_mixture(MixtureConfig(mode="global", keep_short=0, threshold=9), table, 1).documents
    plan = plan_packing(PackConfig(length=8, strategy="intact"), table, chosen, 1)
    assert sorted(rows_of(plan)) == [[(1, 0, 8)], [(3, 0, 8)]]


def test_sources_are_counted_after_packing() -> None:
    """The share that is trained on is the share in rows."""
    table = make_table([("web", 4), ("code", 3), ("web", 2)])
    plan = plan_packing(PackConfig(length=4, shuffle=False), table, np.arange(3, dtype=np.uint32), 1)
    assert plan.report.sources == {"web": 5, "code": 3}


def test_a_saved_plan_comes_back(tmp_path: Path) -> None:
    """Rows are read from the memory-mapped plan, not copied."""
    plan = pack([3, 9, 4], length=4, specials="eos", eos_id=2, shuffle=True)
    plan.save(tmp_path / "plan", stores=["store"])
    loaded = PackPlan.load(tmp_path / "plan")
    assert isinstance(loaded.span_document, np.memmap)
    assert rows_of(loaded) == rows_of(plan)
    assert (loaded.spec, loaded.report, loaded.seed) == (plan.spec, plan.report, plan.seed)
    assert (loaded.fingerprint, loaded.stores) == (plan.fingerprint, ("store",))


def test_the_fingerprint_follows_settings_seed_lengths_and_documents() -> None:
    """Resuming on other rows must be noticed."""
    table = make_table([("text", 5), ("text", 7)])
    both, one = np.array([0, 1], np.uint32), np.array([1], np.uint32)

    def fingerprint(spec: PackConfig, lengths: LengthTable, documents: np.ndarray, seed: int) -> str:
        return plan_packing(spec, lengths, documents, seed).fingerprint

    spec = PackConfig(length=4)
    prints = {
        fingerprint(spec, table, both, 1),
        fingerprint(spec, table, both, 2),
        fingerprint(spec, table, one, 1),
        fingerprint(PackConfig(length=5), table, both, 1),
        fingerprint(spec, make_table([("text", 5), ("text", 8)]), both, 1),
    }
    assert len(prints) == 5
    assert fingerprint(spec, table, both.astype(np.int64), 1) in prints


def _edit_head(folder: Path, key: str) -> None:
    head = json.loads((folder / "head.json").read_text())
    del head["head"][key]
    (folder / "head.json").write_text(json.dumps(head))


def _save_offsets(folder: Path, offsets: list[int]) -> None:
    np.save(folder / "row_offsets.npy", np.array(offsets, np.uint64))
    head = json.loads((folder / "head.json").read_text())
    head["columns"]["row_offsets"]["length"] = len(offsets)
    (folder / "head.json").write_text(json.dumps(head))


@pytest.mark.parametrize("offsets", [[], [0], [0, 3], [1, 5], [0, 3, 3, 5], [0, 4, 2, 5]])
def test_rows_that_do_not_fit_the_spans_are_refused(tmp_path: Path, offsets: list[int]) -> None:
    """Wrong offsets would give rows of other documents, or none."""
    plan = pack([3, 9, 4], length=4)
    plan.save(tmp_path / "plan")
    assert len(plan.span_document) == 5
    _save_offsets(tmp_path / "plan", offsets)
    with pytest.raises(DataError, match="rows of the plan"):
        PackPlan.load(tmp_path / "plan")


@pytest.mark.parametrize("missing", ["spec", "report", "seed", "lengths", "fingerprint", "stores"])
def test_a_damaged_head_is_refused(tmp_path: Path, missing: str) -> None:
    """A head without a part is bad data, not a KeyError."""
    pack([3, 9, 4], length=4).save(tmp_path / "plan")
    _edit_head(tmp_path / "plan", missing)
    with pytest.raises(DataError, match="damaged"):
        PackPlan.load(tmp_path / "plan")


def test_a_mixture_plan_is_not_a_pack_plan(tmp_path: Path) -> None:
    """Both are folders of columns; the message says which one was given."""
    table = make_table([("text", 5)])
    plan_mixture(MixtureConfig(mode="none"), table, 1).save(tmp_path / "plan")
    with pytest.raises(DataError, match="found: mixture-plan"):
        PackPlan.load(tmp_path / "plan")


def test_documents_outside_the_table_are_refused() -> None:
    """A mixture of other stores must not end in an IndexError."""
    with pytest.raises(ArgumentError, match="not in the length table"):
        pack([3, 4], documents=[2], length=4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"length": 0}, "length"),
        ({}, "length: this setting is required"),
        ({"length": 4, "specials": "bos"}, "needs bos_id"),
        ({"length": 4, "specials": "both", "bos_id": 1}, "needs eos_id"),
        ({"length": 4, "remainder": "pad"}, "needs pad_id"),
        ({"length": 4, "strategy": "conact"}, "no strategy 'conact', but concat, intact, best_fit, split"),
        ({"length": 4, "min_tail": 5}, "longer than a row"),
        ({"length": 4, "min_lenght": 3}, "did you mean 'min_length'"),
    ],
)
def test_wrong_settings_are_explained(values: dict[str, object], message: str) -> None:
    """Special ids are never guessed; a misspelt key never means its default."""
    with pytest.raises(ConfigError, match=message):
        PackConfig.from_dict(values)


def test_lengths_take_units() -> None:
    """128k is 131072."""
    assert PackConfig.from_dict({"length": "128k"}).length == 131072


def test_a_strategy_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strategy of one's own needed twelve places of the package changed."""

    def two_by_two(tokens: np.ndarray, length: int) -> np.ndarray:
        return np.arange(len(tokens)) // 2

    monkeypatch.setitem(STRATEGIES, "pairs", Strategy(cut_to_rows, join=two_by_two, remainders=("pad",)))
    spec = PackConfig.from_dict(
        {"length": 8, "strategy": "pairs", "remainder": "pad", "pad_id": 0, "shuffle": False}
    )
    plan = plan_packing(spec, make_table([("a", 3), ("a", 2), ("a", 4)]), np.arange(3, dtype=np.uint32), 0)
    assert plan.span_document.tolist() == [0, 1, PAD_DOCUMENT, 2, PAD_DOCUMENT]
    assert plan.span_tokens.tolist() == [3, 2, 3, 4, 4]
    assert plan.row_offsets.tolist() == [0, 3, 5]
