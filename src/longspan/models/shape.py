"""The shape of a model for `plan`, taken from the model itself: built without weights, and run without numbers.

Every weight is counted on the model that transformers builds of a config on torch's meta device. What each layer asks
of attention (heads, widths, windows) is what arrives at the attention function in a forward pass there. Experts and
layers with a state are stepped over: their weights are counted, and what is computed follows from their sizes. A layer
that cannot be told from these is refused, never guessed.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AutoModelForCausalLM,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import AttentionMaskInterface

from longspan.core.errors import DataError
from longspan.kernels.experts import are_experts
from longspan.models.attention import attention_form
from longspan.models.head import backbone
from longspan.models.hf_config import CHOSEN_EXPERTS, changed_config, experts_per_token, text_config
from longspan.models.states import state_elements
from longspan.plan.models import ModelShape

__all__ = ["model_shape", "shape_of_fields"]

NOTED = "longspan-shapes"
SIZES = (
    "expert",
    "moe",
    "lora_rank",
    "window",
    "chunk_size",
    "state_size",
    "ssm",
    "mamba",
    "head",
    "intermediate",
)
"""Of what names of fields that say how much a layer is and computes."""
TAKEN = ("sliding_window_pattern", "use_sliding_window", "max_window_layers")
"""Fields of such names that transformers takes from old files, or that say nothing by themselves."""
TOKENS = 6
_found: dict[tuple[str, str], ModelShape] = {}


class _AttentionCall(NamedTuple):
    """What one call asks for."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None
    chunk: int | None


class _Layer(NamedTuple):
    """One layer as it is found; equal ones are one kind."""

    parameters: int
    active: int
    mixer: int
    """Of the active ones, those of attention or of the state."""
    attention: tuple[_AttentionCall, ...]
    state: int
    experts: tuple[int, int]
    matrices: tuple[int, ...]
    latent: int


class _Look:
    """Notes what happens in each layer of a forward pass."""

    def __init__(self, layers: int) -> None:
        self.layer: int | None = None
        self.calls = [0] * layers
        self.attention: list[list[_AttentionCall]] = [[] for _ in range(layers)]
        self.mixers: list[set[nn.Module]] = [set() for _ in range(layers)]

    def enter(self, layer: int, *_: Any) -> None:
        self.layer = layer
        self.calls[layer] += 1

    def attend(self, module: nn.Module, q: Any, k: Any, v: Any, *_: Any, **kwargs: Any) -> tuple[Any, None]:
        form = attention_form(module, q, None, kwargs.get("sliding_window"), None, None)
        if k.shape[2] != q.shape[2]:
            raise ValueError(f"{type(module).__name__} attends to {k.shape[2]} keys of {q.shape[2]} tokens")
        if self.layer is not None:
            self.attention[self.layer].append(
                _AttentionCall(
                    q.shape[1], k.shape[1], q.shape[-1], v.shape[-1], form.window, form.attention_chunk
                )
            )
            self.mixers[self.layer].add(module)
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]), None


def model_shape(config: PretrainedConfig, name: str = "model") -> ModelShape:
    """Return the shape of the language model of a config; nothing is read but the config.

    Raises:
        DataError: a model that transformers does not build of it, or with layers whose work is not known.
    """
    key = (json.dumps(config.to_dict(), sort_keys=True, default=str), name)
    if key not in _found:
        _found[key] = _shape(config, name)
    return _found[key]


def shape_of_fields(
    fields: Mapping[str, Any], name: str, *, overrides: Mapping[str, Any] | None = None
) -> ModelShape:
    """Return the shape that the fields of a `config.json` describe, with those of `overrides` in their place.

    Raises:
        ConfigError: `overrides` are no fields of this model.
        DataError: no fields of a model that transformers knows, or one without an estimate.
    """
    family = fields.get("model_type")
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        raise DataError(
            f"the configuration of {name} is of no model that transformers knows",
            found=f"model_type {family!r}",
        )
    try:
        config = CONFIG_MAPPING[family].from_dict(dict(fields))
    except Exception as error:
        # Each family checks, or divides by, fields of its own.
        raise DataError(
            f"transformers refuses the configuration of {name}",
            found=" ".join(line.strip() for line in str(error).splitlines()[:2]) or type(error).__name__,
        ) from error
    _refuse_strange_sizes(fields, config, name)
    return model_shape(changed_config(config, overrides=overrides or {}), name)


