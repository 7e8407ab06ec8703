"""Files beside the weights of a model folder: tokenizer, settings of generation, names that older readers know.

transformers 5 writes RoPE as `rope_parameters`. transformers 4, vLLM and the converters of llama.cpp read other names
and silently take defaults where they do not find them:

    rope_theta, partial_rotary_factor, rope_scaling      the settings of one RoPE, apart
    original_max_position_embeddings                     of LongRoPE, at the top; transformers 5 prefers it in Phi-3
    rope_scaling {type, short_factor, long_factor}       of Phi-3, with no other key; {type, factor} of OLMo 1 and 2
    rope_theta and rope_local_base_freq                  of full and of sliding attention (Gemma 3)
    global_rope_theta and local_rope_theta               the same in ModernBERT's decoder
    rotary_emb_base, rotary_pct                          theta and rotated part of GPT-NeoX
    num_experts                                          of Qwen3-MoE

What 4.57 computes for each family was seen by loading small models of all families, with every type of RoPE, in both.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from longspan.core.files import read_json, write_json
from longspan.models.hf_config import longrope_scale, rope_by_layer_type, rope_meaning

__all__ = ["TOKENIZER_FILES", "complete_folder"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
NEOX = ("gpt_neox", "gpt_neox_japanese")
OLMO = ("olmo", "olmo2")
PHI = ("phi3", "phi4_multimodal")
# By model type: names of the thetas of full and of sliding attention.
TWO_THETAS = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
}
# Types of RoPE beside the default one that transformers 4.57 computes, where that is not all of them.
COMPUTED: dict[str, frozenset[str]] = {
    "hunyuan_v1_dense": frozenset({"linear", "yarn", "llama3", "longrope"}),
    "hunyuan_v1_moe": frozenset({"linear", "yarn", "llama3", "longrope"}),
    "llama4_text": frozenset({"llama3"}),
    "modernbert-decoder": frozenset(),
    "nemotron": frozenset(),
    **dict.fromkeys(OLMO, frozenset({"linear", "dynamic"})),
    **dict.fromkeys(PHI, frozenset({"longrope"})),
}
# Families there whose full and sliding attention have one theta.
ONE_THETA = ("olmo3", "modernbert-decoder")
# By model type: (older name, name) of other fields.
RENAMED = {"qwen3_moe": (("num_experts", "num_local_experts"),)}
APART = ("rope_theta", "partial_rotary_factor")
NOTE = "transformers 4 and what reads as it does take another RoPE from this config.json: use transformers 5"


def complete_folder(folder: Path, *, tokenizer: str | Path | None) -> list[str]:
    """Finish a folder that transformers wrote, in place; return what its readers should know.

    The tokenizer files come from the folder `tokenizer`. Lengths that the model has outgrown are raised to its own.
    """
    for name in TOKENIZER_FILES:
        if tokenizer is not None and (Path(tokenizer) / name).is_file():
            shutil.copyfile(Path(tokenizer) / name, folder / name)
    values = read_json(folder / "config.json")
    context = values.get("text_config", values).get("max_position_embeddings")
    notes = []
    # Servers take the smaller one of this and the model's for the longest prompt.
    _raise_length(folder / "tokenizer_config.json", "model_max_length", context)
    # The limit counts the prompt, so generate() refuses a longer one.
    before = _raise_length(folder / "generation_config.json", "max_length", context)
    if before is not None:
        notes.append(f"max_length in generation_config.json was {before}, now it is the model's {context}")
    return notes + _add_older_names(folder / "config.json")


def _raise_length(path: Path, key: str, context: int | None) -> int | None:
    """Raise a number in a file to the context; return what it was, None if it is left alone."""
    values = read_json(path) if path.is_file() else {}
    before = values.get(key)
    if not isinstance(before, int) or context is None or before >= context:
        return None
    write_json(path, values | {key: context})
    return before


def _add_older_names(path: Path) -> list[str]:
    """Write older names of a config too, all that transformers 5 reads as what they stand for."""
    values = read_json(path)
    text = values.get("text_config") or values
    own = {"torch_dtype": values["dtype"]} if "dtype" in values else {}
    own |= {old: text[new] for old, new in RENAMED.get(text.get("model_type"), ()) if new in text}
    rope = _older_rope(text)
    for names in (rope, {key: value for key, value in rope.items() if key != "rope_scaling"}, {}):
        whole = values | own
        if text is values:
            whole |= names
        else:
            whole["text_config"] = text | names
        write_json(path, whole)
        # Some names are read before rope_parameters, and say less.
        if _reads_as(path, text):
            break
    return [NOTE] if rope != names or not _said_by_older_names(text) else []


def _older_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    rope, kind = values.get("rope_parameters"), values.get("model_type", "")
    if not isinstance(rope, Mapping) or not rope:
        return {}
    by_layer = rope_by_layer_type(rope)
    if by_layer.keys() == {"all"}:
        return _of_one(rope, kind, values.get("max_position_embeddings"))
    full, sliding = by_layer.get("full_attention"), by_layer.get("sliding_attention")
    if full is None or sliding is None:
        return {}
    older = _of_one(full, kind, values.get("max_position_embeddings"))
    names = TWO_THETAS.get(kind, ("rope_theta", None))
    older[names[0]] = older.pop("rope_theta")
    return older | ({names[1]: sliding["rope_theta"]} if names[1] is not None else {})


def _said_by_older_names(values: Mapping[str, Any]) -> bool:
    """Whether transformers 4.57 computes the RoPE of a config, by what it is known to lack."""
    rope, kind = values.get("rope_parameters"), values.get("model_type", "")
    if not isinstance(rope, Mapping) or not rope:
        return True
    kinds = {found.get("rope_type", "default") for found in rope_by_layer_type(rope).values()} - {"default"}
    thetas = {found.get("rope_theta") for found in rope_by_layer_type(rope).values()}
    return kinds <= COMPUTED.get(kind, kinds) and not (kind in ONE_THETA and len(thetas) > 1)


def _of_one(rope: Mapping[str, Any], kind: str, context: int | None) -> dict[str, Any]:
    """Return the older names of one RoPE."""
    older = {key: rope[key] for key in APART if key in rope}
    if kind in NEOX:
        older |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope["partial_rotary_factor"]}
    scaling = {key: value for key, value in rope.items() if key not in APART}
    if scaling.get("rope_type", "default") == "default":
        return older | {"rope_scaling": None}
    original = rope.get("original_max_position_embeddings")
    if original is not None and (scaling["rope_type"] == "longrope" or kind in PHI):
        older["original_max_position_embeddings"] = original
    if kind in OLMO and scaling["rope_type"] in COMPUTED[kind]:
        scaling = {"type": scaling["rope_type"], "factor": scaling["factor"]}
    elif scaling["rope_type"] == "longrope" and kind in PHI:
        scaling = {"type": "longrope"} | {key: rope[key] for key in ("short_factor", "long_factor")}
    elif scaling["rope_type"] == "longrope" and context is not None:
        # transformers 4 derives it from the context length, whatever the factor.
        derived = longrope_scale({"original_max_position_embeddings": original}, context)
        if (scale := longrope_scale(rope, context)) != derived:
            scaling["attention_factor"] = scale
    return older | {"rope_scaling": scaling}


def _reads_as(path: Path, written: Mapping[str, Any]) -> bool:
    try:
        config = AutoConfig.from_pretrained(path.parent).get_text_config(decoder=True)
    except (ValueError, KeyError, TypeError, StrictDataclassError):
        return False
    context = getattr(config, "max_position_embeddings", None)
    read = rope_meaning(getattr(config, "rope_parameters", None) or {}, context)
    return read == rope_meaning(written.get("rope_parameters") or {}, context)
