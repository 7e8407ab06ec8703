"""Adapters: what is trained, what is saved, and what is refused."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from longspan.core.errors import ArgumentError, ConfigError, DataError, MissingDependencyError
from longspan.kernels.loss import linear_cross_entropy
from longspan.kernels.tiled_mlp import enable_tiled_mlp
from longspan.models.checkpointing import enable_checkpointing
from longspan.models.documents import Documents
from longspan.models.export import export_model
from longspan.models.head import output_head
from longspan.models.hf import build_model, empty_model, hidden_states, load_model, save_model
from longspan.models.lora import LoraConfig, apply_lora, check_lora, load_adapter, save_adapter
from longspan.models.lora_config import Quantization
from longspan.models.quantize import dequantize, quantize, without_advice
from longspan.train.config import TrainConfig
from longspan.train.run_plan import plan_run
from tests.models.test_hf import TINY, tokens


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "model"
    save_model(build_model({**TINY, "tie_word_embeddings": request.param}, seed=0), path)
    return path


def loss(model: PreTrainedModel) -> torch.Tensor:
    """Mean loss of two documents of 20 and 30 tokens."""
    ids = tokens(50)
    hidden = hidden_states(model, ids, Documents.from_cu_seqlens([0, 20, 50]))
    return linear_cross_entropy(hidden, output_head(model), ids.roll(-1)).loss / 50


def steps(model: PreTrainedModel, count: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(count):
        value = loss(model)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "attention only": {"target_modules": ["q_proj", "self_attn.v_proj"]},
    "dora": {"dora": True},
    "embeddings and norms": {"trainable": ["embed_tokens", "norm", "input_layernorm"]},
    "head": {"trainable": ["lm_head"]},
    "nf4": {"quantize": "nf4"},
    "nf4, scales in float32": {"quantize": "nf4", "double_quant": False, "compute_dtype": "float32"},
    "dora on nf4": {"quantize": "nf4", "dora": True, "trainable": ["embed_tokens"]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_trains_saves_and_comes_back_bit_for_bit(
    base: Path, tmp_path: Path, variant: str, dtype: torch.dtype
) -> None:
    """A frozen weight that moves, a trained one that is not saved, an embedding whose head stays behind."""
    model = load_model(base, dtype=dtype)
    plain = hidden_states(model, tokens(50))
    apply_lora(model, LoraConfig(rank=4, **VARIANTS[variant]), seed=1)
    if "quantize" not in VARIANTS[variant] and dtype == torch.float32:
        assert torch.equal(hidden_states(model, tokens(50)), plain)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    losses = steps(model)
    assert losses[-1] < losses[0] - 0.05
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) == (not value.requires_grad), name
        assert value.dtype == torch.float32 or not value.requires_grad
    save_adapter(model, tmp_path / "adapter", base=base)
    loaded = load_model(tmp_path / "adapter")
    for ours, theirs in ((model, loaded),):
        assert torch.equal(hidden_states(ours, tokens(50)), hidden_states(theirs, tokens(50)))
        assert torch.equal(ours(tokens(1, 20)).logits, theirs(tokens(1, 20)).logits)


@pytest.mark.parametrize("variant", ["lora", "dora", "embeddings and norms", "head"])
def test_peft_reads_what_is_saved(base: Path, tmp_path: Path, variant: str) -> None:
    """Names of peft that are off by a prefix load as a fresh adapter, with a warning nobody reads."""
    model = load_model(base)
    apply_lora(model, LoraConfig(rank=4, **VARIANTS[variant]), seed=1)
    steps(model)
    save_adapter(model, tmp_path / "adapter", base=base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(load_model(base), tmp_path / "adapter")
    assert torch.equal(theirs(tokens(1, 20)).logits, model(tokens(1, 20)).logits)


def test_what_peft_writes_is_read(base: Path, tmp_path: Path) -> None:
    """A folder without our files has the RoPE of its base."""
    model = load_model(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        )
        theirs.save_pretrained(tmp_path / "adapter")
        expected = theirs(tokens(1, 20)).logits
    assert torch.equal(load_adapter(tmp_path / "adapter", base=base)(tokens(1, 20)).logits, expected)


@pytest.mark.parametrize("variant", ["lora", "nf4"])
@pytest.mark.parametrize("mode", ["full", "offload"])
def test_checkpointing_and_tiles_give_the_same_gradients(base: Path, variant: str, mode: str) -> None:
    """The first block's input needs no gradient, so a careless checkpoint drops those of its adapter."""
    gradients = []
    for saving in (False, True):
        model = load_model(base).train()
        apply_lora(model, LoraConfig(rank=4, **VARIANTS[variant]), seed=1)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_B" in name:
                    value.copy_(value + 0.01)
        if saving:
            enable_checkpointing(model, mode)  # type: ignore[arg-type]
            enable_tiled_mlp(model, 16)
        loss(model).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(value is not None for value in gradients[1].values())
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-4, atol=1e-7)


