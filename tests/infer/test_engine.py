from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ArgumentError, RunError
from longspan.infer.flops import ModelFlops, ladder, work_by_themselves, work_shared
from longspan.infer.local import LocalAnswerer
from longspan.infer.plain import PlainAnswerer
from longspan.kernels.attention import cpu_flash
from longspan.models.hf import build_model
from longspan.models.rotary import varying_ropes
from tests.infer.engines import (
    MODELS,
    Bytes,
    assert_same,
    grid,
    in_order,
    library_answer,
    local,
    model_of,
    plain,
    random_ids,
    request,
)

PROMPTS = grid([40, 60, 25], [0.0, 0.3, 0.5, 1.0])
# Batches of everything, of a few cells in passes across their borders, and of one cell at a time.
LIMITS = [(10_000, None), (17, 100), (5, 1)]


@pytest.mark.both_kernels
@pytest.mark.parametrize(("batch_tokens", "cache_tokens"), LIMITS)
@pytest.mark.parametrize("name", MODELS)
def test_generated_answers_equal_the_plain_way(
    name: str, batch_tokens: int, cache_tokens: int | None
) -> None:
    """A key too many or too few, or at another position, changes what a random model says."""
    requests = [request(ids, max_new_tokens=6) for ids in PROMPTS]
    ours = in_order(local(name, batch_tokens=batch_tokens, cache_tokens=cache_tokens).generate(requests))
    theirs = in_order(plain(name).generate(requests))
    assert_same(ours, theirs)
    assert len({answer.text for answer in ours}) >= 3  # a short window sees little of the difference


@pytest.mark.both_kernels
@pytest.mark.parametrize(("batch_tokens", "cache_tokens"), LIMITS)
@pytest.mark.parametrize("name", MODELS)
def test_scores_equal_the_plain_way(name: str, batch_tokens: int, cache_tokens: int | None) -> None:
    """Answers that are branches of each other, one of which is longer than what is left behind the fork."""
    requests = [request(ids, answer_ids=np.array(random_ids(n, 1 + n % 4))) for n, ids in enumerate(PROMPTS)]
    requests += [request(PROMPTS[0][:30], answer_ids=np.array(PROMPTS[0][30:]))]
    ours = in_order(local(name, batch_tokens=batch_tokens, cache_tokens=cache_tokens).score(requests))
    assert_same(ours, in_order(plain(name).score(requests)))


@pytest.mark.both_kernels
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen"])
def test_the_library_gives_the_same_answers(name: str) -> None:
    """The twin shares our attention; this one reads all tokens again at every step, without a cache."""
    answers = in_order(local(name).generate([request(ids, max_new_tokens=4) for ids in PROMPTS]))
    for ids, answer in zip(PROMPTS, answers):
        assert answer.token_ids is not None
        assert answer.token_ids.tolist() == library_answer(name, ids, 4)


@pytest.mark.both_kernels
def test_prompts_within_prompts() -> None:
    """One token, the same prompt twice, a prompt that begins another, answers of different lengths."""
    whole = PROMPTS[3]
    prompts = [whole[:1], whole, whole, whole[:20], whole[:20] + [250], whole[:19], [7], whole]
    requests = [request(ids, max_new_tokens=1 + 3 * n) for n, ids in enumerate(prompts)]
    expected = in_order(plain("llama").generate(requests))
    for limit in (10_000, 30, 1):
        assert_same(in_order(local("llama", cache_tokens=limit).generate(requests)), expected)


@pytest.mark.both_kernels
def test_every_token_of_the_tree_is_read_once() -> None:
    """The counted work of a small ladder equals the closed form to the last token and pair."""
    lengths, depths, rest = [30, 40, 60], [0.0, 0.25, 0.5, 1.0], 7
    cells = ladder(lengths, depths, rest=rest)
    prompts = grid(lengths, depths, own_needles=True)
    model = ModelFlops.of(model_of("llama").config)
    for limits in LIMITS:
        answerer = local("llama", batch_tokens=limits[0], cache_tokens=limits[1])
        list(answerer.generate([request(ids, max_new_tokens=1) for ids in prompts]))
        expected = work_shared(cells)
        assert answerer.counters.tokens == expected.tokens
        assert answerer.counters.attention_flops == model.per_pair * expected.pairs
        assert answerer.counters.logit_rows == expected.logit_rows == len(cells)
        linear = model.per_token * expected.tokens + model.per_logit_row * expected.logit_rows
        assert answerer.flops == linear + model.per_pair * expected.pairs
        assert expected.tokens < 0.75 * work_by_themselves(cells).tokens


