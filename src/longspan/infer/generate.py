"""Greedy generation the plain way: one prompt, transformers' cache, the most likely token again and again.

The settings that a model folder brings along (sampling, repetition penalty) play no part: published folders
carry penalties that forbid a model to repeat what it has read, which is what retrieval asks for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from transformers import Cache, PreTrainedModel

from longspan.core.errors import ArgumentError, RunError
from longspan.infer.length_rope import fixed_frequencies
from longspan.infer.packed import inference
from longspan.infer.requests import NOT_FINITE
from longspan.models.states import goes_on_from_states


class NotFiniteError(RunError):
    """The model's logits are infinite or no numbers."""


def generate_greedy(
    model: PreTrainedModel,
    prompt_ids: np.ndarray,
    *,
    max_new_tokens: int,
    push: Callable[[int], object] | None = None,
    batch_tokens: int | None = None,
    a_pass: Callable[[int, int], AbstractContextManager[None]] | None = None,
) -> np.ndarray:
    """Return the ids `[at most max_new_tokens]` that greedy decoding puts after a prompt `[tokens]`.

    A token for which `push` returns something true ends the answer and is part of it. `a_pass` is entered around each
    forward pass, with the tokens before those that it reads, and their number.
    Cost: one pass over the prompt (one for each `batch_tokens` tokens), then one pass of a single token per
    generated token; the cache, which the model makes, holds the keys and values of all tokens, or a layer's state.
    A prompt is read in one pass where a layer cannot go on from a state (Mamba-1).

    Raises:
        ArgumentError: the prompt is empty.
        NotFiniteError: the model gives no numbers.
    """
    if len(prompt_ids) == 0:
        raise ArgumentError("an empty prompt cannot be continued")
    a_pass = a_pass or (lambda start, tokens: contextlib.nullcontext())
    generated: list[int] = []
    cache: Cache | None = None
    start = 0

    def read(ids_1T: torch.Tensor) -> torch.Tensor:
        """Return the logits of the last token, [1, 1, V]."""
        nonlocal cache, start
        tokens = ids_1T.shape[1]
        # Families that do not count the tokens of a cache would begin at 0 again.
        positions_1T = torch.arange(start, start + tokens, device=model.device)[None]
        with a_pass(start, tokens):
            output = model(
                input_ids=ids_1T,
                position_ids=positions_1T,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        cache, start = output.past_key_values, start + tokens
        return output.logits

    with fixed_frequencies(model, len(prompt_ids)), inference(model):
        input_1T = torch.from_numpy(np.asarray(prompt_ids, dtype=np.int64))[None].to(model.device)
        whole = batch_tokens is None or not goes_on_from_states(model)
        *before, input_1T = input_1T.split(len(prompt_ids) if whole else batch_tokens, dim=1)
        for part_1T in before:
            read(part_1T)
        while len(generated) < max_new_tokens:
            logits_11V = read(input_1T)
            highest_11, token_11 = logits_11V[:, -1].float().max(dim=-1, keepdim=True)
            # The highest is NaN where any is, and may stand above tokens that the model rules out (-inf).
            if not bool(highest_11.isfinite()):
                raise NotFiniteError(NOT_FINITE)
            input_1T = token_11
            generated.append(int(input_1T))
            if push is not None and push(generated[-1]):
                break
    return np.array(generated, dtype=np.int64)
