"""Distillation through a model's head without the logits of the sequence (Hinton et al. 2015, arXiv:1503.02531).

The teacher is known by its k likeliest words after each token and by the mass of all others, which is one bucket: the
student's distribution is brought to the same k + 1 buckets, and the divergence of one from the other is

    KL = t^2 sum_j P_j (log P_j - log S_j),    P, S = softmax(log bucket / t) of teacher and student

With t = 1 these are the buckets' own masses. Each token's loss is a (KL) + (1 - a) (nll of the next token).

Shape legend: T = tokens, C = tokens of a chunk, K = words known of the teacher, V = vocabulary, D = model dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from longspan.core.errors import ArgumentError
from longspan.kernels.head import IGNORE_LABEL, Head, as_head, cached_blocks
from longspan.kernels.loss import (
    ChunkLosses,
    LossSum,
    check_linear_loss,
    chunked_linear_loss,
    reference_logits,
)

__all__ = ["TeacherTopK", "linear_distillation", "reference_linear_distillation"]


class TeacherTopK(NamedTuple):
    """A teacher's distributions; a token whose first log-probability is -inf has none and learns from its label."""

    ids: torch.Tensor
    """Integers [T, K], different words; where `logprobs` is -inf they mean nothing."""
    logprobs: torch.Tensor
    """Float [T, K], natural logarithms; -inf behind the words of a token that has fewer than K."""
    tail: torch.Tensor
    """Float [T], logarithm of the mass of all other words; -inf = none."""


def linear_distillation(
    hidden: torch.Tensor,
    head: Head | torch.Tensor,
    labels: torch.Tensor,
    teacher: TeacherTopK,
    *,
    distill_weight: float = 0.5,
    temperature: float = 1.0,
    loss_weights: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
) -> LossSum:
    """Return the summed mix of divergence and cross-entropy of the softmax of logits, chunk by chunk.

    Tokens without a label have no loss of either kind, so the weight of a step is that of its labels. Memory and cost
    are those of `kernels.loss.linear_cross_entropy`; the arguments that are not explained here are too.

    Args:
        teacher: one distribution a token: of the word after it.
        distill_weight: a above; 0 to 1.
        temperature: t above; larger makes both distributions flatter.

    Raises:
        ArgumentError: shapes that do not fit, words outside the vocabulary, or settings out of range.
    """
    head = as_head(head)
    _check(
        hidden, head, labels, teacher, distill_weight, temperature, loss_weights, chunk_tokens,
        look=places is None,
    )  # fmt: skip

    def to_gradient(
        logits_cv: torch.Tensor, index: torch.Tensor, factor_c: torch.Tensor | None, wanted: bool
    ) -> ChunkLosses:
        losses = ChunkLosses(*(logits_cv.new_empty(len(logits_cv)) for _ in range(3)))
        for part in cached_blocks(logits_cv):
            places = index[part]
            known = _Known.of(teacher, places, distill_weight, logits_cv.dtype)
            block_factor = None if factor_c is None else factor_c[part]
            found = _to_gradient(
                logits_cv[part], labels[places], known, temperature, block_factor, wanted=wanted
            )
            for into, value in zip(losses, found):
                assert into is not None and value is not None
                into[part] = value
        return losses

    return chunked_linear_loss(
        hidden, head, labels, to_gradient, loss_weights=loss_weights, places=places, chunk_tokens=chunk_tokens
    )


