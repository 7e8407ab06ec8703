"""Memory for answers: what is free, what a plan needs, and what is said when it was not enough."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from longspan.core.errors import RunError
from longspan.core.units import format_bytes
from longspan.infer.kv_types import KvDtype, bytes_per_head
from longspan.kernels.attention import NO_LIMIT
from longspan.kernels.attention.cuda_varlen import why_tiled
from longspan.kernels.attention.tiled import tiled_bytes
from longspan.models.hf_config import attention_width, head_counts, text_config, widest
from longspan.models.states import layers_with_keys

FIX = (
    "ask for shorter contexts, lower --batch-tokens, load the weights as --dtype bfloat16, or use more processes "
    "(--cp, --tp)"
)
LOGIT_ROWS = 1024
"""Positions whose logits exist at once."""


def available_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a device; None where that is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.is_file():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    if "MemAvailable" not in fields:
        return None
    return int(fields["MemAvailable"].split()[0]) * 1024


def shared_memory(device: torch.device, group: dist.ProcessGroup | None = None) -> int:
    """Return the bytes that each rank of a group can have, the same on all: those of the one with the least.

    All ranks call it together. Ranks on the CPU share the memory of their machine.
    """
    free = available_memory(device)
    if free is None:
        free = NO_LIMIT
    elif device.type == "cpu":
        free //= dist.get_world_size(group)
    least = torch.tensor(free, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
    return int(least)


def cache_bytes_per_token(model: PreTrainedModel, *, upcasts: bool, kv_dtype: KvDtype | None = None) -> int:
    """Return the bytes of keys and values of one token in all layers, on this rank.

    `upcasts`: the kernel keeps them in fp32 at least (`AttentionKernel.upcasts`), unless they are held as `kv_dtype`.
    """
    _, kv_heads = head_counts(model.config)
    dtype = torch.promote_types(model.dtype, torch.float32) if upcasts else model.dtype
    ranks, width = getattr(model, "tp_size", None) or 1, attention_width(model.config)
    of_head = width * dtype.itemsize if kv_dtype is None else bytes_per_head(kv_dtype, width)
    return 2 * layers_with_keys(model) * max(1, kv_heads // ranks) * of_head


def pass_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Return the bytes of activations of a forward pass: one layer's, and logits of `LOGIT_ROWS` positions.

    Residual stream, its normalised copy and the sum; queries, keys, values and output, partly in fp32; gate, up and
    their product.
    """
    config = text_config(model.config)
    width = attention_width(config) * head_counts(config)[0]
    inner = widest(config, "intermediate_size") or 4 * config.hidden_size
    size = model.dtype.itemsize
    per_token = 4 * config.hidden_size * size + width * (4 * size + 8) + 3 * inner * size
    logits = min(tokens, LOGIT_ROWS) * config.vocab_size * (size + 8)
    return tokens * per_token + logits


def dense_bytes(model: PreTrainedModel, keys: int) -> int:
    """Return the bytes that attention needs over `keys` keys where no flash kernel takes the model; else 0.

    None takes capped scores.
    """
    heads, kv_heads = head_counts(model.config)
    channels = attention_width(model.config)
    capped = getattr(text_config(model.config), "attn_logit_softcapping", None) is not None
    if not capped and (model.device.type != "cuda" or why_tiled(model.dtype, channels) is None):
        return 0
    return tiled_bytes(heads=heads, kv_heads=kv_heads, head_dim=channels, keys=keys)


def refuse_excess(
    *,
    cache_tokens: int,
    cache_bytes: int,
    activations: int,
    available: int,
    device: torch.device,
    states: int = 0,
    state_bytes: int = 0,
) -> None:
    """Refuse what does not fit, before anything is run.

    Raises:
        RunError: more is needed than is available.
    """
    needed = cache_tokens * cache_bytes + states * state_bytes + activations
    if needed > available:
        held_states = f"{states:,} states of {format_bytes(state_bytes)}, " if state_bytes else ""
        raise RunError(
            f"these prompts do not fit into the memory of {device}",
            found=f"about {format_bytes(needed)}: keys and values of {cache_tokens:,} tokens, "
            f"{format_bytes(cache_bytes)} each, {held_states}and {format_bytes(activations)} of activations",
            allowed=f"{format_bytes(available)} that are free",
            fix=FIX,
        )


@contextlib.contextmanager
def memory_errors(device: torch.device, *, doing: str) -> Iterator[None]:
    """Turn what torch raises when memory is used up into a RunError that says what it was doing."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _used_up(device, doing, error) from error
    except RuntimeError as error:
        # The CPU allocator has no error of its own.
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        raise _used_up(device, doing, error) from error


def _used_up(device: torch.device, doing: str, error: BaseException) -> RunError:
    free = available_memory(device)
    return RunError(
        f"the memory of {device} is used up while {doing}",
        found=(str(error).strip().splitlines() or ["no more memory"])[0][:200],
        allowed=None if free is None else f"{format_bytes(free)} are free now",
        fix=FIX,
    )
