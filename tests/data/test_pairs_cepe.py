"""CEPE's token files: one array of counts, lengths and tokens."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import DataError
from longspan.core.shuffling import permuted
from longspan.data.exchange.cepe import read_cepe, write_cepe


def as_published(documents: list[list[int]]) -> bytes:
    """Return the bytes that CEPE's tokenizer script writes."""
    data = np.concatenate([[len(documents)], [len(ids) for ids in documents], *documents]).astype(np.int64)
    file = io.BytesIO()
    np.save(file, data)
    return file.getvalue()


@given(st.lists(st.lists(st.integers(0, 2**31), max_size=6), max_size=6))
@settings(max_examples=40, deadline=None)
def test_files_are_the_same_bytes_both_ways(tmp_path_factory, documents):
    """Also a file without documents, and documents without tokens."""
    path = tmp_path_factory.mktemp("cepe") / "a.npy"
    write_cepe(path, [len(ids) for ids in documents], [np.array(ids, np.uint32) for ids in documents])
    assert path.read_bytes() == as_published(documents)
    file = read_cepe(path)
    assert file.lengths.tolist() == [len(ids) for ids in documents]
    assert file.tokens.tolist() == [token for ids in documents for token in ids]
    parts = np.split(file.tokens, np.cumsum(file.lengths)[:-1]) if documents else []
    write_cepe(path.with_name("b.npy"), file.lengths.tolist(), parts)
    assert path.with_name("b.npy").read_bytes() == path.read_bytes()


def test_the_published_empty_file_is_read(tmp_path):
    """Concatenating nothing, CEPE's script writes a float64 array."""
    np.save(tmp_path / "a.npy", np.concatenate([[0], []]))
    assert (len(read_cepe(tmp_path / "a.npy").lengths), len(read_cepe(tmp_path / "a.npy").tokens)) == (0, 0)


@pytest.mark.parametrize(
    "data",
    [
        np.array([2, 1, 1, 7]),
        np.array([1, 1, 7, 7]),
        np.array([5, 1]),
        np.array([-1, 1]),
        np.array([2, -1, 2, 7]),
        np.array([2, 2**62, 2**62, 7]),
        np.array([1.5]),
        np.zeros((2, 2), np.int64),
        np.zeros(0, np.int64),
    ],
)
def test_damaged_files_are_refused(tmp_path, data):
    np.save(tmp_path / "a.npy", data)
    with pytest.raises(DataError, match="token file"):
        read_cepe(tmp_path / "a.npy")


def test_cut_and_foreign_files_are_refused(tmp_path):
    whole = as_published([[1, 2, 3]])
    for content in (whole[:-3], whole[:20], b"", b"text", b"\x93NUMPY"):
        (tmp_path / "a.npy").write_bytes(content)
        with pytest.raises(DataError, match="token file"):
            read_cepe(tmp_path / "a.npy")
    with pytest.raises(DataError, match="token file"):
        read_cepe(tmp_path / "gone.npy")


@pytest.mark.parametrize(("lengths", "documents"), [([2], [[1]]), ([1], [[1], [2]]), ([1, 1], [[1]])])
def test_lengths_must_be_those_of_the_documents(tmp_path, lengths, documents):
    with pytest.raises(DataError, match="document"):
        write_cepe(tmp_path / "a.npy", lengths, [np.array(ids) for ids in documents])
    assert not list(tmp_path.iterdir()), "nothing half-written is left"


@given(st.integers(1, 500), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_permuted_gives_every_number_once(count, seed):
    """Shards are slices of it: a number twice would be a chunk in two shards."""
    whole = permuted(count, np.arange(count), seed, "test")
    assert sorted(whole.tolist()) == list(range(count))
    assert permuted(count, np.array([count - 1, 0]), seed, "test").tolist() == [whole[-1], whole[0]]


def test_permuted_looks_random_and_is_large():
    first = permuted(10**12, np.arange(10_000), 0, "test")
    assert len(set(first.tolist())) == 10_000
    assert abs(first.mean() / 10**12 - 0.5) < 0.02
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.05
    assert len(permuted(0, np.arange(0), 0)) == 0
