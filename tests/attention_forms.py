"""Small models whose attention is more than softmax of scaled scores over a window, and their twins in transformers."""

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
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "num_key_value_heads": 4,
}
FORMS: dict[str, dict[str, Any]] = {
    # Sinks, every other layer with a window.
    "gpt_oss": {"sliding_window": 7, "head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2,
                "layer_types": ["sliding_attention", "full_attention"],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    # Values narrower than keys, and wider ones.
    "minicpm3": {**LATENT, "v_head_dim": 6},
    "deepseek_v3": {**LATENT, "v_head_dim": 16, "first_k_dense_replace": 2},
    # Chunks, and a layer without them and without RoPE.
    "llama4_text": {"attention_chunk_size": 9, "head_dim": 8, "intermediate_size_mlp": 24, "num_local_experts": 2,
                    "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
    # Capped scores under a window and without one.
    "gemma2": {"sliding_window": 7, "head_dim": 8, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 2},
    # A window that the layers do not hand on.
    "phimoe": {"sliding_window": 7, "num_local_experts": 2},
}  # fmt: skip


def eager(name: str, *, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """Return a model with transformers' own attention and weights that all differ."""
    config = AutoConfig.for_model(name, **{**SHAPE, **FORMS[name], **fields})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough that a token sees the others, and that a sink takes a share.
            parameter.add_(torch.randn(parameter.shape) * 0.15)
    return model.eval()


def with_ours(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy with longspan's attention."""
    return enable(copy.deepcopy(model))