@pytest.mark.both_kernels
def test_answers_are_decoded_together() -> None:
    """Twelve answers of six tokens are five passes after those over the prompts, not sixty."""
    answerer = local("llama")
    list(answerer.generate([request(ids, max_new_tokens=6) for ids in PROMPTS]))
    assert answerer.counters.passes == 1 + 5
    assert answerer.counters.decoded_tokens == 12 * 5


def test_answers_of_many_lengths_share_kernel_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call for each prompt and layer, a batch that falls apart when some of its answers end."""
    found: list[int] = []
    forward = cpu_flash._forward

    def counted(q: Any, *args: Any, **options: Any) -> Any:
        found.append(len(q))
        return forward(q, *args, **options)

    monkeypatch.setattr(cpu_flash, "_forward", counted)
    requests = [request([n, *random_ids(n, 2 * n)], max_new_tokens=2 + 7 * n % 11) for n in range(16)]
    ours = in_order(local("llama").generate(requests))
    steps, layers = 11, 2
    # Prompts of 1 to 31 tokens are read by a call each, answers with 16 or 32 rows of room in two a step.
    assert len(found) <= layers * (16 + 3 * steps)
    assert_same(ours, in_order(plain("llama").generate(requests)))


def test_a_pass_has_no_more_tokens_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk too large is the memory that chunks are for."""
    from longspan.infer import engine

    told: list[int] = []
    original = engine.PrefillPass

    def counted(segments: Any, *rest: Any) -> Any:
        told.append(sum(last - first for _, first, last in segments))
        return original(segments, *rest)

    monkeypatch.setattr(engine, "PrefillPass", counted)
    answerer = local("llama", batch_tokens=16, cache_tokens=10_000)
    list(answerer.generate([request(ids, max_new_tokens=1) for ids in PROMPTS]))
    assert max(told) == 16
    assert sum(told) == answerer.counters.tokens
    assert sorted(told)[1] == 16  # all but the last pass are full


@pytest.mark.parametrize("cache_tokens", [70, 10_000])
def test_the_share_of_the_work_grows_between_answers(cache_tokens: int) -> None:
    """A batch of 65,536 tokens gave no sign for 15 minutes, and then told a time four times too long."""
    shares: list[float] = []
    at_answers: list[int] = []
    answerer = local("llama", batch_tokens=16, cache_tokens=cache_tokens)
    assert answerer.watch(shares.append)
    # Answers of one and of seven tokens: the short ones need not wait for the others.
    requests = [request(ids, max_new_tokens=1 + 6 * (n % 2)) for n, ids in enumerate(PROMPTS)]
    for _ in answerer.generate(requests):
        at_answers.append(len(shares))
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1.0)
    assert at_answers[0] < len(shares) and max(np.diff([0.0, *shares])) < 0.5
    count = len(shares)
    answerer.watch(None)
    list(answerer.score([request(PROMPTS[0], answer_ids=np.array([1, 2]))]))
    assert len(shares) == count


def test_a_given_answer_is_measured_when_its_last_token_is_read() -> None:
    """All waited for the end of the batch, and a kill lost them."""
    answerer = local("llama", batch_tokens=16, cache_tokens=10_000)
    asked = [request(random_ids(number, 30), answer_ids=np.array([1])) for number in range(4)]
    passes = [answerer.counters.passes for _ in answerer.score(asked)]
    assert passes[0] < passes[-1]


def test_cache_is_given_up_behind_the_answers(held: list[int]) -> None:
    """Keys of cells that are answered must not pile up until the run ends."""
    answerer = local("llama", cache_tokens=70)
    requests = [request(ids, max_new_tokens=3) for ids in PROMPTS]
    assert sorted(index for index, _ in answerer.generate(requests)) == list(range(12))
    assert max(held) <= 70 < sum(map(len, PROMPTS)) // 2


