"""A token store small enough to train on in a second: 40 documents of numbers written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longspan.data.tokenize import tokenize_corpus
from longspan.data.tokenizer import train_bpe

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def document(number: int) -> str:
    """A text that repeats itself, so that a model has something to learn."""
    return " ".join(WORDS[(number + i * i) % 10] for i in range(12 + 9 * (number % 7))) + ".\n"


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("train-data")
    records = []
    for number in range(60):
        record: dict[str, Any] = {"text": document(number), "source": "even" if number % 2 == 0 else "odd"}
        records.append(record)
    (root / "plain.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for record in records:
        # The first word is not trained, the last one weighs 7.
        end = len(record["text"])
        record["loss_weights"] = [[0, record["text"].index(" "), 0], [end - 5, end, 7]]
    (root / "weighted.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = train_bpe((record["text"] for record in records), root / "tokenizer", vocab_size=300)
    for name in ("plain", "weighted"):
        tokenize_corpus([str(root / f"{name}.jsonl")], tokenizer, root / name, source_field="source")
    return root


def recipe(**changes: Any) -> dict[str, Any]:
    """A two-stage recipe as YAML would give it; `changes` replace whole entries."""
    first = {
        "name": "short",
        "context_length": 16,
        "tokens": 16 * 8 * 6,
        "batch_tokens": 16 * 8,
        "micro_batch_tokens": 16 * 3,
        "lr": 0.02,
        "adamw_lr": 0.004,
        "lr_schedule": {"kind": "constant", "warmup_steps": 2},
        "rope": {"rope_type": "default", "rope_theta": 10000.0},
        "max_epochs": 10,
        "streams": {
            "text": {"store": "plain"},
            "weighted": {"store": "weighted", "pack": {"strategy": "intact"}},
        },
    }
    second = {
        **first,
        "name": "long",
        "context_length": 48,
        "tokens": 48 * 2 * 6,
        "batch_tokens": 48 * 2,
        "micro_batch_tokens": None,
        "lr_schedule": {"kind": "cosine", "floor": 0.1},
        "rope": {"rope_type": "default", "rope_theta": 50000.0},
        "optimizer_state": "carry",
    }
    values = {
        "seed": 3,
        "model": {
            "hf_config": {
                "model_type": "llama",
                "vocab_size": 300,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 16,
                "tie_word_embeddings": True,
            },
        },
        "optimizer": {"name": "muon"},
        "checkpoint": {"every_steps": 2, "keep": 2},
        "stages": [first, second],
    }
    return {**values, **changes}
