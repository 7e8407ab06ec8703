"""A tiny teacher with its tokenizer, a store, a plan with padding, packed rows, and CEPE's windows with passages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from longspan.data.plans.pack_config import PackConfig
from longspan.data.plans.packing import plan_packing
from longspan.data.store import Column, TokenStore
from longspan.data.store.directory import MDSWriter
from longspan.data.tokenize import tokenize_corpus
from longspan.data.tokenizer import train_bpe
from longspan.models.hf import build_model, save_model

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
VOCABULARY = 300
MODEL = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


class Inputs(NamedTuple):
    root: Path
    model: Path
    store: Path
    plan: Path
    pairs: Path
    retrieval: Path


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    root = tmp_path_factory.mktemp("annotate")
    texts = [
        " ".join(WORDS[(number + i * i) % 10] for i in range(10 + 5 * (number % 3))) for number in range(24)
    ]
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_bpe(texts, root / "tokenizer", vocab_size=VOCABULARY)
    tokenize_corpus([str(root / "texts.jsonl")], tokenizer, root / "store")
    save_model(build_model(MODEL, seed=1), root / "model", tokenizer=root / "tokenizer")
    store = TokenStore(root / "store")
    spec = PackConfig(length=32, strategy="intact", remainder="pad", pad_id=0)
    documents = np.arange(len(store), dtype=np.uint32)
    plan_packing(spec, store.lengths, documents, 0).save(root / "plan", stores=[root / "store"])
    _pairs(root)
    shutil.copytree(root / "pairs", root / "other-pairs")
    return Inputs(root, root / "model", root / "store", root / "plan", root / "pairs", root / "retrieved")


def _pairs(root: Path) -> None:
    """Six windows of each of two domains: 12 tokens before, 8 tokens after; three passages of 5 tokens for each."""
    for number, domain in enumerate(("arxiv", "book")):
        generator = np.random.default_rng(number)
        for folder in ("pairs", "retrieved"):
            (root / folder / domain).mkdir(parents=True)
        ids = "ndarray:int64"
        pairs = MDSWriter(
            root / "pairs" / domain,
            [Column("token_ids", ids), Column("prev_token_ids", ids), Column("domain", "str")],
            size_limit=600,
        )
        retrieved = MDSWriter(
            root / "retrieved" / domain, [Column("retrieved_token_ids", ids)], size_limit=600
        )
        for _ in range(6):
            row = generator.integers(0, VOCABULARY, 20)
            pairs.write({"token_ids": row[12:], "prev_token_ids": row[:12], "domain": domain})
            retrieved.write({"retrieved_token_ids": generator.integers(0, VOCABULARY, (3, 5))})
        pairs.finish()
        retrieved.finish()
