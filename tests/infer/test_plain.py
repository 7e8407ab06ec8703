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
from longspan.infer.plain import PlainAnswerer, teacher_forced
from tests.infer.engines import Bytes, local, model_of, plain, request


def random_ids(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 97, size=count).astype(np.uint32)


@pytest.mark.both_kernels
@pytest.mark.parametrize("sizes", [(5, 3), (40, 1), (1, 1), (17, 6), (90, 2)])
def test_scores_equal_whole_logits_of_the_library(twins: Any, sizes: tuple[int, int]) -> None:
    """Off by one position, every answer would be judged by the prediction of its neighbour."""
    prompt, answer = random_ids(0, sizes[0]), random_ids(1, sizes[1])
    ids = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))
    with torch.no_grad():
        logits = twins.plain(ids[None]).logits[0, len(prompt) - 1 : -1]
    nll, argmax_ids = teacher_forced(twins.ours, prompt, answer)
    expected = torch.nn.functional.cross_entropy(logits, ids[len(prompt) :], reduction="none").numpy()
    np.testing.assert_allclose(nll, expected, rtol=1e-4, atol=1e-5)
    assert argmax_ids.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("sample", range(6))
def test_an_answer_of_most_likely_tokens_is_what_greedy_generation_gives(twins: Any, sample: int) -> None:
    """Teacher-forced argmax and greedy decoding agree up to and including the first mistake."""
    prompt = random_ids(50 + sample, 10 + 13 * sample)
    generated = generate_greedy(twins.ours, prompt, max_new_tokens=5)
    assert teacher_forced(twins.ours, prompt, generated)[1].tolist() == generated.tolist()
    answer = generated.copy()
    answer[3] = (answer[3] + 1) % 97
    assert teacher_forced(twins.ours, prompt, answer)[1][:4].tolist() == generated[:4].tolist()


@pytest.mark.both_kernels
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
    prompt, answer = random_ids(0, 40), random_ids(1, 4)
    before = teacher_forced(twins.ours, prompt, answer)
    twins.ours.train()
    try:
        during = teacher_forced(twins.ours, prompt, answer)
        assert twins.ours.training
    finally:
        twins.ours.eval()
    np.testing.assert_array_equal(before[0], during[0])


@pytest.mark.parametrize(("ids", "answer", "found"), [([], [3], "token ids"), ([3], [], "no answer")])
def test_empty_prompt_or_answer_is_refused(ids: list[int], answer: list[int], found: str) -> None:
    """Nothing to predict from, or nothing to predict, is no score of 1."""
    for answerer in (plain("llama"), local("llama")):
        with pytest.raises(ArgumentError, match=found):
            list(
                answerer.score(
                    [request([1], answer_ids=np.array([2])), request(ids, answer_ids=np.array(answer))]
                )
            )


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


def test_the_share_of_the_work_grows_inside_an_answer() -> None:
    """One prompt of a million tokens is minutes of work, in which the bar stood still."""
    shares: list[float] = []
    answerer = PlainAnswerer(model_of("llama"), Bytes(), identity={}, max_length=90, batch_tokens=16)  # type: ignore[arg-type]
    assert answerer.watch(shares.append)
    ids = random_ids(3, 80)
    requests = [request(ids, max_new_tokens=4), request(ids[:40], max_new_tokens=9, stop_ids=range(256))]
    at_answers = [len(shares) for _ in answerer.generate([*requests, request(ids, max_new_tokens=11)])]
    assert (
        at_answers[0] > 5 * 2 and at_answers[2] == at_answers[1]
    )  # five passes of two layers; one is too long
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1.0)
    shares.clear()
    scored = [request(ids, answer_ids=np.array([1, 2])) for _ in range(2)]
    at_answers = [len(shares) for _ in answerer.score(scored)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0]) and at_answers == [2, 4]
    answerer.watch(None)
    list(answerer.score(scored))
    assert len(shares) == 4
