"""RoPE whose frequencies depend on the length (dynamic NTK, LongRoPE), held still while prompts of one kind are read.

transformers takes the length from the largest position of each forward pass: in a pass over several prompts it would
be that of the longest, and in the middle of an answer the frequencies would change while the keys in the cache keep
the old ones. Here the length is that of the prompt, from its first token to the end of its answer, and prompts whose
frequencies are equal are read together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from longspan.core.log import log_once
from longspan.infer.packed import plan_batches
from longspan.models.rotary import VaryingRope, hold_frequencies, varying_ropes


def frequency_class(ropes: Sequence[VaryingRope], tokens: int) -> tuple[int, ...]:
    """Return what the frequencies of a prompt of `tokens` tokens depend on: equal for equal frequencies.

    Of dynamic NTK the length itself beyond the model's own context, of LongRoPE whether it is beyond; () where
    frequencies are always the same.
    """
    found = []
    for rope in ropes:
        if rope.kind == "longrope":
            found.append(int(tokens > rope.settings["original_max_position_embeddings"]))
        else:
            found.append(tokens if tokens > rope.module.original_max_seq_len else 0)
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
    ropes = varying_ropes(model)
    for index in indices:
        found.setdefault(frequency_class(ropes, prompts[index]), []).append(index)
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
    found = varying_ropes(model)
    if not found:
        yield
        return
    kinds = {rope.module: rope.module.rope_type for rope in found}
    try:
        hold_frequencies(model, tokens)
        yield
    finally:
        for module, kind in kinds.items():
            module.rope_type = kind
        for rope in found:
            rope.reset()
