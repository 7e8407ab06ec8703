"""Building, initialising, loading and saving models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from longspan.core.errors import ArgumentError, ConfigError, DataError
from longspan.kernels import rope
from longspan.models.head import output_head
from longspan.models.hf import (
    build_model,
    hidden_states,
    load_model,
    rope_fingerprint,
    save_model,
)
from longspan.models.places import tokenizer_folder

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 128, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("init", ["default", "zero_residual"])
def test_weights_are_a_function_of_the_seed_alone(init: str) -> None:
    """Building must not depend on the global generator, nor move it."""
    torch.manual_seed(1)
    first = build_model(TINY, seed=7, init=init).state_dict()
    drawn = torch.rand(3)
    second = build_model(TINY, seed=7, init=init).state_dict()
    third = build_model(TINY, seed=8, init=init).state_dict()
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], third["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    "fields", [{}, {"tie_word_embeddings": False}, {"model_type": "qwen3", "head_dim": 16}]
)
def test_zero_residual_starts_near_uniform(fields: dict[str, Any]) -> None:
    """First logits have std 0.3, so the first loss is near log(vocabulary), and residual branches are 0."""
    model = build_model({**TINY, **fields}, seed=0, init="zero_residual")
    weights = dict(model.named_parameters())
    assert weights["model.embed_tokens.weight"].std().item() == pytest.approx(0.7, rel=0.05)
    assert weights["model.layers.0.mlp.up_proj.weight"].std().item() == pytest.approx(1 / 8, rel=0.05)
    for layer in (0, 1):
        assert not weights[f"model.layers.{layer}.self_attn.o_proj.weight"].any()
        assert not weights[f"model.layers.{layer}.mlp.down_proj.weight"].any()
    with torch.no_grad():
        logits = model(tokens(1, 200)).logits
    if model.config.tie_word_embeddings:
        # The token itself scores 0.3 * sqrt(64) with a tied embedding; the others are the noise meant here.
        logits = logits.scatter(2, tokens(1, 200)[..., None], 0.0)
    assert logits.std().item() == pytest.approx(0.3, rel=0.1)


def test_zero_residual_knows_norms_that_store_the_scale_minus_one() -> None:
    """Gemma multiplies by 1 + weight: writing the scale itself would make the first logits far too large."""
    fields = {**TINY, "model_type": "gemma", "head_dim": 16}
    model = build_model(fields, seed=0, init="zero_residual")
    scale = 0.3 / (math.sqrt(64) * 0.7)
    assert model.model.norm.weight[0].item() == pytest.approx(scale - 1)


def test_rope_is_set_before_the_model_is_built_and_reaches_config_json(tmp_path: Path) -> None:
    """A RoPE changed after building leaves the frequency buffers as they were."""
    plain = build_model(TINY, seed=0)
    long = build_model(TINY, seed=0, rope={"rope_type": "ntk", "factor": 8.0, "rope_theta": 1e4})
    expected = rope.inv_freq(rope.ntk(8.0, theta=1e4, head_dim=16), head_dim=16)
    torch.testing.assert_close(long.model.rotary_emb.inv_freq, expected)
    assert rope_fingerprint(plain) != rope_fingerprint(long)
    save_model(long, tmp_path / "m")
    assert rope_fingerprint(load_model(tmp_path / "m")) == rope_fingerprint(long)
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert written["rope_parameters"]["rope_theta"] == pytest.approx(
        rope.ntk_theta(8.0, theta=1e4, head_dim=16)
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_every_rope_type_builds_runs_and_survives_saving(settings: dict[str, Any], tmp_path: Path) -> None:
    """theta is inherited from the config, and each type has a fingerprint of its own."""
    model = build_model(TINY, seed=0, rope=settings)
    assert model.config.rope_parameters["rope_theta"] == 10000.0
    name = rope_fingerprint(model)
    assert name != rope_fingerprint(build_model(TINY, seed=0))
    assert torch.isfinite(hidden_states(model, tokens(100))).all()
    assert rope_fingerprint(model) == name, "running the model must not change its fingerprint"
    save_model(model, tmp_path / "m")
    assert rope_fingerprint(load_model(tmp_path / "m")) == name


def test_learnt_positions_have_no_rope_and_a_name() -> None:
    """GPT-2 could not be evaluated or trained at all: its run asked for rotary frequencies."""
    fields = {
        "model_type": "gpt2",
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 16,
        "vocab_size": 32,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    assert rope_fingerprint(build_model(fields, seed=0)) == "none"


def test_load_can_replace_rope_and_length(tmp_path: Path) -> None:
    """Extending a context starts from another model's folder with a new RoPE."""
    save_model(build_model(TINY, seed=0), tmp_path / "short")
    model = load_model(tmp_path / "short", rope={"rope_theta": 1e5}, max_position_embeddings=2048)
    assert model.config.max_position_embeddings == 2048
    # A stage shorter than what the model can do must not write a shorter limit into its config.
    assert load_model(tmp_path / "short", max_position_embeddings=16).config.max_position_embeddings == 256
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, rope.inv_freq(rope.default(1e5), head_dim=16))


