"""A small tokenizer and corpus that several test files of this room share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longspan.data.tokenizer import Tokenizer, train_bpe

SENTENCE = "the model reads a long book about rivers and towns , then writes 42 lines of code : x = f ( 7 )"


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """50 different texts of 40 words."""
    words = SENTENCE.split()
    return [
        " ".join(words[(number * 7 + word * (number + 3)) % len(words)] for word in range(40))
        for number in range(50)
    ]


@pytest.fixture(scope="session")
def tokenizer(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level BPE tokenizer of 300 ids; 0, 1, 2 are BOS, EOS and padding."""
    return train_bpe(texts, tmp_path_factory.mktemp("tokenizer"), vocab_size=300)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes records (or raw bytes) as lines of a file under tmp_path."""

    def write(name: str, *records: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in records]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write