def _refuse_strange_sizes(fields: Mapping[str, Any], config: PretrainedConfig, name: str) -> None:
    """Refuse sizes that the family does not have: transformers keeps such fields and builds a model without them.

    What the class of the config does not list may still be read by that of the model: `head_dim` of Qwen3's mixtures.
    """
    known = {*type(config).__dataclass_fields__, *type(config).attribute_map, *TAKEN}
    code = ""
    with contextlib.suppress(ImportError, OSError):
        module = type(config).__module__.replace(".configuration_", ".modeling_")
        code = inspect.getsource(importlib.import_module(module))
    strange = [
        f"{key} {value!r}"
        for key, value in fields.items()
        if key not in known
        and not re.search(rf"\b{re.escape(key)}\b", code)
        and any(word in key for word in SIZES)
        and ((isinstance(value, int) and value > 1) or (isinstance(value, list) and value))
    ]
    if strange:
        raise DataError(
            f"there is no estimate for {name}: its configuration has sizes that {config.model_type} has not",
            found=", ".join(strange),
            fix="correct model_type, or leave them out if the model has no such layers",
        )
    for part, inner in fields.items():
        if isinstance(inner, Mapping) and isinstance(
            of_part := getattr(config, part, None), PretrainedConfig
        ):
            _refuse_strange_sizes(inner, of_part, name)


def _shape(config: PretrainedConfig, name: str) -> ModelShape:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _empty(config, name)
        empty = [key for key, weight in model.named_parameters() if not weight.numel()]
        if empty:
            raise DataError(
                f"there is no estimate for {name}: a size of its configuration is zero",
                found=f"{empty[0]} has no elements",
            )
        layers = _layers(model)
        found = _look_at(model, layers, name)
    head = model.get_output_embeddings()
    if head is None:
        raise DataError(f"{name} has no output embedding: it is no causal language model")
    vocab, hidden = head.weight.shape
    inner = sum(layer.parameters for layer in found)
    outside = sum(weight.numel() for weight in model.parameters()) - inner
    tied = head.weight is model.get_input_embeddings().weight
    kinds = tuple(
        _kind(
            name,
            layer,
            count,
            int(hidden),
            int(vocab),
            tied=tied,
            outside=outside,
            norms=_has_head_norms(layers),
        )
        for layer, count in Counter(found).items()
    )
    if len(kinds) == 1:
        return kinds[0]
    # Attention decides how a model can be spread: the kind that sees furthest stands for the model.
    first = max(
        kinds, key=lambda kind: (kind.heads > 0, kind.window is None and kind.chunk is None, kind.layers)
    )
    return first._replace(layers=len(layers), matrices=(), mixed=kinds)


