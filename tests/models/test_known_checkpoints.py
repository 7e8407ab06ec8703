"""Checkpoints whose config does not say what their weights need: said and set, unless the user says another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from longspan.models.hf import empty_model, load_model, own_config, rope_of, rope_settings, save_model
from longspan.models.known_checkpoints import KNOWN_CHECKPOINTS, find_known
from tests.hub_cache import publish, use_cache

YAOFU = "yaofu/llama-2-7b-80k"
LINEAR = {"rope_type": "linear", "factor": 10.0}


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The published config's RoPE around a small model, as a folder; the same in the hub's cache."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path / "llama-2-7b-80k"
    LlamaForCausalLM(config).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    del values["rope_parameters"]
    values |= {"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    (folder / "config.json").write_text(json.dumps(values))
    publish(folder, tmp_path / "hub", YAOFU)
    use_cache(monkeypatch, tmp_path / "hub")
    return folder


def test_name_copy_and_cache_get_the_rope_of_their_weights(saved, caplog):
    """Loaded as saved, the published 7B model reads nothing right, and nobody is told."""
    expected = AutoConfig.from_pretrained(saved)
    expected.rope_parameters = {**LINEAR, "rope_theta": 1e4}
    theirs = LlamaForCausalLM.from_pretrained(saved, config=expected)
    ids = torch.arange(60)[None]
    cached = next((saved.parent / "hub").glob("models--*/snapshots/*"))
    with caplog.at_level("INFO"):
        for path in (YAOFU, saved, cached):
            model = load_model(path)
            with torch.no_grad():
                assert torch.allclose(model(ids).logits, theirs(ids).logits, atol=1e-5)
            assert model.config.max_position_embeddings == 81920
            assert rope_of(empty_model(path).config) == rope_of(model.config)
            assert f"{path}: its config.json says" in caplog.text and "reset_rope" in caplog.text


def test_the_users_rope_outranks_it(saved, caplog):
    for rope in ({"rope_type": "default"}, {"rope_type": "dynamic", "factor": 2.0}):
        with caplog.at_level("INFO"):
            model = load_model(saved, rope=rope)
        assert model.config.rope_parameters["rope_type"] == rope["rope_type"]
        assert model.config.max_position_embeddings == 4096
    assert not caplog.text
    assert rope_settings(saved, None, 1e6) == {**LINEAR, "rope_theta": 1e6}


def test_a_mended_copy_and_another_name_are_left_alone(saved):
    """What the export wrote would be changed again, or a folder that only has a like name."""
    other = saved.rename(saved.parent / "llama-2-7b-80k-mine")
    assert own_config(other).rope_parameters["rope_type"] == "dynamic"
    mended = other.parent / "llama-2-7b-80k"
    save_model(load_model(other, rope={"rope_type": "linear", "factor": 5.0}), mended)
    assert own_config(mended).rope_parameters["factor"] == 5.0


@pytest.mark.parametrize("known", KNOWN_CHECKPOINTS, ids=lambda known: known.name)
def test_each_fact_can_be_set_and_is_met_once(known):
    """A row whose RoPE is refused, or that still meets the condition after it was set."""
    rope = {"factor": 2.0, "rope_theta": 1e4, **known.saved}
    if rope["rope_type"] == "default":
        del rope["factor"]
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=rope)
    assert find_known(known.name, config) is known
    config.rope_parameters = {"rope_theta": 1e4, **known.rope}
    assert find_known(known.name, config) is None
