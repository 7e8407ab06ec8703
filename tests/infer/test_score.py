from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ArgumentError
from longspan.infer.generate import generate_greedy
from longspan.infer.packed import boundaries, plan_batches
from longspan.infer.score import ScoreRequest, score


def random_ids(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 97, size=count).astype(np.uint32)


def requests_of(sizes: list[tuple[int, int]]) -> list[ScoreRequest]:
    return [
        ScoreRequest(random_ids(index, prompt), random_ids(1000 + index, answer))
        for index, (prompt, answer) in enumerate(sizes)
    ]


SIZES = [(5, 3), (40, 1), (1, 1), (17, 6), (90, 2), (40, 4), (3, 1)]


def test_scores_equal_whole_logits_of_the_library(twins: Any) -> None:
    """Off by one position, every answer would be judged by the prediction of its neighbour."""
    requests = requests_of(SIZES)
    for request, result in zip(requests, score(twins.ours, requests, batch_tokens=64)):
        ids = torch.from_numpy(np.concatenate(request).astype(np.int64))
        with torch.no_grad():
            logits = twins.plain(ids[None]).logits[0]
        first = len(request.prompt_ids) - 1
        answer_logits = logits[first : first + len(request.answer_ids)]
        expected = torch.nn.functional.cross_entropy(
            answer_logits, ids[first + 1 :], reduction="none"
        ).numpy()
        np.testing.assert_allclose(result.nll, expected, rtol=1e-4, atol=1e-5)
        assert result.argmax_ids.tolist() == answer_logits.argmax(-1).tolist()
        assert result.correct == (answer_logits.argmax(-1).tolist() == request.answer_ids.tolist())


def test_flattened_batches_equal_one_at_a_time(twins: Any) -> None:
    """A prompt that sees its neighbours in the row could read their answers."""
    requests = requests_of(SIZES)
    together = score(twins.ours, requests, batch_tokens=10_000)
    alone = [score(twins.ours, [request], batch_tokens=1)[0] for request in requests]
    for one, other in zip(alone, together):
        np.testing.assert_allclose(one.nll, other.nll, rtol=1e-4, atol=1e-5)
        assert one.argmax_ids.tolist() == other.argmax_ids.tolist()
    # Guard against passing because everything is equal anyway.
    assert len({float(result.nll[0]) for result in together}) == len(requests)


@pytest.mark.parametrize("sample", range(6))
def test_correct_means_that_greedy_generation_gives_the_answer(twins: Any, sample: int) -> None:
    """Teacher-forced argmax and greedy decoding agree up to and including the first mistake."""
    prompt = random_ids(50 + sample, 10 + 13 * sample)
    generated = generate_greedy(twins.ours, prompt, max_new_tokens=5)
    assert len(generated) == 5
    right = score(twins.ours, [ScoreRequest(prompt, generated)], batch_tokens=100)[0]
    assert right.correct
    assert right.argmax_ids.tolist() == generated.tolist()
    answer = generated.copy()
    answer[3] = (answer[3] + 1) % 97
    wrong = score(twins.ours, [ScoreRequest(prompt, answer)], batch_tokens=100)[0]
    assert not wrong.correct
    assert wrong.argmax_ids[:4].tolist() == generated[:4].tolist()


def test_generation_equals_the_plain_model(twins: Any) -> None:
    """Our attention with a growing key-value cache must give what the library's own attention gives."""
    prompt = random_ids(9, 60)
    expected = twins.plain.generate(
        torch.from_numpy(prompt.astype(np.int64))[None], max_new_tokens=8, do_sample=False
    )[0, 60:]
    assert generate_greedy(twins.ours, prompt, max_new_tokens=8).tolist() == expected.tolist()


def test_generation_stops_behind_a_stop_token(twins: Any) -> None:
    """The stop token ends the answer and is part of it."""
    prompt = random_ids(50, 10)
    free = generate_greedy(twins.ours, prompt, max_new_tokens=5)
    stop = int(free[2])
    first = free.tolist().index(stop)
    stopped = generate_greedy(twins.ours, prompt, max_new_tokens=5, push=lambda token: token == stop)
    assert stopped.tolist() == free[: first + 1].tolist()
    with pytest.raises(ArgumentError, match="empty prompt"):
        generate_greedy(twins.ours, prompt[:0], max_new_tokens=5)


def test_training_mode_is_left_as_it_was_and_has_no_effect(twins: Any) -> None:
    """Dropout in an evaluation between two training steps would make scores random and too low."""
    requests = requests_of(SIZES[:3])
    before = score(twins.ours, requests, batch_tokens=100)
    twins.ours.train()
    try:
        during = score(twins.ours, requests, batch_tokens=100)
        assert twins.ours.training
    finally:
        twins.ours.eval()
    for one, other in zip(before, during):
        np.testing.assert_array_equal(one.nll, other.nll)


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)])
def test_empty_prompt_or_answer_is_refused(twins: Any, sizes: tuple[int, int]) -> None:
    """Nothing to predict from, or nothing to predict, is no score of 1."""
    with pytest.raises(ArgumentError, match="request 1 cannot be scored"):
        score(twins.ours, [*requests_of([(4, 4)]), *requests_of([sizes])], batch_tokens=100)
    assert score(twins.ours, [], batch_tokens=100) == []


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), max_size=30), batch_tokens=st.integers(1, 100))
def test_batches_hold_every_index_once_within_the_bound(lengths: list[int], batch_tokens: int) -> None:
    """A forgotten sample would shrink the denominator; a batch over the bound would run out of memory."""
    batches = plan_batches(lengths, batch_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[index] for index in batch) <= batch_tokens
    in_order = [lengths[index] for batch in batches for index in batch]
    assert in_order == sorted(lengths, reverse=True)


def test_batch_examples() -> None:
    """The example of the docstring; a bound of nothing is refused."""
    assert plan_batches([2, 5, 3], 5) == [[1], [2, 0]]
    assert boundaries([random_ids(0, 3), random_ids(0, 2)]).tolist() == [0, 3, 5]
    with pytest.raises(ArgumentError, match="batch_tokens"):
        plan_batches([1], 0)