@pytest.mark.both_kernels
def test_room_for_long_answers_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys moved to a larger block must stay those of their strand."""
    from longspan.infer import jobs_run

    monkeypatch.setattr(jobs_run, "FIRST_ROOM", 2)
    requests = [request(ids, max_new_tokens=3 + 4 * n) for n, ids in enumerate(PROMPTS[:4])]
    expected = in_order(plain("qwen").generate(requests))
    for limit in (10_000, 30):
        assert_same(in_order(local("qwen", cache_tokens=limit).generate(requests)), expected)


def test_what_does_not_fit_is_refused_before_it_is_run() -> None:
    """An out-of-memory after an hour of reading helps nobody."""
    answerer = local("llama", available=lambda device: 1_000_000)
    with pytest.raises(RunError, match=r"do not fit into the memory of cpu(.|\n)*977 KiB that are free"):
        list(answerer.generate([request(random_ids(0, 3000))]))
    assert answerer.counters.tokens == 0


@pytest.mark.both_kernels
def test_branches_are_read_in_smaller_batches_where_memory_is_short() -> None:
    """The answers are the same; only the trunk and one branch have to fit."""
    requests = [request(ids, max_new_tokens=2) for ids in PROMPTS]
    expected = in_order(plain("llama").generate(requests))
    wide, narrow = (local("llama", batch_tokens=8, cache_tokens=400) for _ in range(2))
    from longspan.infer.memory import pass_bytes

    narrow._engine._available = lambda device: pass_bytes(model_of("llama"), 8) + 120 * 256
    assert_same(in_order(narrow.generate(requests)), expected)
    assert_same(in_order(wide.generate(requests)), expected)
    assert narrow.counters.passes > wide.counters.passes


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_memory_that_runs_out_is_said_in_words(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own message has a page of allocator statistics and no way out."""
    answerer = local("llama")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(answerer._engine, "_hidden", fail)
    with pytest.raises(RunError, match=r"used up while 5 tokens are read(.|\n)*--batch-tokens"):
        list(answerer.generate([request([1, 2, 3, 4, 5])]))


