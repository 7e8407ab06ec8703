"""The operations of one transformer block as a tape: what each keeps for its backward step.

A block is that of Llama and its kin: two RMS norms, grouped-query attention with RoPE, a gated MLP. Sizes are those
of `longspan.models` with transformers' layers and peft's adapters, operation by operation. Other layers are drawn near:
an MLP of another form counts as a gated one of as many weights, latent attention as attention with heads of its wider
side, a layer with a state by the outputs of its matrices and a state every STATE_TOKENS tokens:

    norm        x in fp32 (x itself, if it is fp32), and what the weight multiplies
    linear      its input, if its weight is trained
    adapter     its input in fp32, A x; beside the output a copy of it in fp32 while B A x is added
    attention   q, k, v, out, lse
    MLP         gate, silu(gate), up and their product; in tiles only its input
    fused       a norm keeps its input alone, and the MLP gate, up and their product (TrainingStep.fused)
    experts     besides, for each expert of a token, its row as it is sorted and what comes out
    state       twice what its matrices put out, and the states

Shape legend: T = tokens, D = hidden, H = query heads, K = key/value heads, F = intermediate.
"""

from __future__ import annotations

from longspan.plan.communication import kv_heads_of_rank
from longspan.plan.memory import SUM_BYTES
from longspan.plan.models import ModelShape
from longspan.plan.tape import Op, Walk, walk
from longspan.plan.training_step import TrainingStep

__all__ = ["block_walk", "flash_backward_bytes", "kernel_bytes"]

FLASH_HEAD_DIM = 256
"""Largest head dimension of the flash kernels, which take 16 bits and multiples of 8."""
DQ_ROWS = 128
"""Rows of dq's sums that the flash kernel adds for each document."""
STATE_TOKENS = 64
"""Tokens of a chunk of the kernels for layers with a state, which keep one state for each (flash-linear-attention)."""
TILE_BYTES = 1 << 28
"""Of one tile's scores where no flash kernel takes the model (`kernels.attention.tiled`)."""


def block_walk(model: ModelShape, s: TrainingStep, *, attention_bytes: float = 0.0) -> Walk:
    """Return what one block needs; in its backward pass everything has just been computed.

    Args:
        s: its `tokens` are those that run through the block at once on this rank.
        attention_bytes: what a schedule holds beside the layer's tensors, or the keys of one earlier chunk with
            gradients.
    """
    hidden = s.tokens * model.hidden * s.compute_bytes
    ops = _mixer_ops(model, s, attention_bytes)
    if model.intermediate:
        before = ops[-1].writes if ops else "x"
        ops += _mlp_ops(model, s, s.tokens, before)
        ops.append(Op((before, "mlp"), "out", hidden, passes=True))
    return walk(ops, {"x": hidden})


def _norm(name: str, read: str, write: str, elements: float, s: TrainingStep) -> Op:
    """y = weight * (x32 * rsqrt(mean(x32^2))): the wide copies exist only where x is narrow."""
    size, wide = elements * s.compute_bytes, elements * SUM_BYTES
    if s.fused:
        return Op((read,), write, size, (read,))
    narrow = s.compute_bytes < SUM_BYTES
    extra = [(f"{name}.normed", size)]
    saves = [read]
    if narrow:
        extra.append((f"{name}.wide", wide))
        saves.append(f"{name}.wide")
    if s.lora is None:
        saves.append(f"{name}.normed")
    # Gradients of the square, of the mean and of the product, one after the other, in fp32.
    return Op((read,), write, size, tuple(saves), tuple(extra), scratch=3 * wide)


