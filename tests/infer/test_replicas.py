"""Copies of a model answer as one process does, each what begins alike, and fail with one message."""

from __future__ import annotations

import os
import signal
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ConfigError, RunError
from longspan.infer.config import AnswererConfig
from longspan.infer.opening import load_weights, open_answerer
from longspan.infer.replicas import divide
from longspan.infer.requests import copies_of
from tests.infer.test_distributed import Folder, compare, ids_of, open_shared, requests, results, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    path = tmp_path_factory.mktemp("model")
    return Folder(str(path), save_model(path, seed=0))


@pytest.mark.parametrize(
    "sharing",
    [{"replicas": 2}, pytest.param({"replicas": 2, "cp": 2}, marks=pytest.mark.slow)],
    ids=["replicas", "replicas-cp"],
)
def test_replicas_answer_as_one_process(folder: Folder, sharing: dict[str, Any]) -> None:
    """An answer under the index of another request would be scored as that one's."""
    alone = results(
        open_answerer(
            AnswererConfig(model=folder.path, prefix_reuse=False, batch_tokens=200),
            tokenizer=folder.tokenizer,
        )
    )
    answerer = open_shared(folder, **sharing)
    assert copies_of(answerer) == 2
    # Fewer requests than copies, and none.
    (one,) = answerer.generate(requests()[:1])
    assert one[0] == 0 and one[1].text == alone.generated[0].text
    assert list(answerer.generate([])) == []
    compare(results(answerer), alone, folder.path)
    assert not dist.is_initialized()


def load_that_is_killed_on_rank_1(config: AnswererConfig) -> Any:
    """Load the model; rank 1 is killed in its first forward pass."""
    model = load_weights(config)

    def die(*_: object) -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    model.model.layers[0].register_forward_pre_hook(die)
    return model


@pytest.mark.slow
def test_a_killed_replica_ends_all_with_a_message(folder: Folder) -> None:
    """The first waits for answers of a process that is not there; those that it has are handed on before."""
    answerer = open_answerer(
        AnswererConfig(model=folder.path, replicas=2, batch_tokens=200), tokenizer=folder.tokenizer
    )
    found = []
    with pytest.raises(RunError, match=r"rank 1 of 2: the process ended without a message"):
        for index, _ in answerer.generate(requests()):
            found.append(index)
    assert len(found) < len(requests())
    answerer.close()
    assert not dist.is_initialized()


def test_what_cannot_be_shared_so_is_refused() -> None:
    """Each was silently without effect, or ended in a collective that waits for ranks that are not there."""
    for fields, message in (
        ({"model": "model", "tp": 2, "replicas": 2}, "tp 2, replicas 2"),
        ({"model": "model", "tp": 2, "cp": 2}, "tp 2, cp 2"),
        ({"model": "model", "schedule": "ring"}, "schedule has no effect without cp"),
        ({"model": "model", "server": "http://localhost:8000/v1"}, "is run here"),
        ({"model": "openai:name", "replicas": 2, "batch_tokens": 5}, "leave out replicas, batch_tokens"),
        ({"model": "completions:name", "server": {"continue_final_message": True}}, "in chats alone"),
    ):
        with pytest.raises(ConfigError, match=message):
            AnswererConfig.from_dict(fields)
    # What was used is written with all defaults, and read again.
    used = AnswererConfig(model="openai:name", tokenizer="t")
    assert AnswererConfig.from_dict(used.to_dict()) == used


def test_prompts_that_begin_alike_stay_together() -> None:
    """A haystack that is read by two copies is read twice."""
    one, other = ids_of(1, 100), ids_of(2, 100)
    prompts = [np.concatenate([head, ids_of(10 + n, 5)]) for n in range(4) for head in (one, other)]
    halves = divide(prompts, [1] * 8, 2)
    assert sorted(halves) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    # One haystack is read by both, or half of the copies would have nothing to do: ends of 100 tokens are the work.
    ends = [np.concatenate([one, ids_of(20 + n, 100)]) for n in range(6)]
    assert sorted(map(len, divide(ends, [1] * 6, 2))) == [3, 3]
    assert divide([one], [1], 3) == [[0], [], []]
    assert divide([], [], 2) == [[], []]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=6), st.integers(0, 4)), max_size=12),
    st.integers(1, 4),
)
def test_every_request_is_one_copys(asked: list[tuple[list[int], int]], copies: int) -> None:
    """What no copy has is never answered; what two have is recorded twice."""
    shares = divide([np.array(ids, np.int64) for ids, _ in asked], [answer for _, answer in asked], copies)
    assert len(shares) == copies
    assert sorted(index for share in shares for index in share) == list(range(len(asked)))