def test_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape error is no lack of memory."""
    answerer = local("llama")

    def fail(*_: object) -> None:
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(answerer._engine, "_hidden", fail)
    with pytest.raises(RuntimeError, match="size mismatch"):
        list(answerer.generate([request([1, 2, 3])]))


def test_requests_that_cannot_be_answered() -> None:
    """One that is too long is an answer with an error, and the others go on; one without ids is a mistake."""
    requests = [
        request(PROMPTS[0], max_new_tokens=2),
        request([1, 2], max_new_tokens=2),
        request([1], max_new_tokens=0),
    ]
    ours = in_order(local("llama", max_length=20).generate(requests))
    assert_same(ours, in_order(plain("llama", max_length=20).generate(requests)))
    assert ours[0].error == "prompt and answer have 42 tokens, at most 20 are allowed"
    assert ours[1].completion_tokens == 2
    assert (ours[2].text, ours[2].finish) == ("", "length")
    with pytest.raises(ArgumentError, match="token ids"):
        list(local("llama").generate([requests[1], requests[1]._replace(prompt_ids=None)]))
    with pytest.raises(ArgumentError, match="no answer to measure"):
        list(local("llama").score([requests[1]]))
    assert list(local("llama").generate([])) == []


@pytest.mark.both_kernels
def test_output_that_is_no_number() -> None:
    """The argmax of NaN is a token like any other."""
    model = build_model(MODELS["llama"], seed=3).eval()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(float("nan"))
    requests = [request([1, 2, 3]), request([1, 2])]
    for kind in (LocalAnswerer, PlainAnswerer):
        answers = in_order(kind(model, Bytes(), identity={}, batch_tokens=100).generate(requests))  # type: ignore[arg-type]
        assert [answer.error for answer in answers] == ["the model's output is not a finite number"] * 2


@pytest.mark.both_kernels
def test_a_prompt_without_numbers_leaves_the_others_theirs() -> None:
    """Keys lie side by side, and 0 * NaN is NaN: others of the batch lost their answers to it."""
    model = build_model(MODELS["llama"], seed=3).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[255] = float("nan")
    prompts = [[1, 2, 3, 4], [1, 2, 255, 5], [9, 8, 7], [9, 8, 7, 6, 255], [1, 2, 3, 4, 5, 6]]
    asked = [request(ids, max_new_tokens=4, answer_ids=np.array([3, 4])) for ids in prompts]
    ours, theirs = (
        kind(model, Bytes(), identity={}, batch_tokens=100)  # type: ignore[arg-type]
        for kind in (LocalAnswerer, PlainAnswerer)
    )
    assert_same(in_order(ours.generate(asked)), in_order(theirs.generate(asked)))
    assert_same(in_order(ours.score(asked)), in_order(theirs.score(asked)))
    assert sum(answer.error is None for answer in in_order(ours.generate(asked))) == 3


@pytest.mark.both_kernels
@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_frequencies_of_the_length_are_those_of_each_prompt(name: str) -> None:
    """In one pass all prompts would have the frequencies of the longest; afterwards the model is as it was."""
    prompts = [PROMPTS[0], PROMPTS[0][:30], PROMPTS[0][:20], PROMPTS[0][:10]]
    requests = [request(ids, answer_ids=np.array([5])) for ids in prompts]
    before = model_of(name).model.rotary_emb.inv_freq.clone()
    together = in_order(local(name).score(requests))
    for ids, answer in zip(prompts, together):
        with torch.no_grad():
            logits = torch.log_softmax(model_of(name)(torch.tensor([ids])).logits[0, -1].double(), -1)
        assert answer.nll is not None
        assert answer.nll[0] == pytest.approx(-float(logits[5]), abs=1e-4)
        for varying in varying_ropes(model_of(name)):
            varying.reset()
    assert torch.equal(model_of(name).model.rotary_emb.inv_freq, before)


@pytest.mark.both_kernels
@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=8),
    batch_tokens=st.integers(1, 30),
    cache_tokens=st.integers(1, 60),
    new_tokens=st.integers(1, 5),
    name=st.sampled_from(["llama", "mistral"]),
)
def test_any_tree_gives_the_plain_answers(
    prompts: list[list[int]], batch_tokens: int, cache_tokens: int, new_tokens: int, name: str
) -> None:
    """Of three letters, random prompts share, contain and equal each other in every way."""
    requests = [request(ids, max_new_tokens=1 + new_tokens * n % 7) for n, ids in enumerate(prompts)]
    answerer = local(name, batch_tokens=batch_tokens, cache_tokens=cache_tokens)
    assert_same(in_order(answerer.generate(requests)), in_order(plain(name).generate(requests)))
    prefixes = {tuple(ids[:n]) for ids in prompts for n in range(1, len(ids) + 1)}
    assert answerer.counters.tokens - answerer.counters.decoded_tokens == len(prefixes)


def test_the_model_is_its_owners_between_two_answers() -> None:
    """Whoever runs it while answers are under way, or leaves them, must not find gradients off or frequencies held."""
    model = model_of("dynamic")
    answers = local("dynamic", cache_tokens=1).generate([request(ids, max_new_tokens=2) for ids in PROMPTS])
    next(answers)
    assert model.model.rotary_emb.rope_type == "dynamic"
    assert not torch.is_inference_mode_enabled()
    answers.close()


def test_memory_of_attention_that_no_flash_kernel_takes() -> None:
    """Keys in fp32 on CUDA, or heads of 512, were let through by the estimate and ended in the middle of a prompt."""
    from transformers import LlamaConfig

    from longspan.infer.memory import dense_bytes

    def needed(head_dim: int, dtype: torch.dtype, device: str = "cuda") -> int:
        config = LlamaConfig(num_attention_heads=4, num_key_value_heads=1, head_dim=head_dim)
        model: Any = SimpleNamespace(device=torch.device(device), dtype=dtype, config=config)
        return dense_bytes(model, 1 << 20)

    assert needed(128, torch.bfloat16) == 0 == needed(512, torch.float32, "cpu")
    assert needed(512, torch.bfloat16) - needed(128, torch.float32) == 4 * (512 - 128) * 4 << 20
