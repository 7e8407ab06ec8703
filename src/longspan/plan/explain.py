"""The formulas behind an estimate, with their numbers and where they are from."""

from __future__ import annotations

from longspan.core.units import format_bytes, format_count, format_seconds
from longspan.plan.efficiency import CALIBRATED_BY, default_kernel, gpu_shares
from longspan.plan.hardware import CPU, Gpu
from longspan.plan.models import ModelShape
from longspan.plan.scale import LINK_EFFICIENCY, kind_seconds
from longspan.plan.search import Arrangement

__all__ = ["explain"]


def explain(
    model: ModelShape, gpu: Gpu, found: Arrangement, *, context: int, num_gpus: int, kernel: str | None
) -> list[str]:
    """Return the estimate of an arrangement, a line for each formula."""
    name = kernel or default_kernel(gpu.family)
    shares, s = gpu_shares(gpu, kernel), found.candidate.step
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
            f"  such a layer: matrices {_milli(one.linear)}, attention {_milli(one.forward)} forward, "
            f"{_milli(one.backward)} backward, gathered in {_milli(one.gather)}"
        )
    again = "forward again, " if s.memory.activation_checkpointing != "none" else ""
    products = "twice" if s.lora is None else "once: weights are frozen"
    fitted = CALIBRATED_BY.get(gpu.family, "nothing on this generation: the nearest one stands in")
    origin, fitted = ("bf16 (plan/hardware.py)", f"fitted to: {fitted}")
    if gpu.measured is not None:
        origin, fitted = "measured", "measured on this machine"
    memory = found.candidate.memory
    lines += [
        f"speed: {format_count(gpu.flops)} FLOP/s, {origin} * {shares.linear:.3g} of matrices, "
        f"{shares.forward:.3g} and {shares.backward:.3g} of attention with {name} (plan/efficiency.py)",
        f"  {fitted}",
        f"links: {LINK_EFFICIENCY:.0%} of {format_bytes(gpu.nvlink)}/s in a node, {format_bytes(gpu.network)}/s "
        f"between nodes of {gpu.per_node}; bytes of a schedule: plan/communication.py, what the schedules send",
        f"passes: forward, {again}backward (matrices {products}) = {format_seconds(found.seconds)} a step of "
        f"{found.tokens:,} tokens (plan/cost.py)",
        f"memory: the highest of {len(memory.moments)} moments of a step, {memory.moment}: "
        f"{format_bytes(memory.device)} of tensors (plan/training.py) + {format_bytes(gpu.workspace)} allowed for "
        f"{'the interpreter and its libraries' if gpu.family == CPU else 'CUDA, NCCL and fragmentation'}",
    ]
    return lines


def _milli(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g} ms"
