"""The end of a language model, from hidden states to logits, and what is read off them: never the logits of a row.

    logits = cap tanh(z / cap),    z = scale (hidden weight^T + bias)

with scale 1 (Granite, Cohere: another), no cap (Gemma: 30) and no bias (Phi: one) in most families. Training
(`kernels.loss`, `kernels.distill`), perplexity, teachers and answers all come here, so they agree.

Shape legend: A = hidden states asked for, C = those of a chunk, D = model width, V = vocabulary, K = words kept,
G = groups of words, M = words of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

__all__ = [
    "IGNORE_LABEL",
    "Head",
    "Prediction",
    "as_head",
    "cached_blocks",
    "chunk_rows",
    "predict",
    "select_top_k",
    "top_k",
]

IGNORE_LABEL = -100
"""Label of a token that has no loss."""

LOGITS_BUDGET_BYTES = 128 << 20
"""Size of the one buffer of logits where the caller does not say how many rows it has."""

CACHED_BYTES = 1 << 20
"""Logits that a CPU core works on at a time: what stays in its second-level cache between passes."""


class Head(NamedTuple):
    """What makes logits of hidden states."""

    weight: torch.Tensor
    """[V, D], the output embedding."""
    bias: torch.Tensor | None = None
    """[V]."""
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        """Words that have a logit."""
        return self.weight.shape[0]

    def finish_(self, product_CV: torch.Tensor) -> torch.Tensor:
        """Turn the product of hidden states and weight into logits, in place."""
        if self.bias is not None:
            product_CV.add_(self.bias)
        if self.scale != 1.0:
            product_CV.mul_(self.scale)
        if self.softcap is not None:
            product_CV.div_(self.softcap).tanh_().mul_(self.softcap)
        return product_CV

    def turn_back_(self, dlogits_CV: torch.Tensor, logits_CV: torch.Tensor | None) -> torch.Tensor:
        """Turn the gradient in the logits into that in the product, in place.

        A cap needs the logits once more, and overwrites them.
        """
        if self.softcap is not None:
            assert logits_CV is not None
            # d cap tanh(z / cap) / dz = 1 - tanh^2
            dlogits_CV.mul_(logits_CV.div_(self.softcap).square_().neg_().add_(1.0))
        if self.scale != 1.0:
            dlogits_CV.mul_(self.scale)
        return dlogits_CV

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits [A, V] of a few hidden states [A, D], in fp32 at least, without gradients."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        with torch.no_grad():
            return self.finish_(torch.nn.functional.linear(hidden, self.weight).to(wide))


class Prediction(NamedTuple):
    """What comes after some tokens."""

    ids: torch.Tensor
    """int64 [A], the likeliest words; of several the first."""
    highest: torch.Tensor
    """[A], their logits: not finite where any logit of the row is not, but for words that are ruled out (-inf)."""
    nll: torch.Tensor | None
    """[A], of the words that were given, in nats."""


def as_head(head: Head | torch.Tensor) -> Head:
    """Return a head; a tensor [V, D] is one whose logits are the product alone."""
    return Head(head) if isinstance(head, torch.Tensor) else head


def chunk_rows(vocab_size: int, dtype: torch.dtype = torch.float32) -> int:
    """Return how many rows of logits fit 128 MiB."""
    item = torch.promote_types(dtype, torch.float32).itemsize
    return max(16, LOGITS_BUDGET_BYTES // (item * vocab_size))


def predict(head: Head, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> Prediction:
    """Return the likeliest words after hidden states [A, D], and how likely `targets` int64 [A] are."""
    found = []
    rows = chunk_rows(head.vocab_size)
    for start in range(0, max(1, len(hidden)), rows):
        logits_CV = head.logits(hidden[start : start + rows])
        nll_C = None
        if targets is not None:
            targets_C1 = targets[start : start + rows, None].to(logits_CV.device)
            nll_C = -torch.log_softmax(logits_CV, dim=-1).gather(1, targets_C1)[:, 0]
        highest_C, ids_C = logits_CV.max(dim=-1)
        found.append(Prediction(ids_C, highest_C, nll_C))
    if len(found) == 1:
        return found[0]
    nll = None if targets is None else torch.cat([part.nll for part in found if part.nll is not None])
    return Prediction(
        torch.cat([part.ids for part in found]), torch.cat([part.highest for part in found]), nll
    )


def top_k(
    head: Head | torch.Tensor, hidden: torch.Tensor, k: int, *, chunk_tokens: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids int64 [A, k], log-probabilities fp32 [A, k], falling, and fp32 [A], that of all other words.

    Products are fp32 on CPU, and summed in fp32 elsewhere. `chunk_tokens`: None = as many as fit 128 MiB of logits.
    """
    head = as_head(head)
    device, num_tokens = hidden.device, hidden.shape[0]
    chunk_tokens = max(1, min(chunk_tokens or chunk_rows(head.vocab_size), num_tokens))
    factor_dtype = torch.float32 if device.type == "cpu" else hidden.dtype
    weight_DV = head.weight.to(factor_dtype).T
    ids_AK = torch.empty(num_tokens, k, dtype=torch.int64, device=device)
    logprobs_AK = torch.empty(num_tokens, k, device=device)
    tail_A = torch.empty(num_tokens, device=device)
    buffer_CV = torch.empty(chunk_tokens, head.vocab_size, device=device)
    for start in range(0, num_tokens, chunk_tokens):
        hidden_CD = hidden[start : start + chunk_tokens].to(factor_dtype)
        logits_CV = head.finish_(product(hidden_CD, weight_DV, out=buffer_CV[: len(hidden_CD)]))
        for part in cached_blocks(logits_CV):
            block = slice(start + part.start, start + min(part.stop, len(logits_CV)))
            ids_AK[block], logprobs_AK[block], tail_A[block] = _of_logits(logits_CV[part], k)
    return ids_AK, logprobs_AK, tail_A


