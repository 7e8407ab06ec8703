"""Packed documents must train exactly like documents alone, for every family and layer kind."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from longspan.kernels.loss import linear_cross_entropy
from longspan.models.head import output_head
from longspan.models.hf import Documents, build_model, hidden_states

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen3", {"head_dim": 16}),
    # Documents of 150 and 100 tokens are longer than the window, so it acts.
    ("mistral", {"sliding_window": 64}),
    # One layer with a window, one without: the window is per layer.
    ("qwen3", {"head_dim": 16, "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}),
]
BORDERS = [0, 150, 157, 158, 258, 300]


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, TINY["vocab_size"], (count,), generator=torch.Generator().manual_seed(seed))


def summed_loss(
    model: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor, documents: Documents | None
) -> torch.Tensor:
    return linear_cross_entropy(hidden_states(model, ids, documents), output_head(model), labels).loss


@pytest.mark.both_kernels
@pytest.mark.parametrize(("model_type", "fields"), FAMILIES)
def test_packed_equals_each_document_alone(model_type: str, fields: dict[str, Any]) -> None:
    """Guards loss and every gradient against leaks between documents, wrong positions and wrong windows."""
    model = build_model({**TINY, **fields, "model_type": model_type}, seed=0)
    ids, labels = tokens(300), tokens(300, seed=1)
    packed_loss = summed_loss(model, ids, labels, Documents.from_cu_seqlens(BORDERS))
    packed_loss.backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.set_attn_implementation("eager")  # the judge: transformers' own masks, one document a call
    total = 0.0
    for start, stop in pairwise(BORDERS):
        states = model.base_model(input_ids=ids[None, start:stop], use_cache=False).last_hidden_state[0]
        loss = torch.nn.functional.cross_entropy(model.lm_head(states), labels[start:stop], reduction="sum")
        loss.backward()
        total += loss.item()
    assert packed_loss.item() == pytest.approx(total, rel=1e-5)
    for name, parameter in model.named_parameters():
        error = (packed[name] - parameter.grad).norm() / parameter.grad.norm()
        assert parameter.grad.norm() > 0 and error <= 1e-5, (name, error.item())


def test_the_window_acts() -> None:
    """Guards the tests above against passing because the window is ignored on both sides."""
    fields = {**TINY, "model_type": "mistral"}
    narrow = build_model({**fields, "sliding_window": 64}, seed=0)
    wide = build_model({**fields, "sliding_window": None}, seed=0)
    states = [hidden_states(model, tokens(150)) for model in (narrow, wide)]
    torch.testing.assert_close(states[0][:64], states[1][:64])
    assert (states[0][64:] - states[1][64:]).abs().max() > 1e-3


@pytest.mark.both_kernels
@pytest.mark.parametrize(("model_type", "fields"), FAMILIES)
def test_another_document_does_not_change_a_bit(model_type: str, fields: dict[str, Any]) -> None:
    """One changed token of a document changes it and leaves every bit of the others."""
    model = build_model({**TINY, **fields, "model_type": model_type}, seed=0)
    ids, documents = tokens(300), Documents.from_cu_seqlens(BORDERS)
    with torch.no_grad():
        before = hidden_states(model, ids, documents)
        ids[160] = (ids[160] + 1) % TINY["vocab_size"]
        after = hidden_states(model, ids, documents)
    changed = (before != after).any(1).nonzero().squeeze(1)
    assert changed.min() == 160 and changed.max() < 258


def test_rows_of_a_batch_are_separate_and_equal_one_long_row_of_documents() -> None:
    """A batch without a table is one document a row; the table over the flattened batch says the same."""
    model = build_model({**TINY, "model_type": "llama"}, seed=0)
    ids = tokens(120).reshape(3, 40)
    with torch.no_grad():
        rows = hidden_states(model, ids)
        flat = hidden_states(model, ids.flatten(), Documents.from_cu_seqlens([0, 40, 80, 120]))
    torch.testing.assert_close(rows.flatten(0, 1), flat)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    """The document table must reach recomputed layers too."""
    grads = []
    for checkpointing in (False, True):
        model = build_model({**TINY, "model_type": "llama"}, seed=0).train()
        if checkpointing:
            # transformers renamed the method in 5.23.
            switch = (
                getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            )
            switch({"use_reentrant": False})
        summed_loss(model, tokens(300), tokens(300, seed=1), Documents.from_cu_seqlens(BORDERS)).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*grads):
        assert torch.equal(plain, recomputed)


def test_positions_restart_with_each_document() -> None:
    """RoPE is relative, so positions that run on hide; dynamic RoPE reacts to the largest one and shows them."""
    fields = {**TINY, "model_type": "llama", "max_position_embeddings": 64}
    model = build_model(fields, seed=0, rope={"rope_type": "dynamic", "factor": 4.0})
    ids = tokens(180)
    with torch.no_grad():
        alone = torch.cat([hidden_states(model, ids[start : start + 60]) for start in (0, 60, 120)])
        packed = hidden_states(model, ids, Documents.from_cu_seqlens([0, 60, 120, 180]))
        one = hidden_states(model, ids)
    torch.testing.assert_close(packed, alone)
    assert (one[:60] - alone[:60]).abs().max() > 1e-3
