"""Every causal family of the installed transformers, built small and sorted: right, refused, or wrong.

    right      packed documents give each document's own logits and gradients, as transformers' eager attention
    refused    a message says why
    unbuilt    no small model can be made of its config here
    wrong      anything else: there must be none

`tests.models.family_page` writes what it finds to docs/models.md.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from longspan.core.errors import UserError
from longspan.kernels.loss import reference_logits
from longspan.models.documents import Documents
from longspan.models.families import check_family
from longspan.models.head import output_head
from longspan.models.hf import enable, hidden_states, without_bars
from longspan.models.hf_config import text_config
from longspan.models.stand_in import small_config

LENGTHS = (23, 14)
"""Tokens of the two documents: longer than the windows."""
WINDOW = 5
MOST_WEIGHTS = 100_000_000

MOE = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
OLD_NAMES = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 200, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
             "embd_pdrop": 0.0}  # fmt: skip
TWO_LAYERS = {"num_hidden_layers": 2}
KINDS = {**TWO_LAYERS, "layer_types": ["linear_attention", "full_attention"]}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
}
# Fields that a family's default config lacks or has too large, and kinds of layers that it has in practice.
FIELDS: dict[str, dict[str, Any]] = {
    "beam": TWO_LAYERS,
    "dbrx": {"d_model": 64, "n_heads": 4, "n_layers": 2,
             "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}},
    "deepseek_v4": {**TWO_LAYERS, "hidden_size": 64, "num_attention_heads": 4, "n_routed_experts": 4,
                    "moe_intermediate_size": 16},
    "xmod": {**TWO_LAYERS, "default_language": "en_XX", "hidden_size": 64, "intermediate_size": 64,
             "num_attention_heads": 4},
    "deepseek_v2": MOE,
    "dots1": MOE,
    "gemma3n_text": {**TWO_LAYERS, "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
                     "intermediate_size": [64, 64], "vocab_size_per_layer_input": 64},
    "gpt2": OLD_NAMES,
    "gpt-sw3": OLD_NAMES,
    "gpt_bigcode": OLD_NAMES,
    "ctrl": {**OLD_NAMES, "dff": 64},
    "granitemoehybrid": {**TWO_LAYERS, **SMALL, **MAMBA2, "layer_types": ["mamba", "attention"],
                         "num_local_experts": 4},
    "hunyuan_v1_dense": {"head_dim": 64},
    "hunyuan_v1_moe": {"head_dim": 64},
    "kolibri1": TWO_LAYERS,
    "bailing_hybrid": {**KINDS, **SMALL, **LATENT, **MOE, "num_local_experts": 4, "moe_intermediate_size": 16,
                       "first_k_dense_replace": 1, "mlp_layer_types": ["dense", "sparse"]},
    "bamba": {**TWO_LAYERS, **SMALL, **MAMBA2, "attn_layer_indices": [1]},
    "falcon_h1": {**TWO_LAYERS, **SMALL, **MAMBA2, "mamba_d_ssm": 128, "mamba_rms_norm": True},
    "jamba": {**TWO_LAYERS, **SMALL, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
              "mamba_dt_rank": 4, "mamba_d_state": 8},
    "kimi_linear": {**KINDS, **SMALL, **LATENT, "linear_num_heads": 4, "linear_head_dim": 16, "num_local_experts": 4,
                    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_layer_types": ["dense", "sparse"]},
    "lfm2": {**TWO_LAYERS, **SMALL, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {**TWO_LAYERS, **SMALL, **MOE, "num_experts": 4, "moe_intermediate_size": 16,
                 "layer_types": ["conv", "full_attention"]},
    "lfm3": {**TWO_LAYERS, **SMALL, "layer_types": ["conv", "full_attention"]},
    "minimax": {**KINDS, **SMALL, "block_size": 8, "num_local_experts": 4},
    "nemotron_h": {**SMALL, "layer_types": ["linear_attention", "moe", "full_attention", "mlp"], "mamba_num_heads": 4,
                   "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 16, "n_routed_experts": 4,
                   "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16},
    "olmo_hybrid": {**KINDS, **SMALL, **DELTA},
    "qwen3_next": {**KINDS, **SMALL, **DELTA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                   "shared_expert_intermediate_size": 16},
    "qwen3_5": {"text_config": {**KINDS, **SMALL, **DELTA}},
    "qwen3_5_moe": {"text_config": {**KINDS, **SMALL, **DELTA, "num_experts": 4, "num_experts_per_tok": 2,
                                    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}},
    "qwen3_5_text": {**KINDS, **SMALL, **DELTA},
    "qwen3_5_moe_text": {**KINDS, **SMALL, **DELTA, "num_experts": 4, "num_experts_per_tok": 2,
                         "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "zamba": {"num_hidden_layers": 3, **SMALL, "layers_block_type": ["hybrid", "hybrid", "mamba"], "mamba_dt_rank": 4,
              "mamba_d_state": 8, "attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"num_hidden_layers": 3, **SMALL, "layers_block_type": ["mamba", "hybrid", "mamba"], "mamba_d_state": 8,
               "n_mamba_heads": 4, "mamba_headdim": 32, "mamba_ngroups": 2, "chunk_size": 16},
    "longcat_flash": {"num_layers": 1, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "hidden_size": 64,
                      "ffn_hidden_size": 32, "expert_ffn_hidden_size": 16, "num_attention_heads": 4,
                      "q_lora_rank": 16, "kv_lora_rank": 16},
    "ministral": {"head_dim": 64},
    "nemotron": {"head_dim": 64, "num_key_value_heads": 4, "num_attention_heads": 8, "hidden_size": 512},
}  # fmt: skip


class Finding(NamedTuple):
    """What became of a family."""

    verdict: str
    reason: str


def families() -> list[str]:
    """Return the causal families of the installed transformers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING._model_mapping)


