"""longspan's attention under its own name in the transformers registries.

`register()` adds two functions named "longspan": the attention itself, which gets the document table as the
keyword `documents`, and a mask builder that builds nothing. What this attention cannot express is refused
with a message, never dropped: transformers silently drops an unknown kernel's padding mask.

Shape legend: B = batch, H = query heads, K = key/value heads, Q = query tokens, S = key tokens, D = head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from longspan.core.errors import ArgumentError
from longspan.kernels.attention import AttentionForm, Bands, attention, choose_kernel
from longspan.models.documents import Documents
from longspan.parallel.sharded_documents import ShardedDocuments

__all__ = [
    "ATTENTION_NAME",
    "attention_form",
    "keep_out_of_compiler",
    "longspan_attention",
    "longspan_mask",
    "register",
]

ATTENTION_NAME = "longspan"

USE_DOCUMENTS = (
    "pass documents=Documents.from_cu_seqlens([0, ..., tokens]) and one row of tokens without padding"
)

# Families whose layers do not hand on the window that their mask has.
WINDOW_IN_MASK_ALONE = ("phimoe",)

# Arguments by which models ask for something that is not softmax(q k^T * scale) v over a band.
UNSUPPORTED = {
    "position_bias": "an additive position bias",
    "cache": "a paged cache",
}


class KeyOffset(NamedTuple):
    """Stands in for a mask: the position of the first key of a cache that forgets."""

    tokens: int


def register() -> None:
    """Make "longspan" known to transformers as an attention implementation; calling it again is harmless."""
    AttentionInterface.register(ATTENTION_NAME, _registered[ATTENTION_NAME])
    AttentionMaskInterface.register(ATTENTION_NAME, longspan_mask)


def keep_out_of_compiler() -> None:
    """Let torch.compile leave attention as it is from now on: its kernels are chosen and compiled by themselves.

    Tables of documents are numpy, which torch.compile would try to turn into tensors.
    """
    _registered[ATTENTION_NAME] = torch.compiler.disable(longspan_attention)
    register()


def longspan_mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    config: Any = None,
    **_: Any,
) -> KeyOffset | None:
    """Build no mask; refuse what a mask would have been needed for.

    Returns:
        For chunked attention the position of the first key, where the cache has given up those before it; else None.

    Raises:
        ArgumentError: a padded attention mask, a preallocated (static) cache, or a model that overlays a mask of
            its own.
    """
    name = getattr(config, "model_type", "this model")
    if isinstance(q_offset, torch.Tensor) or q_offset + q_length != kv_offset + kv_length:
        raise ArgumentError(
            "longspan attention does not work with a preallocated key/value cache",
            fix="use the default dynamic cache (no cache_implementation='static')",
        )
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ArgumentError(
            "longspan attention takes no padding",
            found=f"an attention mask with {int((~attention_mask.bool()).sum())} masked positions",
            fix=USE_DOCUMENTS,
        )
    if use_vmap:
        raise ArgumentError(f"{name} adds a mask of its own, which longspan attention would ignore")
    chunked = getattr(config, "attention_chunk_size", None) is not None
    return KeyOffset(int(kv_offset)) if chunked and kv_offset else None


def longspan_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | KeyOffset | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    documents: Documents | ShardedDocuments | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention for one layer, per document.

    Values narrower or wider than keys (latent attention: 128 beside 192) are filled up with zeros, which costs the
    difference in memory and work.

    Args:
        module: the attention layer.
        query: [B, H, Q, D].
        key, value: [B, K, S, D] and [B, K, S, W]; S > Q means the queries are the last Q of S positions (a KV cache).
        attention_mask: what `longspan_mask` returned.
        dropout: must be 0.
        scaling: factor on the scores; None = 1/sqrt(D).
        sliding_window: a query sees that many keys, itself included; None = all.
        softcap: scores s become softcap * tanh(s / softcap).
        s_aux: [H], scores of a key without a value that every query sees: attention sinks.
        documents: document table of the B*Q tokens, whole or of this rank; None = each of the B rows is one document.

    Returns:
        [B, Q, H, W], and None in place of attention probabilities.

    Raises:
        ArgumentError: anything this attention does not compute; the message names the model.
    """
    forgotten = 0
    if isinstance(attention_mask, KeyOffset):
        forgotten, attention_mask = attention_mask.tokens, None
    _refuse_unsupported(module, attention_mask, dropout, is_causal, kwargs)
    form = attention_form(module, query, scaling, sliding_window, softcap, s_aux)
    batch, num_heads, num_queries, head_dim = query.shape
    num_keys, value_dim = key.shape[2], value.shape[-1]
    if head_dim != value_dim:
        query, key, value = (_widened(tensor, max(head_dim, value_dim)) for tensor in (query, key, value))
    # [B, H, Q, D] -> [B, Q, H, D] -> [B*Q, H, D]: a view, because models project to [B, Q, H, D] first.
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    if documents is None:
        _refuse_packed_positions(module, kwargs)
        bands = _rows(batch, num_queries, num_keys, form.window, form.attention_chunk, forgotten)
        kernel = choose_kernel(q.device, softcap=softcap)
        out = attention(q, k, v, bands, scale=form.scale, kernel=kernel, sinks=form.sinks)
    else:
        if num_keys != num_queries or documents.num_tokens != batch * num_queries:
            raise ArgumentError(
                "the document table does not fit the tokens",
                found=f"{documents.num_tokens} tokens in documents, {batch} x {num_queries} tokens in the input, "
                f"{num_keys} keys",
                fix="pass one table for the whole row and use_cache=False",
            )
        layer = getattr(module, "layer_idx", None)
        out = documents.attend(q, k, v, form, layer=layer)
    out = out.reshape(batch, num_queries, num_heads, -1)
    return out if out.shape[-1] == value_dim else out[..., :value_dim], None


