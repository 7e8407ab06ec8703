"""What a model has to be for longspan to run it, known from its config; the language model of a larger one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from longspan.core.errors import ArgumentError, ConfigError, DataError
from longspan.core.log import log_once
from longspan.models.head import backbone
from longspan.models.hf_config import text_config
from longspan.models.mixers import mixers

__all__ = [
    "RIGHT",
    "check_family",
    "check_layers",
    "check_registry",
    "hand_documents_on",
    "language_model",
    "quantized_as",
    "reading_quantized",
    "refuse_quantized",
]

ATTENTION_LAYERS = {"attention", "full_attention", "sliding_attention", "chunked_attention"}
STATELESS_LAYERS = {"mlp", "moe"}
STATE = "they carry a state over document borders"
# Kinds of layers that are known to be something else.
OTHER_LAYERS = {
    "conv": "short convolutions, which run over document borders",
    "hybrid": STATE,
    "indexed_attention": "sparse attention, whose keys are chosen by an indexer",
    "linear_attention": STATE,
    "mamba": STATE,
}
DROPS_KEYWORDS = ("nemotron",)
TAKES_REGISTRY_UNSAID = frozenset({
    "BailingHybridForCausalLM", "BambaForCausalLM", "FalconH1ForCausalLM", "JambaForCausalLM", "KimiLinearForCausalLM",
    "NemotronHForCausalLM", "OlmoHybridForCausalLM", "Qwen3NextForCausalLM", "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForCausalLM", "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration",
    "ZambaForCausalLM", "Zamba2ForCausalLM",
})  # fmt: skip
"""Classes whose attention does come from the transformers registry, though they do not say so."""
RIGHT = frozenset({
    "afmoe", "apertus", "arcee", "aria_text", "axk1", "bailing_hybrid", "bamba", "beam", "bitnet", "cohere",
    "cohere2", "cohere2_moe", "ctrl", "cwm", "dbrx", "deepseek_v2", "deepseek_v3", "diffllama", "dots1", "emu3",
    "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "falcon_h1", "flex_olmo", "flint", "fuyu", "gemma", "gemma2",
    "gemma3", "gemma3_text", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "glm",
    "glm4", "glm4_moe", "glm4_moe_lite", "got_ocr2", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss",
    "granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "helium",
    "hrm_text", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3", "iquestcoder", "jais2",
    "jamba", "jetmoe", "kimi_linear", "kolibri1", "laguna", "lfm2", "lfm2_moe", "lfm3", "llama", "llama4",
    "llama4_text", "longcat_flash", "mellum", "mimo_v2_flash", "minicpm3", "minimax", "minimax_m2",
    "minimax_m3_vl_text", "ministral", "ministral3", "mistral", "mixtral", "mllama", "moshi",
    "moss_transcribe_diarize", "nanochat", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe",
    "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_5", "qwen3_5_moe",
    "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3", "solar_open", "starcoder2",
    "vaultgemma", "youtu", "zamba", "zamba2",
})  # fmt: skip
"""Families that docs/models.md lists as right, which a test compares: they are not tried when they are opened."""


def check_family(config: PretrainedConfig) -> None:
    """Refuse a family whose attention cannot be replaced: some fail on the name of ours while they are built.

    Raises:
        ArgumentError: one that does not take its attention from the transformers registry.
    """
    family = AutoModelForCausalLM._model_mapping.get(type(text_config(config)), None)
    if family is not None:
        check_registry(family)


def check_registry(family: type[PreTrainedModel]) -> None:
    """Refuse a class of models that does not take its attention from the transformers registry.

    Raises:
        ArgumentError: naming it.
    """
    if getattr(family, "_supports_attention_backend", False) or family.__name__ in TAKES_REGISTRY_UNSAID:
        return
    raise ArgumentError(
        f"{family.__name__} does not take its attention from the transformers registry",
        fix="use a model family that does, such as llama, qwen3 or mistral",
    )


def check_layers(model: PreTrainedModel) -> None:
    """Refuse a model with layers that the document table does not reach.

    Raises:
        ArgumentError: naming their kind.
    """
    kinds = (
        set(getattr(text_config(model.config), "layer_types", None) or ())
        - ATTENTION_LAYERS
        - STATELESS_LAYERS
    )
    if any(mixers(model)):
        kinds -= OTHER_LAYERS.keys() - {"indexed_attention"}
    for kind in sorted(kinds):
        raise ArgumentError(
            f"{type(model).__name__} has layers that longspan attention does not take the place of",
            found=f"{kind}: {OTHER_LAYERS.get(kind, 'no kind of attention that is known')}",
            allowed=", ".join(sorted(ATTENTION_LAYERS)),
        )


def hand_documents_on(model: PreTrainedModel) -> None:
    """Let the document table reach attention in families whose layers drop the keywords that they do not know."""
    if text_config(model.config).model_type not in DROPS_KEYWORDS:
        return
    for layer in model.modules():
        attention = getattr(layer, "self_attn", None)
        if isinstance(attention, torch.nn.Module) and not hasattr(attention, "longspan_documents"):
            attention.longspan_documents = None  # type: ignore[assignment]
            layer.register_forward_pre_hook(_note_documents, with_kwargs=True)
            attention.register_forward_pre_hook(_give_documents, with_kwargs=True)


def _note_documents(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
    layer.self_attn.longspan_documents = kwargs.get("documents")


def _give_documents(attention: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "documents": attention.longspan_documents}


def quantized_as(config: PretrainedConfig) -> str | None:
    """Return how the weights of a folder are quantised (gptq, awq, fp8, bitsandbytes, ...); None = they are not."""
    for found in (config, text_config(config)):
        settings: Any = getattr(found, "quantization_config", None)
        if settings:
            values = settings if isinstance(settings, dict) else settings.to_dict()
            kind = values.get("quant_method")
            return str(getattr(kind, "value", kind) or "an unknown method")
    return None


def refuse_quantized(config: PretrainedConfig, path: str | Path, *, verb: str) -> None:
    """Refuse a folder of quantised weights where they would have to change.

    Raises:
        ConfigError: with the method that the folder names; `verb` says what cannot be done.
    """
    kind = quantized_as(config)
    if kind is not None:
        raise ConfigError(
            f"a model that is stored quantised is not {verb}",
            found=f"quantization_config of {path}: {kind}",
            allowed="weights in float32, bfloat16 or float16",
            fix="name the model that it was made from; lora.quantize: nf4 keeps that in 4 bits while adapters train",
        )


@contextlib.contextmanager
def reading_quantized(config: PretrainedConfig, path: str | Path) -> Iterator[None]:
    """Turn what a quantised folder raises where its package or device is missing into one message.

    Raises:
        DataError: it cannot be read here.
    """
    try:
        yield
    except (ImportError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        kind = quantized_as(config)
        if kind is None or isinstance(error, torch.OutOfMemoryError):
            raise
        raise DataError(
            f"the quantised weights in {path} cannot be read here ({kind})",
            found=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:300],
            fix="install the package that reads them, or name the model that it was made from",
        ) from error


def language_model(model: PreTrainedModel, path: str | Path) -> PreTrainedModel:
    """Return the causal language model inside one that reads images or sound too; the rest is left out, with a warning.

    A model of text alone is returned as it is. The parameters are shared, not copied.

    Raises:
        ArgumentError: one whose language model is not a causal model that transformers knows.
    """
    text = text_config(model.config)
    if text is model.config:
        return model
    with torch.device("meta"):
        alone = AutoModelForCausalLM.from_config(text)
    inner = model.get_decoder()
    if type(inner) is not type(backbone(alone)):
        raise ArgumentError(
            f"the language model in {type(model).__name__} cannot be taken alone",
            found=type(inner).__name__,
            allowed=type(backbone(alone)).__name__,
        )
    setattr(alone, alone.base_model_prefix, inner)
    alone.set_output_embeddings(model.get_output_embeddings())
    alone.generation_config = model.generation_config
    text.dtype = model.config.dtype
    log_once(
        "models",
        f"{path} is a {type(model).__name__}: its language model alone is used, as {type(alone).__name__}",
    )
    return alone.train(model.training)
