"""Copies between host and device on streams of their own, on a card that keeps count of what is ordered."""

from __future__ import annotations

import pytest
import torch

from longspan.kernels.transfers import to_device, to_host
from longspan.models import chunk_cache
from longspan.models.checkpointing import enable_checkpointing
from longspan.train.recurrent import recurrent_step
from longspan.train.trainer import train_step
from tests.device_streams import DEVICE, Streams
from tests.flash_operators import flash_operators
from tests.train.test_device_budget import model_and_optimizer, row
from tests.train.test_recurrent import at_once, batch_of, gradients, model_of

BORDERS = [0, 9, 40]


def offloaded(what: str, forgetting: str = "") -> Streams:
    """Train a step with the cache of chunks, or with the inputs of blocks, on the host."""
    model = model_of()
    at_once(model, batch_of(BORDERS), 37.0)
    truth = gradients(model)
    if what == "blocks":
        enable_checkpointing(model, "offload")
    chunk_cache._stream.cache_clear()
    with (
        flash_operators(wide=True),
        Streams([*model.parameters(), *model.buffers()], forgetting=forgetting) as card,
    ):
        if what == "blocks":
            at_once(model, batch_of(BORDERS), 37.0)
        else:
            recurrent_step(model, batch_of(BORDERS), chunk_tokens=16, weight=37.0, offload=True)
    chunk_cache._stream.cache_clear()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, truth[name], rtol=1e-4, atol=1e-5)
    return card


@pytest.mark.parametrize("what", ["chunks", "blocks"])
def test_what_is_offloaded_is_in_order(what: str) -> None:
    """A key read before it has come back is another model, once in a while, on a busy card only."""
    card = offloaded(what)
    assert not card.faults, card.faults[:3]
    assert card.copies > 10_000


@pytest.mark.parametrize(
    ("what", "forgetting", "fault"),
    [
        ("chunks", "wait_event", "compute reads"),  # keys that are still on their way
        ("chunks", "wait_stream", "stream 1 reads"),  # keys that are not computed yet
        ("chunks", "record_stream", "is freed while"),  # on their way out, or in use after they have come
        ("blocks", "wait_event", "compute reads"),
        ("blocks", "wait_stream", "stream 1 reads"),
    ],
)
def test_planted_faults_are_found(what: str, forgetting: str, fault: str) -> None:
    """A judge that has never found anything proves nothing."""
    faults = offloaded(what, forgetting).faults
    assert any(fault in each for each in faults), faults[:5]


def test_rows_and_losses_of_a_step_are_in_order() -> None:
    """Rows go to the device pinned, losses come back pinned: the host must not touch either before its time."""
    model, optimizers = model_and_optimizer()
    with flash_operators(wide=True), Streams([*model.parameters(), *model.buffers()]) as card:
        rows = [row([1, 30, 65], 0), row([96], 1)]
        train_step(model, optimizers, rows, rows_per_micro_batch=1, max_grad_norm=1.0)
    assert not card.faults, card.faults[:3]
    assert card.copies >= 2 * 96 * 8 * 3


def test_host_buffers_used_too_early_are_found() -> None:
    """A buffer filled again before it was copied, and one read before anything has come."""
    numbers = torch.arange(4.0)
    with Streams() as card:
        there = to_device(numbers, DEVICE)
        pinned = numbers.pin_memory()
        other = pinned.to(DEVICE, non_blocking=True)
        assert there.device == other.device == DEVICE and not card.faults
        pinned.zero_()
    assert len(card.faults) == 1 and "host writes" in card.faults[0]
    for wait in (True, False):
        with Streams() as card:
            back = to_host(to_device(numbers, DEVICE) * 2)
            if wait:
                to_device(numbers, DEVICE).sum().item()
            assert back.tolist() == [0, 2, 4, 6]
        assert [("host reads" in each) for each in card.faults] == [True] * (not wait)
