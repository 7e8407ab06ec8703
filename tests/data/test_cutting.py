"""Pieces with overlap, MOS and listed lengths, against walks token by token."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ArgumentError, ConfigError
from longspan.data.plans.pack_config import PackConfig
from longspan.data.plans.packing import PAD_DOCUMENT, PackPlan, plan_packing, plan_split
from longspan.data.rows.loader import RowLoader
from tests.data.made_stores import MadeStore, make_table

MOS, BOS, EOS, PAD = 60000, 60001, 60002, 60003


def loader(tokens: list[int], **values: object) -> RowLoader:
    """Return the rows of documents whose token t of document d is 100 d + t, all weights 1."""
    ids = {"bos_id": BOS, "eos_id": EOS, "pad_id": PAD}
    spec = PackConfig.from_dict({"shuffle": False} | ids | values)
    store = MadeStore([("text", n) for n in tokens])
    documents = np.arange(len(tokens), dtype=np.uint32)
    return RowLoader(store, plan_packing(spec, store.lengths, documents, 1))


def test_overlap_and_mos_by_hand() -> None:
    """The example of the module: what a piece repeats stands in front, and is not trained on twice."""
    rows = loader([5, 15], length=8, overlap=2, mos_id=MOS, remainder="pad")
    found = [rows.row(index) for index in range(rows.num_rows)]
    assert [row.input_ids.tolist() for row in found] == [
        [0, 1, 2, 3, 4, 100, 101, 102],
        [MOS, 101, 102, 103, 104, 105, 106, 107],
        [MOS, 106, 107, 108, 109, 110, 111, 112],
        [MOS, 111, 112, 113, 114, PAD, PAD, PAD],
    ]
    assert [row.weights.tolist() for row in found] == [
        [1, 1, 1, 1, 1, 1, 1, 1],
        [1, 0, 0, 1, 1, 1, 1, 1],
        [1, 0, 0, 1, 1, 1, 1, 1],
        [1, 0, 0, 1, 1, 0, 0, 0],
    ]
    report = rows.plan.report
    assert (report.tokens_in, report.tokens_packed, report.repeated_tokens) == (20, 20, 6)
    assert (report.special_tokens, report.padding_tokens) == (3, 3)


def test_overlap_never_reaches_into_another_document() -> None:
    """A row that was exactly full must not begin with the end of the document before."""
    rows = loader([4, 6], length=4, overlap=1)
    assert [rows.row(index).input_ids.tolist() for index in range(2)] == [[0, 1, 2, 3], [100, 101, 102, 103]]


def walk(tokens: list[int], spec: PackConfig) -> list[list[tuple[int, int]]]:
    """Return rows of (id, weight) by packing one document after another."""
    rows: list[list[tuple[int, int]]] = [[]]
    apart = spec.strategy != "concat"
    for document, total in enumerate(tokens):
        framed = [BOS] * spec.num_bos + [100 * document + t for t in range(total)] + [EOS] * spec.num_eos
        position = last = 0
        while position < len(framed):
            if len(rows[-1]) == spec.length or (apart and rows[-1]):
                rows.append([])
            again = spec.overlap if position and last > spec.overlap else 0
            head = [(MOS, 1)] * spec.num_mos if position else []
            head += [(token, 0) for token in framed[position - again : position]]
            room = spec.length - len(rows[-1]) - len(head)
            new = framed[position : position + room]
            if position and position + len(new) == len(framed) and len(new) < spec.min_tail:
                break
            rows[-1] += head + [(token, 1) for token in new]
            last = len(new) + again
            position += len(new)
    rows = [row for row in rows if row]
    if spec.remainder == "drop":
        return [row for row in rows if len(row) == spec.length]
    return [row + [(PAD, 0)] * (spec.length - len(row)) for row in rows]


@settings(max_examples=250, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 40), max_size=12),
    length=st.integers(3, 17),
    overlap=st.integers(0, 16),
    mos=st.booleans(),
    strategy=st.sampled_from(["concat", "intact"]),
    remainder=st.sampled_from(["drop", "pad"]),
    specials=st.sampled_from(["none", "bos", "eos", "both"]),
    min_tail=st.integers(1, 3),
)
def test_rows_equal_a_walk(
    tokens: list[int], length: int, overlap: int, mos: bool, min_tail: int, **values: object
) -> None:
    """Overlap, MOS and dropped tails move all that follows; ids, weights and counts must agree."""
    overlap = min(overlap, length - mos - 1)
    values |= {"length": length, "overlap": overlap, "mos_id": MOS if mos else None, "min_tail": min_tail}
    rows = loader(tokens, **values)
    expected = walk(tokens, rows.plan.spec)
    found = [rows.row(index) for index in range(rows.num_rows)]
    assert [list(zip(row.input_ids.tolist(), row.weights.tolist())) for row in found] == expected
    own = sum(token < MOS and weight == 1 for row in expected for token, weight in row)
    report = rows.plan.report
    assert report.tokens_packed == own == report.tokens_in - sum(report.dropped.values())
    assert report.repeated_tokens == sum(
        token != PAD and not weight for row in expected for token, weight in row
    )


def spans_of(plan: PackPlan) -> list[tuple[int, int, int]]:
    return [
        span
        for span in zip(plan.span_document.tolist(), plan.span_start.tolist(), plan.span_tokens.tolist())
        if span[0] != PAD_DOCUMENT
    ]


@settings(max_examples=120, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 90), max_size=15),
    specials=st.sampled_from(["none", "bos", "eos", "both"]),
    mos=st.booleans(),
    by_source=st.booleans(),
    remainder=st.sampled_from(["drop", "pad"]),
)
def test_split_cuts_the_longest_listed_length_first(
    tokens: list[int], specials: str, mos: bool, by_source: bool, remainder: str
) -> None:
    """Every token is in one plan, or counted in one; domains never share a row when they must not."""
    values = {"length": 32, "strategy": "split", "split_lengths": [32, 8, 4], "by_source": by_source}
    values |= {"specials": specials, "bos_id": BOS, "eos_id": EOS, "mos_id": MOS if mos else None}
    spec = PackConfig.from_dict(values | {"remainder": remainder, "pad_id": PAD})
    table = make_table([("ab"[number % 2], n) for number, n in enumerate(tokens)])
    plans = plan_split(spec, table, np.arange(len(tokens), dtype=np.uint32), 3)
    assert list(plans) == [32, 8, 4]
    left = tails = 0
    for piece, plan in plans.items():
        assert all(count == piece for _, _, count in spans_of(plan))
        report = plan.report
        assert report.tokens_in == report.tokens_packed + sum(report.dropped.values())
        left += report.tokens_packed + report.dropped["remainder"]
        tails = report.dropped["tail"]
        owners = table.source[np.minimum(plan.span_document, max(len(tokens) - 1, 0))] if tokens else []
        for low, high in pairwise(plan.row_offsets.astype(int).tolist()):
            real = [
                owner for owner, d in zip(owners[low:high], plan.span_document[low:high]) if d != PAD_DOCUMENT
            ]
            assert len(set(real)) == 1 or not by_source
    assert left + tails == sum(tokens)
    if remainder == "pad":
        for document, total in enumerate(tokens):
            framed = total + spec.num_bos + spec.num_eos
            found = sorted(
                (start, count)
                for plan in plans.values()
                for d, start, count in spans_of(plan)
                if d == document
            )
            position, expected = 0, []
            while fitting := [n for n in (32, 8, 4) if n - mos * (position > 0) <= framed - position]:
                expected.append((position, fitting[0]))
                position += fitting[0] - mos * (position > 0)
            assert found == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"overlap": 8}, "no room for new tokens"),
        ({"overlap": 7, "mos_id": 1}, "no room for new tokens"),
        ({"strategy": "split"}, "longest first"),
        ({"strategy": "split", "split_lengths": [4, 8]}, "longest first"),
        ({"strategy": "split", "split_lengths": [8, 3]}, "do not all divide"),
        ({"strategy": "split", "split_lengths": [8], "overlap": 1}, "no overlap"),
        ({"strategy": "split", "split_lengths": [8, 1], "mos_id": 1}, "behind mos_id"),
        ({"strategy": "split", "split_lengths": [8], "piece_length": 4}, "not one of"),
        ({"split_lengths": [8]}, "with strategy split only"),
    ],
)
def test_settings_that_contradict_each_other_are_explained(values: dict[str, object], message: str) -> None:
    """An overlap as long as the row made the packer of old run for ever."""
    with pytest.raises(ConfigError, match=message):
        PackConfig.from_dict({"length": 8} | values)


def test_split_asks_for_its_own_function() -> None:
    """One plan holds pieces of one length."""
    spec = PackConfig.from_dict({"length": 8, "strategy": "split", "split_lengths": [8, 4]})
    with pytest.raises(ArgumentError, match="plan_split"):
        plan_packing(spec, make_table([("a", 3)]), np.zeros(1, np.uint32), 0)