def _linear(
    name: str,
    read: str,
    write: str,
    rows: float,
    fan_in: int,
    fan_out: int,
    s: TrainingStep,
    scale: float = 1.0,
) -> list[Op]:
    size = rows * fan_out * s.compute_bytes
    weight = float(fan_in * fan_out * s.compute_bytes)
    scratch = weight if s.lora is not None and s.lora.quantized else 0.0
    if s.lora is None or name not in s.lora.targets:
        saves = (read,) if s.lora is None else ()
        return [
            Op(
                (read,),
                write,
                size,
                saves,
                scratch=scratch,
                weights=weight * scale if s.lora is None else 0.0,
            )
        ]
    narrow = s.compute_bytes < SUM_BYTES
    inner = (f"{name}.inner", rows * s.lora.rank * SUM_BYTES)
    wide_in = (f"{name}.wide", rows * fan_in * SUM_BYTES)
    wide_out = rows * fan_out * SUM_BYTES
    adapters = s.lora.rank * (fan_in + fan_out) * SUM_BYTES
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


def _mixer_ops(model: ModelShape, s: TrainingStep, attention_bytes: float) -> list[Op]:
    ops = _attention_ops(model, s, attention_bytes) if model.heads else []
    weights = model.layer_active - 3 * model.hidden * model.intermediate
    if model.state or (not model.heads and weights > model.hidden):
        # Outputs of its matrices, before and after the convolution.
        wide = 2 * s.tokens * weights / model.hidden * s.compute_bytes
        states = s.tokens / STATE_TOKENS * model.state * SUM_BYTES
        before, after = (ops[-1].writes, "with state") if ops else ("x", "middle")
        ops.append(_norm("norm1", before, "y1.state", s.tokens * model.hidden, s))
        ops.append(
            Op(
                ("y1.state",),
                after,
                s.tokens * model.hidden * s.compute_bytes,
                ("y1.state", "mixer.wide", "mixer.states"),
                (("mixer.wide", wide), ("mixer.states", states)),
                scratch=wide + states,
                weights=0.0 if s.lora is not None else float(weights * s.compute_bytes),
            )
        )
    return ops


def _attention_ops(model: ModelShape, s: TrainingStep, attention_bytes: float) -> list[Op]:
    t, b = s.tokens, s.compute_bytes
    hidden = t * model.hidden
    width, kv_width = model.heads * model.held_dim, model.kv_heads * model.held_dim
    query, key = t * width, t * kv_width
    scale = model.weight_scale
    ops = [_norm("norm1", "x", "y1", hidden, s)]
    ops += _linear("q", "y1", "q.flat", t, model.hidden, width, s, scale)
    ops += _linear("k", "y1", "k.flat", t, model.hidden, kv_width, s, scale)
    ops += _linear("v", "y1", "v", t, model.hidden, kv_width, s, scale)
    flat = ["q.flat", "k.flat"]
    if model.head_norms:
        ops.append(_norm("q.norm", "q.flat", "q.normed", query, s))
        ops.append(_norm("k.norm", "k.flat", "k.normed", key, s))
        flat = ["q.normed", "k.normed"]
    # RoPE keeps nothing of its own; the gradient passes through two products and a rotation.
    turned = 0.0 if s.fused else 2.0
    ops.append(Op((flat[0],), "q", query * b, scratch=turned * query * b))
    ops.append(Op((flat[1],), "k", key * b, scratch=turned * key * b))
    lse = ("lse", t * model.heads * SUM_BYTES)
    ops.append(
        Op(
            ("q", "k", "v"),
            "a",
            query * b,
            ("q", "k", "v", "a", "lse"),
            (lse,),
            scratch=kernel_bytes(model, s) + attention_bytes,
        )
    )
    ops += _linear("o", "a", "o", t, width, model.hidden, s, scale)
    ops.append(Op(("x", "o"), "middle", hidden * b, passes=True))
    return ops