@pytest.mark.parametrize("tied", [True, False])
def test_saved_folder_loads_in_plain_transformers(tied: bool, tmp_path: Path) -> None:
    """The folder is for everyone: no trace of longspan in it, equal logits."""
    model = build_model({**TINY, "tie_word_embeddings": tied}, seed=0, rope=rope.default(5e4))
    save_model(model, tmp_path / "m")
    assert "longspan" not in (tmp_path / "m" / "config.json").read_text()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="sdpa")
    ids = tokens(2, 50)
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model(ids).logits)
        states = hidden_states(load_model(tmp_path / "m"), ids)
        torch.testing.assert_close(output_head(model).logits(states), model(ids).logits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"], "nothing is left aside"
    with pytest.raises(ArgumentError, match="already exists"):
        save_model(model, tmp_path / "m")
    save_model(model, tmp_path / "m", replace=True)


def test_user_mistakes_are_named(tmp_path: Path) -> None:
    """A typo in a config is otherwise kept as an attribute that nobody reads."""
    with pytest.raises(ConfigError, match="num_layers"):
        build_model({**TINY, "num_layers": 3}, seed=0)
    with pytest.raises(ConfigError, match="needs model_type"):
        build_model({"hidden_size": 8}, seed=0)
    with pytest.raises(ConfigError, match="lama"):
        build_model({**TINY, "model_type": "lama"}, seed=0)
    with pytest.raises(ConfigError, match="unknown init"):
        build_model(TINY, seed=0, init="zeros")
    with pytest.raises(ConfigError, match="unknown rope_type"):
        build_model(TINY, seed=0, rope={"rope_type": "yam"})
    with pytest.raises(DataError, match="not a Hugging Face model folder"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(DataError, match="cannot load a model"):
        load_model(tmp_path)


def rewrite_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_do_not_fill_the_model_are_refused(tmp_path: Path) -> None:
    """transformers fills a missing matrix with random numbers, and an evaluation of those looks like any other."""
    name = "model.layers.0.self_attn.q_proj.weight"
    for change in (lambda t: t.pop(name), lambda t: t.update({name: t[name][:32].clone()})):
        save_model(build_model(TINY, seed=0), tmp_path / "m", replace=True)
        rewrite_weights(tmp_path / "m", change)
        with pytest.raises(DataError, match=r"1 parameters missing or of another shape: .*q_proj"):
            load_model(tmp_path / "m")


def test_a_truncated_weight_file_is_one_message(tmp_path: Path) -> None:
    """safetensors raises an exception of its own, which reached the user as a traceback."""
    save_model(build_model(TINY, seed=0), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(DataError, match="cannot load a model"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("fields", [{"hidden_size": "abc"}, {"num_attention_heads": 5}])
def test_values_that_transformers_refuses_are_a_config_error(fields: dict[str, Any]) -> None:
    """Its checks raise an exception that is no ValueError, which reached the user as a traceback."""
    with pytest.raises(ConfigError, match=r"expected int|not a multiple"):
        build_model({**TINY, **fields}, seed=0)


def test_layers_that_know_no_documents_are_refused() -> None:
    """A recurrence without a function of its own reads the document before: packed rows leaked without a word."""
    fields = {
        **TINY,
        "model_type": "recurrent_gemma",
        "block_types": ["recurrent", "attention"],
        "lru_width": 32,
    }
    del fields["max_position_embeddings"]
    with pytest.raises(ArgumentError, match=r"(?s)does not take the place of.*linear_attention"):
        build_model(fields, seed=0)


def test_tokenizer_of_a_hub_model_comes_from_the_hub(tmp_path, monkeypatch):
    """A stage folder without tokenizer cannot be evaluated; a name that nobody knows is one message."""
    import huggingface_hub

    asked = []

    def download(name, *, allow_patterns):
        asked.append((name, "tokenizer.json" in allow_patterns))
        return str(tmp_path)

    assert tokenizer_folder(tmp_path) == tmp_path
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert tokenizer_folder("somebody/model") == tmp_path and asked == [("somebody/model", True)]

    def refuse(name, *, allow_patterns):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(DataError, match="tokenizer files of somebody/model"):
        tokenizer_folder("somebody/model")
