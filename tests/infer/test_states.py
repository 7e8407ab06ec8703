"""Models whose layers carry a state: prefix reuse, answers side by side and losses, against transformers alone."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from longspan.infer.local import LocalAnswerer
from longspan.infer.perplexity import token_nll
from longspan.infer.plain import PlainAnswerer
from longspan.infer.requests import Request
from tests.hybrids import HYBRIDS, eager, with_ours
from tests.infer.engines import Bytes, assert_same, grid, in_order, random_ids, request

# Forks in the trunk, at its end, and of a prompt that is the beginning of another.
PROMPTS = [*grid([40, 25], [0.0, 0.4, 1.0]), random_ids(5, 9), random_ids(5, 9)[:4], random_ids(5, 9) + [3]]
NEW_TOKENS = 6


@lru_cache(maxsize=8)
def twins(name: str) -> tuple[Any, Any]:
    plain = eager(name)
    return with_ours(plain), plain


@torch.no_grad()
def alone(name: str, ids: list[int]) -> torch.Tensor:
    """Return the logits [tokens, words] of transformers' own forward pass over one sequence without a cache."""
    return twins(name)[1](torch.tensor([ids]), use_cache=False).logits[0].float()


@lru_cache(maxsize=8)
def continued_alone(name: str) -> list[list[int]]:
    """Return what transformers' own `generate` puts after each prompt."""
    found = []
    for ids in PROMPTS:
        row = torch.tensor([ids])
        out = twins(name)[1].generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        found.append(out[0, len(ids) :].tolist())
    return found


def questions() -> list[Request]:
    return [request(ids, max_new_tokens=NEW_TOKENS) for ids in PROMPTS]


def measures() -> list[Request]:
    return [request(ids, answer_ids=np.array(random_ids(n, 1 + n))) for n, ids in enumerate(PROMPTS)]


def check(name: str, answerer: Any) -> None:
    """Compare answers and losses with transformers'."""
    answers = in_order(answerer.generate(questions()))
    assert [answer.token_ids.tolist() for answer in answers] == continued_alone(name)
    for found, asked in zip(in_order(answerer.score(measures())), measures()):
        ids = [*asked.prompt_ids.tolist(), *asked.answer_ids.tolist()]
        logits = alone(name, ids)[len(asked.prompt_ids) - 1 : -1]
        truth = torch.nn.functional.cross_entropy(
            logits, torch.from_numpy(asked.answer_ids), reduction="none"
        )
        np.testing.assert_allclose(found.nll, truth.numpy(), rtol=1e-4, atol=1e-4)
        assert found.token_ids.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize(("batch_tokens", "cache_tokens"), [(10_000, None), (7, 60), (3, 20)])
@pytest.mark.parametrize("name", HYBRIDS)
def test_prefix_reuse_equals_transformers(name: str, batch_tokens: int, cache_tokens: int | None) -> None:
    """Branches go on from the state where they leave the trunk, not from its end; passes cut strands anywhere."""
    check(name, LocalAnswerer(
        twins(name)[0], Bytes(), identity={}, batch_tokens=batch_tokens, cache_tokens=cache_tokens,  # type: ignore[arg-type]
    ))  # fmt: skip


@pytest.mark.parametrize("name", HYBRIDS)
def test_the_plain_way_equals_transformers(name: str) -> None:
    """One prompt after another through transformers' cache, also when a prompt is read in several passes."""
    for batch_tokens in (10_000, 7):
        model = twins(name)[0]
        check(name, PlainAnswerer(model, Bytes(), identity={}, batch_tokens=batch_tokens))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", HYBRIDS)
def test_losses_of_windows_equal_transformers(name: str) -> None:
    """Windows that are read together start anew, each for itself."""
    windows = [np.array(ids) for ids in PROMPTS]
    for ids, nll in zip(PROMPTS, token_nll(twins(name)[0], windows, batch_tokens=60)):
        truth = torch.nn.functional.cross_entropy(
            alone(name, ids)[:-1], torch.tensor(ids[1:]), reduction="none"
        )
        np.testing.assert_allclose(nll, truth.numpy(), rtol=1e-4, atol=1e-4)
