"""What the layers of a model hold of a sequence that is read on: keys of every token, or a state of one size."""

from __future__ import annotations

import inspect
from math import prod
from typing import cast

from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from longspan.core.errors import ArgumentError
from longspan.kernels.experts import are_experts
from longspan.models.hf_config import experts_per_token, text_config
from longspan.models.mixers import mixers

__all__ = [
    "goes_on_from_states",
    "layers_with_keys",
    "operations_per_token",
    "state_bytes",
    "state_elements",
]

STATE_BYTES = 4
"""Of an element of a recurrent state, which families keep in fp32."""
STATE_SIZES = (
    ("num_v_heads", "head_k_dim", "head_v_dim"),
    ("num_heads", "head_dim", "ssm_state_size"),
    ("n_mamba_heads", "mamba_head_dim", "ssm_state_size"),
    ("num_heads", "head_dim", "state_size"),
    ("intermediate_size", "ssm_state_size"),
    ("num_attention_heads", "head_dim", "head_dim"),
    ("lru_width",),
)
"""Attributes of a layer with a state whose product is its size."""


def layers_with_keys(model: PreTrainedModel) -> int:
    """Return how many layers of a model keep keys and values."""
    layers = int(text_config(model.config).num_hidden_layers)
    if not any(mixers(model)):
        return layers
    return sum(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=model.config).layers)


def state_elements(layer: nn.Module) -> int | None:
    """Return the elements of the recurrent state of a layer: heads by what each remembers; None where it is not known.

    0 of a short convolution, which has a tail alone.
    """
    for names in STATE_SIZES:
        sizes = [getattr(layer, name, None) for name in names]
        if all(isinstance(size, int) for size in sizes):
            return prod(cast(list[int], sizes))
    if "DeltaAttention" in type(layer).__name__:
        # Kimi's delta attention: keys and values of one width.
        return int(layer.num_heads * layer.head_dim**2)  # type: ignore[operator]
    return 0 if "ShortConv" in type(layer).__name__ else None


def _known_elements(mixer: nn.Module) -> int:
    elements = state_elements(mixer)
    if elements is None:
        raise ArgumentError("the size of a layer's state is not known", found=type(mixer).__name__)
    return elements


def state_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the states and convolution tails of one sequence in all layers, whatever its length."""
    total = 0
    for mixer, _ in mixers(model):
        tails = sum(
            conv.in_channels * (conv.kernel_size[0] - 1)
            for conv in mixer.children()
            if isinstance(conv, nn.Conv1d)
        )
        total += STATE_BYTES * _known_elements(mixer) + model.dtype.itemsize * tails
    return total


def operations_per_token(model: PreTrainedModel) -> float | None:
    """Return the operations of a token in the layers of a model with states, without attention over keys; else None.

    Two for each weight that it meets, of experts those of the chosen ones, and six for each element of a state, which
    is decayed, written to and read.
    """
    found = [mixer for mixer, _ in mixers(model)]
    if not found:
        return None
    chosen = experts_per_token(model.config) or 1
    head, total = model.get_output_embeddings(), 0.0
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            total += module.in_features * module.out_features
        elif isinstance(module, nn.Conv1d):
            total += module.weight.numel()
        elif are_experts(module):
            # They have their matrices in one parameter.
            stacks = [p for p in module.parameters(recurse=False) if p.ndim == 3]
            total += sum(p.numel() * chosen / p.shape[0] for p in stacks)
        else:
            # A matrix for each head or block (Zamba, RecurrentGemma), all of which a token meets.
            named = module.named_parameters(recurse=False)
            total += sum(p.numel() for name, p in named if p.ndim == 3 and name.endswith("weight"))
    return 2.0 * total + 6.0 * sum(map(_known_elements, found))


def goes_on_from_states(model: PreTrainedModel) -> bool:
    """Whether every layer with a state can read further tokens, several at a time, behind those that it has read.

    Mamba-1's function begins at zero.
    """
    forwards = (inspect.unwrap(type(mixer).forward) for mixer, _ in mixers(model))
    return not any("mamba_selective_scan" in forward.__code__.co_names for forward in forwards)
