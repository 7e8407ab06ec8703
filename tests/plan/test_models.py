"""Shapes of models: every weight counted, what each layer asks of attention, and what has no estimate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from longspan.core.errors import ArgumentError, DataError
from longspan.models.families import RIGHT
from longspan.models.hf_config import new_config, text_config
from longspan.models.shape import model_shape, shape_of_fields
from longspan.models.stand_in import small_config
from longspan.plan.hardware import GPUS
from longspan.plan.inference import answering
from longspan.plan.models import MODELS, ModelShape, causal_pairs, plain_name, published_configs
from tests.models.family_survey import FIELDS

SMALL = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
    "intermediate_size": 128, "vocab_size": 100,
}  # fmt: skip
EXPERTS = {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
           "head_dim": 16, "intermediate_size": 128, "moe_intermediate_size": 32, "vocab_size": 100}  # fmt: skip
WITHOUT = {
    "dbrx": "keeps its experts as one matrix and chooses among them by numbers that a model without weights has not",
    "jetmoe": "its attention chooses among experts by numbers that a model without weights has not",
    "hrm_text": "runs its layers in a loop",
    "minimax": "wants a cache of its own",
}
"""Families that longspan runs and that have no estimate: they are refused."""


def counted(config: Any) -> int:
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text_config(config))
    except (ValueError, TypeError):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("family", sorted(RIGHT))
def test_weights_of_every_family_are_those_of_the_empty_model(family: str) -> None:
    """A field that a family calls by another name, and a model of 106 billion weights that fits as one of 12."""
    config = small_config(AutoConfig.for_model(family, **FIELDS.get(family, {})))
    if family in WITHOUT:
        with pytest.raises(DataError, match="there is no estimate"):
            model_shape(config, family)
        return
    shape = model_shape(config, family)
    assert shape.parameters == counted(config)
    assert 0 < shape.active_parameters <= shape.parameters
    assert sum(kind.layers for kind in shape.kinds) == shape.layers
    assert shape.attention_flops(64) > 0


@pytest.mark.slow
def test_other_families_of_transformers_are_counted_or_refused() -> None:
    """A family that nobody looked at, with layers that are taken for something else."""
    found = []
    for family in sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - RIGHT):
        try:
            config = small_config(AutoConfig.for_model(family))
        except (ValueError, StrictDataclassError):
            # Its class wants fields that nothing says.
            continue
        try:
            shape = model_shape(config, family)
        except DataError:
            continue
        assert shape.parameters == counted(config), family
        found.append(family)
    assert len(found) >= 25


@pytest.mark.parametrize("name", sorted(MODELS))
def test_formulas_count_what_the_model_has(name: str) -> None:
    """A wrong width in the table would move every figure of that model."""
    # Two layers tell what eighty do.
    shape = MODELS[name]._replace(layers=2)
    family = "qwen3" if shape.head_norms else "qwen2" if shape.biases else "llama"
    config = new_config(
        {
            "model_type": family, "num_hidden_layers": shape.layers, "hidden_size": shape.hidden,
            "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocab,
            "intermediate_size": shape.intermediate, "tie_word_embeddings": shape.tied,
            **({} if family == "qwen2" else {"head_dim": shape.head_dim}),
        },
        None,
    )  # fmt: skip
    found = model_shape(config, name)
    assert found.parameters == shape.parameters == counted(config)
    assert found.layer_active == shape.layer_active and found.intermediate == shape.intermediate
    assert found.linear_flops() == shape.linear_flops()
    assert found.attention_flops(1000) == shape.attention_flops(1000)
    assert (found.heads, found.kv_heads, found.head_dim, found.tied) == (
        shape.heads, shape.kv_heads, shape.head_dim, shape.tied,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("qwen2.5-0.5b", 494_032_768), ("qwen2.5-1.5b", 1_543_714_304), ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-14b", 14_770_033_664), ("qwen2.5-72b", 72_706_203_648), ("llama-3.3-70b", 70_553_706_496),
    ],
)  # fmt: skip
def test_sizes_are_those_of_the_weights_on_the_hub(name: str, total: int) -> None:
    """A width that was typed wrong: formula and table agree on it."""
    assert MODELS[name].parameters == total


def test_experts_count_as_weights_and_only_the_chosen_as_work() -> None:
    """Experts by DeepSeek's name, with a shared one and a first dense layer, taken for one MLP."""
    fields = {**EXPERTS, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1,
              "topk_group": 1, "first_k_dense_replace": 1}  # fmt: skip
    shape = model_shape(
        new_config(
            {"model_type": "glm4_moe", **{key: value for key, value in fields.items() if key != "head_dim"}},
            None,
        )
    )
    dense, sparse = shape.mixed
    assert (dense.layers, dense.experts, sparse.layers, sparse.experts, sparse.chosen) == (1, 0, 2, 8, 2)
    assert dense.intermediate == 128
    expert = 3 * 64 * 32
    # Two chosen experts, the shared one and the router.
    assert sparse.intermediate == -(-(3 * expert + 8 * 64) // (3 * 64))
    assert sparse.layer_parameters - sparse.layer_active > 6 * expert
    # Values that no token is multiplied by matrices of: norms, biases.
    assert (
        shape.active_parameters
        == shape.parameters - 2 * (sparse.layer_parameters - sparse.layer_active) - 100 * 64
    )


def test_windows_chunks_latent_attention_and_states_are_seen() -> None:
    """Layers that see 4 tokens counted as if they saw the whole sequence, or keys of latent attention by `head_dim`."""
    gemma = {
        "head_dim": 16,
        "sliding_window": 4,
        "num_key_value_heads": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    windows = model_shape(new_config({**SMALL, "model_type": "gemma3_text", **gemma}, None))
    assert [(kind.window, kind.layers) for kind in windows.kinds] == [
        (4, 1),
        (None, 1),
    ] and windows.window is None
    assert windows.attention_flops(100) == 4 * 4 * 16 * (5000 + 100 * 4 - 8)
    assert windows.attention_flops(np.array([100.0, 2.0])).tolist() == [
        windows.attention_flops(100),
        4 * 4 * 16 * (2 + 2),
    ]
    latent = {**EXPERTS, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
              "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, 
              "topk_group": 1}  # fmt: skip
    latent.pop("head_dim")
    shape = model_shape(new_config({"model_type": "deepseek_v3", **latent, "num_key_value_heads": 4}, None))
    assert (shape.head_dim, shape.value_dim, shape.held_dim, shape.kv_heads) == (24, 16, 24, 4)
    assert shape.cache_elements == shape.latent == 16 + 8
    hybrid = {**SMALL, "model_type": "qwen3_next", "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
              "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_key_value_heads": 2,
              "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
              "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 16}  # fmt: skip
    states = model_shape(new_config(hybrid, None))
    assert [(kind.heads, kind.state) for kind in states.kinds] == [(0, 4 * 8 * 16), (4, 0)]


def test_what_a_config_leaves_out() -> None:
    """No key/value heads means as many as query heads; gemma ties its embeddings unless it says otherwise."""
    shape = model_shape(new_config(SMALL, None))
    assert (shape.kv_heads, shape.head_dim, shape.tied, shape.head_norms) == (4, 16, False, False)
    assert model_shape(
        new_config({**SMALL, "model_type": "gemma2", "head_dim": 16, "num_key_value_heads": 2}, None)
    ).tied


def test_no_estimate_is_said() -> None:
    """A family whose attention cannot be seen, taken for one without attention."""
    with pytest.raises(DataError, match="not taken from the transformers registry"):
        model_shape(
            new_config(
                {
                    "model_type": "gptj",
                    "n_layer": 2,
                    "n_embd": 64,
                    "n_head": 4,
                    "vocab_size": 100,
                    "rotary_dim": 8,
                },
                None,
            )
        )


def test_pairs_of_a_window_meet_those_of_the_whole() -> None:
    """A jump where a sequence is as long as the window."""
    assert (
        causal_pairs(64)
        == causal_pairs(64, window=64)
        == causal_pairs(64, window=100)
        == causal_pairs(64, chunk=64)
        == 2048
    )
    assert causal_pairs(128, window=64) == 2048 + 64 * 64 and causal_pairs(128, chunk=64) == 2 * 2048


def test_heads_of_all_layers_are_shared_evenly() -> None:
    """What was said to be allowed divided the heads of one kind of layer, and was refused for the other."""
    one = MODELS["llama-3-8b"]._replace(layers=16)
    shape = one._replace(layers=32, mixed=(one, one._replace(heads=24)))
    with pytest.raises(ArgumentError, match=r"24 and 32 heads on 16 GPUs(.|\n)*numbers that divide 8"):
        answering(shape, GPUS["h100"], context=8192, num_gpus=16)
    assert answering(shape, GPUS["h100"], context=8192, num_gpus=8).fits


@pytest.mark.parametrize(
    "name", ["llama-3-8b", "meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-8B"]
)
def test_names(name: str) -> None:
    """The name on the hub is the one that people have."""
    assert plain_name(name) == "llama-3-8b"
    for other, known in (
        ("Qwen3-4B-Thinking-2507", "qwen3-4b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b"),
    ):
        assert plain_name(other) == known and known in MODELS
    # Of fewer words.
    assert plain_name("mistralai/Mistral-7B-Instruct-v0.2") not in MODELS
    assert (
        isinstance(MODELS.get(plain_name("llama-3-70b")), ModelShape) and plain_name("llama-9") not in MODELS
    )


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("qwen3-30b-a3b", 30.5, 3.3), ("glm-4.5-air", 106, 12), ("deepseek-v3", 671, 37), ("gpt-oss-20b", 20.9, 3.6),
        ("gemma-3-27b", 27, 27), ("nemotron-h-8b", 8.1, 8.1), ("qwen3-next-80b-a3b", 80, 3.6),
        ("mixtral-8x7b", 46.7, 12.9),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_published_models_have_the_weights_of_their_cards(name: str, total: float, active: float) -> None:
    """Billions of all and of active weights, as cards round them; some count the input embedding among the latter."""
    shape = shape_of_fields(published_configs()[name], name)
    assert shape.parameters / 1e9 == pytest.approx(total, rel=0.01)
    assert shape.active_parameters / 1e9 == pytest.approx(active, rel=0.1)


def test_every_published_config_has_a_family() -> None:
    """A misspelt model_type that shows when somebody plans that model."""
    assert all(
        config["model_type"] in RIGHT | {"qwen3_next", "nemotron_h"}
        for config in published_configs().values()
    )
    with pytest.raises(DataError, match="no model that transformers knows"):
        shape_of_fields({"model_type": "llama9"}, "x")
    with pytest.raises(DataError, match="refuses"):
        shape_of_fields({"model_type": "llama", "num_attention_heads": "many"}, "x")