def survey(family: str) -> Finding:
    """Return what becomes of a family, with the windows of its config and with windows wherever it has some."""
    first = _look(family, windows=False)
    if first.verdict != "right":
        return first
    second = _look(family, windows=True)
    return second if second.verdict in ("wrong", "refused") else first


def _look(family: str, *, windows: bool) -> Finding:
    try:
        config = AutoConfig.for_model(family, **FIELDS.get(family, {}))
    except Exception as error:  # noqa: BLE001
        return Finding("unbuilt", line(error))
    try:
        check_family(config)
    except UserError as error:
        return Finding("refused", line(error))
    ids = torch.arange(3, 3 + sum(LENGTHS)) % 60 + 1
    try:
        model = built(shrunk(config, windows))
        alone = torch.cat(
            [model(input_ids=part[None], use_cache=False).logits[0] for part in ids.split(LENGTHS)]
        )
        _loss(alone, ids).backward()
    except Exception as error:  # noqa: BLE001
        return Finding("unbuilt", line(error))
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    try:
        enable(model)
        hidden = hidden_states(model, ids, Documents.from_cu_seqlens([0, LENGTHS[0], len(ids)]))
        logits = reference_logits(hidden, output_head(model))
    except UserError as error:
        return Finding("refused", line(error))
    except Exception as error:  # noqa: BLE001
        return Finding("wrong", f"the forward pass fails: {line(error)}")
    distance = float((logits - alone).detach().abs().max() / alone.detach().abs().max())
    if not distance < 1e-4:
        return Finding("wrong", f"logits are off by {distance:.1e} of the largest")
    _loss(logits, ids).backward()
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    for name, parameter in model.named_parameters():
        if parameter.grad is None and name not in wanted:
            continue
        mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        off = float((mine - wanted.get(name, 0.0)).norm())
        if not off <= 1e-3 * (float(mine.norm()) + 1e-3 * largest):
            return Finding("wrong", f"the gradient of {name} is off by {off:.1e}")
    return Finding("right", "")


def _loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:], reduction="sum")


def shrunk(config: PretrainedConfig, windows: bool) -> PretrainedConfig:
    small = small_config(config)
    text = text_config(small)
    for field in ("sliding_window", "attention_chunk_size"):
        if isinstance(getattr(text, field, None), int) or (windows and hasattr(text, field)):
            setattr(text, field, WINDOW)
    if windows and hasattr(text, "use_sliding_window"):
        text.use_sliding_window = True
    return small


def built(config: PretrainedConfig) -> Any:
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    weights = sum(parameter.numel() for parameter in empty.parameters())
    if weights > MOST_WEIGHTS:
        raise ValueError(f"its smallest config has {weights // 1_000_000} million weights")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases of 0, norms of 1 and sinks of 0 would hide what is left out.
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()]
    found = [line for line in lines[1:] if line.startswith("found: ")]
    if not isinstance(error, UserError):
        return f"{type(error).__name__}: {lines[0] if lines else ''}"
    said = "; ".join([*lines[:1], *found])
    # The class stands in the table already.
    first, _, rest = said.partition(" ")
    return rest if rest and any(letter.isupper() for letter in first) else said


def survey_all() -> dict[str, Finding]:
    """Return what becomes of every family."""
    with quiet():
        return {family: survey(family) for family in families()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what transformers and longspan say of odd sizes out of the way."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), without_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
