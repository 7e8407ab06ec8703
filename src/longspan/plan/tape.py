"""Bytes that are alive while a chain of operations runs forward and backward, as torch's autograd frees them.

A tape is a list of operations that read and write named tensors. What an operation saves lives until its own backward
step is done, a gradient until the operation that made the tensor has used it, and weights' gradients stay. Walked in
order the tape gives the peak of a forward pass, walked backward that of a backward pass:

    y = silu(x)      Op(reads=("x",), writes={"y": n}, saves=("x",))
    forward          x + y               x is saved, y read by the next operation
    backward         x + dy + dx         then x and dy are given up

Not in it: what an operation needs inside itself, unless it is said as `scratch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Op", "Walk", "walk"]


class Op(NamedTuple):
    """One operation; all sizes in bytes."""

    reads: tuple[str, ...]
    """Tensors that get a gradient from it."""
    writes: str
    size: float
    """Of what it writes, and of the gradient of it."""
    saves: tuple[str, ...] = ()
    """Tensors that its backward step needs: read, written, or made on the side (`extra`)."""
    extra: tuple[tuple[str, float], ...] = ()
    """Tensors that it makes beside what it writes; those that are not saved live while it runs."""
    scratch: float = 0.0
    """Alive inside its backward step only."""
    weights: float = 0.0
    """Gradients of its weights, which stay."""
    passes: bool = False
    """Its backward step hands the gradient on as it is, without a copy (a sum)."""


class Walk(NamedTuple):
    """What a tape needs."""

    forward: float
    """Peak of a forward pass that saves nothing, its input included."""
    saved: float
    """What stays after a forward pass with gradients, its input included and its output left out."""
    backward: float
    """Peak of the backward pass: what was saved, gradients, and weights' gradients that the pass has made so far."""
    weights: float
    """Gradients of all weights."""


def walk(ops: Sequence[Op], inputs: dict[str, float]) -> Walk:
    """Return the needs of a tape.

    Args:
        ops: in the order of the forward pass; the last one writes the result.
        inputs: names and sizes of what is there before.
    """
    sizes = dict(inputs)
    for op in ops:
        sizes[op.writes] = op.size
        sizes.update(op.extra)
    saved = set(inputs).union(*(op.saves for op in ops))
    return Walk(
        _forward(ops, inputs, sizes),
        sum(sizes[name] for name in saved),
        _backward(ops, saved, set(inputs), sizes),
        sum(op.weights for op in ops),
    )


def _forward(ops: Sequence[Op], inputs: dict[str, float], sizes: dict[str, float]) -> float:
    last_read = {name: index for index, op in enumerate(ops) for name in op.reads}
    live, peak = set(inputs), 0.0
    for index, op in enumerate(ops):
        live.add(op.writes)
        peak = max(peak, sum(sizes[name] for name in live) + sum(size for _, size in op.extra))
        live -= {name for name, last in last_read.items() if last == index and name not in inputs}
    return peak


def _backward(ops: Sequence[Op], saved: set[str], inputs: set[str], sizes: dict[str, float]) -> float:
    # A gradient is a buffer that several names may share: a sum hands the same one to both its terms.
    gradients = {ops[-1].writes: ops[-1].writes}
    weights = peak = 0.0

    def alive(saves: set[str]) -> float:
        return sum(sizes[name] for name in saves) + sum(
            sizes[name.partition("'")[0]] for name in set(gradients.values())
        )

    for index in reversed(range(len(ops))):
        op = ops[index]
        if op.writes not in gradients:
            continue
        fresh = [] if op.passes else list(op.reads)
        weights += op.weights
        peak = max(peak, alive(saved) + sum(sizes[name] for name in fresh) + op.scratch + weights)
        buffer = gradients.pop(op.writes)
        for name in op.reads:
            before = gradients.get(name)
            if before is None:
                gradients[name] = buffer if op.passes else f"{name}'{index}"
            elif list(gradients.values()).count(before) > 1:
                gradients[name] = f"{name}'{index}"
        saved &= inputs.union(*(other.saves for other in ops[:index]))
    return peak
