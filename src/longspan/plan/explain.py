"""The formulas behind an estimate, with their numbers and where they are from."""

from __future__ import annotations

from longspan.core.units import format_bytes, format_count, format_seconds
from longspan.plan.efficiency import CALIBRATED_BY, default_kernel, shares_of
from longspan.plan.hardware import Gpu
from longspan.plan.models import ModelShape
from longspan.plan.scale import LINK_EFFICIENCY, kind_seconds
from longspan.plan.search import Arrangement
from longspan.plan.training import WORKSPACE

__all__ = ["explain"]


def explain(
    model: ModelShape, gpu: Gpu, found: Arrangement, *, context: int, num_gpus: int, kernel: str | None
) -> list[str]:
    """Return the estimate of an arrangement, a line for each formula."""
    name = kernel or default_kernel(gpu.family)
    shares, s = shares_of(gpu.family, kernel), found.candidate.step
    lines = [
        f"weights: {model.parameters:,} counted on the model, of which a token uses {model.active_parameters:,}",
        f"matrices: 2 FLOPs a weight and token = {format_count(model.linear_flops())} a token, forward",
    ]
    for kind in model.kinds:
        seen = (
            f"window {kind.window:,}"
            if kind.window
            else f"chunk {kind.chunk:,}"
            if kind.chunk
            else "all before it"
        )
        if kind.heads:
            pairs = format_count(float(kind.pairs(context)))
            lines.append(
                f"attention of {kind.layers} layers, {kind.heads} heads, a token sees {seen}: 4 * {pairs} pairs * "
                f"{kind.heads} * {kind.held_dim} FLOPs forward, 2.5 times as many backward (scores again)"
            )
        elif kind.state:
            lines.append(
                f"{kind.layers} layers with a state of {kind.state:,} elements: 6 FLOPs an element and token"
            )
        one = kind_seconds(kind, gpu, s.parallel, context=context, num_gpus=num_gpus, kernel=kernel)
        lines.append(
            f"  such a layer: matrices {format_seconds(one.linear)}, attention {format_seconds(one.forward)} "
            f"forward, {format_seconds(one.backward)} backward, gathered in {format_seconds(one.gather)}"
        )
    again = "forward again, " if s.memory.activation_checkpointing != "none" else ""
    products = "twice" if s.lora is None else "once: weights are frozen"
    fitted = CALIBRATED_BY.get(gpu.family, "nothing on this generation: the nearest one stands in")
    memory = found.candidate.memory
    lines += [
        f"speed: {gpu.flops / 1e12:,.0f} TFLOP/s bf16 (plan/hardware.py) * {shares.linear} of matrices, "
        f"{shares.forward} and {shares.backward} of attention with {name} (plan/efficiency.py)",
        f"  fitted to: {fitted}",
        f"links: {LINK_EFFICIENCY:.0%} of {format_bytes(gpu.nvlink)}/s in a node, {format_bytes(gpu.network)}/s "
        f"between nodes of {gpu.per_node}; bytes of a schedule: plan/communication.py, what the schedules send",
        f"passes: forward, {again}backward (matrices {products}) = {format_seconds(found.seconds)} a step of "
        f"{found.tokens:,} tokens (plan/cost.py)",
        f"memory: the highest of {len(memory.moments)} moments of a step, {memory.moment}: "
        f"{format_bytes(memory.device)} of tensors (plan/training.py) + {format_bytes(WORKSPACE)} allowed for CUDA, "
        "NCCL and fragmentation",
    ]
    return lines
