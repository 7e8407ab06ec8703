"""A tiny random Llama with our attention, and the same weights with the library's own attention."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longspan.infer.kv import KvBlock
from longspan.models.hf import enable

VOCAB_SIZE = 97


class Twins(NamedTuple):
    ours: torch.nn.Module
    plain: torch.nn.Module


@pytest.fixture(scope="session")
def twins() -> Twins:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        attention_dropout=0.5,
        attn_implementation="eager",
    )
    plain = LlamaForCausalLM(config).eval()
    ours = copy.deepcopy(plain)
    enable(ours)
    return Twins(ours, plain)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of a block after each time that keys were put into one."""
    found: list[int] = []
    append = KvBlock.append

    def watched(block: KvBlock, *args: Any) -> None:
        append(block, *args)
        found.append(block.rows)

    monkeypatch.setattr(KvBlock, "append", watched)
    return found
