"""Experts in tiles against transformers' own experts at once: values, every gradient, memory, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from longspan.core.errors import ArgumentError
from longspan.kernels.experts import experts_in, num_experts
from longspan.kernels.tiled_mlp import TiledMLP, enable_tiled_mlp
from tests.kernels.test_tiled_mlp import PeakBytes

SIZES: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_experts_per_tok": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    # Biases, and gate and up interleaved.
    "gpt_oss": {"num_local_experts": 4},
    # A shared expert beside them, and a dense layer before.
    "deepseek_v3": {
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 2,
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    },
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 24},
}  # fmt: skip


def model_of(family: str, implementation: str = "eager") -> PreTrainedModel:
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    model.set_experts_implementation(implementation)
    return model


def run(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits = model(input_ids=torch.arange(23)[None] * 5 % 48, use_cache=False).logits
    logits.square().sum().backward()
    return {"logits": logits.detach()} | {
        name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None
    }


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_experts_at_once(family: str, implementation: str) -> None:
    """Choices of another tile than the tokens, or shares whose gradient is lost: the router then stands still."""
    plain = model_of(family, implementation)
    limit = 1e-9
    if implementation == "grouped_mm":
        # It has no fp64.
        plain, limit = plain.float(), 2e-4
    mine = enable_tiled_mlp(copy.deepcopy(plain), 7)
    tiled = [name for name, module in mine.named_modules() if isinstance(module, TiledMLP)]
    assert experts_in(mine) and experts_in(mine).keys() <= set(tiled)
    if family in ("deepseek_v3", "qwen2_moe"):
        assert any("shared" in name for name in tiled), "the shared expert runs at once"
    truth, found = run(plain), run(mine)
    assert truth.keys() == found.keys() and any("gate.weight" in name or "router" in name for name in truth)
    for name in truth:
        error = (found[name] - truth[name]).norm() / truth[name].norm()
        assert error <= limit, (name, error)


def test_frozen_experts_pass_gradients_of_tokens_and_shares_on() -> None:
    """Adapters train beside frozen experts; checkpointing computes the choices again."""
    model = model_of("mixtral")
    experts = model.model.layers[0].mlp.experts.requires_grad_(False)
    twin = copy.deepcopy(experts)
    enable_tiled_mlp(model, 5)
    grads = []
    for module in (twin, experts):
        generator = torch.Generator().manual_seed(1)
        x, shares = (
            torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
            for shape in ((13, 16), (13, 2))
        )
        chosen = torch.arange(26).view(13, 2) % 4
        checkpoint(module, x, chosen, shares, use_reentrant=False).square().sum().backward()
        grads.append((x.grad, shares.grad))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-12)


def test_memory_does_not_hold_what_each_choice_makes() -> None:
    """The intermediates of every token's every choice: with tiles, more tokens cost rows of the hidden size only."""
    experts = model_of("mixtral").model.layers[0].mlp.experts.float()

    def peak(tokens: int) -> int:
        x = torch.randn(tokens, 16).requires_grad_()
        chosen = torch.arange(2 * tokens).view(tokens, 2) % num_experts(experts)
        shares = torch.rand(tokens, 2).requires_grad_()
        with PeakBytes() as counter:
            experts(x, chosen, shares).sum().backward()
        return counter.peak

    # What more tokens cost: the weights and their gradients do not grow.
    at_once = peak(512) - peak(256)
    enable_tiled_mlp(torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Sequential(experts)])), 16)
    mine = peak(512) - peak(256)
    row = 4 * 16 * 256
    # Input, output and their gradients; at once the products of both choices too.
    assert mine <= 6 * row < at_once / 3, (mine, at_once)


def test_experts_that_see_all_tokens_at_once_are_refused() -> None:
    """Llama 4 gives each expert every token: a tile of that order is no span of tokens."""
    config = AutoConfig.for_model("llama4_text", **SIZES, num_local_experts=4, intermediate_size_mlp=24)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ArgumentError, match="not known to treat every token by itself"):
        enable_tiled_mlp(model, 4)
