"""Layers with a state in a row walked in chunks: what a document carries over a border, and its gradient back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longspan.core.errors import ArgumentError
from longspan.models.checkpointing import enable_checkpointing
from longspan.models.chunk_cache import ChunkCache
from longspan.train.recurrent import recurrent_step
from tests.hybrids import HYBRIDS, MAMBA_1, eager, with_ours
from tests.train.test_recurrent import batch_of, check_equal, gradients

# Documents that end inside chunks of 16 and on their borders, fill several, and are shorter than a convolution.
BORDERS = [0, 10, 16, 17, 70, 72, 101]


@pytest.fixture
def in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the recurrences of transformers compute in fp64: they cast to fp32, and hide errors in its rounding."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def model_of(name: str, *, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    return with_ours(eager(name, **fields).to(dtype)).train()


@pytest.mark.parametrize("chunk_tokens", [2, 16, 37])
@pytest.mark.parametrize("name", HYBRIDS)
def test_equals_the_row_at_once(name: str, chunk_tokens: int, in_fp64: None) -> None:
    """A chunk of two tokens is shorter than what a convolution reads: its tail comes from the chunk before that."""
    borders = BORDERS if chunk_tokens > 2 else [0, 3, 13, 20]
    batch = batch_of(borders, weighted=True)
    check_equal(model_of(name, dtype=torch.float64), batch, tolerance=1e-10, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("checkpointing", ["full", "offload"])
def test_composes_with_what_saves_memory(checkpointing: Any) -> None:
    """A block that is computed again must find the state that it found the first time."""
    model = enable_checkpointing(model_of("falcon_h1"), checkpointing)
    check_equal(model, batch_of(BORDERS), tolerance=2e-5, chunk_tokens=16, offload=checkpointing == "offload")


@pytest.mark.parametrize("trained", ["0.mixer.A_log", "0.mixer.conv1d", "2.mixer"])
def test_frozen_weights(trained: str) -> None:
    """A state has a gradient where only its decay is trained, and none below the first trained weight."""
    model = model_of("nemotron_h")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name or "lm_head" in name)
    check_equal(model, batch_of(BORDERS), tolerance=2e-5, chunk_tokens=16)


def test_what_waits_is_one_state_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """States are counted, nothing is left of them after a step, and documents that end in their chunk leave none."""
    peaks: list[int] = []
    release = ChunkCache.release

    def note(self: ChunkCache, chunk: int) -> None:
        peaks.append(self.num_bytes)
        release(self, chunk)
        peaks.append(self.num_bytes)

    monkeypatch.setattr(ChunkCache, "release", note)
    model = model_of("lfm2")
    recurrent_step(model, batch_of([0, 48]), chunk_tokens=16, weight=1.0)
    # Of 32 tokens keys and values of a layer, 2 heads of 8; of two chunks two tokens of 32 channels in two layers.
    keys, tails = 2 * 32 * 2 * 8 * 4, 2 * 2 * 2 * 32 * 4
    # The last chunk has been through: gradients of all keys, and of the states that it read.
    assert peaks[0] == 2 * keys + tails + tails // 2 and peaks[-1] == 0
    gradients(model)
    peaks.clear()
    recurrent_step(model, batch_of([0, 16, 32]), chunk_tokens=16, weight=1.0)
    assert set(peaks) == {0}


def test_a_recurrence_that_takes_no_state_is_refused() -> None:
    """Mamba-1's function begins at zero: a document cut by chunks would forget what it read, without a word."""
    model = model_of("jamba", **MAMBA_1)
    with pytest.raises(ArgumentError, match="cannot go on from a state"):
        recurrent_step(model, batch_of([0, 40]), chunk_tokens=16, weight=1.0)
    check_equal(model, batch_of([0, 16, 32]), tolerance=2e-5, chunk_tokens=16)
