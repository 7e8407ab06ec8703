"""Chunk-recurrent training: the gradient of a row of any length with the activations of one chunk.

A batch's forward and backward pass, chunk by chunk (see `models.recurrent`): the same loss and the same gradients as
in one piece, to rounding. Memory of a chunk beside a cache of keys and values that grows with the length and may wait
in host memory; time of at most one more forward pass, which is what activation checkpointing costs: where a chunk fits
without checkpointing, a long row costs no more than a checkpointed one. Chunked loss, tiled MLP, checkpointing, frozen
weights, adapters and FSDP act inside the chunk as they do in a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from longspan.core.errors import ArgumentError
from longspan.core.heartbeat import beat
from longspan.kernels.distill import TeacherTopK
from longspan.kernels.loss import IGNORE_LABEL, LossSum
from longspan.models.documents import Documents
from longspan.models.recurrent import ChunkedRow
from longspan.train.batch import Batch
from longspan.train.objectives import ModelWithLoss

__all__ = ["recurrent_step", "walk_through"]


def recurrent_step(
    model: nn.Module,
    batch: Batch,
    *,
    chunk_tokens: int,
    weight: float,
    offload: bool = False,
    device: torch.device | None = None,
) -> LossSum:
    """Add the gradient of a batch's loss sum over `weight` to the parameters, chunk by chunk.

    Takes the place of `result = model(batch); (result.loss / weight).backward()`.

    Args:
        model: a causal language model with longspan's attention, or what `Spread.shard` made of one.
        batch: whole rows, on the host.
        chunk_tokens: tokens that run at a time.
        weight: total weight of the labels of the optimizer step. 0 means that there is no label: nothing runs.
        offload: keep keys, values and their gradients in host memory.
        device: where the model computes; None = the batch's.

    Returns:
        The loss sum, without a graph, and the loss of each token, [N].

    Raises:
        ArgumentError: a batch that is spread over ranks, a chunk without a token, or a model whose layers have no
            number.
    """
    if not isinstance(batch.documents, Documents):
        raise ArgumentError(
            "training in chunks needs whole rows, and these are spread over processes",
            found=batch.documents,
            fix="set parallel.cp_ring and parallel.cp_ulysses to 1, or leave chunk_tokens out",
        )
    row = ChunkedRow(batch.documents, chunk_tokens, offload=offload)
    device = batch.input_ids.device if device is None else device
    losses: list[LossSum] = []
    if weight <= 0:
        return LossSum(torch.zeros((), device=device), torch.zeros(len(batch.labels), device=device))
    root = model if isinstance(model, ModelWithLoss) else ModelWithLoss(model)
    # Drawn, so that two batches of a step do not drop the same neurons.
    seed = int(torch.randint(1 << 62, ()))
    with _wide_sums(root):
        with torch.no_grad():
            for index in range(len(row) - 1):
                if row.is_read_later(index) or _others_wait():
                    _read(root, batch, row, index, seed, device)
        for index in reversed(range(len(row))):
            beat()
            with _own_randomness(seed + index, device):
                result = root(_part(batch, row, index, first_walk=False).to(device))
            (result.loss / weight).backward()
            row.release(index)
            losses.append(result._replace(loss=result.loss.detach()))
    losses.reverse()
    total = sum(each.loss.double() for each in losses)
    return LossSum(
        cast(torch.Tensor, total).to(losses[0].loss.dtype),
        torch.cat([each.per_token_nll for each in losses]),
        _divergence(losses),
    )


def walk_through(
    model: ModelWithLoss, batch: Batch, *, chunk_tokens: int, offload: bool, device: torch.device
) -> None:
    """Run the forward pass of all chunks of a batch, as `recurrent_step` will; to be called without gradients."""
    assert isinstance(batch.documents, Documents)
    row = ChunkedRow(batch.documents, chunk_tokens, offload=offload)
    seed = int(torch.randint(1 << 62, ()))
    for index in range(len(row)):
        _read(model, batch, row, index, seed, device)


def _read(
    root: nn.Module, batch: Batch, row: ChunkedRow, index: int, seed: int, device: torch.device
) -> None:
    """Run a chunk in the first walk, for the keys and values that later ones read."""
    beat()
    with _own_randomness(seed + index, device):
        root(_part(batch, row, index, first_walk=True).to(device))


def _divergence(losses: list[LossSum]) -> torch.Tensor | None:
    """Return the divergences of all chunks; a chunk in which nothing is trained has none."""
    if all(each.per_token_kl is None for each in losses):
        return None
    return torch.cat(
        [
            torch.zeros_like(each.per_token_nll) if each.per_token_kl is None else each.per_token_kl
            for each in losses
        ]
    )


def _part(batch: Batch, row: ChunkedRow, index: int, *, first_walk: bool) -> Batch:
    """Return the tokens of one chunk; the first walk needs no loss, and tokens without a label cost none."""
    span = row.span(index)
    labels = batch.labels[span]
    return batch._replace(
        input_ids=batch.input_ids[span],
        labels=torch.full_like(labels, IGNORE_LABEL) if first_walk else labels,
        loss_weights=None if batch.loss_weights is None else batch.loss_weights[span],
        positions=batch.positions[span],
        sources=batch.sources[span],
        lengths=None if batch.lengths is None else batch.lengths[span],
        teacher=None if batch.teacher is None else TeacherTopK(*(column[span] for column in batch.teacher)),
        # It stands in for a table of whole rows.
        documents=cast(Documents, row.chunk(index, write=first_walk)),
    )


def _others_wait() -> bool:
    """Whether other processes gather parameters with this one: each must run as often as the others."""
    return dist.is_initialized() and dist.get_world_size() > 1


@contextlib.contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Let both walks over a chunk drop the same neurons."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _wide_sums(model: nn.Module) -> Iterator[None]:
    """Sum the gradients of bf16 and fp16 parameters over chunks in fp32, and round them once.

    A sum of dozens of chunks in bf16 loses what later ones add. Sharded parameters have sums of their own.
    """
    narrow = [
        parameter
        for parameter in model.parameters()
        if parameter.requires_grad and parameter.dtype.itemsize < 4 and not isinstance(parameter, DTensor)
    ]
    sums: dict[nn.Parameter, torch.Tensor] = {}

    def add(parameter: torch.Tensor) -> None:
        grad = parameter.grad
        assert grad is not None and isinstance(parameter, nn.Parameter)
        parameter.grad = None
        if parameter in sums:
            sums[parameter] += grad
        else:
            sums[parameter] = grad.float()

    hooks = [parameter.register_post_accumulate_grad_hook(add) for parameter in narrow]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, total in sums.items():
            parameter.grad = total.to(parameter.dtype)
