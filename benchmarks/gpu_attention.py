"""Sections of benchmarks/gpu.py about attention: the kernel against others, and a ring's blocks against one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from gpu_measure import Deadline, Row, Scale, Tensors, borders, difference, measure, qkv
from longspan.kernels.attention import Bands, choose_kernel
from longspan.kernels.attention.reference import ReferenceKernel
from longspan.parallel.schedules.base import AttentionCall, Partial, block_backward, block_forward
from longspan.parallel.shards import SequenceShards

FLEX_BLOCK = 128


def correctness(scale: Scale, deadline: Deadline) -> Iterator[Row]:
    """The device's kernel against the dense reference in fp64, on the masks that schedules make."""
    tokens = 1024 if scale.device == "cuda" else 96
    cu = borders(tokens, tokens // 5)
    zigzag = SequenceShards("zigzag", cu, 4)
    striped = SequenceShards("striped", cu, 4)
    cases: dict[str, tuple[Bands, int, int]] = {
        "one document": (Bands.from_documents([0, tokens]), tokens, tokens),
        "documents": (Bands.from_documents(cu), tokens, tokens),
        "documents, window": (Bands.from_documents(cu, window=tokens // 16), tokens, tokens),
        "zigzag, own keys": (zigzag.bands((1,), (1,)), zigzag.num_local, zigzag.num_local),
        "zigzag, other keys": (zigzag.bands((2,), (1,)), zigzag.num_local, zigzag.num_local),
        "zigzag, window": (zigzag.bands((2,), (2,), window=50), zigzag.num_local, zigzag.num_local),
        "striped, other keys": (striped.bands((1,), (3,)), striped.num_local, striped.num_local),
        "all keys": (zigzag.bands((1,), (0, 1, 2, 3)), zigzag.num_local, zigzag.num_padded),
    }
    for name, (bands, num_q, num_k) in cases.items():
        yield deadline.row(
            {"case": name}, lambda b=bands, n=num_q, m=num_k: _against_reference(scale, b, n, m)
        )
    yield deadline.row({"case": "leak"}, lambda: _leak(scale, cu))


def _both_passes(kernel: Any, tensors: Tensors, bands: Bands, attention_scale: float) -> Tensors:
    q, k, v, dout = tensors
    out, lse = kernel.forward(q, k, v, bands, attention_scale)
    return (out, *kernel.backward(dout, q, k, v, out, lse, bands, attention_scale))


def _against_reference(scale: Scale, bands: Bands, num_q: int, num_k: int) -> Row:
    q, k, v, dout = qkv(scale, max(num_q, num_k))
    tensors = (q[:num_q], k[:num_k], v[:num_k], dout[:num_q])
    factor = scale.head_dim**-0.5
    truth = _both_passes(ReferenceKernel(), tuple(x.double() for x in tensors), bands, factor)
    kernel = choose_kernel(scale.device)
    error = difference(_both_passes(kernel, tensors, bands, factor), truth)
    limit = 2e-2 if scale.dtype == torch.bfloat16 else 1e-5
    return {
        "kernel": kernel.name,
        "error": None,
        "difference": error,
        "limit": limit,
        "passed": error <= limit,
    }


def _leak(scale: Scale, cu: np.ndarray) -> Row:
    """The output of one document is all that has a gradient: those of the other documents' keys must be 0."""
    q, k, v, dout = qkv(scale, int(cu[-1]))
    start, stop = int(cu[1]), int(cu[2])
    only = torch.zeros_like(dout)
    only[start:stop] = dout[start:stop]
    bands, kernel = Bands.from_documents(cu), choose_kernel(scale.device)
    _, *grads = _both_passes(kernel, (q, k, v, only), bands, scale.head_dim**-0.5)
    leaked = max(float(g[rows].abs().max()) for g in grads for rows in (slice(0, start), slice(stop, None)))
    return {"kernel": kernel.name, "difference": leaked, "limit": 0.0, "passed": leaked == 0.0}


def attention(scale: Scale, deadline: Deadline) -> Iterator[Row]:
    """The block kernel against torch's SDPA and FlexAttention, forward and backward."""
    for tokens in scale.attention_tokens:
        for median in (None, scale.document_tokens):
            cu = borders(tokens, median)
            truth: list[Tensors] = []
            for name, run in (("longspan", _ours), ("sdpa_flash", _sdpa), ("flex", _flex)):
                case = {"tokens": tokens, "documents": len(cu) - 1, "kernel": name}
                yield deadline.row(case, lambda c=cu, r=run, t=truth: _attention_case(scale, c, r, t))


def _attention_case(scale: Scale, cu: np.ndarray, make: Callable[..., Any], truth: list[Tensors]) -> Row:
    tensors = qkv(scale, int(cu[-1]))
    forward, backward = make(scale, cu, *tensors)
    results = backward(forward())
    row: Row = {}
    if truth:
        row["difference"] = difference(results, truth[0])
    elif make is _ours:
        truth.append(results)
    del results
    row |= measure(forward, backward, scale)
    # 4 * head_dim per visible pair and head forward; the backward pass counts as 2.5 times that.
    flops = 4 * scale.head_dim * scale.heads * Bands.from_documents(cu).num_pairs()
    row["forward_tflops"] = flops / row["forward_ms"] / 1e9
    row["total_tflops"] = 3.5 * flops / row["total_ms"] / 1e9
    return row


def _ours(scale: Scale, cu: np.ndarray, *tensors: torch.Tensor) -> tuple[Callable, Callable]:
    q, k, v, dout = tensors
    bands, kernel, factor = Bands.from_documents(cu), choose_kernel(scale.device), scale.head_dim**-0.5

    def backward(state: Tensors) -> Tensors:
        return (state[0], *kernel.backward(dout, q, k, v, *state, bands, factor))

    return lambda: kernel.forward(q, k, v, bands, factor), backward


def _leaves(*tensors: torch.Tensor) -> Tensors:
    """Return [1, heads, tokens, head_dim] views of [tokens, heads, head_dim], as leaves."""
    return tuple(x.transpose(0, 1)[None].detach().requires_grad_() for x in tensors)


def _autograd(
    inputs: Tensors, dout: torch.Tensor, run: Callable[[], torch.Tensor]
) -> tuple[Callable, Callable]:
    def backward(out: torch.Tensor) -> Tensors:
        grads = torch.autograd.grad(out, inputs, dout.transpose(0, 1)[None])
        return tuple(x[0].transpose(0, 1) for x in (out.detach(), *grads))

    return run, backward


def _sdpa(scale: Scale, cu: np.ndarray, *tensors: torch.Tensor) -> tuple[Callable, Callable]:
    """SDPA has no document mask for its flash kernel: one call per document."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = _leaves(*tensors[:3])
    lengths = np.diff(cu).tolist()

    def run() -> torch.Tensor:
        parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            outs = [
                torch.nn.functional.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True)
                for part in parts
            ]
        return torch.cat(outs, dim=2) if len(outs) > 1 else outs[0]

    return _autograd((q, k, v), tensors[3], run)


def _flex(scale: Scale, cu: np.ndarray, *tensors: torch.Tensor) -> tuple[Callable, Callable]:
    """FlexAttention, compiled, with the blocks of the document mask worked out from the borders."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    q, k, v = _leaves(*tensors[:3])
    document = torch.from_numpy(np.repeat(np.arange(len(cu) - 1), np.diff(cu))).to(scale.device)

    def visible(_b: Any, _h: Any, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
        return (q_index >= k_index) & (document[q_index] == document[k_index])

    partial, full = flex_blocks(document.cpu().numpy())
    mask = BlockMask.from_kv_blocks(
        *_block_lists(partial, scale.device),
        *_block_lists(full, scale.device),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=visible,
    )
    if scale.device == "cuda":
        torch._dynamo.reset()  # or it stops compiling after some lengths
        call = torch.compile(flex_attention, dynamic=False)
    else:
        call = flex_attention
    return _autograd((q, k, v), tensors[3], lambda: call(q, k, v, block_mask=mask, enable_gqa=True))


def flex_blocks(document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return bool [query blocks, key blocks]: where some pairs of a block are visible, and where all are."""
    first, last = document[::FLEX_BLOCK], document[FLEX_BLOCK - 1 :: FLEX_BLOCK]
    row, column = np.arange(len(first))[:, None], np.arange(len(first))[None]
    some = (column <= row) & (last[None] >= first[:, None])
    full = (column < row) & (first[None] == last[:, None])
    return some & ~full, full


def _block_lists(blocks: np.ndarray, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many key blocks each query block has, and which: int32 [1, 1, n] and [1, 1, n, n]."""
    order = np.argsort(~blocks, axis=1, kind="stable")
    columns = (blocks.sum(1).astype(np.int32), order.astype(np.int32))
    counts, indices = (torch.from_numpy(column)[None, None].to(device) for column in columns)
    return counts, indices


def zigzag(scale: Scale, deadline: Deadline) -> Iterator[Row]:
    """All block calls of all ranks of a ring, one after another on one device, against one plain call."""
    for tokens in scale.zigzag_tokens:
        for median in (None, scale.document_tokens):
            cu = borders(tokens, median)
            plain: list[Row] = []
            for world in (1, 2, 3, 4):
                case = {"tokens": tokens, "documents": len(cu) - 1, "ranks": world}
                yield deadline.row(case, lambda c=cu, w=world, p=plain: _zigzag_case(scale, c, w, p))


def _zigzag_case(scale: Scale, cu: np.ndarray, world: int, plain: list[Row]) -> Row:
    tensors = qkv(scale, int(cu[-1]))
    forward, backward = _ours(scale, cu, *tensors)
    if world == 1:
        plain.append(measure(forward, backward, scale))
        return plain[0]
    truth = backward(forward())
    ring_forward, ring_backward, shards = _virtual_ring(scale, cu, world, *tensors)
    parts = ring_backward(ring_forward())
    places = torch.cat([torch.from_numpy(shards.indices(rank)) for rank in range(world)]).to(scale.device)
    # What lies past the last token is padding.
    order = torch.argsort(places)[: int(cu[-1])]
    error = difference(tuple(torch.cat(column)[order] for column in zip(*parts)), truth)
    del truth, parts
    row = measure(ring_forward, ring_backward, scale) | {"difference": error}
    if plain:
        row["forward_of_ideal"] = plain[0]["forward_ms"] / row["forward_ms"]
        row["total_of_ideal"] = plain[0]["total_ms"] / row["total_ms"]
    return row


def _virtual_ring(
    scale: Scale, cu: np.ndarray, world: int, *tensors: torch.Tensor
) -> tuple[Callable, Callable, SequenceShards]:
    """Return what the ranks of a ring compute in its forward and backward pass, without their communication."""
    shards = SequenceShards("zigzag", cu, world)
    call = AttentionCall(shards, None, scale.head_dim**-0.5, choose_kernel(scale.device))
    padding = shards.num_padded - shards.num_tokens
    padded = [torch.cat([x, x.new_zeros(padding, *x.shape[1:])]) for x in tensors]
    local = [
        tuple(x[torch.from_numpy(shards.indices(rank)).to(scale.device)] for x in padded)
        for rank in range(world)
    ]
    pairs = [
        (rank, owner, shards.bands((rank,), (owner,))) for rank in range(world) for owner in range(world)
    ]
    pairs = [pair for pair in pairs if len(pair[2])]

    def forward() -> list[Tensors]:
        partials = [Partial(q) for q, *_ in local]
        for rank, owner, bands in pairs:
            _, k, v, _ = local[owner]
            partials[rank].add(*block_forward(local[rank][0], k, v, bands, call))
        return [(partial.out.to(scale.dtype), partial.lse) for partial in partials]

    def backward(states: list[Tensors]) -> list[Tensors]:
        sums = [[torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)] for q, k, v, _ in local]
        for rank, owner, bands in pairs:
            (q, _, _, dout), (_, k, v, _) = local[rank], local[owner]
            grads = block_backward(dout, q, k, v, *states[rank], bands, call)
            for total, grad in zip((sums[rank][0], *sums[owner][1:]), grads):
                total += grad
        return [(out, *(total.to(scale.dtype) for total in totals)) for (out, _), totals in zip(states, sums)]

    return forward, backward, shards