def kernel_bytes(model: ModelShape, s: TrainingStep) -> float:
    """Return what the kernel of attention needs in its backward pass, beside what it returns."""
    b = s.compute_bytes
    query, key = (s.tokens * heads * model.held_dim for heads in (model.heads, model.kv_heads))
    if s.cuda and (b >= SUM_BYTES or model.held_dim % 8 or model.held_dim > FLASH_HEAD_DIM):
        # In tiles: five copies of the scores of one; keys, values and their gradients in fp32, laid out for products.
        return 5.0 * max(TILE_BYTES, s.tokens * model.heads * SUM_BYTES) + 7 * 2 * key * SUM_BYTES
    if s.cuda:
        return flash_backward_bytes(model, s)
    # Everything once more in fp32 where it is narrow.
    return float((4 * query + 4 * key) * SUM_BYTES) if b < SUM_BYTES else 0.0


def flash_backward_bytes(model: ModelShape, s: TrainingStep) -> float:
    """Return what FlashAttention-2 needs in its backward pass, beside what it returns.

    dq in fp32, its heads rounded up, with 128 rows more for each document; dk and dv of every query head, where
    several look at one head of keys: on a rank that traded tokens for heads, fewer do.
    """
    step = 32 if model.held_dim <= 128 else 64
    rounded = -(-model.held_dim // step) * step
    sums = (s.tokens + DQ_ROWS * s.documents) * model.heads * rounded * SUM_BYTES
    degree = s.parallel.cp_ulysses
    shared = kv_heads_of_rank(model.heads, model.kv_heads, degree, 0) < model.heads // degree
    return float(sums + shared * 2 * s.tokens * model.heads * model.held_dim * s.compute_bytes)


def _mlp_ops(model: ModelShape, s: TrainingStep, tokens: int, before: str) -> list[Op]:
    norm = _norm("norm2", before, "y2", tokens * model.hidden, s)
    if s.memory.tiled_mlp is None or s.memory.tiled_mlp >= tokens:
        return [norm, *_gated(model, s, tokens)]
    tile = walk(
        _gated(model, s, s.memory.tiled_mlp), {"y2": s.memory.tiled_mlp * model.hidden * s.compute_bytes}
    )
    # A tile's gradients of the weights arrive together, beside their sums in fp32.
    sums = tile.weights * SUM_BYTES / s.compute_bytes
    return [
        norm,
        Op(
            ("y2",),
            "mlp",
            tokens * model.hidden * s.compute_bytes,
            ("y2",),
            (("tile", tile.forward),),
            # Its own count adds them once more.
            scratch=tile.backward + sums - tile.weights,
            weights=tile.weights,
        ),
    ]


def _gated(model: ModelShape, s: TrainingStep, tokens: int) -> list[Op]:
    inner = tokens * model.intermediate * s.compute_bytes
    hidden, wide, scale = model.hidden, model.intermediate, model.weight_scale
    gate, up = (_linear(name, "y2", name, tokens, hidden, wide, s, scale) for name in ("gate", "up"))
    if s.fused:
        ops = [*gate, *up, Op(("gate", "up"), "product", inner, ("gate", "up"))]
    else:
        product = Op(("silu", "up"), "product", inner, ("silu", "up"))
        ops = [*gate, Op(("gate",), "silu", inner, ("gate",)), *up, product]
    ops += _linear("down", "product", "mlp", tokens, wide, hidden, s, scale)
    if not model.experts:
        return ops
    rows = tokens * model.chosen * hidden * s.compute_bytes
    sorted_rows = Op(("y2",), "y2.sorted", 0.0, ("rows.in",), (("rows.in", rows),), scratch=rows)
    summed = Op(
        ("mlp.sorted",),
        "mlp",
        tokens * hidden * s.compute_bytes,
        ("rows.out",),
        (("rows.out", rows),),
        scratch=rows,
    )
    renamed = [
        op._replace(
            reads=tuple("y2.sorted" if name == "y2" else name for name in op.reads),
            writes="mlp.sorted" if op.writes == "mlp" else op.writes,
            size=0.0 if op.writes == "mlp" else op.size,
            saves=tuple(name for name in op.saves if name != "y2"),
        )
        for op in ops
    ]
    return [sorted_rows, *renamed, summed]
