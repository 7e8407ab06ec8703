"""A saved model whose layers carry a state, asked by every kind of command; it has no RoPE either."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longspan.data.tokenizer import load_tokenizer
from tests.hybrids import eager


@pytest.fixture
def hybrid(store: Path) -> Path:
    """A random Nemotron-H in `hybrid`, with the tokenizer of the store."""
    folder, tokenizer = store.parent / "hybrid", store.parent / "tokenizer"
    model = eager("nemotron_h", vocab_size=load_tokenizer(tokenizer).vocab_size, max_position_embeddings=4096)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    return folder


def test_every_command_asks_it(longspan, hybrid):
    """Records name a RoPE, which it has none of; a grid read once and cell by cell is the same grid."""
    grid = "eval needle --model hybrid --out run --lengths 256,320 --depths 0:1:3 --samples 1 --json"
    once = longspan(grid)
    assert once.code == 0, once.err
    plain = longspan(f"{grid} --label plain --no-prefix-reuse")
    assert json.loads(plain.out)["cells"] == json.loads(once.out)["cells"]
    ppl = longspan("eval ppl --model hybrid --out run --data store --lengths 64,128 --num-documents 2 --json")
    assert ppl.code == 0, ppl.err
    assert [row["length"] for row in json.loads(ppl.out)["by_length"]] == [64, 128]
    asked = longspan("ask hybrid --question Hello --max-new-tokens 2 --json")
    assert asked.code == 0 and json.loads(asked.out)["answer_tokens"] == 2, asked.err
