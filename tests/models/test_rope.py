"""Frequencies held at one length, and angles in fp64: right at far positions, the same model at near ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longspan.kernels import rope
from longspan.models.hf import build_model
from longspan.models.rotary import exact_angles, hold_frequencies, varying_ropes

CONFIG = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 256, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 1 << 20,
}  # fmt: skip


def cos_near(model: torch.nn.Module, position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos of the model and the exact one, for its own frequencies."""
    positions = torch.arange(position - 64, position)[None]
    rotary = model.model.rotary_emb
    found, _ = rotary(torch.zeros(1), positions)
    angles = positions.double()[..., None] * rotary.inv_freq.double()
    return found.double(), torch.cat((angles, angles), -1).cos()


def test_far_positions_are_exact_only_with_it() -> None:
    """At 524,288 an fp32 angle is off by half its last bit, 0.016: more than bf16 rounds a cos."""
    model = build_model(CONFIG, seed=0, rope={"rope_type": "default", "rope_theta": 128e6})
    found, exact = cos_near(model, 524288)
    assert (found - exact).abs().max() > 5e-3
    assert exact_angles(model) == 1 and exact_angles(model) == 0
    found, exact = cos_near(model, 524288)
    assert (found - exact).abs().max() < 1e-7


def test_scaled_types_keep_their_scale() -> None:
    """YaRN multiplies cos and sin: a hook that forgets it changes the temperature of attention."""
    settings = {
        "rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4, "original_max_position_embeddings": 1 << 17
    }  # fmt: skip
    plain, exact = (build_model(CONFIG, seed=0, rope=settings) for _ in range(2))
    assert exact_angles(exact) == 1
    ids = torch.arange(40)[None]
    torch.testing.assert_close(exact(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)


def test_models_with_other_layouts_are_left_alone() -> None:
    """A module that interleaves its angles must not get two halves."""
    cohere = {
        "model_type": "cohere", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "logit_scale": 1.0,
    }  # fmt: skip
    model = build_model(cohere, seed=0)
    assert exact_angles(model) == 0


def test_the_error_of_fp32_angles_grows_with_the_position() -> None:
    """The bound that decides when exact angles are used: 3e-8 of the position."""
    frequencies = rope.inv_freq(rope.default(8e6), head_dim=128)
    for position in (4096, 65536, 524288):
        positions = torch.arange(position - 512, position)
        exact = (positions.double()[:, None] * frequencies.double()).cos()
        rounded = (positions.float()[:, None] * frequencies.float()).cos()  # as transformers computes them
        assert 1e-8 * position < (exact - rounded.double()).abs().max() < 4e-8 * position


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 4, "long_factor": [1.0, 1.5, 4.0, 8.0],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
SMALL = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128,
}  # fmt: skip
BY_LAYER = {
    **SMALL, "model_type": "gemma3_text", "head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8,
    "rope_parameters": {
        "full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip


@pytest.mark.parametrize("length", [64, 65, 500])
@pytest.mark.parametrize(
    "fields",
    [{**SMALL, "rope_parameters": LONGROPE}, {**SMALL, "rope_parameters": DYNAMIC}, BY_LAYER],
    ids=["longrope", "dynamic", "by layer"],
)
def test_held_frequencies_are_those_of_transformers_at_that_length(
    fields: dict[str, Any], length: int
) -> None:
    """Guards a model that turns by the longest of what it is given, or by what it was given before."""
    layer = {"layer_type": "full_attention"} if fields is BY_LAYER else {}
    config = AutoConfig.for_model(**fields)
    theirs = AutoModelForCausalLM.from_config(config).model.rotary_emb
    # A longer one is in the batch, and at hand are the angles of the first positions.
    expected = theirs(torch.zeros(1), torch.arange(length)[None], **layer)
    model = build_model(fields, seed=0)
    assert varying_ropes(model)
    for seen in (3, 4000):
        model.model.rotary_emb(torch.zeros(1), torch.arange(seen)[None], **layer)
    hold_frequencies(model, length)
    assert not varying_ropes(model)
    for seen in (length, 10, 4000, 10):
        found = model.model.rotary_emb(torch.zeros(1), torch.arange(seen)[None], **layer)
        for mine, right in zip(found, expected):
            shared = min(seen, length)
            torch.testing.assert_close(mine[:, :shared], right[:, :shared], rtol=0, atol=0)
