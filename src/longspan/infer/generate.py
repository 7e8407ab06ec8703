"""Greedy generation: the most likely token, again and again, with a key-value cache.

The settings that a model folder brings along (sampling, repetition penalty) play no part: published folders
carry penalties that forbid a model to repeat what it has read, which is what retrieval asks for.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from longspan.core.errors import ArgumentError
from longspan.infer.packed import inference


def generate_greedy(
    model: PreTrainedModel, prompt_ids: np.ndarray, *, max_new_tokens: int, stop_ids: Collection[int] = ()
) -> np.ndarray:
    """Return the ids `[at most max_new_tokens]` that greedy decoding puts after a prompt `[tokens]`.

    A token of `stop_ids` ends the answer and is part of it. Cost: one pass over the prompt, then one pass of
    a single token per generated token; the cache holds the keys and values of all tokens.

    Raises:
        ArgumentError: the prompt is empty.
    """
    if len(prompt_ids) == 0:
        raise ArgumentError("an empty prompt cannot be continued")
    cache = DynamicCache(config=model.config)
    generated: list[int] = []
    with inference(model):
        input_1T = torch.from_numpy(np.asarray(prompt_ids, dtype=np.int64))[None].to(model.device)
        while len(generated) < max_new_tokens and (not generated or generated[-1] not in stop_ids):
            logits_11V = model(
                input_ids=input_1T, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits
            input_1T = logits_11V[:, -1].argmax(dim=-1, keepdim=True)
            generated.append(int(input_1T))
    return np.array(generated, dtype=np.int64)
