"""The reference: dense attention in plain torch, one boolean mask, every score held at once.

Slow and quadratic in memory on purpose: heads * queries * keys * 4 bytes for the scores. Every other kernel
is tested against it; the fast kernels fall back to it only for what they cannot express.

Shape legend: T = queries, S = keys, H = query heads, K = key/value heads, G = H / K, D = head dimension.
"""

from __future__ import annotations

import torch

from longspan.kernels.attention.bands import Bands

__all__ = ["ReferenceKernel", "dense_mask"]


def dense_mask(bands: Bands, *, num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """Return bool [num_queries, num_keys]: True where a query sees a key."""
    mask = torch.zeros(num_queries, num_keys, dtype=torch.bool, device=device)
    columns = (bands.q_start, bands.q_len, bands.k_start, bands.k_len, bands.lo, bands.hi)
    for q_start, q_len, k_start, k_len, lo, hi in zip(*(column.tolist() for column in columns)):
        row = torch.arange(q_len, device=device)[:, None]
        col = torch.arange(k_len, device=device)[None, :]
        visible = (row - col >= lo) & (row - col <= hi)
        mask[q_start : q_start + q_len, k_start : k_start + k_len] |= visible
    return mask


class ReferenceKernel:
    """Dense masked attention in fp32 (fp64 for fp64 inputs); forward and an explicit backward."""

    name = "reference"
    upcasts = True
    spread_by_queries = False

    def __init__(self, *, softcap: float | None = None) -> None:
        self.softcap = softcap
        """Scores s become softcap * tanh(s / softcap)."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bands: Bands, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out [T, H, D] in q's dtype and lse [T, H]; a query that sees nothing gets 0 and -inf."""
        scores_kgts, _ = self._scores(q, k, bands, scale)
        lse_kgt = scores_kgts.logsumexp(-1)
        probs_kgts = _probs(scores_kgts, lse_kgt)
        out = torch.einsum("kgts,skd->tkgd", probs_kgts, v.to(probs_kgts.dtype))
        return out.reshape(q.shape).to(q.dtype), lse_kgt.flatten(0, 1).T.contiguous()

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        bands: Bands,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return dq, dk, dv; `out` and `lse` belong to the whole attention; k, v may be a part of it.

        dS = P * (dP - delta), delta = rowsum(dout * out) (FlashAttention-2, arXiv:2307.08691, algorithm 2).
        """
        scores_kgts, slope_kgts = self._scores(q, k, bands, scale)
        dtype = scores_kgts.dtype
        num_tokens, num_heads, head_dim = q.shape
        grouped = (num_tokens, k.shape[1], num_heads // k.shape[1], head_dim)
        lse_kgt = lse.to(dtype).T.reshape(scores_kgts.shape[:3])
        probs_kgts = _probs(scores_kgts, lse_kgt)
        dout_tkgd = dout.to(dtype).reshape(grouped)
        delta_kgt = (dout_tkgd * out.to(dtype).reshape(grouped)).sum(-1).permute(1, 2, 0)
        dprobs_kgts = torch.einsum("tkgd,skd->kgts", dout_tkgd, v.to(dtype))
        dscores_kgts = probs_kgts * (dprobs_kgts - delta_kgt[..., None]) * scale
        if slope_kgts is not None:
            dscores_kgts *= slope_kgts
        dq = torch.einsum("kgts,skd->tkgd", dscores_kgts, k.to(dtype)).reshape(q.shape)
        dk = torch.einsum("kgts,tkgd->skd", dscores_kgts, q.to(dtype).reshape(grouped))
        dv = torch.einsum("kgts,tkgd->skd", probs_kgts, dout_tkgd)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def _scores(
        self, q: torch.Tensor, k: torch.Tensor, bands: Bands, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the scores, -inf where nothing is seen, and the slope of their cap where there is one."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        num_tokens, num_heads, head_dim = q.shape
        q_tkgd = q.to(dtype).reshape(num_tokens, k.shape[1], num_heads // k.shape[1], head_dim)
        scores_kgts = torch.einsum("tkgd,skd->kgts", q_tkgd, k.to(dtype)) * scale
        slope_kgts = None
        if self.softcap is not None:
            scores_kgts.div_(self.softcap).tanh_()
            slope_kgts = 1 - scores_kgts.square()
            scores_kgts.mul_(self.softcap)
        mask = dense_mask(bands, num_queries=num_tokens, num_keys=k.shape[0], device=q.device)
        return scores_kgts.masked_fill_(~mask, float("-inf")), slope_kgts


def _probs(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    # A row that sees nothing has lse -inf, and exp(-inf - -inf) is NaN: shift such rows by 0 instead.
    return (scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp_()
