"""Exported folders hold the model that was trained, whole, under names that other tools read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from longspan.core.errors import ArgumentError, DataError
from longspan.data.tokenizer import train_bpe
from longspan.models import export
from longspan.models.export import check_folder, export_adapter, export_model, merge_adapter
from longspan.models.hf import build_model, load_model, save_model
from longspan.models.lora import LoraConfig, apply_lora, save_adapter
from tests.models.test_hf import TINY, tokens

ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 5e5}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer made for short contexts and generation settings that transformers does not write."""
    path = tmp_path_factory.mktemp("base") / "model"
    save_model(build_model({**TINY, "vocab_size": 300}, seed=0, rope=ROPE), path)
    train_bpe(["one two three"], path, vocab_size=300)
    (path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 64}))
    settings = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}
    (path / "generation_config.json").write_text(json.dumps(settings))
    return path


def trained(base: Path, **settings: Any) -> PreTrainedModel:
    """Return a model with an adapter that changes its logits by about as much as they are large."""
    model = load_model(base)
    apply_lora(model, LoraConfig(rank=4, **settings), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def greedy(model: PreTrainedModel) -> torch.Tensor:
    return model.generate(tokens(1, 12), max_new_tokens=24, do_sample=False, temperature=1.0, top_p=1.0)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("dora", [False, True])
def test_merged_model_is_base_with_adapter(base: Path, tmp_path: Path, quantize: str, dora: bool) -> None:
    """A base that is merged as it was before it was quantised is not the model that was trained."""
    model = trained(base, dora=dora, quantize=quantize, trainable=["embed_tokens", "norm"])
    with torch.no_grad():
        expected, words = model(tokens(1, 40)).logits, greedy(model)
    save_adapter(model, tmp_path / "adapter", base=base)
    report = export_model(load_model(tmp_path / "adapter"), tmp_path / "out", tokenizer=base, generation=base)
    assert report.kind == "merged" and report.dtype == "float32" and report.notes == []
    assert report.merge_error is not None and report.merge_error < 1e-4
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens(1, 40)).logits, expected, atol=1e-4, rtol=0)
    assert torch.equal(greedy(plain), words)
    rounded = export_model(load_model(tmp_path / "adapter"), tmp_path / "rounded", dtype="bfloat16")
    assert rounded.rounding_error is not None and 1e-4 < rounded.rounding_error < 0.2
    weights = load_file(tmp_path / "rounded" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}


def test_merging_in_place_would_quantise_again(base: Path) -> None:
    """What peft does to a 4-bit layer loses more than a thousand times of what merging in float32 does."""
    model = trained(base, quantize="nf4")
    with torch.no_grad():
        expected = model(tokens(1, 40)).logits
        ours = trained(base, quantize="nf4")
        merge_adapter(ours)
        for layer in model.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                with pytest.warns(UserWarning, match="rounding errors"):
                    layer.merge()
        in_place = float((model(tokens(1, 40)).logits - expected).abs().max())
        merged = float((ours(tokens(1, 40)).logits - expected).abs().max())
    assert merged < 1e-4 < 0.05 < in_place


def test_folder_has_what_other_tools_read(base: Path, tmp_path: Path) -> None:
    """vLLM and transformers 4 take theta 10,000, float32 and 64 tokens where they do not find their names."""
    rope = {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6}
    model = load_model(base, rope=rope, max_position_embeddings=2048)
    report = export_model(model, tmp_path / "out", dtype="bfloat16", tokenizer=base, generation=base)
    assert report.kind == "model" and report.merge_error is None and report.rounding_error is not None
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] == 2048
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["rope_parameters"] == rope
    assert config["rope_theta"] == 2e6
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    words = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert words["model_max_length"] == 2048
    for name in ("generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.rope_parameters == rope and loaded.dtype == torch.bfloat16


def test_adapter_alone_is_what_peft_reads(base: Path, tmp_path: Path) -> None:
    """Exported, it says which base and which RoPE it needs, because peft asks for neither."""
    model = trained(base, trainable=["norm"])
    report = export_adapter(model, tmp_path / "out", base=base, tokenizer=base)
    assert report.kind == "adapter"
    assert any("rope_parameters" in note for note in report.notes)
    assert any("vLLM" in note for note in report.notes)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    config = peft.LoraConfig.from_pretrained(tmp_path / "out")
    assert config.base_model_name_or_path == str(base)


def test_nothing_half_written_is_left(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that a failed export leaves would be uploaded."""
    with pytest.raises(ArgumentError, match="already exists"):
        export_model(load_model(base), base)
    with pytest.raises(ArgumentError, match="bfloat16"):
        export_model(load_model(base), tmp_path / "out", dtype="int8")
    model = trained(base)
    with torch.no_grad():
        next(value for name, value in model.named_parameters() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(DataError, match="not finite"):
        export_model(model, tmp_path / "out")

    def broken(path: Path) -> None:
        raise DataError("a check failed")

    monkeypatch.setattr(export, "check_folder", broken)
    with pytest.raises(DataError, match="a check failed"):
        export_model(load_model(base), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_fit_is_found(base: Path, tmp_path: Path) -> None:
    """Weights of another shape, an index that points elsewhere, keys that servers need."""
    export_model(load_model(base), tmp_path / "out")
    assert check_folder(tmp_path / "out") == [
        "there is no tokenizer: name one with --tokenizer",
        "there is no tokenizer_config.json: transformers guesses the kind of tokenizer",
    ]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    short = {**weights, "model.norm.weight": torch.ones(3)}
    save_file(short, tmp_path / "out" / "model.safetensors")
    with pytest.raises(DataError, match=r"model\.norm\.weight"):
        check_folder(tmp_path / "out")
    index = {"metadata": {}, "weight_map": {name: "elsewhere.safetensors" for name in weights}}
    (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"index\.json"):
        check_folder(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "architectures": None}))
    with pytest.raises(DataError, match="no architectures"):
        check_folder(tmp_path / "out")


def test_a_weight_beyond_the_type_is_refused(base: Path, tmp_path: Path) -> None:
    """float16 ends at 65,504: an infinite weight was written, with exit code 0."""
    model = load_model(base)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 1e5
    with pytest.raises(DataError, match=r"becomes infinite in float16(.|\n)*down_proj(.|\n)*bfloat16"):
        export_model(model, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    assert (
        export_model(load_model(base), tmp_path / "fine", dtype="float16").notes[0].startswith("there is no")
    )


def test_values_that_layers_hand_on_beyond_float16_are_said(base: Path, tmp_path: Path) -> None:
    """Every weight fits, and the sums do not: the model answers with NaN in float16."""
    model = load_model(base)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(6e4 / model.model.embed_tokens.weight.abs().max())
        model.model.layers[0].mlp.down_proj.weight.fill_(6e4)
        model.model.layers[0].mlp.gate_proj.weight.fill_(1.0)
    notes = export_model(model, tmp_path / "out", dtype="float16").notes
    assert any("infinite in float16" in note for note in notes)
