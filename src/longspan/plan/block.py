"""The operations of one transformer block as a tape: what each keeps for its backward step.

A block is that of Llama and its kin: two RMS norms, grouped-query attention with RoPE, a gated MLP. Sizes are those
of `longspan.models` with transformers' layers and peft's adapters, operation by operation:

    norm        x in fp32 (x itself, if it is fp32), and what the weight multiplies
    linear      its input, if its weight is trained
    adapter     its input in fp32, A x; beside the output a copy of it in fp32 while B A x is added
    attention   q, k, v, out, lse
    MLP         gate, silu(gate), up and their product; in tiles only its input

Shape legend: T = tokens, D = hidden, H = query heads, K = key/value heads, F = intermediate.
"""

from __future__ import annotations

from typing import NamedTuple

from longspan.plan.models import ModelShape
from longspan.plan.tape import Op, Walk, walk

__all__ = ["LINEARS", "BlockSettings", "block_walk", "flash_backward_bytes"]

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
"""The linear layers of a block."""
FLASH_HEAD_DIM = 256
"""Largest head dimension of the flash kernels, which take 16 bits and multiples of 8."""
DQ_ROWS = 128
"""Rows of dq's sums that the flash kernel adds for each document."""
TILE_BYTES = 1 << 28
"""Of one tile's scores where no flash kernel takes the model (`kernels.attention.tiled`)."""
SUM_BYTES = 4
"""Of an element of a sum: fp32."""


class BlockSettings(NamedTuple):
    """What decides the operations of a block."""

    tokens: int
    """Tokens that run through the block at once on this rank."""
    element_bytes: int = 2
    """Of an activation."""
    tile_tokens: int | None = None
    """Tokens of a tile of the MLP; None = all at once."""
    trained: bool = True
    """The block's own weights are trained."""
    lora_rank: int | None = None
    """Rank of adapters."""
    adapted: tuple[str, ...] = LINEARS
    """Linear layers that have one, if there are adapters."""
    dequantized: bool = False
    """A frozen linear layer makes its weight from 4 bits each time."""
    documents: int = 1
    """That these tokens are of."""
    cuda: bool = True
    """The kernel is the GPU's, which sums dq in fp32; that of the CPU computes everything in fp32."""
    attention_bytes: float = 0.0
    """What a schedule holds beside the layer's tensors, or the keys of one earlier chunk with gradients."""


def block_walk(model: ModelShape, settings: BlockSettings) -> Walk:
    """Return what one block needs; in its backward pass everything has just been computed."""
    ops = _attention_ops(model, settings) + _mlp_ops(model, settings, settings.tokens)
    ops.append(
        Op(("middle", "mlp"), "out", settings.tokens * model.hidden * settings.element_bytes, passes=True)
    )
    return walk(ops, {"x": settings.tokens * model.hidden * settings.element_bytes})


def _norm(name: str, read: str, write: str, elements: float, s: BlockSettings) -> Op:
    """y = weight * (x32 * rsqrt(mean(x32^2))): the wide copies exist only where x is narrow."""
    size, wide = elements * s.element_bytes, elements * SUM_BYTES
    narrow = s.element_bytes < SUM_BYTES
    extra = [(f"{name}.normed", size)]
    saves = [read]
    if narrow:
        extra.append((f"{name}.wide", wide))
        saves.append(f"{name}.wide")
    if s.trained:
        saves.append(f"{name}.normed")
    # Gradients of the square, of the mean and of the product, one after the other, in fp32.
    return Op((read,), write, size, tuple(saves), tuple(extra), scratch=3 * wide)


def _linear(
    name: str, read: str, write: str, rows: float, fan_in: int, fan_out: int, s: BlockSettings
) -> list[Op]:
    size = rows * fan_out * s.element_bytes
    weight = float(fan_in * fan_out * s.element_bytes)
    scratch = weight if s.dequantized else 0.0
    if s.lora_rank is None or name not in s.adapted:
        saves = (read,) if s.trained else ()
        return [Op((read,), write, size, saves, scratch=scratch, weights=weight if s.trained else 0.0)]
    narrow = s.element_bytes < SUM_BYTES
    inner = (f"{name}.inner", rows * s.lora_rank * SUM_BYTES)
    wide_in = (f"{name}.wide", rows * fan_in * SUM_BYTES)
    wide_out = rows * fan_out * SUM_BYTES
    adapters = s.lora_rank * (fan_in + fan_out) * SUM_BYTES
    return [
        Op(
            (read,),
            write,
            size,
            (wide_in[0], inner[0]) if narrow else (read, inner[0]),
            (inner, wide_in) if narrow else (inner,),
            # The gradient scaled, in fp32, and, for a narrow layer, the wide gradient of its input.
            scratch=scratch + wide_out + (wide_in[1] + wide_out if narrow else rows * fan_in * SUM_BYTES),
            weights=adapters,
        )
    ]


