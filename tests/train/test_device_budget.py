"""What a training step costs on a device, counted on the CPU: waits of the host, launches, copies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from longspan.data.rows.loader import PackedRow
from longspan.models.hf import build_model
from longspan.train import batch as batches
from longspan.train import trainer
from longspan.train.config import OptimizerConfig
from longspan.train.optim import build_optimizers
from longspan.train.trainer import train_step
from tests.flash_operators import calls, flash_operators
from tests.host_waits import HostWaits

LAYERS = 2


@pytest.fixture
def flash() -> Iterator[None]:
    with flash_operators(wide=True):
        yield


def model_and_optimizer(**fields: Any) -> tuple[torch.nn.Module, list[torch.optim.Optimizer]]:
    model = build_model(
        {
            "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 256, **fields,
        },
        seed=0,
    ).train()  # fmt: skip
    return model, build_optimizers(model, OptimizerConfig())


def row(lengths: list[int], seed: int) -> PackedRow:
    tokens = sum(lengths)
    return PackedRow(
        input_ids=np.random.default_rng(seed).integers(0, 64, tokens),
        cu_seqlens=np.cumsum([0, *lengths]).astype(np.int32),
        documents=np.arange(len(lengths), dtype=np.uint32),
        sources=np.arange(len(lengths), dtype=np.uint16) % 2,
        source_names=("a", "b"),
        continuation=np.zeros(len(lengths), bool),
        weights=np.ones(tokens, np.uint8),
    )


@pytest.mark.parametrize("chunk_tokens", [None, 40])
@pytest.mark.usefixtures("flash")
def test_the_host_waits_for_the_device_once_a_step(
    chunk_tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels were looked through and losses counted on the device: a dozen waits a micro-batch, each of which drains
    the queue of work.
    """
    model, optimizers = model_and_optimizer()
    rows = [row([1, 30, 65], 0), row([96], 1), row([50, 46], 2)]
    train_step(
        model, optimizers, rows, rows_per_micro_batch=1, max_grad_norm=1.0
    )  # makes the optimizer's state
    state = [
        value for optimizer in optimizers for each in optimizer.state.values() for value in each.values()
    ]
    moved: list[torch.Tensor] = []
    monkeypatch.setattr(
        batches, "to_device", lambda tensor, device: moved.append(tensor.clone()) or moved[-1]
    )
    waits = HostWaits([*model.parameters(), *(value for value in state if value.ndim)])
    monkeypatch.setattr(trainer, "to_host", waits.to_host)
    with waits:
        result = train_step(
            model, optimizers, rows, rows_per_micro_batch=1, max_grad_norm=1.0, chunk_tokens=chunk_tokens
        )
    assert result.loss is not None and result.grad_norm is not None
    # One list of numbers: each micro-batch's loss and the norm.
    assert +waits.counts == {"tolist": 1}
    # Ids, labels, positions, and which tokens have a label; nothing that only the host asks for.
    assert sum(tensor.nbytes for tensor in moved) <= 3 * 96 * 4 * 8 * (1 if chunk_tokens is None else 2)


@pytest.mark.usefixtures("flash")
def test_a_row_of_any_documents_is_one_launch_a_layer_and_pass() -> None:
    """Gathers and a launch for each kind of document would show here first."""
    model, optimizers = model_and_optimizer()
    train_step(model, optimizers, [row([1, 30, 64, 1], 0)], rows_per_micro_batch=1, max_grad_norm=1.0)
    assert calls == [("forward", 4)] * LAYERS + [("backward", 4)] * LAYERS