def test_adapter_is_a_function_of_the_seed(base: Path) -> None:
    """Each process makes its own A before it is sharded: they must be one."""
    first, again, other = (
        dict(apply_lora(load_model(base), LoraConfig(rank=4), seed=seed).named_parameters())
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_quantised_layers_take_half_a_byte_and_come_back(base: Path) -> None:
    """The widest gap of NF4 is 0.30 of a block's largest weight; what is taken back computes as what was stored."""
    model, exact = load_model(base), load_model(base)
    quantize(model, Quantization())
    layer, weight = model.model.layers[0].mlp.up_proj, exact.model.layers[0].mlp.up_proj.weight
    assert layer.weight.dtype == torch.uint8 and 2 * layer.weight.numel() == weight.numel()
    with torch.no_grad():
        small = hidden_states(model, tokens(50))
        dequantize(model)
        torch.testing.assert_close(hidden_states(model, tokens(50)), small, atol=1e-5, rtol=1e-5)
    back = model.model.layers[0].mlp.up_proj.weight
    error = (back - weight).detach().abs().max()
    assert 0 < float(error) < 0.16 * float(weight.detach().abs().max())


def test_settings_that_name_nothing_are_refused(base: Path) -> None:
    """They would train nothing, or something else; the message lists what there is."""
    cases = [
        ({"target_modules": ["qproj"]}, ["'qproj'", "q_proj", "down_proj"]),
        ({"target_modules": ["embed_tokens"]}, ["'embed_tokens'", "lora.trainable"]),
        ({"target_modules": ["roj"]}, ["'roj'"]),
        ({"trainable": ["layernorm"]}, ["'layernorm'", "input_layernorm", "norm"]),
        ({"target_modules": ["q_proj"], "trainable": ["self_attn.q_proj"]}, ["not both", "layers.0"]),
    ]
    for settings, parts in cases:
        for refuse in (
            lambda c: check_lora(empty_model(base), c),
            lambda c: apply_lora(load_model(base), c, seed=0),
        ):
            with pytest.raises(ConfigError) as caught:
                refuse(LoraConfig(**settings))  # type: ignore[no-untyped-call]
            for part in parts:
                assert part in str(caught.value)
    with pytest.raises(ConfigError, match="rank"):
        LoraConfig.from_dict({"rank": 0})
    with pytest.raises(ConfigError, match="target_module"):
        LoraConfig.from_dict({"target_module": ["q_proj"]})
    model = apply_lora(load_model(base), LoraConfig(rank=2), seed=0)
    with pytest.raises(ArgumentError, match="longspan export"):
        apply_lora(model, LoraConfig(rank=2), seed=0)


def test_wrong_bases_and_damaged_folders_are_refused(base: Path, tmp_path: Path) -> None:
    """An adapter beside other weights computes nonsense without a word."""
    model = apply_lora(load_model(base), LoraConfig(rank=2), seed=0)
    folder = tmp_path / "adapter"
    save_adapter(model, folder, base=base)
    with pytest.raises(ArgumentError, match="already exists"):
        save_adapter(model, folder, base=base)
    save_model(build_model(TINY, seed=9), tmp_path / "other")
    with pytest.raises(DataError, match="other weights"):
        load_adapter(folder, base=tmp_path / "other")
    with pytest.raises(DataError, match="cannot load a model"):
        load_adapter(folder, base=tmp_path / "absent")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), folder / "adapter_model.safetensors")
    with pytest.raises(DataError, match="1 missing"):
        load_adapter(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(DataError, match="does not fit"):
        load_adapter(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "peft_type": "IA3"}))
    with pytest.raises(DataError, match="no LoRA adapter"):
        load_adapter(folder)


