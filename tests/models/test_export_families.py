"""Every family that transformers builds small is exported as it saves it: read again, no key is missing or left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longspan.core.errors import DataError
from longspan.models.export import check_folder, export_model
from longspan.models.hf import load_model

SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1, "moe_k": 2, "n_group": 1,
    "topk_group": 1, "shared_expert_intermediate_size": 32, "first_k_dense_replace": 1, "sliding_window": 50,
    "ffn_hidden_size": 96, "moe_topk": 2, "intermediate_size_mlp": 96,
}  # fmt: skip
# transformers renames or splits the tensors of these on their way to the disk.
RENAMED = ["mixtral", "qwen3_moe", "gpt_neox", "phimoe", "granitemoe"]
OTHERS = [
    "afmoe", "apertus", "arcee", "aria_text", "bitnet", "cohere", "cohere2", "cohere2_moe", "cwm", "diffllama",
    "doge", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo", "gemma", "gemma2",
    "gemma3_text", "glm", "glm4", "glm4_moe", "gpt_oss", "granite", "granitemoeshared", "helium", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "jetmoe", "llama", "llama4_text", "minimax_m2", "ministral", "mistral", "nemotron", "olmo",
    "olmo2", "olmo3", "olmoe", "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "seed_oss", "smollm3",
    "solar_open", "starcoder2",
]  # fmt: skip


def small_config(model_type: str) -> Any:
    """Return the family's config with the sizes above, as far as it has them, and two layers of different kinds."""
    default = AutoConfig.for_model(model_type)
    names = default.to_dict().keys() | set(default.attribute_map)
    fields = {name: value for name, value in SMALL.items() if name in names}
    for name in ("layer_types", "mlp_layer_types"):
        if kinds := list(dict.fromkeys(getattr(default, name, None) or ())):
            fields[name] = (kinds * 2)[:2]
    return AutoConfig.for_model(model_type, **fields)


@pytest.mark.parametrize(
    "model_type", [*RENAMED, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_a_family_is_exported_as_transformers_saves_it(model_type: str, tmp_path: Path) -> None:
    """Mixtures of experts and GPT-NeoX were refused: their names in files are not those in the model."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(small_config(model_type)).eval()
    made.save_pretrained(tmp_path / "base")
    export_model(load_model(tmp_path / "base"), tmp_path / "out")
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    for (name, value), (other, kept) in zip(made.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(value, kept), name
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, made(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_missing_or_misshapen_expert_is_found(tmp_path: Path) -> None:
    """Experts are joined while they are read, so what is wrong with one shows under another name, or as an error."""
    from safetensors.torch import load_file, save_file

    AutoModelForCausalLM.from_config(small_config("mixtral")).save_pretrained(tmp_path / "out")
    check_folder(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "experts.1." in name)
    for broken in (
        {key: value for key, value in weights.items() if key != name},
        {**weights, name: torch.ones(3, 5)},
        {**weights, "more.weight": torch.ones(3)},
    ):
        save_file(broken, file, metadata={"format": "pt"})
        with pytest.raises(DataError, match="are not those of its config"):
            check_folder(tmp_path / "out")