def _attention_ops(model: ModelShape, s: BlockSettings) -> list[Op]:
    t, b = s.tokens, s.element_bytes
    hidden = t * model.hidden
    query, key = t * model.heads * model.head_dim, t * model.kv_heads * model.head_dim
    width, kv_width = model.heads * model.head_dim, model.kv_heads * model.head_dim
    ops = [_norm("norm1", "x", "y1", hidden, s)]
    ops += _linear("q", "y1", "q.flat", t, model.hidden, width, s)
    ops += _linear("k", "y1", "k.flat", t, model.hidden, kv_width, s)
    ops += _linear("v", "y1", "v", t, model.hidden, kv_width, s)
    flat = ["q.flat", "k.flat"]
    if model.head_norms:
        ops.append(_norm("q.norm", "q.flat", "q.normed", query, s))
        ops.append(_norm("k.norm", "k.flat", "k.normed", key, s))
        flat = ["q.normed", "k.normed"]
    # RoPE keeps nothing of its own; the gradient passes through two products and a rotation.
    ops.append(Op((flat[0],), "q", query * b, scratch=2 * query * b))
    ops.append(Op((flat[1],), "k", key * b, scratch=2 * key * b))
    lse = ("lse", t * model.heads * SUM_BYTES)
    if s.cuda and (b >= SUM_BYTES or model.head_dim % 8 or model.head_dim > FLASH_HEAD_DIM):
        # In tiles: five copies of the scores of one; keys, values and their gradients in fp32, laid out for products.
        scratch = 5.0 * max(TILE_BYTES, t * model.heads * SUM_BYTES) + 7 * 2 * key * SUM_BYTES
    elif s.cuda:
        scratch = flash_backward_bytes(model, s)
    else:
        # Everything once more in fp32 where it is narrow.
        scratch = (4 * query + 4 * key) * SUM_BYTES if b < SUM_BYTES else 0.0
    ops.append(
        Op(
            ("q", "k", "v"),
            "a",
            query * b,
            ("q", "k", "v", "a", "lse"),
            (lse,),
            scratch=scratch + s.attention_bytes,
        )
    )
    ops += _linear("o", "a", "o", t, width, model.hidden, s)
    ops.append(Op(("x", "o"), "middle", hidden * b, passes=True))
    return ops


def flash_backward_bytes(model: ModelShape, s: BlockSettings) -> float:
    """Return what FlashAttention-2 needs in its backward pass, beside what it returns.

    dq in fp32, its heads rounded up, with 128 rows more for each document; dk and dv of every query head.
    """
    step = 32 if model.head_dim <= 128 else 64
    rounded = -(-model.head_dim // step) * step
    sums = (s.tokens + DQ_ROWS * s.documents) * model.heads * rounded * SUM_BYTES
    shared = model.kv_heads < model.heads
    return float(sums + shared * 2 * s.tokens * model.heads * model.head_dim * s.element_bytes)


def _mlp_ops(model: ModelShape, s: BlockSettings, tokens: int) -> list[Op]:
    norm = _norm("norm2", "middle", "y2", tokens * model.hidden, s)
    if s.tile_tokens is None or s.tile_tokens >= tokens:
        return [norm, *_gated(model, s, tokens)]
    tile = walk(_gated(model, s, s.tile_tokens), {"y2": s.tile_tokens * model.hidden * s.element_bytes})
    # A tile's gradients of the weights arrive together, beside their sums in fp32.
    sums = tile.weights * SUM_BYTES / s.element_bytes
    return [
        norm,
        Op(
            ("y2",),
            "mlp",
            tokens * model.hidden * s.element_bytes,
            ("y2",),
            (("tile", tile.forward),),
            # Its own count adds them once more.
            scratch=tile.backward + sums - tile.weights,
            weights=tile.weights,
        ),
    ]


def _gated(model: ModelShape, s: BlockSettings, tokens: int) -> list[Op]:
    inner = tokens * model.intermediate * s.element_bytes
    hidden, wide = model.hidden, model.intermediate
    return [
        *_linear("gate", "y2", "gate", tokens, hidden, wide, s),
        Op(("gate",), "silu", inner, ("gate",)),
        *_linear("up", "y2", "up", tokens, hidden, wide, s),
        Op(("silu", "up"), "product", inner, ("silu", "up")),
        *_linear("down", "product", "mlp", tokens, wide, hidden, s),
    ]
