"""Small models with layers that carry a state, and their twins with transformers' own attention."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from longspan.models.hf import enable

SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
MAMBA = {
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 8,
}
HYBRIDS: dict[str, dict[str, Any]] = {
    # Gated delta net beside attention.
    "qwen3_next": {**DELTA, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
                   "num_experts": 0},
    # Mamba-2, attention and feed-forward, a layer each.
    "nemotron_h": {**MAMBA, "layers_block_type": ["mamba", "attention", "mlp", "mamba"], "num_hidden_layers": 4},
    # Mamba-2 and attention in one layer.
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_d_ssm": 32,
                  "mamba_d_conv": 4, "mamba_chunk_size": 8, "num_hidden_layers": 2},
    # Short convolutions, no recurrence.
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False},
}  # fmt: skip
# Of a jamba: its recurrence takes no state to begin with.
MAMBA_1 = {"mamba_d_state": 4, "mamba_d_conv": 4, "mamba_dt_rank": 4, "num_experts": 1, "attn_layer_period": 2,
           "attn_layer_offset": 1, "num_hidden_layers": 2}  # fmt: skip


def eager(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
    """Return a model with transformers' own attention and weights that all differ."""
    config = AutoConfig.for_model(name, **{**SHAPE, **HYBRIDS.get(name, {}), **fields})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough that what a token finds in a state shows.
            parameter.add_(torch.randn(parameter.shape) * 0.15)
    return model.to(dtype).eval()


def with_ours(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy with longspan's attention."""
    return enable(copy.deepcopy(model))
