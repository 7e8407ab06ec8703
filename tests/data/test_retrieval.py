"""The retrieval corpus: chunks, what follows them, and shards that share nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest

from longspan.core.errors import ArgumentError, DataError
from longspan.data.exchange.token_documents import open_documents
from longspan.data.pairs.retrieval import RetrievalConfig, plan_retrieval, write_retrieval
from longspan.data.pairs.windows import split_parts
from longspan.data.store import TokenStoreWriter

LENGTHS = [3, 6, 8, 9, 11, 40]
CHUNK = 4


@pytest.fixture
def documents(tmp_path, tokenizer):
    """A store of 120 documents, framed: 5, 8, 10, 11, 13 or 42 tokens."""
    with TokenStoreWriter(tmp_path / "store", config={}, tokenizer=tokenizer) as writer:
        for number in range(120):
            ids = 3 + (np.arange(LENGTHS[number % 6], dtype=np.uint32) + 7 * number) % 290
            writer.add(ids, source="ab"[number % 2], key=number)
    return open_documents([tmp_path / "store"])


def spec(**settings) -> RetrievalConfig:
    return RetrievalConfig(**{"samples": 20, "chunk": CHUNK, "num_shards": 10, **settings})


def lines(folder) -> list[dict]:
    return [
        json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()
    ]


def test_chunks_and_neighbors(documents, tokenizer, tmp_path):
    """42 tokens in chunks of 4: ten chunks, each with the 4 tokens after it, the last with 2."""
    plan = plan_retrieval(spec(samples=100_000), documents, 0)
    folder = write_retrieval(plan, documents, tokenizer, tmp_path)
    assert folder == tmp_path / "retrieval" / "0"
    found = sorted((line["contents_token_ids"], line["neighbor_token_ids"]) for line in lines(folder))
    expected = []
    for document in np.flatnonzero(split_parts(documents, 0) == 2):
        ids = documents.ids(int(document)).tolist()
        for start in range(0, len(ids) - CHUNK + 1, CHUNK):
            expected.append((ids[start : start + CHUNK], ids[start + CHUNK : start + 2 * CHUNK]))
    assert found == sorted(expected)
    assert {len(neighbor) for _, neighbor in found} >= {0, 1, 2, 4}


def test_lines_hold_text_without_framing(documents, tokenizer, tmp_path):
    folder = write_retrieval(plan_retrieval(spec(), documents, 3), documents, tokenizer, tmp_path)
    for name in "ab":
        texts = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        assert [line["id"] for line in texts] == [f"{name}_3_{number}" for number in range(10)]
        for line in texts:
            plain = [token for token in line["contents_token_ids"] if token > 2]
            assert line["contents"] == tokenizer.decode(plain)
            assert list(line) == ["id", "contents", "neighbor", "contents_token_ids", "neighbor_token_ids"]


def test_shards_share_no_chunk(documents):
    """Each machine writes its own shard: none may repeat a chunk of another."""
    seen: dict[str, list[tuple[int, int]]] = {"a": [], "b": []}
    for shard in range(10):
        plan = plan_retrieval(spec(samples=8), documents, shard)
        for domain, chunks in plan.chunks.items():
            assert len(chunks.document) == 4
            seen[domain] += list(zip(chunks.document.tolist(), chunks.start.tolist()))
    for found in seen.values():
        assert len(found) == len(set(found)) == 40


def test_shards_past_the_end(documents):
    """A shard that does not exist was skipped without a word; one that would be empty is an error."""
    with pytest.raises(ArgumentError, match="no such shard"):
        plan_retrieval(spec(), documents, 10)
    plan = plan_retrieval(spec(samples=100_000), documents, 0)
    assert all(count.pairs == count.available < count.wanted for count in plan.counts)
    with pytest.raises(DataError, match="no chunk is left"):
        plan_retrieval(spec(samples=100_000), documents, 1)


def test_a_complete_shard_is_kept_and_another_is_refused(documents, tokenizer, tmp_path):
    folder = write_retrieval(plan_retrieval(spec(), documents, 0), documents, tokenizer, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    write_retrieval(plan_retrieval(spec(), documents, 0), documents, tokenizer, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(DataError, match="made otherwise"):
        write_retrieval(plan_retrieval(spec(), documents, 0, seed=1), documents, tokenizer, tmp_path)
