"""RoPE whose frequencies depend on the length (dynamic NTK, LongRoPE), held still while prompts of one kind are read.

transformers takes the length from the largest position of each forward pass: in a pass over several prompts it would
be that of the longest, and in the middle of an answer the frequencies would change while the keys in the cache keep
the old ones. Here the length is that of the prompt, from its first token to the end of its answer, and prompts whose
frequencies are equal are read together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from longspan.core.log import log_once
from longspan.infer.packed import plan_batches


def frequency_class(model: nn.Module, tokens: int) -> tuple[int, ...]:
    """Return what the frequencies of a prompt of `tokens` tokens depend on: equal for equal frequencies.

    Of dynamic NTK the length itself beyond the model's own context, of LongRoPE whether it is beyond; () where
    frequencies are always the same.
    """
    found = []
    for module, _, kind, settings in _rotary(model):
        if kind == "longrope":
            found.append(int(tokens > settings["original_max_position_embeddings"]))
        else:
            found.append(tokens if tokens > module.original_max_seq_len else 0)
    if found:
        log_once(
            "infer",
            "the RoPE of this model depends on the length of the prompt: only prompts with the same frequencies "
            "share what is read",
        )
    return tuple(found)


def alike(model: nn.Module, indices: Iterable[int], prompts: Sequence[int]) -> list[list[int]]:
    """Group some sequences, in their order, by the frequencies of their prompts of `prompts[index]` tokens."""
    found: dict[tuple[int, ...], list[int]] = {}
    for index in indices:
        found.setdefault(frequency_class(model, prompts[index]), []).append(index)
    return list(found.values())


def plan_alike_batches(
    model: nn.Module,
    indices: Iterable[int],
    lengths: Sequence[int],
    *,
    prompts: Sequence[int],
    batch_tokens: int,
) -> list[list[int]]:
    """Group some sequences of `lengths[index]` tokens as `plan_batches` does, those of one batch `alike`."""
    return [
        [group[place] for place in batch]
        for group in alike(model, indices, prompts)
        for batch in plan_batches([lengths[index] for index in group], batch_tokens)
    ]


@contextlib.contextmanager
def fixed_frequencies(model: nn.Module, tokens: int) -> Iterator[None]:
    """Let the model have the frequencies of a prompt of `tokens` tokens, whatever it is given."""
    found = list(_rotary(model))
    if not found:
        yield
        return
    kinds = {module: module.rope_type for module, *_ in found}
    try:
        with torch.no_grad():
            for module, layer_type, _, _ in found:
                _reset(module, layer_type)
                buffer = next(module.buffers())
                position = torch.full((1, 1), tokens - 1, device=buffer.device)
                module(
                    buffer.new_zeros(1),
                    position,
                    **({} if layer_type is None else {"layer_type": layer_type}),
                )
        for module, kind in kinds.items():
            module.rope_type = "default" if isinstance(kind, str) else dict.fromkeys(kind, "default")
        yield
    finally:
        for module, kind in kinds.items():
            module.rope_type = kind
        for module, layer_type, _, _ in found:
            _reset(module, layer_type)


def _rotary(model: nn.Module) -> Iterator[tuple[Any, str | None, str, Mapping[str, Any]]]:
    """Yield (module, layer type, kind of RoPE, its settings) of frequencies that depend on the length."""
    modules: Iterable[Any] = model.modules()
    for module in modules:
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            if _depends(kinds):
                yield module, None, kinds, module.config.rope_parameters
        elif isinstance(kinds, Mapping):
            for layer_type, kind in kinds.items():
                if _depends(kind):
                    yield module, layer_type, kind, module.config.rope_parameters[layer_type]


def _depends(kind: object) -> bool:
    return isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")


def _reset(module: Any, layer_type: str | None) -> None:
    """Forget the lengths that the module has seen."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    frequencies = getattr(module, f"{prefix}inv_freq")
    setattr(
        module,
        f"{prefix}inv_freq",
        getattr(module, f"{prefix}original_inv_freq").to(frequencies.device).clone(),
    )
    setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