def attention_form(
    module: torch.nn.Module,
    query: torch.Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> AttentionForm:
    """Return what the layer asks for: by its arguments, and where those say nothing by its config."""
    config = getattr(module, "config", None)
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None:
        kinds, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
        if kinds is None or layer is None:
            raise ArgumentError(f"{type(module).__name__} does not say which of its layers attend in chunks")
        chunk = chunk if kinds[layer] == "chunked_attention" else None
    if window is None and getattr(config, "model_type", None) in WINDOW_IN_MASK_ALONE:
        window = config.sliding_window  # type: ignore[union-attr]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return AttentionForm(scale, window, chunk, softcap, sinks)


def _widened(tensor: torch.Tensor, width: int) -> torch.Tensor:
    missing = width - tensor.shape[-1]
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


@lru_cache(maxsize=64)
def _rows(
    batch: int, num_queries: int, num_keys: int, window: int | None, chunk: int | None, forgotten: int
) -> Bands:
    # Queries are the last of the keys, so query i stands at key position i + past: i - j >= -past.
    past = num_keys - num_queries
    rows = range(batch)
    if chunk is not None:
        return _rows_in_chunks(batch, num_queries, num_keys, window, chunk, forgotten)
    return Bands(
        [row * num_queries for row in rows],
        [num_queries] * batch,
        [row * num_keys for row in rows],
        [num_keys] * batch,
        lo=-past,
        hi=None if window is None else window - 1 - past,
    )


def _rows_in_chunks(
    batch: int, num_queries: int, num_keys: int, window: int | None, chunk: int, forgotten: int
) -> Bands:
    """Return the bands of rows whose queries see no further back than the last multiple of `chunk`."""
    past = num_keys - num_queries
    # In keys: positions without those that the cache has forgotten.
    multiples = range(-forgotten % chunk, num_keys, chunk)
    cuts = sorted({past, num_keys, *(cut for cut in multiples if cut > past)})
    spans = [
        (start, stop, max(0, (start + forgotten) // chunk * chunk - forgotten))
        for start, stop in itertools.pairwise(cuts)
    ]
    table = [
        (row * num_queries + start - past, stop - start, row * num_keys + first, stop - first, first - start)
        for row in range(batch)
        for start, stop, first in spans
    ]
    *columns, lo = zip(*table)
    hi = None if window is None else [limit + window - 1 for limit in lo]
    return Bands(*columns, lo=lo, hi=hi)


def _refuse_unsupported(
    module: torch.nn.Module,
    attention_mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> None:
    name = type(module).__name__
    for key, meaning in UNSUPPORTED.items():
        if kwargs.get(key) is not None:
            raise ArgumentError(
                f"{name} asks for {meaning} ({key}), which longspan attention does not compute",
                fix="use a model without it, or another attention implementation for this model",
            )
    if kwargs.get("output_attentions"):
        raise ArgumentError(f"{name} is asked for attention probabilities, which are never formed")
    if attention_mask is not None:
        raise ArgumentError(
            f"{name} was given a mask of its own, which longspan attention would ignore",
            found=f"shape {list(attention_mask.shape)}",
            fix=f"if it is yours, {USE_DOCUMENTS}; if the model makes it, use another family",
        )
    if dropout:
        raise ArgumentError(
            f"{name} uses attention dropout, which longspan attention does not compute",
            found=dropout,
            fix="set it to 0 (attention_dropout, attn_pdrop): in a recipe, under model.config_overrides",
        )
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise ArgumentError(f"{name} is not causal; longspan attention is for causal language models")


def _refuse_packed_positions(module: torch.nn.Module, kwargs: dict[str, Any]) -> None:
    """Positions that restart, or borders meant for another kernel, mean documents that would see each other."""
    positions = kwargs.get("position_ids")
    # The first layer looks, for all: reading the values makes a GPU wait.
    if positions is None or positions.ndim != 2 or getattr(module, "layer_idx", 0) != 0:
        restart = False
    else:
        restart = bool((positions[:, 1:] <= positions[:, :-1]).any())
    found = "cu_seq_lens_q" if kwargs.get("cu_seq_lens_q") is not None else None
    if restart:
        found = "position_ids that start again inside a row"
    if found is not None:
        raise ArgumentError(
            "several documents in a row, but no document table", found=found, fix=USE_DOCUMENTS
        )


_registered: dict[str, Callable[..., Any]] = {ATTENTION_NAME: longspan_attention}