def test_packages_that_are_missing_are_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to install; a traceback of an import would not."""
    for package, extra, settings in (
        ("peft", "lora", {}),
        ("bitsandbytes", "qlora", {"quantize": "nf4"}),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(MissingDependencyError, match=rf"longspan\[{extra}\]"):
                check_lora(empty_model(base), LoraConfig(**settings))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
def test_the_card_of_an_adapter_loads_it_with_its_rope(base: Path, tmp_path: Path) -> None:
    """peft puts an adapter beside the base as it is: with the RoPE of short contexts, without a word."""
    rope = {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}
    model = load_model(base, rope=rope, max_position_embeddings=2048)
    apply_lora(model, LoraConfig(rank=2), seed=0)
    save_adapter(model.eval(), tmp_path / "adapter", base=base)
    card = (tmp_path / "adapter" / "README.md").read_text()
    code = (
        card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(tmp_path / "adapter"))
    )
    found: dict[str, Any] = {}
    exec(code, found)
    with torch.no_grad():
        expected = model(tokens(1, 100)).logits
        torch.testing.assert_close(found["model"](tokens(1, 100)).logits, expected, atol=1e-4, rtol=0)
    assert '"factor": 8.0' in card and "2048" in card


def test_experts_that_adapters_do_not_reach_are_said_and_the_merged_model_is_exported(tmp_path: Path) -> None:
    """Most weights of a mixture of experts stayed as they were, unquantised, without a word."""
    fields = {**TINY, "model_type": "mixtral", "num_local_experts": 4}
    save_model(build_model(fields, seed=0), tmp_path / "base")
    config = LoraConfig(rank=2, quantize="nf4")
    notes = check_lora(empty_model(tmp_path / "base"), config)
    weights = {name: weight.numel() for name, weight in load_model(tmp_path / "base").named_parameters()}
    share = sum(count for name, count in weights.items() if "experts" in name) / sum(weights.values())
    assert (
        len(notes) == 1 and f"{share:.0%} of the weights, the experts, get no adapter and are not" in notes[0]
    )
    assert "model.layers.mlp.experts.down_proj" in notes[0]
    model = apply_lora(load_model(tmp_path / "base"), config, seed=0)
    save_adapter(model, tmp_path / "adapter", base=tmp_path / "base")
    report = export_model(load_model(tmp_path / "adapter"), tmp_path / "out")
    assert report.kind == "merged"
    save_model(build_model(TINY, seed=0), tmp_path / "dense")
    assert check_lora(empty_model(tmp_path / "dense"), config) == []


def test_layers_that_kernels_read_past_an_adapter_are_left_out_and_said() -> None:
    """Fused kernels of Mamba-2 take the weight of out_proj: peft refuses some such families, others train in vain."""
    fields = {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2,
        "vocab_size": 61, "num_hidden_layers": 2, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8,
        "mamba_n_groups": 2, "mamba_d_state": 8,
    }  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bamba", **fields))
    notes = check_lora(model, LoraConfig())
    assert len(notes) == 1 and "model.layers.mamba.out_proj" in notes[0]
    with pytest.raises(ConfigError, match="is read past it"):
        check_lora(model, LoraConfig(target_modules=("out_proj",)))
    assert check_lora(model, LoraConfig(target_modules=("in_proj", "o_proj"))) == []


EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


@pytest.mark.parametrize("fields", [{}, {"quantize": "nf4"}], ids=["lora", "nf4"])
def test_experts_get_adapters_that_come_back_and_are_merged(tmp_path: Path, fields: dict[str, Any]) -> None:
    """An adapter around another one, which is lost where the model is saved, walked in tiles or merged."""
    base = tmp_path / "base"
    save_model(build_model({**TINY, "model_type": "mixtral", "num_local_experts": 4}, seed=0), base)
    config = LoraConfig(rank=2, target_modules=("q_proj",), target_parameters=EXPERTS, **fields)
    notes = check_lora(empty_model(base), config)
    assert ["not quantised" in note for note in notes] == ([True] if fields else [])
    model = load_model(base).train()
    plain = hidden_states(model, tokens(50))
    apply_lora(model, config, seed=1)
    if not fields:
        assert torch.equal(hidden_states(model, tokens(50)), plain)
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    losses = steps(model)
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(value, frozen[name]) for name, value in model.named_parameters() if name in frozen)
    assert sum("experts" in name for name, p in model.named_parameters() if p.requires_grad) == 2 * 4
    save_adapter(model, tmp_path / "adapter", base=base)
    loaded = load_model(tmp_path / "adapter")
    expected = model(tokens(1, 20)).logits
    assert torch.equal(loaded(tokens(1, 20)).logits, expected)
    if not fields:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.PeftModel.from_pretrained(load_model(base), tmp_path / "adapter")
        assert torch.equal(theirs(tokens(1, 20)).logits, expected)
    loss(model).backward()
    enable_tiled_mlp(enable_checkpointing(loaded.train(), "full"), 16)
    loss(loaded).backward()
    for (name, one), other in zip(model.named_parameters(), loaded.parameters()):
        if one.requires_grad:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6, msg=name)
    report = export_model(load_model(tmp_path / "adapter"), tmp_path / "out")
    assert report.kind == "merged"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(merged(tokens(1, 20)).logits, expected, rtol=0, atol=1e-3)


def test_tensors_of_experts_that_are_not_there_are_refused(base: Path) -> None:
    """A misspelt name, or a dense model, would train attention alone."""
    config = LoraConfig(target_parameters=EXPERTS)
    with pytest.raises(ConfigError, match="no tensor of experts is called"):
        apply_lora(load_model(base), config, seed=0)
    with pytest.raises(ValueError, match="no dropout and no dora"):
        LoraConfig(target_parameters=EXPERTS, dropout=0.1)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "hqq", "torchao"])
def test_a_folder_that_is_quantised_is_one_message(method: str, tmp_path: Path) -> None:
    """The package that reads it was missing: an ImportError traceback, in every command."""
    save_model(build_model(TINY, seed=0), tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    settings = {"quant_method": method, "bits": 4}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    with pytest.raises(DataError, match=rf"cannot be read here \({method}\)"):
        load_model(tmp_path / "base")


def test_a_base_that_was_stored_in_four_bits_is_read_and_not_trained_or_exported(tmp_path: Path) -> None:
    """Training ran to its end and could not save; adapters ended in a traceback of peft."""
    save_model(build_model({**TINY, "intermediate_size": 128}, seed=0), tmp_path / "base")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with without_advice():
        small = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=how, dtype=torch.float32
        )
        small.save_pretrained(tmp_path / "four")
        read = load_model(tmp_path / "four")
        with torch.no_grad():
            assert torch.isfinite(read(tokens(1, 20)).logits).all()
    with pytest.raises(ConfigError, match=r"not exported(.|\n)*bitsandbytes"):
        export_model(read, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    stage = {
        "name": "s",
        "context_length": 16,
        "steps": 1,
        "batch_tokens": 16,
        "lr": 0.1,
        "streams": {"a": {"store": "s"}},
    }
    for lora in (None, {"rank": 2}):
        recipe = TrainConfig.from_dict({"model": {"path": "four"}, "stages": [stage], "lora": lora})
        with pytest.raises(ConfigError, match=r"not trained(.|\n)*bitsandbytes"):
            plan_run(recipe, data_root=tmp_path)


def test_an_adapter_beside_a_rope_that_nobody_can_ask_for_comes_back() -> None:
    """Gemma 4's RoPE type is its own: asked for again by name, it was refused, and the adapter was lost."""
    from tests.models.family_columns import columns_alone

    assert columns_alone("gemma4_text", ["LoRA"])["LoRA"].verdict == "yes"
