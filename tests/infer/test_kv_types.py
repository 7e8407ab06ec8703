"""A KV cache of a smaller type: what it holds, what it changes, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from longspan.core.errors import ArgumentError
from longspan.infer.kv import KvBlock
from longspan.infer.kv_types import KvDtype, held, read_back
from longspan.infer.local import LocalAnswerer
from longspan.infer.memory import cache_bytes_per_token
from tests.attention_forms import eager, with_ours
from tests.infer.engines import Bytes, grid, in_order, local, model_of, random_ids, request

KINDS: list[KvDtype] = ["int8", "fp8"]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(-6, 2))
def test_a_channel_is_off_by_its_step_at_most(seed: int, power: int) -> None:
    """A scale for all heads would leave small ones no digit; rounding down is twice as far off."""
    x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(seed)) * 10.0**power
    x[1, 2] = 0
    off = (read_back("int8", held("int8", x), torch.float32) - x).abs()
    assert bool((off <= x.abs().amax(-1, keepdim=True) / 254 * 1.001).all())
    off = (read_back("fp8", held("fp8", x), torch.float32) - x.clamp(-448, 448)).abs()
    assert bool((off <= x.abs() / 16 + 2.0**-10).all())
    assert bool(read_back("int8", held("int8", x * torch.nan), torch.float32).isnan().any())


class HeldCache(DynamicCache):
    """transformers' cache, whose keys and values pass through the type on their way in."""

    kind: KvDtype = "int8"

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        small = [
            read_back(self.kind, held(self.kind, each.transpose(1, 2).flatten(0, 1)), each.dtype)
            .unflatten(0, (each.shape[0], -1))
            .transpose(1, 2)
            for each in (key_states, value_states)
        ]
        return super().update(*small, *args, **kwargs)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_losses_are_those_of_transformers_with_such_a_cache(kind: KvDtype) -> None:
    """Tokens of one pass that saw each other's whole keys measured another cache than the one that generates."""
    model, prompts = model_of("llama"), grid([40, 25], [0.0, 0.5, 1.0])
    ours = local("llama", kv_dtype=kind, batch_tokens=16)
    found = in_order(ours.generate([request(ids, max_new_tokens=9) for ids in prompts]))
    windows = [np.array(random_ids(seed, 30)) for seed in range(2)]
    losses = ours.token_nll(windows)
    whole = local("llama").token_nll(windows)
    for ids, answer in zip(prompts, found):
        cache, row, said = HeldCache(), torch.tensor([ids]), []
        cache.kind = kind
        with torch.no_grad():
            for _ in range(9):
                row = model(row, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
                said.append(int(row))
        assert answer.token_ids is not None and answer.token_ids.tolist() == said
    for ids, nll, without in zip(windows, losses, whole):
        cache = HeldCache()
        cache.kind = kind
        with torch.no_grad():
            logits = model(torch.tensor([ids.tolist()]), past_key_values=cache, use_cache=True).logits[0]
        truth = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
        np.testing.assert_allclose(nll, truth.numpy(), rtol=1e-4, atol=1e-4)
        assert not np.allclose(nll, without, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "num_bytes"), [("int8", 12), ("fp8", 8)])
def test_memory_is_counted_as_it_is_held(
    kind: KvDtype, num_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planned with four bytes a channel, a grid that fits was refused."""
    blocks: list[KvBlock] = []
    append = KvBlock.append
    monkeypatch.setattr(KvBlock, "append", lambda self, *args: blocks.append(self) or append(self, *args))
    ours = local("llama", kv_dtype=kind)
    in_order(ours.generate([request([1, 2, 3, 4, 5, 6], max_new_tokens=1)]))
    each = cache_bytes_per_token(model_of("llama"), upcasts=True, kv_dtype=kind)
    # Two layers, two heads of keys, eight channels; a scale is four bytes.
    assert blocks[0].num_bytes == 6 * each == 6 * 2 * 2 * 2 * num_bytes


def test_latent_attention_is_refused() -> None:
    """Its own cache holds one latent value a token: what int8 does to that is not what it does to keys."""
    model = with_ours(eager("deepseek_v3"))
    with pytest.raises(ArgumentError, match="latent value"):
        LocalAnswerer(model, Bytes(), identity={}, batch_tokens=100, kv_dtype="int8")  # type: ignore[arg-type]
