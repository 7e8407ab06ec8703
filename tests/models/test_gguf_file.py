"""GGUF files: what llama.cpp would take for another model is refused or found out.

The converter is no package, so a small one stands in here, made with the `gguf` package and read by transformers.
"""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from longspan.core.errors import ArgumentError, ConfigError, MissingDependencyError, RunError
from longspan.models.export import export_model
from longspan.models.gguf_file import check_gguf, find_converter, refuse_config, write_gguf
from longspan.models.hf import build_model

gguf = pytest.importorskip("gguf")

MODEL = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
CONVERTER = """
    import json, os, sys
    import gguf, numpy as np
    from safetensors.numpy import load_file

    folder, _, out, _, kind = sys.argv[1:]
    config = json.load(open(f"{folder}/config.json"))
    rope = config["rope_parameters"]
    if os.environ.get("STAND_IN") == "fails":
        sys.exit("Model LlamaForCausalLM is not supported")
    file = gguf.GGUFWriter(out, "llama")
    file.add_context_length(config["max_position_embeddings"])
    file.add_embedding_length(config["hidden_size"])
    file.add_block_count(config["num_hidden_layers"])
    file.add_feed_forward_length(config["intermediate_size"])
    file.add_head_count(config["num_attention_heads"])
    file.add_head_count_kv(config["num_key_value_heads"])
    file.add_layer_norm_rms_eps(config["rms_norm_eps"])
    file.add_vocab_size(config["vocab_size"])
    if os.environ.get("STAND_IN") != "forgets":
        file.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] in ("linear", "yarn"):
            file.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
            file.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            file.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, weight in load_file(f"{folder}/model.safetensors").items():
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if part in name:  # llama.cpp turns pairs of neighbours
                weight = weight.reshape(config[heads], 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        file.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(weight))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
"""
LINEAR = {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def config_of(rope: dict) -> LlamaConfig:
    values = {name: value for name, value in MODEL.items() if name != "model_type"}
    return LlamaConfig(**values, rope_parameters=rope)


@pytest.fixture
def converter(tmp_path: Path) -> list[str]:
    path = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    path.parent.mkdir()
    path.write_text(textwrap.dedent(CONVERTER))
    return find_converter(str(path.parent))


def folder_with(rope: dict, place: Path) -> Path:
    export_model(build_model({**MODEL, "rope_parameters": rope}, seed=0), place)
    return place


def test_a_gguf_file_is_the_model(tmp_path: Path, converter: list[str]) -> None:
    """The file must give the logits of the folder, as another reader of it computes them."""
    rope = {"rope_type": "default", "rope_theta": 5e5}
    folder = folder_with(rope, tmp_path / "model")
    file = write_gguf(folder, folder / "model-f32.gguf", "f32", converter)
    assert [path.name for path in folder.glob("*gguf*")] == ["model-f32.gguf"]  # nothing is left beside it
    ids = torch.arange(48)[None] % 64
    ours = AutoModelForCausalLM.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    assert theirs.config.rope_parameters["rope_theta"] == 5e5
    assert theirs.config.max_position_embeddings == 512
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rope", [LINEAR, YARN], ids=lambda rope: rope["rope_type"])
def test_a_factor_that_the_converter_leaves_out_is_found_out(tmp_path, converter, rope, monkeypatch) -> None:
    """Without its factor a model of 512 positions is asked beyond what it was trained on, and answers nonsense."""
    folder = folder_with(rope, tmp_path / "model")
    assert write_gguf(folder, tmp_path / "right.gguf", "f32", converter).is_file()
    monkeypatch.setenv("STAND_IN", "forgets")
    with pytest.raises(RunError, match=r"factor: none, the model's 4") as caught:
        write_gguf(folder, tmp_path / "wrong.gguf", "f32", converter)
    assert "type of RoPE: none" in str(caught.value)
    monkeypatch.setenv("STAND_IN", "fails")
    with pytest.raises(
        RunError, match=r"which is whole\n  found: exit code 1\nModel LlamaForCausalLM is not"
    ):
        write_gguf(folder, tmp_path / "wrong.gguf", "f32", converter)
    assert not list(tmp_path.glob("*wrong*"))


def written(path: Path, *, factor: float = 8.0, theta: float = 5e5) -> Path:
    """Write a file of LLAMA3's RoPE with no model in it, its slowed pairs by the formula of Llama 3.1's release."""
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(512)
    file.add_rope_freq_base(theta)
    slowed = []
    for frequency in theta ** -(np.arange(0, 8, 2) / 8):
        turns = 64 / (2 * np.pi / frequency)
        smooth = min(max((turns - 1) / 3, 0.0), 1.0)
        slowed.append(1 / ((1 - smooth) / factor + smooth))
    finish(file, {"rope_freqs.weight": slowed})
    return path


def finish(file: gguf.GGUFWriter, tensors: dict[str, list[float]]) -> None:
    for name, values in tensors.items():
        file.add_tensor(name, np.array(values, dtype=np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def written_longrope(path: Path, *, length: int | None, scale: float | None, long: float = 4.0) -> Path:
    """Write a file of LongRoPE as Phi-3's converter does, with no name of it; MiniCPM's writes its factors alone."""
    file = gguf.GGUFWriter(path, "phi3")
    file.add_context_length(512)
    file.add_rope_freq_base(1e4)
    if length is not None:
        file.add_rope_scaling_orig_ctx_len(length)
    if scale is not None:
        file.add_rope_scaling_attn_factors(scale)
    finish(file, {"rope_factors_long.weight": [long] * 4, "rope_factors_short.weight": [1.0] * 4})
    return path


def test_pairs_slowed_as_llama_3_does_are_compared_one_by_one(tmp_path: Path) -> None:
    """The file says Llama 3's RoPE as a tensor: a base or factor of another model stands in no field."""
    config = config_of(LLAMA3)
    check_gguf(written(tmp_path / "right"), config)
    with pytest.raises(
        RunError, match="slowing of pairs: 4 numbers from 1 to 4, the model's 4 numbers from 1 to 8"
    ):
        check_gguf(written(tmp_path / "factor", factor=4.0), config)
    with pytest.raises(RunError, match="the base: 10000, the model's 500000"):
        check_gguf(written(tmp_path / "theta", theta=1e4), config)
    with pytest.raises(RunError, match="slowing of pairs: 4 numbers from 1 to 8, the model's none"):
        check_gguf(written(tmp_path / "default"), config_of({"rope_type": "default", "rope_theta": 5e5}))


def test_longrope_is_its_factors(tmp_path: Path) -> None:
    """llama.cpp asks a file for LongRoPE's factors and not for its name: Phi-3 with 128K could not be exported."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = config_of({**rope, "factor": 4.0, "original_max_position_embeddings": 128})
    scale = (1 + np.log(4) / np.log(128)) ** 0.5
    check_gguf(written_longrope(tmp_path / "phi3", length=128, scale=scale), config)
    with pytest.raises(
        RunError, match=r"^[^;]*long factors: 4 numbers from 2 to 2, the model's 4 numbers from 4 to 4"
    ):
        check_gguf(written_longrope(tmp_path / "long", length=128, scale=scale, long=2.0), config)
    with pytest.raises(
        RunError, match="the original length: 512, the model's 128; the attention factor: 1, the"
    ):
        check_gguf(written_longrope(tmp_path / "bare", length=None, scale=None), config)
    same = config_of({**rope, "factor": 1.0, "original_max_position_embeddings": 512})
    check_gguf(written_longrope(tmp_path / "minicpm", length=None, scale=None), same)


@pytest.mark.parametrize(
    ("rope", "part"),
    [
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "cannot say this RoPE"),
        ({**YARN, "attention_factor": 1.0}, "attention_factor: 1.0"),
        ({**YARN, "mscale": 1.0, "mscale_all_dim": 0.8}, "mscale: 1.0, mscale_all_dim: 0.8"),
        (
            {**LINEAR, "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
            "this family",
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(rope: dict, part: str) -> None:
    """llama.cpp 11434 takes YaRN's attention factor from the factor, whatever the file says, and warns of nothing."""
    config = config_of(YARN)
    config.rope_parameters = rope
    with pytest.raises(ConfigError, match=part):
        refuse_config(config)


WINDOWED = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "sliding_window": 128,
}  # fmt: skip


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_a_window_that_llama_cpp_does_not_have_is_refused(family: str) -> None:
    """Asked there, a Mistral with a window of 256 was 2 nats off after 600 tokens, and the export called it checked."""
    values = {**WINDOWED, "pad_token_id": 0, "num_hidden_layers": 2}
    known = AutoConfig.for_model(family).to_dict()
    values = {name: value for name, value in values.items() if name in known}
    with pytest.raises(ConfigError, match=f"{family} with a window of 128 and 512 positions"):
        refuse_config(AutoConfig.for_model(family, **values))
    for window in (None, 512):
        refuse_config(AutoConfig.for_model(family, **{**values, "sliding_window": window}))


def test_a_window_that_is_never_used_is_not_refused() -> None:
    """Qwen2's configs name a window that no layer has."""
    values = {name: value for name, value in WINDOWED.items() if name != "head_dim"}
    refuse_config(AutoConfig.for_model("qwen2", **values))
    with pytest.raises(ConfigError, match="gives this family no sliding window"):
        refuse_config(AutoConfig.for_model("qwen2", **values, use_sliding_window=True, max_window_layers=2))


def written_windows(
    path: Path, family: str, *, window: int | None, pattern: list[bool] | None = None
) -> Path:
    """Write a file of a model with windows and two bases, no layer in it."""
    file = gguf.GGUFWriter(path, family)
    file.add_context_length(512)
    file.add_rope_freq_base(1e6)
    file.add_float32(f"{family}.rope.freq_base_swa", 1e4)
    if window is not None:
        file.add_sliding_window(window)
    if pattern is not None:
        file.add_sliding_window_pattern(pattern)
    finish(file, {"output_norm.weight": [1.0]})
    return path


def test_a_rope_that_llama_cpp_does_not_load_is_refused() -> None:
    """SmolLM3's converter writes the slowed pairs, and llama.cpp ends at a tensor that it does not know."""
    config = AutoConfig.for_model("smollm3", **WINDOWED, pad_token_id=0, rope_parameters=LLAMA3)
    with pytest.raises(ConfigError, match="does not load a file of this family"):
        refuse_config(config)


def test_which_layers_have_a_window_is_compared(tmp_path: Path) -> None:
    """llama.cpp gives every sixth layer of a Gemma 3 no window unless its file says otherwise."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    ropes = {"full_attention": rope, "sliding_attention": {**rope, "rope_theta": 1e4}}
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = AutoConfig.for_model("gemma3_text", **WINDOWED, layer_types=kinds, rope_parameters=ropes)
    check_gguf(written_windows(tmp_path / "right", "gemma3", window=128), config)
    for window in (None, 64):
        with pytest.raises(RunError, match=f"the window: {window or 'none'}, the model's 128"):
            check_gguf(written_windows(tmp_path / f"{window}", "gemma3", window=window), config)
    pattern = [True, False] * 3
    with pytest.raises(RunError, match="not the model's in layers 1, 3"):
        check_gguf(written_windows(tmp_path / "pattern", "gemma3", window=128, pattern=pattern), config)
    # A converter may write layers that only predict further tokens too.
    pattern = [True] * 5 + [False, True]
    with pytest.raises(RunError, match=r"not the model's in layers 6\n"):
        check_gguf(written_windows(tmp_path / "longer", "gemma3", window=128, pattern=pattern), config)
    config.rope_parameters["sliding_attention"] |= {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(RunError, match="of layers with a window: none, the model's linear"):
        check_gguf(written_windows(tmp_path / "right", "gemma3", window=128), config)


def test_a_base_of_windows_that_llama_cpp_does_not_read_is_found_out(tmp_path: Path) -> None:
    """An OLMo 3 with a larger base in its full layers was 2 nats off there: the file's second base is not looked at."""
    kinds = ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 2
    values = {name: value for name, value in WINDOWED.items() if name != "head_dim"}
    pattern = [kind == "sliding_attention" for kind in kinds]
    file = written_windows(tmp_path / "file", "olmo2", window=128, pattern=pattern)
    for theta, wrong in ((1e4, True), (1e6, False)):
        rope = {"rope_type": "default", "rope_theta": 1e6}
        ropes = {"full_attention": rope, "sliding_attention": {**rope, "rope_theta": theta}}
        config = AutoConfig.for_model("olmo3", **values, layer_types=kinds, rope_parameters=ropes)
        if not wrong:
            check_gguf(file, config)
            continue
        with pytest.raises(RunError, match="base of layers with a window: 1e\\+06, the model's 10000"):
            check_gguf(file, config)


def test_longrope_goes_by_the_servers_context(caplog: pytest.LogCaptureFixture) -> None:
    """A prompt of 600 tokens was 2.5 nats off in a context of 3,000: transformers takes the short factors for it."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    values = {**WINDOWED, "pad_token_id": 0, "sliding_window": None}
    values.pop("head_dim")
    config = AutoConfig.for_model("phi3", **values)
    config.rope_parameters = {**rope, "factor": 4.0, "original_max_position_embeddings": 128}
    refuse_config(config)
    assert "more than 128 tokens" in caplog.text


def test_what_is_as_llama_cpp_has_it_is_not_refused(caplog: pytest.LogCaptureFixture) -> None:
    """A config that spells out what is usual is the same model, and nothing is to be said of it."""
    for rope in (YARN, {**YARN, "attention_factor": 0.1 * np.log(4) + 1, "truncate": True}, LLAMA3, LINEAR):
        config = config_of(YARN)
        config.rope_parameters = rope
        refuse_config(config)
        assert config.rope_parameters == rope and not caplog.text


def test_what_llama_cpp_rounds_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """gpt-oss is used there by everybody, with borders that are not its own: close, and not the same."""
    config = config_of(YARN)
    config.rope_parameters = {**YARN, "truncate": False}
    refuse_config(config)
    assert "rounds the borders" in caplog.text


def test_a_converter_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in no package: the message must say where it is had from."""
    with pytest.raises(ArgumentError, match="there is no converter"):
        find_converter(str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match="git clone"):
        find_converter(None)
    path = tmp_path / "convert_hf_to_gguf.py"
    path.write_text("#!/bin/sh\n")
    os.chmod(path, 0o755)
    assert find_converter(None) == [str(path)]
