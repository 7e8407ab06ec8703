"""A small trained tokenizer, deterministic held-out documents and a tiny random Llama."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longspan.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from longspan.eval.held_out import HeldOutDocument
from longspan.models.hf import enable

SYLLABLES = ["ba", "ce", "di", "fo", "gu", "ha", "ke", "li", "mo", "nu", "pa", "re", "si", "to", "vu"]


def words(generator: np.random.Generator, count: int) -> list[str]:
    return ["".join(generator.choice(SYLLABLES, size=generator.integers(2, 5))) for _ in range(count)]


def make_text(seed: int, num_lines: int) -> str:
    generator = np.random.default_rng(seed)
    return "".join(
        " ".join(words(generator, int(generator.integers(3, 9)))).capitalize() + ".\n"
        for _ in range(num_lines)
    )


@pytest.fixture(scope="session")
def documents() -> list[HeldOutDocument]:
    """Twelve documents of two sources; prose of made-up words, one short sentence a line."""
    return [
        HeldOutDocument(f"doc{index}", make_text(index, 20 + 12 * index), "code" if index % 2 else "prose")
        for index in range(12)
    ]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [make_text(seed, 60) + "The magic number of key is 12345.\n" for seed in range(100, 110)]
    train_bpe(texts, folder, vocab_size=400)
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> torch.nn.Module:
    """A random Llama of two layers, hidden size 32, with this tokenizer's vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    model = LlamaForCausalLM(config)
    enable(model)
    return model


@pytest.fixture()
def model_info() -> dict[str, object]:
    return {"path": "model", "fingerprint": "f", "rope": {"rope_type": "default"}, "trained_length": 256}


@pytest.fixture()
def records(tmp_path: Path) -> Path:
    return tmp_path / "needle-before.jsonl"