def _empty(config: PretrainedConfig, name: str) -> PreTrainedModel:
    config = copy.deepcopy(config)
    error: Exception | None = None
    text = text_config(config)
    for each in (text,) if text is config else (text, config):
        for part in (each, text_config(each)):
            vars(part).pop("quantization_config", None)
        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(each, attn_implementation="eager").eval()
        except Exception as failed:  # noqa: BLE001
            # Of hundreds of families, each may want its sizes to fit in a way of its own.
            error = error or failed
    assert error is not None
    mapped = AutoModelForCausalLM._model_mapping
    if type(text) not in mapped and type(config) not in mapped:
        raise DataError(
            f"there is no estimate for {name}: transformers has no causal language model of this family alone",
            found=f"model_type {config.model_type!r}",
            fix="such a model does not train here either; plan the family of its language model, by a config of that",
        )
    raise DataError(
        f"transformers builds no causal language model of the config of {name}",
        found=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}",
    )


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the list of layers: of all lists the one with most weights."""
    lists = [each for each in backbone(model).modules() if isinstance(each, nn.ModuleList) and len(each)]
    if not lists:
        raise DataError(f"{type(model).__name__} has no list of layers")
    return max(lists, key=lambda each: sum(weight.numel() for weight in each.parameters()))


def _look_at(model: PreTrainedModel, layers: nn.ModuleList, name: str) -> list[_Layer]:
    look = _Look(len(layers))
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(partial(_enter, look, index))
    experts = {module: _chosen(module, model, name) for module in layers.modules() if are_experts(module)}
    states = {module for module in layers.modules() if _has_state(module)}
    # A gate inside of one is a part of it.
    states -= {part for module in states for part in module.modules() if part is not module}
    for module in (*experts, *states):
        module.forward = _step_over
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    try:
        with _noting(model, look), torch.no_grad():
            cache = DynamicCache(config=text_config(model.config))
            backbone(model)(input_ids=ids, past_key_values=cache, use_cache=True)
    except Exception as error:
        raise DataError(
            f"there is no estimate for {name}: what its layers compute is not known",
            found=f"{type(model).__name__}, {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}",
        ) from error
    if set(look.calls) != {1}:
        raise DataError(
            f"there is no estimate for {name}: its layers are not run once each",
            found=f"calls of the layers of {type(model).__name__}: {sorted(set(look.calls))}",
        )
    if not states and not any(look.attention):
        raise DataError(
            f"there is no estimate for {name}: its attention is not taken from the transformers registry",
            found=type(model).__name__,
        )
    seen: set[nn.Parameter] = set()
    return [
        _layer(layer, look.attention[index], look.mixers[index], experts, states, seen, name)
        for index, layer in enumerate(layers)
    ]


def _enter(look: _Look, index: int, *_: Any) -> None:
    look.enter(index)


def _step_over(*args: Any, **kwargs: Any) -> Any:
    hidden: torch.Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return torch.empty_like(hidden)


@contextlib.contextmanager
def _noting(model: PreTrainedModel, look: _Look) -> Iterator[None]:
    AttentionInterface.register(NOTED, look.attend)
    AttentionMaskInterface.register(NOTED, _no_mask)
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PretrainedConfig):
            module.config._attn_implementation_internal = NOTED
    try:
        yield
    finally:
        look.layer = None


def _no_mask(**_: Any) -> None:
    return None


def _chosen(module: nn.Module, model: PreTrainedModel, name: str) -> int:
    chosen = experts_per_token(model.config)
    if chosen is None:
        raise DataError(
            f"there is no estimate for {name}: it does not say how many of its experts compute a token",
            found=type(module).__name__,
            allowed=f"a config with one of {', '.join(CHOSEN_EXPERTS)}",
        )
    return chosen


def _has_state(module: nn.Module) -> bool:
    own = {key for key, _ in module.named_parameters(recurse=False)}
    convolves = any(isinstance(child, nn.Conv1d) for child in module.children())
    return (
        bool(own & {"A_log", "dt_bias", "A", "recurrent_param"})
        or convolves
        or "Lightning" in type(module).__name__
    )


def _state_elements(module: nn.Module, name: str) -> int:
    elements = state_elements(module)
    if elements is None:
        raise DataError(
            f"there is no estimate for {name}: the size of a layer's state is not known",
            found=type(module).__name__,
        )
    return elements


def _layer(
    layer: nn.Module,
    attention: list[_AttentionCall],
    mixers: set[nn.Module],
    experts: dict[nn.Module, int],
    states: set[nn.Module],
    seen: set[nn.Parameter],
    name: str,
) -> _Layer:
    own = [module for module in layer.modules() if module in states]
    inside = {id(weight) for module in (*mixers, *own) for weight in module.parameters()}
    share: dict[int, float] = {}
    counts = (0, 0)
    for module in layer.modules():
        if module in experts:
            for weight in module.parameters(recurse=False):
                share[id(weight)] = min(1.0, experts[module] / weight.shape[0])
                counts = (max(counts[0], weight.shape[0]), experts[module])
        elif isinstance(module, nn.Embedding):
            share.update({id(weight): 0.0 for weight in module.parameters(recurse=False)})
    parameters, active, mixer, matrices = 0, 0.0, 0.0, []
    for weight in layer.parameters():
        # Some families run one layer's weights in several places: they are there once, and computed with each time.
        if weight not in seen:
            parameters += weight.numel()
            if weight.dim() > 1:
                matrices.append(weight.numel())
        seen.add(weight)
        if weight.dim() > 1:
            worked = weight.numel() * share.get(id(weight), 1.0)
            active += worked
            mixer += worked if id(weight) in inside else 0.0
    return _Layer(
        parameters,
        round(active),
        round(mixer),
        tuple(attention),
        sum(_state_elements(module, name) for module in own),
        counts,
        tuple(sorted(matrices)),
        max((_latent(module) for module in mixers), default=0),
    )


def _latent(module: nn.Module) -> int:
    """Return what a token leaves behind in latent attention (arXiv:2405.04434, 2.1): it, and a key of RoPE."""
    sizes = [getattr(module, name, None) for name in ("kv_lora_rank", "qk_rope_head_dim")]
    return sum(size for size in sizes if isinstance(size, int)) if isinstance(sizes[0], int) else 0


def _has_head_norms(layers: nn.ModuleList) -> bool:
    return any(
        key.endswith(("q_norm.weight", "query_layernorm.weight")) for key, _ in layers.named_parameters()
    )


def _kind(
    name: str, layer: _Layer, count: int, hidden: int, vocab: int, *, tied: bool, outside: int, norms: bool
) -> ModelShape:
    # Several calls in one layer weigh like one with all their heads; of different ones the widest stands for all.
    widest = max(
        layer.attention,
        key=lambda call: call.heads * call.head_dim,
        default=_AttentionCall(0, 0, 0, 0, None, None),
    )
    return ModelShape(
        name,
        count,
        hidden,
        sum(call.heads for call in layer.attention),
        sum(call.kv_heads for call in layer.attention),
        widest.head_dim,
        -(-(layer.active - layer.mixer) // (3 * hidden)),
        vocab,
        tied=tied,
        head_norms=norms,
        value_dim=0 if widest.value_dim == widest.head_dim else widest.value_dim,
        window=widest.window,
        chunk=widest.chunk,
        state=layer.state,
        experts=layer.experts[0],
        chosen=layer.experts[1],
        counted=(layer.parameters, layer.active, outside),
        matrices=layer.matrices,
        latent=layer.latent,
    )
