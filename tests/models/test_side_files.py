"""Names in config.json by which other readers take the RoPE; right values from running transformers 4.57.6.

With the fields below, small models of these families gave the same logits (within 1e-4 on 600 tokens) in
transformers 4.57.6 as in 5.23; without them, other logits without a word, or no model. To see it again: export small
models of all families with every type of RoPE, load the folders in an environment with `transformers==4.57.6`, compare.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longspan.core.errors import ConfigError
from longspan.models.export import export_model
from longspan.models.hf import build_model, load_model, rope_fingerprint, save_model
from tests.models.test_hf import TINY, tokens

SHORT, LONG = [1.0 + 0.1 * i for i in range(8)], [1.0 + i for i in range(8)]
LONGROPE = {
    "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 256,
    "short_factor": SHORT, "long_factor": LONG,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 37000.0}
WINDOWS = {"sliding_window": 50, "layer_types": ["sliding_attention", "full_attention"]}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "longrope": (
        {"model_type": "llama"}, LONGROPE,
        {"rope_theta": 10000.0, "original_max_position_embeddings": 256,
         "rope_scaling": {k: v for k, v in LONGROPE.items()}},
    ),
    "longrope with another factor than the lengths say": (
        {"model_type": "llama"}, {**LONGROPE, "factor": 8.0},
        # sqrt(1 + ln 8 / ln 256) = sqrt(1.375)
        {"rope_scaling": {**LONGROPE, "factor": 8.0, "attention_factor": pytest.approx(1.375**0.5)}},
    ),
    "phi3": (
        {"model_type": "phi3", "original_max_position_embeddings": 4096, "pad_token_id": 0}, LONGROPE,
        {"original_max_position_embeddings": 256,
         "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}},
    ),
    "gemma3": (
        {"model_type": "gemma3_text", "head_dim": 16, **WINDOWS}, LINEAR,
        {"rope_theta": 37000.0, "rope_local_base_freq": 10000.0,
         "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "gpt_neox": (
        {"model_type": "gpt_neox", "num_key_value_heads": None}, LINEAR,
        {"rotary_emb_base": 37000.0, "rotary_pct": 0.25, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "olmo2": (
        {"model_type": "olmo2"}, LINEAR,
        {"rope_theta": 37000.0, "rope_scaling": {"type": "linear", "factor": 8.0}},
    ),
    "qwen3_moe": (
        {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}, LINEAR,
        {"rope_theta": 37000.0, "num_experts": 4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_older_readers_find_the_rope_and_newer_ones_the_same(name: str, tmp_path: Path) -> None:
    """A reader that finds no name of its own takes theta 10,000 and no scaling, without a word."""
    fields, rope, expected = CASES[name]
    whole = {key: value for key, value in {**TINY, **fields}.items() if value is not None}
    save_model(build_model(whole, seed=0), tmp_path / "base")
    model = load_model(tmp_path / "base", rope=rope, max_position_embeddings=1024)
    ids, used = tokens(1, 300), rope_fingerprint(model)
    with torch.no_grad():
        logits = model(ids).logits
    report = export_model(model, tmp_path / "out")
    assert not any("transformers 4" in note for note in report.notes)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: written[key] for key in expected} == expected
    again = load_model(tmp_path / "out")
    assert rope_fingerprint(again) == used
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({"model_type": "olmo3", **WINDOWS}, LINEAR),
        ({"model_type": "nemotron"}, LINEAR),
        ({"model_type": "olmo2"}, LONGROPE),
        # Phi-3's form has no place for a factor that does not follow from the lengths.
        ({"model_type": "phi3", "pad_token_id": 0}, {**LONGROPE, "factor": 8.0}),
    ],
)
def test_what_older_readers_cannot_take_is_said(
    fields: dict[str, Any], rope: dict[str, Any], tmp_path: Path
) -> None:
    """These were seen to give other logits, or an error, in transformers 4.57.6, whatever config.json says."""
    save_model(build_model({**TINY, **fields}, seed=0), tmp_path / "base")
    if fields["model_type"] == "nemotron":
        rope = {**rope, "partial_rotary_factor": 0.5}
    model = load_model(tmp_path / "base", rope=rope, max_position_embeddings=1024)
    used = rope_fingerprint(model)
    report = export_model(model, tmp_path / "out")
    assert any("transformers 4" in note for note in report.notes)
    assert rope_fingerprint(load_model(tmp_path / "out")) == used


def test_a_rope_written_at_the_top_does_not_outlive_a_new_one(tmp_path: Path) -> None:
    """transformers 5 lets a top-level original_max_position_embeddings win over that of a new RoPE."""
    save_model(build_model(TINY, seed=0, rope=LONGROPE), tmp_path / "long")
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}
    model = load_model(tmp_path / "long", rope=yarn, max_position_embeddings=1024)
    assert model.config.rope_parameters["original_max_position_embeddings"] == 512
    save_model(model, tmp_path / "yarn")
    assert rope_fingerprint(load_model(tmp_path / "yarn")) == rope_fingerprint(model)


def test_settings_beside_those_of_layers_are_no_layer(tmp_path: Path) -> None:
    """transformers keeps one RoPE beside those of the kinds of layers, and reads the latter: a traceback."""
    plain = {"rope_type": "default", "rope_theta": 5000.0}
    nested = {kind: plain for kind in ("full_attention", "sliding_attention")}
    mixed = build_model(
        {**TINY, "model_type": "gemma3_text", "head_dim": 16, **WINDOWS, "rope_parameters": plain | nested},
        seed=0,
    )
    clean = build_model(
        {**TINY, "model_type": "gemma3_text", "head_dim": 16, **WINDOWS, "rope_parameters": nested}, seed=0
    )
    assert rope_fingerprint(mixed) == rope_fingerprint(clean)
    export_model(mixed, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(tokens(1, 20)).logits, clean(tokens(1, 20)).logits)


def test_a_rope_that_a_family_would_not_load_again_is_refused_before_work(tmp_path: Path) -> None:
    """Phi-3 trained with a linear RoPE to its end, then nothing could load what was saved."""
    save_model(build_model({**TINY, "model_type": "phi3", "pad_token_id": 0}, seed=0), tmp_path / "base")
    with pytest.raises(ConfigError, match="longrope"):
        load_model(tmp_path / "base", rope=LINEAR)


@pytest.mark.parametrize(("before", "after"), [(64, 256), (4096, 4096), (None, None)])
def test_lengths_that_the_model_has_outgrown_are_raised(
    before: int | None, after: int | None, tmp_path: Path
) -> None:
    """generate() refuses a prompt beyond max_length, and servers one beyond model_max_length."""
    save_model(build_model(TINY, seed=0), tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": before}))
    settings = {"eos_token_id": 2, "max_length": before}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(settings))
    report = export_model(
        load_model(tmp_path / "base"),
        tmp_path / "out",
        tokenizer=tmp_path / "base",
        generation=tmp_path / "base",
    )
    assert any("max_length" in note for note in report.notes) == (before != after)
    for name, key in (("generation_config", "max_length"), ("tokenizer_config", "model_max_length")):
        assert json.loads((tmp_path / "out" / f"{name}.json").read_text())[key] == after
    assert AutoConfig.from_pretrained(tmp_path / "out").max_position_embeddings == 256