def _of_logits(logits_CV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, log-probabilities and the rest's; the logits are overwritten."""
    top_CK, ids_CK = select_top_k(logits_CV, k)
    top_CK = top_CK - top_CK[:, :1]
    exp_CV = logits_CV.sub_(logits_CV.gather(1, ids_CK[:, :1])).exp_()
    # Without the words kept, the sum is exactly the mass of the others, however small.
    rest_C = exp_CV.scatter_(1, ids_CK, 0.0).sum(1)
    log_sum_C = (rest_C + top_CK.exp().sum(1)).log()
    return ids_CK, top_CK - log_sum_C[:, None], rest_C.log() - log_sum_C


def select_top_k(logits_CV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values and ids [C, k] of the k largest, falling: what `torch.topk` returns, but for ties.

    On CPU that is slow over a whole vocabulary. The k largest lie in the k groups of words with the largest maxima,
    and maxima of groups are found at the speed of memory: of 32,768 words in 1,024 groups, 1,600 are looked at.
    """
    num_words = logits_CV.shape[1]
    size = _group_size(num_words, k)
    if logits_CV.device.type != "cpu" or size < 2:
        return logits_CV.topk(k, dim=1)
    # Group g holds words g, g + G, g + 2 G, ...: so a maximum over groups runs along memory.
    num_groups = num_words // size
    grouped_CMG = logits_CV[:, : num_groups * size].unflatten(1, (size, num_groups))
    _, groups_CK = grouped_CMG.amax(1).topk(k, dim=1, sorted=False)
    step_M1 = torch.arange(0, num_groups * size, num_groups)[:, None]
    places = (groups_CK[:, None, :] + step_M1).flatten(1)
    if rest := num_words - num_groups * size:
        behind = torch.arange(num_words - rest, num_words).expand(len(places), rest)
        places = torch.cat((places, behind), 1)
    values_CK, at_CK = logits_CV.gather(1, places).topk(k, dim=1)
    return values_CK, places.gather(1, at_CK)


def _group_size(num_words: int, k: int) -> int:
    """Return how many words a group has: the power of two with the fewest values to look at, 1 = no groups."""
    sizes = [2**power for power in range(12) if num_words // 2**power >= k]
    return min(sizes, key=lambda size: num_words // size + k * size if size > 1 else num_words)


def cached_blocks(logits_CV: torch.Tensor) -> Iterator[slice]:
    """Yield the rows of logits that stay in cache between passes over them: on a GPU all at once."""
    rows = max(1, len(logits_CV))
    if logits_CV.device.type == "cpu":
        row_bytes = logits_CV.element_size() * logits_CV.shape[1]
        rows = max(1, CACHED_BYTES * torch.get_num_threads() // row_bytes)
    for start in range(0, len(logits_CV), rows):
        yield slice(start, start + rows)


def product(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """Write a @ b into `out` without rounding it to the dtype of the factors on the way."""
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else torch.mm(a, b, out_dtype=out.dtype, out=out)
