"""Cross-entropy of a linear layer without the logits of the sequence.

`linear_cross_entropy` walks over tokens in chunks: logits of one chunk, their loss, their gradient in the
same buffer, two products, next chunk. Logits are computed once, and memory beyond inputs and gradients is
one chunk of logits: 65,536 tokens x 128,256 words in fp32 need 0.2 GiB instead of 31 GiB a copy.

The result is a weighted sum. Dividing by the token count of the whole optimizer step is the caller's job,
because only the caller knows it; a chunk or a batch without a valid label contributes exactly 0.

Shape legend: T = tokens, C = tokens of a chunk, V = vocabulary, D = model dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from longspan.core.errors import ArgumentError, RunError

__all__ = [
    "IGNORE_LABEL",
    "ChunkLosses",
    "LossSum",
    "cached_blocks",
    "check_linear_loss",
    "chunked_linear_loss",
    "linear_cross_entropy",
    "product",
    "reference_linear_cross_entropy",
]

IGNORE_LABEL = -100
"""Label of a token that has no loss."""

LOGITS_BUDGET_BYTES = 128 << 20
"""Size of the one buffer of logits when `chunk_tokens` is not given."""

CACHED_BYTES = 1 << 20
"""Logits that a CPU core turns into their gradient at a time: what stays in its second-level cache between passes."""


class LossSum(NamedTuple):
    """A weighted sum of token losses, and the losses themselves."""

    loss: torch.Tensor
    """Scalar, fp32 (fp64 for fp64 inputs): sum over tokens of weight * nll, in nats; differentiable."""
    per_token_nll: torch.Tensor
    """[T], same dtype, detached: unweighted nll in nats, 0 where the label is ignored."""
    per_token_kl: torch.Tensor | None = None
    """[T], same dtype, detached: divergence from a teacher (`kernels.distill`), 0 where there is none; else None."""


class ChunkLosses(NamedTuple):
    """What a chunk of logits comes to, each [C]."""

    loss: torch.Tensor
    """What is summed."""
    nll: torch.Tensor
    kl: torch.Tensor | None = None


ToGradient = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, bool], ChunkLosses]
"""Takes the logits [C, V] of a chunk, the places of its tokens [C] and the weights of their losses [C]; if the last is
true, puts the gradient of the weighted loss in the place of the logits."""


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    loss_weights: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
) -> LossSum:
    """Return the summed cross-entropy of softmax(hidden weight^T) against labels, chunk by chunk.

    Args:
        hidden: [T, D], any float dtype.
        weight: [V, D], the output embedding.
        labels: int64 [T], already shifted; -100 = no loss.
        loss_weights: [T], factor on each token's loss; None = 1. It gets no gradient.
        chunk_tokens: tokens per chunk; None = as many as fit 128 MiB of logits.

    Gradients of `hidden` and `weight` are computed in the forward pass, when they are needed, and `weight`'s
    is accumulated in fp32; cost 2*T*V*D FLOPs forward, 4*T*V*D more for both gradients. Products are fp32 on
    CPU whatever the dtype (bf16 products are about 20 times slower there) and fp32-accumulated on CUDA.

    Raises:
        ArgumentError: shapes that do not fit, or a label outside the vocabulary.
        RunError: `backward` is called twice on one result; the gradients are handed over, not kept.
    """
    check_linear_loss(hidden, weight, labels, loss_weights, chunk_tokens)

    def to_gradient(
        logits_cv: torch.Tensor, index: torch.Tensor, factor_c: torch.Tensor | None, wanted: bool
    ) -> ChunkLosses:
        nll_c = _to_gradient(logits_cv, labels[index], factor_c, wanted=wanted)
        return ChunkLosses(nll_c, nll_c)

    return chunked_linear_loss(
        hidden, weight, labels, to_gradient, loss_weights=loss_weights, chunk_tokens=chunk_tokens
    )


def chunked_linear_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    to_gradient: ToGradient,
    *,
    loss_weights: torch.Tensor | None,
    chunk_tokens: int | None,
) -> LossSum:
    """Return the sum of a loss that `to_gradient` finds in the logits of each chunk; see `linear_cross_entropy`."""
    grad_hidden = torch.is_grad_enabled() and hidden.requires_grad
    grad_weight = torch.is_grad_enabled() and weight.requires_grad
    if chunk_tokens is None:
        item = torch.promote_types(hidden.dtype, torch.float32).itemsize
        chunk_tokens = max(16, LOGITS_BUDGET_BYTES // (item * weight.shape[0]))
    return LossSum(
        *_ChunkedLinearLoss.apply(
            hidden, weight, labels, loss_weights, chunk_tokens, grad_hidden, grad_weight, to_gradient
        )
    )


def reference_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    loss_weights: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
) -> LossSum:
    """Return the same as `linear_cross_entropy` from all logits at once, in fp32 or better (the slow twin).

    `chunk_tokens` is accepted for the shared signature and has no effect here.
    """
    check_linear_loss(hidden, weight, labels, loss_weights, chunk_tokens)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits_tv = hidden.to(dtype) @ weight.to(dtype).T
    nll = torch.nn.functional.cross_entropy(logits_tv, labels, ignore_index=IGNORE_LABEL, reduction="none")
    weighted = nll if loss_weights is None else nll * loss_weights.to(dtype)
    # A weight of an ignored token may be anything: its nll is 0, and 0 * inf must not reach the sum.
    return LossSum(weighted.masked_fill(labels == IGNORE_LABEL, 0.0).sum(), nll.detach())


def check_linear_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    loss_weights: torch.Tensor | None,
    chunk_tokens: int | None,
) -> None:
    """Raise ArgumentError for what `linear_cross_entropy` refuses."""
    tokens = hidden.shape[:1]
    fits = hidden.ndim == weight.ndim == 2 and hidden.shape[1] == weight.shape[1] and labels.shape == tokens
    if not fits or (loss_weights is not None and loss_weights.shape != tokens):
        raise ArgumentError(
            "linear_cross_entropy takes hidden [T, D], weight [V, D], labels [T] and loss_weights [T]",
            found=f"hidden {list(hidden.shape)}, weight {list(weight.shape)}, labels {list(labels.shape)}"
            + ("" if loss_weights is None else f", loss_weights {list(loss_weights.shape)}"),
        )
    if labels.dtype != torch.int64:
        raise ArgumentError("labels must be int64", found=labels.dtype)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ArgumentError("chunk_tokens must be at least 1", found=chunk_tokens)
    if labels.numel():
        valid = labels[labels != IGNORE_LABEL]
        if valid.numel() and (int(valid.min()) < 0 or int(valid.max()) >= weight.shape[0]):
            raise ArgumentError(
                "a label lies outside the vocabulary",
                found=f"labels from {int(valid.min())} to {int(valid.max())}",
                allowed=f"0 .. {weight.shape[0] - 1}, or {IGNORE_LABEL} for no loss",
                fix="check that the tokenizer of the data is the tokenizer of the model",
            )


class _ChunkedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        loss_weights: torch.Tensor | None,
        chunk_tokens: int,
        grad_hidden: bool,
        grad_weight: bool,
        to_gradient: ToGradient,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        device = hidden.device
        # Lower precisions keep their fast products on an accelerator; on CPU everything becomes fp32.
        factor_dtype = dtype if device.type == "cpu" else hidden.dtype
        weight_vd = weight.to(factor_dtype)
        nll = torch.zeros(hidden.shape[0], dtype=dtype, device=device)
        kl: torch.Tensor | None = None
        total = torch.zeros((), dtype=torch.float64 if device.type != "mps" else dtype, device=device)
        dhidden = torch.zeros_like(hidden) if grad_hidden else None
        # Tokens without a label cost nothing: only the others are gathered into chunks.
        with_label = (labels != IGNORE_LABEL).nonzero().squeeze(1)
        chunk_tokens = min(chunk_tokens, max(1, with_label.numel()))
        # Products on CPU are faster into [D, V]; turning that round takes memory, which the buffer of logits frees.
        turned = device.type == "cpu" and weight.shape[1] <= chunk_tokens
        shape = tuple(reversed(weight.shape)) if turned else weight.shape
        dweight = torch.zeros(shape, dtype=dtype, device=device) if grad_weight else None
        # One buffer serves every chunk: with a fresh one, the last chunk would still be held beside it.
        buffer_cv = torch.empty(chunk_tokens, weight.shape[0], dtype=dtype, device=device)
        for index in with_label.split(chunk_tokens):
            hidden_cd = hidden[index].to(factor_dtype)
            logits_cv = product(hidden_cd, weight_vd.T, out=buffer_cv[: len(index)])
            factor_c = None if loss_weights is None else loss_weights[index].to(dtype)
            found = to_gradient(logits_cv, index, factor_c, grad_hidden or grad_weight)
            nll[index] = found.nll
            if found.kl is not None:
                kl = torch.zeros_like(nll) if kl is None else kl
                kl[index] = found.kl
            total += (found.loss if factor_c is None else found.loss * factor_c).sum(dtype=total.dtype)
            if dhidden is None and dweight is None:
                continue
            dlogits_cv = logits_cv.to(factor_dtype)
            if dhidden is not None:
                dhidden[index] = (dlogits_cv @ weight_vd).to(hidden.dtype)
            if dweight is not None:
                pair = (hidden_cd.T, dlogits_cv) if turned else (dlogits_cv.T, hidden_cd)
                _add_product(dweight, *pair)
        if dweight is not None and turned:
            del buffer_cv, logits_cv, dlogits_cv
            dweight = dweight.T.contiguous()
        ctx.grads = (dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        loss = total.to(dtype)
        ctx.mark_non_differentiable(*(nll,) if kl is None else (nll, kl))
        return loss, nll, kl

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.grads is None:
            raise RunError(
                "backward ran twice through one linear_cross_entropy; its gradients were handed over"
            )
        dhidden, dweight = ctx.grads
        ctx.grads = None
        grad = grad_outputs[0]
        if dhidden is not None:
            dhidden = dhidden.mul_(grad.to(dhidden.dtype))
        if dweight is not None:
            dweight = dweight.mul_(grad).to(ctx.weight_dtype)
        return dhidden, dweight, None, None, None, None, None, None


def _to_gradient(
    logits_cv: torch.Tensor, label_c: torch.Tensor, factor_c: torch.Tensor | None, *, wanted: bool
) -> torch.Tensor:
    """Return the nll of each token; if wanted, the gradient of its loss takes the place of the logits."""
    nll_c = logits_cv.new_empty(len(logits_cv))
    for part in cached_blocks(logits_cv):
        block_cv, block_label_c = logits_cv[part], label_c[part, None]
        label_logit_c = block_cv.gather(1, block_label_c).squeeze(1)
        top_c = block_cv.amax(1)
        exp_cv = block_cv.sub_(top_c[:, None]).exp_()
        sum_c = exp_cv.sum(1)
        nll_c[part] = top_c - label_logit_c + sum_c.log()
        if wanted:
            # d nll / d logits = softmax - onehot, written over the logits.
            block_factor_c = torch.ones_like(sum_c) if factor_c is None else factor_c[part]
            exp_cv.mul_((block_factor_c / sum_c)[:, None])
            exp_cv.scatter_add_(1, block_label_c, -block_factor_c[:, None])
    return nll_c


def cached_blocks(logits_cv: torch.Tensor) -> Iterator[slice]:
    """Yield the rows of logits that stay in cache between passes over them: on a GPU all at once."""
    rows = max(1, len(logits_cv))
    if logits_cv.device.type == "cpu":
        row_bytes = logits_cv.element_size() * logits_cv.shape[1]
        rows = max(1, CACHED_BYTES * torch.get_num_threads() // row_bytes)
    for start in range(0, len(logits_cv), rows):
        yield slice(start, start + rows)


def product(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """Write a @ b into `out` without rounding it to the dtype of the factors on the way."""
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b, out_dtype=total.dtype)
