"""A tiny model of a config, run once: what a family's layers ask of attention shows in a forward pass only.

The stand-in has the config's classes, kinds of layers and heads, and a few widths: some thousand weights for a model
of billions. It reads two documents in one row. What longspan's attention refuses, it refuses here; and what comes out
has to be what transformers' own attention gives each document alone.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from longspan.core.errors import ArgumentError, UserError
from longspan.core.log import get_logger
from longspan.models.families import RIGHT
from longspan.models.hf import Documents, enable, hidden_states, without_bars
from longspan.models.hf_config import CHOSEN_EXPERTS, text_config
from longspan.models.init import seeded

__all__ = ["check_forward", "check_unknown_family", "small_config"]

DOCUMENTS = (7, 5)
REACH = 4
WIDTH = 16
VOCABULARY = 64
EXPERTS = 8
TOLERANCE = 1e-2
"""Of the largest number: fp32 of a few layers is off by 1e-5."""
MOST_WEIGHTS = 100_000_000
"""Of a stand-in: one whose fields have other names than those that are made small is not run."""


def check_unknown_family(config: PretrainedConfig) -> None:
    """Refuse a model for answers as `check_forward` does for training, if its family is none that a test found right.

    Raises:
        ArgumentError: what `check_forward` raises.
    """
    if text_config(config).model_type not in RIGHT:
        check_forward(config, training=False)


def check_forward(config: PretrainedConfig, *, training: bool = True) -> None:
    """Refuse a model whose forward pass would: with longspan's attention, in training or not, on packed documents.

    A config of which no small stand-in can be made is let through, with a warning.

    Raises:
        ArgumentError: what the forward pass refuses, or a model that mixes documents.
    """
    fields = json.dumps(config.to_dict(), sort_keys=True, default=str)
    found = _refusal(fields, training=training)
    if found is not None:
        raise ArgumentError(
            f"a {config.model_type} model cannot be {'trained' if training else 'run'}: {found}"
        )


def small_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of a config with few weights: the same kinds of layers, heads of the same size."""
    small = copy.deepcopy(config)
    text = text_config(small)
    # How weights are stored does not change their shape.
    vars(small).pop("quantization_config", None)
    for name in getattr(small, "sub_configs", {}):
        part = getattr(small, name, None)
        if isinstance(part, PretrainedConfig) and part is not text:
            _set(part, _few_layers(part.to_dict(), 1))
    fields = text.to_dict()
    kinds = fields.get("layer_types") or []
    firsts = [kinds.index(kind) for kind in set(kinds)]
    # Mixtures of experts begin with so many dense layers.
    dense = fields.get("first_k_dense_replace")
    changes = _few_layers(fields, 1 + max(1, *firsts, dense if isinstance(dense, int) else 0))
    changes |= _few_heads(fields) | _few_experts(fields)
    for name, value in fields.items():
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if "intermediate_size" in name:
            changes[name] = min(value, WIDTH)
        elif name in ("sliding_window", "attention_chunk_size"):
            # Below the documents' lengths: one that a family does not hand to its attention shows.
            changes[name] = min(value, REACH)
        elif name.startswith("vocab_size"):
            changes[name] = VOCABULARY
        elif name.endswith("_token_id") and value >= 0:
            # Beyond the words of the documents.
            changes[name] = VOCABULARY // 2 + value % (VOCABULARY // 2)
    _set(text, changes)
    return small


def _few_layers(fields: dict[str, Any], layers: int) -> dict[str, Any]:
    """Return the fields of a model of so many layers: their number, and the lists with an entry for each."""
    number = fields.get("num_hidden_layers")
    if not isinstance(number, int) or number <= layers:
        return {}
    lists = {
        name: value[:layers]
        for name, value in fields.items()
        if isinstance(value, list) and len(value) == number
    }
    # Layers that differ from the others, by their number (Gemma 4).
    each = {
        index: own for index, own in (fields.get("per_layer_config") or {}).items() if int(index) < layers
    }
    return {"num_hidden_layers": layers, **lists, **({"per_layer_config": each} if each else {})}


def _few_heads(fields: dict[str, Any]) -> dict[str, Any]:
    """Return heads and width divided by the same number: the size of a head stays, and queries to a key."""
    heads, hidden = fields.get("num_attention_heads"), fields.get("hidden_size")
    kv_heads = fields.get("num_key_value_heads") or heads
    if not (isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(hidden, int)):
        return {}
    share = math.gcd(heads, kv_heads, hidden)
    # Two heads of keys stay: some families split them.
    share = max(part for part in range(1, share + 1) if share % part == 0 and (part == 1 or kv_heads > part))
    made = {"num_attention_heads": heads // share, "hidden_size": hidden // share}
    return made | ({"num_key_value_heads": kv_heads // share} if fields.get("num_key_value_heads") else {})


def _few_experts(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fewer experts, in as many groups: each group has two, and those that are chosen enough."""
    numbers = {name: value for name, value in fields.items() if isinstance(value, int) and value > 0}
    groups = numbers.get("n_group", 1)
    chosen = max(numbers.get(name, 1) for name in CHOSEN_EXPERTS)
    size = max(2, -(-EXPERTS // groups), -(-2 * chosen // numbers.get("topk_group", 1)))
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return {name: groups * size for name in names if numbers.get(name, 0) > groups * size}


def _set(config: PretrainedConfig, changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        setattr(config, name, value)


@lru_cache(maxsize=32)
def _refusal(fields: str, *, training: bool) -> str | None:
    """Return what a model of this config refuses, None if it runs."""
    ids = torch.arange(1, 1 + sum(DOCUMENTS))
    parts = ids.split(DOCUMENTS)
    settings = json.loads(fields)
    with warnings.catch_warnings(), without_bars(), seeded(0, "stand-in"), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            model = _built(small_config(AutoConfig.for_model(**settings)))
            if model is None:
                raise ArgumentError(f"it would have more than {MOST_WEIGHTS:,} weights")
            model(input_ids=parts[0][None], use_cache=False)
        except Exception as error:  # noqa: BLE001
            # Of hundreds of families, each may want its sizes to fit in a way of its own.
            get_logger("models").warning(
                "no small stand-in of a %s model can be made (%s: %s): whether its layers do what longspan's attention "
                "asks of them shows at the first step",
                settings["model_type"],
                type(error).__name__,
                str(error).partition("\n")[0],
            )
            return None
        try:
            alone = torch.cat([hidden_states(model, part) for part in parts])
            enable(model)
            documents = Documents.from_cu_seqlens([0, DOCUMENTS[0], len(ids)])
            # Dropout is asked for in training only.
            hidden_states(model.train(training), ids, documents)
            packed = hidden_states(model.eval(), ids, documents)
        except UserError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001
            return (
                f"its forward pass with longspan's attention fails\n  found: {type(error).__name__}: {error}"
            )
    if not float((packed - alone).abs().max()) <= TOLERANCE * float(alone.abs().max()):
        return "with longspan's attention it computes something else than transformers does for each document alone"
    return None


def _built(config: PretrainedConfig) -> PreTrainedModel | None:
    """Return a model with transformers' own attention; None if it would not be small."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    if sum(weight.numel() for weight in empty.parameters()) > MOST_WEIGHTS:
        return None
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
