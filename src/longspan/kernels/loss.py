"""Cross-entropy of a model's head (`kernels.head`) without the logits of the sequence.

`linear_cross_entropy` walks over tokens in chunks: logits of one chunk, their loss, their gradient in the
same buffer, two products, next chunk. Logits are computed once, and memory beyond inputs and gradients is
one chunk of logits: 65,536 tokens x 128,256 words in fp32 need 0.2 GiB instead of 31 GiB a copy.

The result is a weighted sum. Dividing by the token count of the whole optimizer step is the caller's job,
because only the caller knows it; a chunk or a batch without a valid label contributes exactly 0.

Shape legend: T = tokens, C = tokens of a chunk, V = vocabulary, D = model dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from longspan.core.errors import ArgumentError, RunError
from longspan.kernels.head import IGNORE_LABEL, Head, as_head, cached_blocks, chunk_rows, product

__all__ = [
    "IGNORE_LABEL",
    "ChunkLosses",
    "LossSum",
    "check_linear_loss",
    "chunked_linear_loss",
    "linear_cross_entropy",
    "reference_linear_cross_entropy",
    "reference_logits",
]


INTENSE_ROWS = 2048
"""Of a chunk on an accelerator: the sum of the head's gradient is read and written once for each, 8 bytes a weight for
4,096 operations, which is more than a GPU computes in that time."""
SUM_BYTES = 4


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
    head: Head | torch.Tensor,
    labels: torch.Tensor,
    *,
    loss_weights: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
) -> LossSum:
    """Return the summed cross-entropy of the softmax of logits against labels, chunk by chunk.

    Args:
        hidden: [T, D], any float dtype.
        head: what makes logits of them; a tensor [V, D] is an output embedding with nothing behind it.
        labels: int64 [T], already shifted; -100 = no loss.
        loss_weights: [T], factor on each token's loss; None = 1. It gets no gradient.
        places: int64 [L], which tokens have a label, from someone who knows that the labels are words of the head;
            None = found and checked here, for which the host waits for the device.
        chunk_tokens: tokens per chunk; None = as many as fit 128 MiB of logits, or on an accelerator the memory
            that a gradient of the head computed beside its sum would take, up to `INTENSE_ROWS`.

    Gradients of `hidden` and the head are computed in the forward pass, when they are needed, and the head's
    are accumulated in fp32; cost 2*T*V*D FLOPs forward, 4*T*V*D more for both gradients. Products are fp32 on
    CPU whatever the dtype (bf16 products are about 20 times slower there) and fp32-accumulated on CUDA.

    Raises:
        ArgumentError: shapes that do not fit, or a label outside the vocabulary.
        RunError: `backward` is called twice on one result; the gradients are handed over, not kept.
    """
    head = as_head(head)
    check_linear_loss(hidden, head, labels, loss_weights, chunk_tokens, look=places is None)

    def to_gradient(
        logits_cv: torch.Tensor, index: torch.Tensor, factor_c: torch.Tensor | None, wanted: bool
    ) -> ChunkLosses:
        nll_c = _to_gradient(logits_cv, labels[index], factor_c, wanted=wanted)
        return ChunkLosses(nll_c, nll_c)

    return chunked_linear_loss(
        hidden, head, labels, to_gradient, loss_weights=loss_weights, places=places, chunk_tokens=chunk_tokens
    )


def chunked_linear_loss(
    hidden: torch.Tensor,
    head: Head,
    labels: torch.Tensor,
    to_gradient: ToGradient,
    *,
    loss_weights: torch.Tensor | None,
    places: torch.Tensor | None = None,
    chunk_tokens: int | None,
) -> LossSum:
    """Return the sum of a loss that `to_gradient` finds in the logits of each chunk; see `linear_cross_entropy`."""
    weight, bias = head.weight, head.bias
    wanted = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden, weight, bias)
    ]
    if chunk_tokens is None:
        # A cap needs a second copy of the chunk.
        chunk_tokens = chunk_rows(head.vocab_size * (1 if head.softcap is None else 2), hidden.dtype)
        if wanted[1] and sums_in_product(hidden.device, hidden.dtype):
            chunk_tokens = max(chunk_tokens, intense_rows(hidden.shape[1], hidden.dtype))
    if places is None:
        places = (labels != IGNORE_LABEL).nonzero().squeeze(1)
    return LossSum(
        *_ChunkedLinearLoss.apply(
            hidden, weight, bias, head, places, loss_weights, chunk_tokens, wanted, to_gradient
        )
    )


def reference_logits(hidden: torch.Tensor, head: Head | torch.Tensor) -> torch.Tensor:
    """Return all logits [T, V] in fp32 or better, by autograd (the slow twin of what goes in chunks)."""
    head = as_head(head)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits_tv = hidden.to(dtype) @ head.weight.to(dtype).T
    if head.bias is not None:
        logits_tv = logits_tv + head.bias.to(dtype)
    logits_tv = logits_tv * head.scale
    return logits_tv if head.softcap is None else head.softcap * torch.tanh(logits_tv / head.softcap)


def reference_linear_cross_entropy(
    hidden: torch.Tensor,
    head: Head | torch.Tensor,
    labels: torch.Tensor,
    *,
    loss_weights: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
) -> LossSum:
    """Return the same as `linear_cross_entropy` from all logits at once, in fp32 or better (the slow twin).

    `chunk_tokens` is accepted for the shared signature and has no effect here.
    """
    check_linear_loss(hidden, as_head(head), labels, loss_weights, chunk_tokens)
    logits_tv = reference_logits(hidden, head)
    nll = torch.nn.functional.cross_entropy(logits_tv, labels, ignore_index=IGNORE_LABEL, reduction="none")
    weighted = nll if loss_weights is None else nll * loss_weights.to(nll.dtype)
    # A weight of an ignored token may be anything: its nll is 0, and 0 * inf must not reach the sum.
    return LossSum(weighted.masked_fill(labels == IGNORE_LABEL, 0.0).sum(), nll.detach())


def check_linear_loss(
    hidden: torch.Tensor,
    head: Head,
    labels: torch.Tensor,
    loss_weights: torch.Tensor | None,
    chunk_tokens: int | None,
    *,
    look: bool = True,
) -> None:
    """Raise ArgumentError for what `linear_cross_entropy` refuses; `look`: at the labels themselves, too."""
    weight, tokens = head.weight, hidden.shape[:1]
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
    if look and labels.numel():
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
        bias: torch.Tensor | None,
        head: Head,
        with_label: torch.Tensor,
        loss_weights: torch.Tensor | None,
        chunk_tokens: int,
        wanted: tuple[bool, bool, bool],
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
        # Tokens without a label cost nothing: only the others are gathered into chunks.
        chunk_tokens = min(chunk_tokens, max(1, with_label.numel()))
        # Products on CPU are faster into [D, V]; turning that round takes memory, which the buffer of logits frees.
        turned = device.type == "cpu" and weight.shape[1] <= chunk_tokens
        shape = tuple(reversed(weight.shape)) if turned else weight.shape
        dhidden = torch.zeros_like(hidden) if wanted[0] else None
        dweight = torch.zeros(shape, dtype=dtype, device=device) if wanted[1] else None
        dbias = torch.zeros(weight.shape[0], dtype=dtype, device=device) if wanted[2] else None
        # One buffer serves every chunk: with a fresh one, the last chunk would still be held beside it.
        buffer_cv = torch.empty(chunk_tokens, weight.shape[0], dtype=dtype, device=device)
        for index in with_label.split(chunk_tokens):
            hidden_cd = hidden[index].to(factor_dtype)
            logits_cv = head.finish_(product(hidden_cd, weight_vd.T, out=buffer_cv[: len(index)]))
            capped_cv = logits_cv.clone() if head.softcap is not None and any(wanted) else None
            factor_c = None if loss_weights is None else loss_weights[index].to(dtype)
            found = to_gradient(logits_cv, index, factor_c, any(wanted))
            nll[index] = found.nll
            if found.kl is not None:
                kl = torch.zeros_like(nll) if kl is None else kl
                kl[index] = found.kl
            total += (found.loss if factor_c is None else found.loss * factor_c).sum(dtype=total.dtype)
            if not any(wanted):
                continue
            dlogits_cv = head.turn_back_(logits_cv, capped_cv).to(factor_dtype)
            if dhidden is not None:
                dhidden[index] = (dlogits_cv @ weight_vd).to(hidden.dtype)
            if dweight is not None:
                pair = (hidden_cd.T, dlogits_cv) if turned else (dlogits_cv.T, hidden_cd)
                _add_product(dweight, *pair)
            if dbias is not None:
                dbias += logits_cv.sum(0)
        if dweight is not None and turned:
            del buffer_cv, logits_cv, dlogits_cv
            dweight = dweight.T.contiguous()
        ctx.grads = (dhidden, dweight, dbias)
        ctx.head = weight.dtype, None if bias is None else bias.dtype
        loss = total.to(dtype)
        ctx.mark_non_differentiable(*(nll,) if kl is None else (nll, kl))
        return loss, nll, kl

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.grads is None:
            raise RunError(
                "backward ran twice through one linear_cross_entropy; its gradients were handed over"
            )
        dhidden, *of_head = ctx.grads
        ctx.grads = None
        grad = grad_outputs[0]
        if dhidden is not None:
            dhidden = dhidden.mul_(grad.to(dhidden.dtype))
        dweight, dbias = (
            None if part is None else part.mul_(grad).to(dtype) for part, dtype in zip(of_head, ctx.head)
        )
        return dhidden, dweight, dbias, None, None, None, None, None, None


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


def intense_rows(hidden_size: int, dtype: torch.dtype) -> int:
    """Return the rows of logits, with their copy in `dtype`, that fit the fp32 gradient of the head once more."""
    return min(INTENSE_ROWS, hidden_size * SUM_BYTES // (SUM_BYTES + dtype.itemsize))


@cache
def sums_in_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch adds a product of 16-bit numbers to an fp32 sum in one operation on a device."""
    if dtype.itemsize >= SUM_BYTES:
        return False
    total, factor = torch.zeros(16, 16, device=device), torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=total.dtype, out=total)
    except RuntimeError:  # torch has no such operation here
        return False
    return True


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif sums_in_product(total.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(a, b, out_dtype=total.dtype)
