"""What longspan's attention refuses, and generation with a KV cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MistralConfig
from transformers.masking_utils import create_sliding_window_causal_mask

from longspan.core.errors import ArgumentError
from longspan.kernels.attention import Bands
from longspan.kernels.attention.reference import dense_mask
from longspan.models.attention import longspan_attention
from longspan.models.hf import Documents, build_model, enable

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("window", [1, 3, 10, 50])
def test_window_means_what_transformers_means(window: int) -> None:
    """Off by one here is silent: the mask of transformers itself decides."""
    config = MistralConfig(hidden_size=8, num_attention_heads=1, num_key_value_heads=1, sliding_window=window)
    config._attn_implementation = "eager"
    mask = create_sliding_window_causal_mask(
        config=config, inputs_embeds=torch.zeros(1, 20, 8), attention_mask=None, past_key_values=None
    )
    ours = dense_mask(
        Bands.from_documents([0, 20], window=window), num_queries=20, num_keys=20, device=torch.device("cpu")
    )
    assert torch.equal(mask[0, 0] == 0, ours)


@pytest.mark.both_kernels
@pytest.mark.parametrize(
    "fields", [{}, {"model_type": "mistral", "sliding_window": 8}, {"model_type": "qwen3", "head_dim": 8}]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_generation_with_cache_equals_sdpa(fields: dict[str, Any], batch: int) -> None:
    """Decoding is bottom-right causal; top-left alignment would let a new token see only the first key."""
    model = build_model({**TINY, **fields}, seed=3)
    prompt, options = tokens(batch, 13), {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    model.set_attn_implementation("sdpa")
    truth = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    assert torch.equal(found.sequences, truth.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(truth.logits), atol=1e-5, rtol=1e-4)


@pytest.mark.both_kernels
def test_several_new_tokens_after_a_cache() -> None:
    """A prompt fed in two pieces gives the states of the whole prompt, also under a window."""
    model = build_model({**TINY, "model_type": "mistral", "sliding_window": 8}, seed=3)
    ids = tokens(1, 30)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :17], use_cache=True)
        second = model(ids[:, 17:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, atol=1e-5, rtol=1e-4)


def test_padding_is_refused_not_dropped() -> None:
    """transformers drops a padding mask without a word for a kernel that has no mask function."""
    model, ids = build_model(TINY, seed=0), tokens(2, 6)
    mask = torch.ones_like(ids)
    model(ids, attention_mask=mask)
    mask[0, 0] = 0
    with pytest.raises(ArgumentError, match="takes no padding"):
        model(ids, attention_mask=mask)
    with pytest.raises(ArgumentError, match="a mask of its own"):
        model(ids, attention_mask=torch.zeros(2, 1, 6, 6))


def test_packed_rows_without_a_table_are_refused() -> None:
    """Positions that restart announce several documents; without a table they would see each other."""
    model, ids = build_model(TINY, seed=0), tokens(1, 6)
    with pytest.raises(ArgumentError, match="no document table"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)
    with pytest.raises(ArgumentError, match="cu_seq_lens_q"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 3, 6]), use_cache=False)
    skipping = torch.tensor([[0, 1, 2, 100, 101, 102]])  # positions may skip, as in PoSE
    model(ids, position_ids=skipping, use_cache=False)


def test_a_table_that_does_not_fit_is_refused() -> None:
    """A table for other tokens, or together with a cache, cannot mean what was intended."""
    model, ids = build_model(TINY, seed=0), tokens(1, 6)
    with pytest.raises(ArgumentError, match="does not fit"):
        model(ids, documents=Documents.single(5), use_cache=False)
    with pytest.raises(ArgumentError, match="start at 0"):
        Documents.from_cu_seqlens([0, 4, 2])
    with pytest.raises(ArgumentError, match="preallocated"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static", pad_token_id=0)


def test_positions_and_bands_of_a_table() -> None:
    """Positions restart per document; bands are made once per window, and a window nobody fills is none."""
    documents = Documents.from_cu_seqlens(torch.tensor([0, 3, 5, 5]))
    assert documents.positions().tolist() == [0, 1, 2, 0, 1]
    assert documents.bands() is documents.bands(None) is documents.bands(3)
    assert documents.bands(2) is documents.bands(2) is not documents.bands()
    assert len(documents) == 3 and documents.num_tokens == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "not causal"),
        ({"output_attentions": True}, "probabilities"),
    ],
)
def test_other_arithmetic_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    """Anything beyond softmax(q k^T) v is refused, and the message names the layer that asked for it."""
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ArgumentError, match=message) as caught:
        longspan_attention(torch.nn.Linear(1, 1), x, x, x, None, **changes)
    assert "Linear" in str(caught.value)


@pytest.mark.both_kernels
def test_scaling_is_honoured() -> None:
    """Some families scale scores by something other than 1/sqrt(head_dim)."""
    q, k, v = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    found, _ = longspan_attention(torch.nn.Identity(), q, k, v, None, scaling=0.9)
    truth = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.9)
    torch.testing.assert_close(found, truth.transpose(1, 2))


@pytest.mark.both_kernels
def test_enable_switches_a_model_in_place() -> None:
    """A model from anywhere gets the attention; its outputs stay what they were."""
    model = build_model(TINY, seed=0)
    model.set_attn_implementation("sdpa")
    ids = tokens(1, 9)
    before = model(ids).logits
    assert enable(model) is model and model.config._attn_implementation == "longspan"
    torch.testing.assert_close(model(ids).logits, before)
    with pytest.raises(ArgumentError, match="registry"):
        enable(torch.nn.Linear(1, 1))
