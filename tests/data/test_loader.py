"""Rows read through plans, and streams of rows interleaved by weight."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ArgumentError, ConfigError, DataError
from longspan.data.plans.pack_config import PackConfig
from longspan.data.plans.packing import PAD_DOCUMENT, PackPlan, plan_packing
from longspan.data.rows.loader import PackedRow, RowLoader, StreamMixer
from longspan.data.store.lengths import LengthTable
from tests.data.made_stores import MadeStore


def plan_all(stores: list[MadeStore], **values: object) -> PackPlan:
    """Pack every document of the stores in order, rows unshuffled unless asked."""
    lengths = LengthTable.concatenate([store.lengths for store in stores])
    spec = PackConfig.from_dict({"shuffle": False} | values)
    return plan_packing(spec, lengths, np.arange(len(lengths), dtype=np.uint32), 1)


def make_loader(rows: int, *, length: int = 2, first_id: int = 0) -> RowLoader:
    """Return a loader of `rows` rows whose ids count up from `first_id`."""
    ids = range(first_id, first_id + rows * length)
    store = MadeStore([("text", rows * length)], ids=[ids])
    return RowLoader(store, plan_all([store], length=length))


def test_a_row_by_hand() -> None:
    """Borders, specials, padding and weights of one small example, each visible."""
    store = MadeStore([("web", 2), ("code", 5)], masks=[[0, 3], [1, 1, 0, 0, 7]])
    values = {"length": 6, "specials": "both", "bos_id": 1, "eos_id": 2, "remainder": "pad", "pad_id": 9}
    loader = RowLoader(store, plan_all([store], **values))
    first, second = loader.row(0), loader.row(1)
    assert first.input_ids.tolist() == [1, 0, 1, 2, 1, 100]
    assert first.cu_seqlens.tolist() == [0, 4, 6]
    assert first.weights.tolist() == [1, 0, 3, 1, 1, 1]
    assert second.input_ids.tolist() == [101, 102, 103, 104, 2, 9]
    assert second.cu_seqlens.tolist() == [0, 5, 6]
    assert second.weights.tolist() == [1, 0, 0, 7, 1, 0]
    assert second.documents.tolist() == [1, PAD_DOCUMENT]
    assert [second.source_names[s] for s in second.sources] == ["code", "padding"]
    assert first.continuation.tolist() == [False, False]
    assert second.continuation.tolist() == [True, False]
    dtypes = [column.dtype for column in (*first[:4], *first[5:7])]
    assert dtypes == [np.int64, np.int32, np.uint32, np.uint16, np.bool_, np.uint8]
    assert first.positions is None


def test_documents_without_a_mask_weigh_one() -> None:
    """No mask means that every token is trained on, not none."""
    assert make_loader(2).row(1).weights.tolist() == [1, 1]


def test_several_stores_keep_their_own_documents() -> None:
    """Document 0 of the second store must not be read from the first."""
    first = MadeStore([("web", 3)], ids=[[10, 11, 12]])
    second = MadeStore([("code", 2), ("web", 1)], ids=[[20, 21], [30]])
    row = RowLoader([first, second], plan_all([first, second], length=6)).row(0)
    assert row.input_ids.tolist() == [10, 11, 12, 20, 21, 30]
    assert row.documents.tolist() == [0, 1, 2]
    assert [row.source_names[s] for s in row.sources] == ["web", "code", "web"]


def test_a_plan_for_other_stores_is_refused() -> None:
    """Spans over other documents would train on arbitrary cuts."""
    store, other = MadeStore([("web", 3)]), MadeStore([("web", 4)])
    with pytest.raises(DataError, match="other token stores"):
        RowLoader(other, plan_all([store], length=2))


def test_a_store_that_contradicts_its_table_is_refused() -> None:
    """A short document would leave uninitialised ids in the row."""
    store = MadeStore([("web", 4)], ids=[[1, 2]])
    with pytest.raises(DataError, match="document 0"):
        RowLoader(store, plan_all([store], length=4)).row(0)


def test_a_damaged_plan_is_refused(tmp_path: Path) -> None:
    """A row that is too short or reaches behind its document is an error, not garbage."""
    store = MadeStore([("web", 8)])
    plan_all([store], length=4).save(tmp_path / "plan")
    np.save(tmp_path / "plan" / "span_tokens.npy", np.array([4, 3], np.uint32))
    with pytest.raises(DataError, match="row 1"):
        RowLoader(store, PackPlan.load(tmp_path / "plan")).row(1)
    np.save(tmp_path / "plan" / "span_tokens.npy", np.array([4, 4], np.uint32))
    np.save(tmp_path / "plan" / "span_start.npy", np.array([0, 6], np.uint32))
    with pytest.raises(DataError, match="document 0"):
        RowLoader(store, PackPlan.load(tmp_path / "plan")).row(1)


@pytest.mark.parametrize("index", [-1, 2])
def test_rows_outside_the_plan_are_refused(index: int) -> None:
    """Row -1 must not be the last row."""
    with pytest.raises(ArgumentError, match="no such row"):
        make_loader(2).row(index)


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    length=st.integers(1, 13),
    specials=st.sampled_from(["none", "bos", "eos", "both"]),
    split=st.integers(0, 12),
)
def test_rows_equal_the_documents_written_one_after_another(
    tokens: list[int], length: int, specials: str, split: int
) -> None:
    """Reading through views must give the ids and weights of a plain loop over documents."""
    documents = [("text", n) for n in tokens]
    masks = [[(3 * t + d) % 5 for t in range(n)] for d, n in enumerate(tokens)]
    ids = [[1000 * d + t for t in range(n)] for d, n in enumerate(tokens)]
    cuts = [slice(0, split), slice(split, None)]
    stores = [MadeStore(documents[c], ids=ids[c], masks=masks[c]) for c in cuts if documents[c]]
    values = {"length": length, "specials": specials, "bos_id": 60001, "eos_id": 60002}
    loader = RowLoader(stores, plan_all(stores, **values, remainder="pad", pad_id=60003))
    stream: list[tuple[int, int, int]] = []
    for document in range(len(tokens)):
        framed = list(zip(ids[document], masks[document]))
        framed = [(60001, 1)] * (specials in ("bos", "both")) + framed
        framed += [(60002, 1)] * (specials in ("eos", "both"))
        stream += [(token, weight, document) for token, weight in framed]
    stream += [(60003, 0, PAD_DOCUMENT)] * (-len(stream) % length)
    assert loader.num_rows * length == len(stream)
    for index in range(loader.num_rows):
        row = loader.row(index)
        expected = stream[index * length : (index + 1) * length]
        assert row.input_ids.tolist() == [token for token, _, _ in expected]
        assert row.weights.tolist() == [weight for _, weight, _ in expected]
        owners = np.repeat(row.documents, np.diff(row.cu_seqlens))
        assert owners.tolist() == [document for _, _, document in expected]


def ids_of(rows: list[PackedRow]) -> list[int]:
    return [int(row.input_ids[0]) for row in rows]


def test_equal_weights_alternate() -> None:
    """With 1:1 the streams take turns, without a random run of one of them."""
    mixer = StreamMixer({"a": (make_loader(50), 1), "b": (make_loader(50, first_id=1000), 1)}, 7)
    assert [mixer.locate(k).stream for k in range(6)] == ["a", "b", "a", "b", "a", "b"]
    assert ids_of(mixer.rows(0, 4)) == [0, 1000, 2, 1002]


def test_weights_two_to_one() -> None:
    """a b a a b a: two of three rows, spread evenly."""
    mixer = StreamMixer({"a": (make_loader(50), 0.2), "b": (make_loader(50), 0.1)}, 7)
    assert [mixer.locate(k).stream for k in range(6)] == ["a", "b", "a", "a", "b", "a"]


def test_an_ended_stream_begins_again_in_another_order() -> None:
    """Each epoch has every row once; a short stream repeats while a long one is in its first epoch."""
    mixer = StreamMixer({"short": (make_loader(20), 1), "long": (make_loader(500), 1)}, 7)
    rows = [mixer.locate(k) for k in range(0, 120, 2)]
    epochs = [[row.row for row in rows[start : start + 20]] for start in (0, 20, 40)]
    assert [row.epoch for row in rows[::20]] == [0, 1, 2]
    assert epochs[0] == list(range(20))
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert mixer.epochs(50) == {"short": (25, 1, 5), "long": (25, 0, 25)}
    assert mixer.epochs(0) == {"short": (0, 0, 0), "long": (0, 0, 0)}


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.floats(0.001, 50), min_size=1, max_size=5),
    position=st.integers(0, 10**6),
    seed=st.integers(0, 2**32),
)
def test_shares_hold_at_every_position(weights: list[float], position: int, seed: int) -> None:
    """After k rows each stream is within a few rows of k times its share: 1/2 + streams/2 by construction."""
    streams = {f"s{i}": (make_loader(3, first_id=10 * i), weight) for i, weight in enumerate(weights)}
    mixer = StreamMixer(streams, seed)
    progress = mixer.epochs(position)
    assert sum(stream.rows for stream in progress.values()) == position
    for weight, stream in zip(weights, progress.values()):
        share = weight / sum(weights)
        # Weights that need a long cycle are rounded to 1 in 65536.
        assert abs(stream.rows - position * share) <= 0.5 + len(weights) / 2 + position * 1e-4
    address = mixer.locate(position)
    assert (address.epoch, address.row) == mixer.locate(position)[1:]
    after = mixer.epochs(position + 1)
    drawn = [name for name in after if after[name].rows != progress[name].rows]
    assert drawn == [address.stream]


@settings(max_examples=25, deadline=None)
@given(start=st.integers(0, 200), count=st.integers(0, 30), seed=st.integers(0, 9))
def test_rows_are_a_function_of_the_position(start: int, count: int, seed: int) -> None:
    """A loader made anew at any position must continue exactly, whatever was read before."""

    def mixer() -> StreamMixer:
        return StreamMixer({"a": (make_loader(7), 3), "b": (make_loader(4, first_id=1000), 2)}, seed)

    used = mixer()
    everything = ids_of(used.rows(0, start + count))
    assert ids_of(mixer().rows(start, count)) == everything[start:]
    assert ids_of(used.rows(start, count)) == everything[start:]


def test_a_state_is_its_position_and_refuses_other_data() -> None:
    """Resuming with other data, weights or seed would silently train on something else."""
    mixer = StreamMixer({"a": (make_loader(7), 1), "b": (make_loader(4), 1)}, 3)
    state = mixer.state(17)
    assert mixer.check_state(state) == 17
    again = StreamMixer({"a": (make_loader(7), 0.5), "b": (make_loader(4), 0.5)}, 3)
    assert again.check_state(state) == 17
    others = [
        StreamMixer({"a": (make_loader(7), 1), "b": (make_loader(4), 1)}, 4),
        StreamMixer({"a": (make_loader(7), 1), "b": (make_loader(4), 2)}, 3),
        StreamMixer({"a": (make_loader(7), 1), "c": (make_loader(4), 1)}, 3),
        StreamMixer({"a": (make_loader(7), 1), "b": (make_loader(5), 1)}, 3),
        StreamMixer({"a": (make_loader(7), 1), "b": (make_loader(4, first_id=1), 1)}, 3),
    ]
    for other in others:
        with pytest.raises(DataError, match="other data, weights or seed"):
            other.check_state(state)
    for broken in (
        {},
        {"fingerprint": mixer.fingerprint},
        state | {"position": -1},
        state | {"position": "x"},
    ):
        with pytest.raises(DataError):
            mixer.check_state(broken)


def test_streams_that_cannot_be_mixed_are_refused() -> None:
    """An empty stream would divide by zero; rows of two lengths do not form a batch."""
    with pytest.raises(ConfigError, match="no stream"):
        StreamMixer({}, 1)
    with pytest.raises(DataError, match="no rows"):
        StreamMixer({"a": (make_loader(2), 1), "b": (make_loader(0), 1)}, 1)
    with pytest.raises(ConfigError, match="one length"):
        StreamMixer({"a": (make_loader(2), 1), "b": (make_loader(2, length=3), 1)}, 1)
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="positive"):
            StreamMixer({"a": (make_loader(2), weight)}, 1)
    with pytest.raises(ArgumentError, match="not negative"):
        StreamMixer({"a": (make_loader(2), 1)}, 1).rows(-1, 1)


def test_a_rare_stream_is_never_rounded_away() -> None:
    """A weight below the resolution of a cycle still gets a row in it."""
    mixer = StreamMixer({"a": (make_loader(5), 1.0), "b": (make_loader(5), 1e-9)}, 1)
    counts = Counter(mixer.locate(k).stream for k in range(0, 70_000, 1))
    assert counts["b"] == 1 and counts["a"] == 69_999
