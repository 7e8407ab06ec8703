"""Shapes from configurations: what a config.json leaves out, and what has no estimate."""

from __future__ import annotations

import json

import pytest

from longspan.core.errors import ArgumentError, DataError
from longspan.plan.models import MODELS, find_model, shape_of

SMALL = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
    "intermediate_size": 128, "vocab_size": 100,
}  # fmt: skip


def test_what_a_config_leaves_out() -> None:
    """No key/value heads means as many as query heads; gemma ties its embeddings unless it says otherwise."""
    shape = shape_of(SMALL)
    assert (shape.kv_heads, shape.head_dim, shape.tied, shape.head_norms) == (4, 16, False, False)
    assert shape_of({**SMALL, "model_type": "gemma2"}).tied
    assert shape_of({**SMALL, "tie_word_embeddings": True}).tied
    assert shape_of({"model_type": "x_vl", "text_config": {**SMALL, "model_type": "qwen3"}}).head_norms


def test_no_estimate_is_said() -> None:
    """A mixture of experts counted as one MLP would be off by the number of experts."""
    with pytest.raises(DataError, match="mixture of experts"):
        shape_of({**SMALL, "num_local_experts": 8})
    with pytest.raises(DataError, match="no hidden_size"):
        shape_of({key: value for key, value in SMALL.items() if key != "hidden_size"})


@pytest.mark.parametrize(
    "name", ["llama-3-8b", "meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-8B"]
)
def test_names(name: str) -> None:
    """The name on the hub is the one that people have."""
    assert find_model(name) is MODELS["llama-3-8b"]


def test_folders_and_files(tmp_path) -> None:
    """Both are what people have; a broken file is said by name."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    assert find_model(tmp_path)[1:] == find_model(tmp_path / "config.json")[1:] == shape_of(SMALL)[1:]
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(DataError, match="no configuration"):
        find_model(tmp_path)
    with pytest.raises(ArgumentError, match="llama-3-8b"):
        find_model("llama-9")
