"""Models whose layers carry a state: prefix reuse, answers side by side and losses, against transformers alone."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longspan.core.errors import ArgumentError, RunError
from longspan.infer.config import AnswererConfig
from longspan.infer.context_parallel import SpreadModel
from longspan.infer.flops import ModelFlops
from longspan.infer.kv import KvBlock
from longspan.infer.local import LocalAnswerer
from longspan.infer.memory import cache_bytes_per_token
from longspan.infer.opening import open_answerer
from longspan.infer.perplexity import token_nll
from longspan.infer.plain import PlainAnswerer
from longspan.infer.requests import Request
from longspan.infer.states import TreeStates
from longspan.models.states import state_bytes
from tests.hybrids import HYBRIDS, MAMBA_1, eager, with_ours
from tests.infer.engines import Bytes, grid, in_order, random_ids, request

# Forks in the trunk, at its end, and of a prompt that is the beginning of another.
PROMPTS = [*grid([40, 25], [0.0, 0.4, 1.0]), random_ids(5, 9), random_ids(5, 9)[:4], random_ids(5, 9) + [3]]


def new_tokens(number: int) -> int:
    """Answers that end at different times: others begin beside those that go on."""
    return 2 + number % 3 * 4


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
            row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=new_tokens(len(found)),
            do_sample=False,
            pad_token_id=0,
        )
        found.append(out[0, len(ids) :].tolist())
    return found


def questions() -> list[Request]:
    return [request(ids, max_new_tokens=new_tokens(n)) for n, ids in enumerate(PROMPTS)]


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


@pytest.mark.parametrize("name", HYBRIDS)
def test_memory_is_counted_as_it_is_held(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys were counted for layers that have none, and states, of which each fork has one, were not counted."""
    model = twins(name)[0]
    blocks: list[KvBlock] = []
    peaks: list[int] = []
    append, keep = KvBlock.append, TreeStates.keep
    monkeypatch.setattr(KvBlock, "append", lambda self, *args: blocks.append(self) or append(self, *args))
    monkeypatch.setattr(
        TreeStates, "keep", lambda self, *args: keep(self, *args) or peaks.append(self.num_bytes)
    )
    # Two leave the trunk at different tokens.
    prompts = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 9], [1, 2, 8]]
    answerer = LocalAnswerer(model, Bytes(), identity={}, batch_tokens=100)  # type: ignore[arg-type]
    found = in_order(answerer.generate([request(ids, max_new_tokens=1) for ids in prompts]))
    assert all(answer.error is None for answer in found)
    assert max(peaks) == (2 + 3) * state_bytes(model)
    assert blocks[0].num_bytes == (6 + 1 + 1) * cache_bytes_per_token(model, upcasts=True)


def test_states_that_do_not_fit_are_refused() -> None:
    """A grid of many forks has more bytes in states than in keys, and the message says so."""
    model = twins("qwen3_next")[0]
    free = 2 * state_bytes(model)
    answerer = LocalAnswerer(
        model, Bytes(), identity={}, batch_tokens=1000, available=lambda device: free  # type: ignore[arg-type]
    )  # fmt: skip
    with pytest.raises(RunError, match=r"\d+ states of "):
        list(answerer.generate(questions()))


@pytest.mark.parametrize("name", HYBRIDS)
def test_operations_are_those_of_the_layers(name: str) -> None:
    """Attention was reckoned for every layer, also for those that see no keys."""
    model = twins(name)[0]
    weights = sum(p.numel() for n, p in model.model.named_parameters() if p.ndim > 1 and "embed" not in n)
    flops = ModelFlops.of_model(model)
    states = {"qwen3_next": 2 * 4 * 8 * 8, "nemotron_h": 2 * 32 * 8, "falcon_h1": 2 * 32 * 8, "lfm2": 0}
    assert flops.per_token == 2 * weights + 6 * states[name]
    attending = 2 if name == "falcon_h1" else 1
    assert flops.per_pair == 4 * attending * 4 * 8


def test_what_cannot_go_on_from_a_state_is_read_at_once(tmp_path: Path) -> None:
    """Mamba-1 read in pieces forgets all but the last one without a word."""
    plain = eager("jamba", **MAMBA_1)
    model, ids = with_ours(plain), PROMPTS[0]
    shared = LocalAnswerer(model, Bytes(), identity={}, batch_tokens=10_000)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="cannot go on from a state"):
        list(shared.generate([request(ids, max_new_tokens=2)]))
    plain.save_pretrained(tmp_path)
    config = AnswererConfig(model=str(tmp_path), batch_tokens=7)
    answerer = open_answerer(config, tokenizer=Bytes())  # type: ignore[arg-type]
    (_, answer), *_ = answerer.generate([request(ids, max_new_tokens=4)])
    row = torch.tensor([ids])
    truth = plain.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=4, do_sample=False)
    assert answer.token_ids.tolist() == truth[0, len(ids) :].tolist()


def test_ranks_that_share_sequences_do_not_continue_them() -> None:
    """Their states lie with other ranks: the first generated token would fail, after all has been read."""
    model = object.__new__(SpreadModel)
    model._model, model._has_states = twins("lfm2")[0], True
    with pytest.raises(ArgumentError, match="do not continue them in a Lfm2ForCausalLM"):
        next(model.generate(questions()))
