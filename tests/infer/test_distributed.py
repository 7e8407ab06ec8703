"""A model shared by several processes answers as one process does, and fails with one message."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from longspan.core.errors import ArgumentError, RunError
from longspan.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from longspan.infer.opening import Source, load_source, open_answerer
from longspan.infer.requests import Answer, Answerer, Request


class Folder(NamedTuple):
    path: str
    tokenizer: Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A random Llama with a tokenizer in one folder; its weights are large, so that it says different things."""
    path = tmp_path_factory.mktemp("model")
    train_bpe(["one two three four five six seven " * 20], path, vocab_size=270)
    tokenizer = load_tokenizer(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return Folder(str(path), tokenizer)


def ids_of(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 250, size=count).astype(np.int64)


def requests() -> list[Request]:
    """Prompts of unequal length, shorter than the ranks are many too; two share a prefix."""
    shared = ids_of(0, 41)
    prompts = [np.concatenate([shared, ids_of(1, 9)]), np.concatenate([shared, ids_of(2, 5)])]
    prompts += [ids_of(3, 17), ids_of(4, 1), ids_of(5, 2)]
    return [
        Request("", prompt_ids=ids, max_new_tokens=5 + number, answer_ids=ids_of(50 + number, 1 + number))
        for number, ids in enumerate(prompts)
    ]


WINDOWS = [ids_of(seed, count) for seed, count in ((1, 50), (2, 2), (3, 33), (4, 33), (5, 7))]


class Results(NamedTuple):
    generated: list[Answer]
    scored: list[Answer]
    losses: list[np.ndarray]


def results(answerer: Answerer) -> Results:
    try:
        generated = dict(answerer.generate(requests()))
        scored = dict(answerer.score(requests()))
        losses = answerer.token_nll(WINDOWS)  # type: ignore[attr-defined]
    finally:
        answerer.close()
    order = range(len(requests()))
    return Results([generated[index] for index in order], [scored[index] for index in order], losses)


@pytest.fixture(scope="module")
def alone(folder: Folder) -> Results:
    return results(
        open_answerer(folder.path, tokenizer=folder.tokenizer, prefix_reuse=False, batch_tokens=200)
    )


def compare(found: Results, alone: Results) -> None:
    for ours, plain in zip(found.generated, alone.generated):
        assert ours.token_ids is not None
        assert plain.token_ids is not None
        assert ours.token_ids.tolist() == plain.token_ids.tolist()
        assert (ours.text, ours.finish, ours.error) == (plain.text, plain.finish, plain.error)
    for ours, plain in zip(found.scored, alone.scored):
        assert (ours.text, ours.error) == (plain.text, plain.error)
        np.testing.assert_allclose(ours.nll, plain.nll, rtol=1e-4, atol=1e-5)
    for losses, expected in zip(found.losses, alone.losses):
        assert losses.sum(dtype=np.float64) == pytest.approx(expected.sum(dtype=np.float64), rel=1e-6)
        np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-5)
    # Guard against passing because everything is equal anyway.
    assert len({answer.text for answer in found.generated}) == len(found.generated)


def open_shared(folder: Folder, **settings: Any) -> Answerer:
    return open_answerer(folder.path, tokenizer=folder.tokenizer, batch_tokens=200, **settings)


@pytest.mark.parametrize(
    ("settings", "prefix_reuse"),
    [({"cp": 2}, True), ({"tp": 2}, True), ({"tp": 2}, False)],
    ids=["cp", "tp", "tp-plain"],
)
def test_two_processes_answer_as_one(
    folder: Folder, alone: Results, settings: dict[str, int], prefix_reuse: bool
) -> None:
    """Shards of a sequence or of matrices that were put together wrongly give fluent nonsense."""
    compare(results(open_shared(folder, **settings, prefix_reuse=prefix_reuse)), alone)
    assert not dist.is_initialized()


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["striped", "dist_flash", "ulysses", "all_gather"])
def test_every_schedule_answers_as_one_process(folder: Folder, alone: Results, schedule: str) -> None:
    """Keys are held where their tokens are, however they travel."""
    compare(results(open_shared(folder, cp=2, schedule=schedule)), alone)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["ring", "usp"])
def test_four_processes_answer_as_one(folder: Folder, alone: Results, schedule: str) -> None:
    """With four ranks some have no key of a short prompt."""
    compare(results(open_shared(folder, cp=4, schedule=schedule)), alone)