def reference_linear_distillation(
    hidden: torch.Tensor,
    head: Head | torch.Tensor,
    labels: torch.Tensor,
    teacher: TeacherTopK,
    *,
    distill_weight: float = 0.5,
    temperature: float = 1.0,
    loss_weights: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
) -> LossSum:
    """Return the same as `linear_distillation` from all logits at once, by autograd (the slow twin)."""
    _check(hidden, as_head(head), labels, teacher, distill_weight, temperature, loss_weights, chunk_tokens)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logprobs_tv = torch.log_softmax(reference_logits(hidden, head), dim=1)
    nll = torch.nn.functional.nll_loss(logprobs_tv, labels, ignore_index=IGNORE_LABEL, reduction="none")
    kl = []
    for row, (ids, logprobs, tail) in zip(logprobs_tv, zip(*teacher)):
        known = logprobs > -torch.inf
        if not bool(known[0]):
            kl.append(row.new_zeros(()))
            continue
        others = torch.ones_like(row, dtype=torch.bool)
        others[ids[known].long()] = False
        rest = row[others].logsumexp(0) if bool(others.any()) else row.new_full((), -torch.inf)
        student = torch.cat((row[ids[known].long()], rest[None])) / temperature
        target = torch.cat((logprobs[known], tail[None])).to(dtype) / temperature
        log_s, log_p = torch.log_softmax(student, 0), torch.log_softmax(target, 0)
        there = log_p > -torch.inf
        kl.append(temperature**2 * (log_p[there].exp() * (log_p[there] - log_s[there])).sum())
    kl_t = torch.stack(kl).masked_fill(labels == IGNORE_LABEL, 0.0)
    a_t = torch.full_like(nll, distill_weight).masked_fill(teacher.logprobs[:, 0] == -torch.inf, 0.0)
    loss = a_t * kl_t + (1 - a_t) * nll
    if loss_weights is not None:
        loss = (loss * loss_weights.to(dtype)).masked_fill(labels == IGNORE_LABEL, 0.0)
    return LossSum(loss.sum(), nll.detach(), kl_t.detach())


class _Known(NamedTuple):
    """What is known of the teacher for the tokens of a block, such that every row can be computed with."""

    ids_ck: torch.Tensor
    """int64; an absent word is the first one, once more."""
    logprobs_ck: torch.Tensor
    tail_c: torch.Tensor
    absent_ck: torch.Tensor
    nobody_c: torch.Tensor
    """Whether the token has no teacher."""
    weight_c: torch.Tensor
    """Share of the divergence in the loss: 0 for a token without a teacher."""

    @classmethod
    def of(
        cls, teacher: TeacherTopK, places: torch.Tensor, distill_weight: float, dtype: torch.dtype
    ) -> _Known:
        ids_ck = teacher.ids[places].long()
        logprobs_ck, tail_c = teacher.logprobs[places].to(dtype), teacher.tail[places].to(dtype)
        nobody_c = logprobs_ck[:, 0] == -torch.inf
        # Such a token gets a teacher that is sure of word 0, and no share of it: its row stays finite.
        logprobs_ck[:, 0].masked_fill_(nobody_c, 0.0)
        ids_ck[:, 0].masked_fill_(nobody_c, 0)
        tail_c = tail_c.masked_fill(nobody_c, -torch.inf)
        absent_ck = logprobs_ck == -torch.inf
        ids_ck = torch.where(absent_ck, ids_ck[:, :1], ids_ck)
        weight_c = torch.full_like(tail_c, distill_weight).masked_fill(nobody_c, 0.0)
        return cls(ids_ck, logprobs_ck, tail_c, absent_ck, nobody_c, weight_c)


