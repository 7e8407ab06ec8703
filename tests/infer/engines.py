"""Tiny random models, a tokenizer of bytes, and the plain way's answers to compare with."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from longspan.infer.local import LocalAnswerer
from longspan.infer.plain import PlainAnswerer
from longspan.infer.requests import Answer, Request
from longspan.models.hf import build_model

VOCAB = 256
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SHAPE},
    "mha": {"model_type": "llama", **SHAPE, "num_key_value_heads": 4},
    "mistral": {"model_type": "mistral", **SHAPE, "sliding_window": 7},
    "qwen": {
        "model_type": "qwen3",
        **SHAPE,
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": 11,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "dynamic": {
        "model_type": "llama",
        **SHAPE,
        "max_position_embeddings": 24,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    },
    "longrope": {
        "model_type": "llama",
        **SHAPE,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 24,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0, 3.0, 5.0, 7.0],
        },
    },
}


class Bytes:
    """A tokenizer whose tokens are bytes, so that characters and texts reach over the borders of tokens."""

    vocab_size = VOCAB

    def decode(self, ids: Any) -> str:
        return bytes(int(token) for token in ids).decode("utf-8", "replace")


@lru_cache(maxsize=8)
def model_of(name: str) -> Any:
    return build_model(MODELS[name], seed=3).eval()


def local(name: str, **options: Any) -> LocalAnswerer:
    options = {"batch_tokens": 10_000, **options}
    return LocalAnswerer(model_of(name), Bytes(), identity={}, **options)  # type: ignore[arg-type]


def plain(name: str, **options: Any) -> PlainAnswerer:
    return PlainAnswerer(model_of(name), Bytes(), identity={}, batch_tokens=10_000, **options)  # type: ignore[arg-type]


def request(ids: Any, **fields: Any) -> Request:
    return Request("", np.asarray(ids, dtype=np.int64), **fields)


def in_order(answers: Any) -> list[Answer]:
    found = dict(answers)
    return [found[index] for index in range(len(found))]


def random_ids(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, size=count).tolist()


def grid(lengths: list[int], depths: list[float], *, own_needles: bool = False) -> list[list[int]]:
    """Prompts of a needle grid over one haystack; the needle's first token is none of the haystack's.

    With one needle for all, cells of one insertion point have more than the haystack before it in common.
    """
    haystack = [token % 200 for token in random_ids(0, max(lengths))]
    question = [255, 8, 9]
    prompts: list[list[int]] = []
    for length in lengths:
        room = length - 7
        for depth in depths:
            cut = round(depth * room)
            needle = [200 + (len(prompts) if own_needles else 0), 5, 6, 7]
            prompts.append(haystack[:cut] + needle + haystack[cut:room] + question)
    return prompts


def assert_same(ours: list[Answer], theirs: list[Answer]) -> None:
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs):
        assert our.error == their.error
        assert our.text == their.text
        assert our.finish == their.finish
        if their.token_ids is not None:
            assert our.token_ids is not None
            assert our.token_ids.tolist() == their.token_ids.tolist()
        assert (our.prompt_tokens, our.completion_tokens) == (their.prompt_tokens, their.completion_tokens)
        if their.nll is not None:
            np.testing.assert_allclose(our.nll, their.nll, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def library_answer(name: str, ids: list[int], new_tokens: int) -> list[int]:
    """Greedy answer of the library alone, all tokens again at each step."""
    model = model_of(name)
    found = list(ids)
    for _ in range(new_tokens):
        found.append(int(model(torch.tensor([found]), use_cache=False).logits[0, -1].argmax()))
    return found[len(ids) :]