def _to_gradient(
    logits_cv: torch.Tensor,
    label_c: torch.Tensor,
    known: _Known,
    temperature: float,
    factor_c: torch.Tensor | None,
    *,
    wanted: bool,
) -> ChunkLosses:
    """Return the losses of a block; if wanted, the gradient of the weighted loss takes the place of the logits.

    For word v, with q the student's masses and g_j = t (S_j - P_j) the gradient in the logarithm of bucket j:

        a g_v                 + (1 - a) (q_v - [v is the label])      for a word of the teacher's
        a g_tail q_v / q_tail + (1 - a) (q_v - [v is the label])      for any other

    (the normaliser of the student drops out, because the g_j sum to 0).
    """
    tiny = torch.finfo(logits_cv.dtype).tiny
    ids_ck, absent_ck, a_c = known.ids_ck, known.absent_ck, known.weight_c
    label_logit_c = logits_cv.gather(1, label_c[:, None]).squeeze(1)
    max_c = logits_cv.amax(1)
    word_ck = logits_cv.gather(1, ids_ck).sub_(max_c[:, None]).masked_fill_(absent_ck, -torch.inf)
    exp_cv = logits_cv.sub_(max_c[:, None]).exp_()
    # Without the teacher's words the sum is exactly the mass of the others, however small.
    exp_cv.scatter_(1, ids_ck, 0.0)
    rest_c, exp_ck = exp_cv.sum(1), word_ck.exp()
    sum_c = rest_c + exp_ck.sum(1)
    log_sum_c = sum_c.log()
    nll_c = max_c - label_logit_c + log_sum_c
    # [C, K + 1]: the student's and the teacher's buckets.
    student = torch.cat((word_ck, rest_c.clamp_min(tiny).log()[:, None]), 1).sub_(log_sum_c[:, None])
    target = torch.cat((known.logprobs_ck, known.tail_c[:, None]), 1)
    log_s = torch.log_softmax(student / temperature, 1)
    log_p = torch.log_softmax(target / temperature, 1)
    p = log_p.exp()
    terms = p * (log_p - log_s)
    kl_c = temperature**2 * terms.masked_fill_(log_p == -torch.inf, 0.0).sum(1)
    kl_c.masked_fill_(known.nobody_c, 0.0)
    losses = ChunkLosses(a_c * kl_c + (1 - a_c) * nll_c, nll_c, kl_c)
    if wanted:
        factor_c = torch.ones_like(sum_c) if factor_c is None else factor_c
        g = (log_s.exp() - p) * (temperature * a_c)[:, None]
        lm_c = (1 - a_c) / sum_c
        of_rest_c = torch.where(rest_c > tiny, g[:, -1] / rest_c.clamp_min(tiny), 0.0)
        exp_cv.mul_((factor_c * (lm_c + of_rest_c))[:, None])
        grad_ck = (g[:, :-1] + lm_c[:, None] * exp_ck) * factor_c[:, None]
        # An absent word stands for the first: it writes the same value once more.
        exp_cv.scatter_(1, ids_ck, torch.where(absent_ck, grad_ck[:, :1], grad_ck))
        exp_cv.scatter_add_(1, label_c[:, None], (-factor_c * (1 - a_c))[:, None])
    return losses


def _check(
    hidden: torch.Tensor,
    head: Head,
    labels: torch.Tensor,
    teacher: TeacherTopK,
    distill_weight: float,
    temperature: float,
    loss_weights: torch.Tensor | None,
    chunk_tokens: int | None,
    *,
    look: bool = True,
) -> None:
    check_linear_loss(hidden, head, labels, loss_weights, chunk_tokens, look=look)
    ids, logprobs, tail = teacher
    fits = ids.ndim == 2 and ids.shape[1] > 0 and ids.shape == logprobs.shape
    if not fits or not ids.shape[:1] == tail.shape == labels.shape:
        raise ArgumentError(
            "a teacher has ids [T, K], logprobs [T, K] and tail [T]",
            found=f"ids {list(ids.shape)}, logprobs {list(logprobs.shape)}, tail {list(tail.shape)} for "
            f"{len(labels)} tokens",
        )
    if not 0 <= distill_weight <= 1:
        raise ArgumentError("the weight of a teacher is a share", found=distill_weight, allowed="0 to 1")
    if not temperature > 0:
        raise ArgumentError("a temperature is above 0", found=temperature)
    if not look:
        return
    known = ids[logprobs > -torch.inf]
    if known.numel() and (int(known.min()) < 0 or int(known.max()) >= head.vocab_size):
        raise ArgumentError(
            "the teacher knows words that the student does not",
            found=f"ids from {int(known.min())} to {int(known.max())}",
            allowed=f"0 .. {head.vocab_size - 1}",
            fix="annotate with a teacher that has the student's tokenizer",
        )
