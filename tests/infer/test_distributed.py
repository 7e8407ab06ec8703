"""A model shared by several processes answers as one process does, and fails with one message."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from longspan.core.errors import ArgumentError, RunError
from longspan.core.log import log_once
from longspan.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from longspan.infer import memory, opening
from longspan.infer.config import AnswererConfig
from longspan.infer.distributed import Member, join_ranks
from longspan.infer.opening import load_weights, open_answerer
from longspan.infer.requests import Answer, Answerer, Request, Watched
from tests.patience import PATIENCE_SECONDS


def save_model(path: Path, *, seed: int, sliding_window: int | None = None) -> Tokenizer:
    """Write a random model with a tokenizer; its weights are large, so that it says different things."""
    train_bpe(["one two three four five six seven " * 20], path, vocab_size=270)
    tokenizer = load_tokenizer(path)
    sizes: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
    }
    torch.manual_seed(seed)
    if sliding_window is None:
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(path)
    else:
        config = MistralConfig(**sizes, sliding_window=sliding_window)
        MistralForCausalLM(config).save_pretrained(path)
    return tokenizer


class Folder(NamedTuple):
    path: str
    tokenizer: Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A random Llama."""
    path = tmp_path_factory.mktemp("model")
    return Folder(str(path), save_model(path, seed=0))


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


def brute_force(path: str, window: np.ndarray) -> float:
    """Sum of the losses of a window by transformers' own model in double precision."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    ids = torch.from_numpy(window)
    with torch.no_grad():
        log_probs = torch.log_softmax(model(ids[None]).logits[0], dim=-1)
    return -float(log_probs[:-1].gather(1, ids[1:, None]).sum())


WINDOWS = [ids_of(seed, count) for seed, count in ((1, 50), (2, 2), (3, 33), (4, 33), (5, 7))]


class Results(NamedTuple):
    generated: list[Answer]
    scored: list[Answer]
    losses: list[np.ndarray]


def results(answerer: Answerer) -> Results:
    shares: list[float] = []
    try:
        assert isinstance(answerer, Watched) and answerer.watch(shares.append)
        generated = dict(answerer.generate(requests()))
        assert len(shares) > len(requests()) and shares[-1] == pytest.approx(1.0)
        assert shares == sorted(shares)
        answerer.watch(None)
        scored = dict(answerer.score(requests()))
        losses = answerer.token_nll(WINDOWS)  # type: ignore[attr-defined]
    finally:
        answerer.close()
    order = range(len(requests()))
    return Results([generated[index] for index in order], [scored[index] for index in order], losses)


@pytest.fixture(scope="module")
def alone(folder: Folder) -> Results:
    return results(
        open_answerer(
            AnswererConfig(model=folder.path, prefix_reuse=False, batch_tokens=200),
            tokenizer=folder.tokenizer,
        )
    )


def compare(found: Results, alone: Results, path: str) -> None:
    for ours, plain in zip(found.generated, alone.generated):
        assert ours.token_ids is not None
        assert plain.token_ids is not None
        assert ours.token_ids.tolist() == plain.token_ids.tolist()
        assert (ours.text, ours.finish, ours.error) == (plain.text, plain.finish, plain.error)
    for ours, plain in zip(found.scored, alone.scored):
        assert (ours.text, ours.error) == (plain.text, plain.error)
        np.testing.assert_allclose(ours.nll, plain.nll, rtol=1e-4, atol=1e-5)
    for window, losses, expected in zip(WINDOWS, found.losses, alone.losses):
        np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-5)
        assert losses.sum(dtype=np.float64) == pytest.approx(brute_force(path, window), rel=1e-6)
    # Guard against passing because everything is equal anyway.
    assert len({answer.text for answer in found.generated}) == len(found.generated)


def open_shared(folder: Folder, *, load: Any = None, **settings: Any) -> Answerer:
    config = AnswererConfig(model=folder.path, batch_tokens=200, **settings)
    return open_answerer(config, tokenizer=folder.tokenizer, load=load)


@pytest.mark.parametrize(
    "settings",
    [
        {"cp": 2, "prefix_reuse": False},
        {"tp": 2},
        pytest.param({"tp": 2, "prefix_reuse": False}, marks=pytest.mark.slow),
    ],
    ids=["cp-plain", "tp", "tp-plain"],
)
def test_two_processes_answer_as_one(folder: Folder, alone: Results, settings: dict[str, Any]) -> None:
    """Shards of a sequence or of matrices that were put together wrongly give fluent nonsense.

    Between answers the work that is done is told (`results`): the bar stood still for a batch.
    """
    compare(results(open_shared(folder, **settings)), alone, folder.path)
    assert not dist.is_initialized()


def tree_requests() -> list[Request]:
    """Ask twice for a needle in three places of a haystack of two lengths: forks at forks, and equal prompts."""
    haystack, needle = ids_of(0, 60), ids_of(1, 3)
    prompts = [
        np.concatenate([haystack[:cut], needle, haystack[cut:length], ids_of(question, 2)])
        for length in (60, 35)
        for cut in (0, 13, 35)
        for question in (2, 3)
    ]
    prompts += [haystack[:21], haystack[:21]]
    return [
        Request("", prompt_ids=ids, max_new_tokens=3 + number, answer_ids=ids_of(number, 1 + number))
        for number, ids in enumerate(prompts)
    ]


def assert_tree_over_ranks(folder: Folder, *, ranks: int, batch_tokens: int) -> None:
    asked = tree_requests()
    nodes = {request.prompt_ids[:end].tobytes() for request in asked for end in range(1, 1 + len(request.prompt_ids))}  # type: ignore[index,arg-type]  # fmt: skip
    config = AnswererConfig(model=folder.path, cp=ranks, batch_tokens=batch_tokens)
    answerer: Any = open_answerer(config, tokenizer=folder.tokenizer)
    try:
        generated = dict(answerer.generate(asked))
        counters = answerer._member._tree.counters
        read, segments = counters.tokens - counters.decoded_tokens, len(asked) + counters.passes
        scored = dict(answerer.score(asked))
    finally:
        answerer.close()
    # Each token once, on one rank; where a stretch ends between two stripes a row is filled up.
    assert len(nodes) < sum(len(request.prompt_ids) for request in asked) / 2  # type: ignore[arg-type]
    assert len(nodes) / ranks <= read <= len(nodes) / ranks + segments
    peer = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float64).eval()
    peer.generation_config.eos_token_id = None
    for index, request in enumerate(asked):
        prompt, answer = torch.from_numpy(request.prompt_ids)[None], torch.from_numpy(request.answer_ids)
        found = peer.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=request.max_new_tokens,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        assert generated[index].token_ids.tolist() == found[0, prompt.shape[1] :].tolist()
        with torch.no_grad():
            logits = peer(torch.cat([prompt[0], answer])[None]).logits[0, prompt.shape[1] - 1 : -1]
        losses = torch.nn.functional.cross_entropy(logits, answer, reduction="none")
        np.testing.assert_allclose(scored[index].nll, losses, rtol=1e-4, atol=1e-5)


def test_a_prefix_tree_lies_over_processes_in_stripes(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a grid one trunk alone was shared: every process read all that followed it, the haystack's rest too."""
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="longspan"):
        assert_tree_over_ranks(folder, ranks=2, batch_tokens=200)
    assert caplog.text.count("--schedule has no effect on them") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "batch_tokens"), [(2, 7), (3, 50), (4, 200)])
def test_passes_of_a_tree_end_anywhere(folder: Folder, ranks: int, batch_tokens: int) -> None:
    """Stretches shorter than the ranks are many, and of a rank that has none of a pass."""
    assert_tree_over_ranks(folder, ranks=ranks, batch_tokens=batch_tokens)


def test_records_tell_types_of_weights_apart(folder: Folder) -> None:
    """An evaluation in float32 that goes on in bfloat16 would be one of neither."""
    identities = [
        open_answerer(AnswererConfig(model=folder.path, dtype=dtype), tokenizer=folder.tokenizer).identity
        for dtype in (None, "bfloat16")
    ]
    assert [identity["dtype"] for identity in identities] == ["float32", "bfloat16"]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["striped", "dist_flash", "ulysses", "all_gather"])
def test_every_schedule_answers_as_one_process(folder: Folder, alone: Results, schedule: str) -> None:
    """Keys are held where their tokens are, however they travel."""
    found = results(open_shared(folder, cp=2, schedule=schedule, prefix_reuse=False))
    compare(found, alone, folder.path)


@pytest.mark.slow
def test_sliding_windows_reach_over_ranks(tmp_path: Path) -> None:
    """What a rank holds of a window has gaps, in stripes and as schedules leave it."""
    folder = Folder(str(tmp_path), save_model(tmp_path, seed=1, sliding_window=11))
    alone = results(
        open_answerer(AnswererConfig(model=folder.path, prefix_reuse=False), tokenizer=folder.tokenizer)
    )
    for settings in ({}, {"prefix_reuse": False}, {"prefix_reuse": False, "schedule": "striped"}):
        compare(results(open_shared(folder, cp=2, **settings)), alone, folder.path)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["ring", "usp"])
def test_four_processes_answer_as_one(folder: Folder, alone: Results, schedule: str) -> None:
    """With four ranks some have no key of a short prompt."""
    compare(results(open_shared(folder, cp=4, schedule=schedule, prefix_reuse=False)), alone, folder.path)


def load_that_fails_on_rank_1(config: AnswererConfig) -> Any:
    """Load the model; on rank 1 its second forward pass finds no memory."""
    model = load_weights(config)
    passes = []

    def fail(*_: object) -> None:
        passes.append(1)
        if dist.get_rank() == 1 and len(passes) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.model.layers[0].register_forward_pre_hook(fail)
    return model


def test_memory_that_one_rank_lacks_ends_all_with_a_message(folder: Folder) -> None:
    """The others wait in a collective for a rank that never comes: without word from it they would hang."""
    answerer = open_answerer(
        AnswererConfig(model=folder.path, cp=2, batch_tokens=200),
        tokenizer=folder.tokenizer,
        load=load_that_fails_on_rank_1,
    )
    with pytest.raises(
        RunError, match=r"shares the model failed\n.*rank 1 of 2: the memory of cpu is used up"
    ):
        list(answerer.generate(requests()))
    with pytest.raises(RunError, match="cannot go on after a failure"):
        list(answerer.score(requests()))
    answerer.close()
    assert not dist.is_initialized()


def load_that_is_interrupted_on_rank_0(config: AnswererConfig) -> Any:
    """Load the model; on rank 0 somebody interrupts its second forward pass."""
    model = load_weights(config)
    passes = []

    def interrupt(*_: object) -> None:
        passes.append(1)
        if dist.get_rank() == 0 and len(passes) == 2:
            raise KeyboardInterrupt

    model.model.layers[0].register_forward_pre_hook(interrupt)
    return model


def test_an_interrupt_of_the_first_rank_alone_ends_all(folder: Folder) -> None:
    """The others wait in a collective and hear no order to end: closing waited for them, for thirty days."""
    answerer = open_answerer(
        AnswererConfig(model=folder.path, cp=2, batch_tokens=200),
        tokenizer=folder.tokenizer,
        load=load_that_is_interrupted_on_rank_0,
    )
    with pytest.raises(KeyboardInterrupt):
        list(answerer.generate(requests()))
    answerer.close()
    assert not dist.is_initialized()


def build_where_rank_1_has_less_memory(device: torch.device, spec: Any) -> Member:
    """Open the model; rank 1 has `spec`'s bytes for itself."""
    settings, free = spec
    if dist.get_rank() == 1:
        # Two ranks share what their machine has.
        memory.available_memory = opening.available_memory = lambda device: 2 * free
    return opening._build(device, settings)


@pytest.mark.parametrize(("free", "refused"), [(1_100_000, False), (1000, True)])
def test_ranks_reckon_with_the_least_memory_that_one_has(folder: Folder, free: int, refused: bool) -> None:
    """Ranks that read batches of unequal size add up tensors that have nothing to do with each other."""
    config = AnswererConfig(model=folder.path, tp=2, batch_tokens=200)
    settings = opening._Part(config, folder.tokenizer, None)
    # 128 bytes of keys a token on a rank: of these prompts one fits at a time, beside 1 MiB of activations.
    asked = [Request("", prompt_ids=ids_of(seed, 190 + 5 * seed), max_new_tokens=6) for seed in range(3)]
    expected = dict(
        open_answerer(AnswererConfig(model=folder.path), tokenizer=folder.tokenizer).generate(asked)
    )
    answerer = join_ranks(2, build_where_rank_1_has_less_memory, (settings, free))
    try:
        if refused:
            with pytest.raises(RunError, match=r"do not fit into the memory of cpu(.|\n)*1000 B that"):
                list(answerer.generate(asked))
        else:
            found = dict(answerer.generate(asked))
            assert {index: answer.text for index, answer in found.items()} == {
                index: answer.text for index, answer in expected.items()
            }
    finally:
        answerer.close()


def load_nothing_on_rank_1(config: AnswererConfig) -> Any:
    """Fail on rank 1 before the model is there."""
    if dist.get_rank() == 1:
        raise MemoryError
    return load_weights(config)


@pytest.mark.slow
def test_rank_that_cannot_load_the_model_ends_all(folder: Folder) -> None:
    """The first rank is done with loading and asks: nobody is there."""
    with pytest.raises(RunError, match="rank 1 of 2: the memory of cpu is used up"):
        results(
            open_answerer(
                AnswererConfig(model=folder.path, cp=2),
                tokenizer=folder.tokenizer,
                load=load_nothing_on_rank_1,
            )
        )
    assert not dist.is_initialized()


@pytest.mark.slow
def test_heads_that_do_not_divide_are_named(folder: Folder) -> None:
    """transformers would cut a head in two."""
    with pytest.raises(ArgumentError, match=r"heads of this model do not divide among 4 processes"):
        open_answerer(AnswererConfig(model=folder.path, tp=4), tokenizer=folder.tokenizer)
    assert not dist.is_initialized()


SCRIPT = """
import sys
import numpy as np
from longspan.data.tokenizer import load_tokenizer
from longspan.infer.config import AnswererConfig
from longspan.infer.opening import open_answerer
from longspan.infer.requests import Request

path = sys.argv[1]
answerer = open_answerer(AnswererConfig(model=path, cp=2), tokenizer=load_tokenizer(path))
prompt = np.arange(3, 40)
found = [answer for _, answer in answerer.generate([Request("", prompt_ids=prompt, max_new_tokens=6)])]
answerer.close()
print("answer", found[0].token_ids.tolist())
"""


@pytest.mark.slow
def test_processes_of_torchrun_are_used(folder: Folder, tmp_path: Path) -> None:
    """The same script alone and under torchrun; only the first process says something."""
    script = tmp_path / "ask.py"
    script.write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    found = [
        subprocess.run(
            [*command, str(script), folder.path], capture_output=True, text=True, timeout=PATIENCE_SECONDS
        )
        for command in ([*torchrun, "2"], [*torchrun, "3"])
    ]
    assert found[0].returncode == 0, found[0].stderr
    lines = [line for line in found[0].stdout.splitlines() if line.startswith("answer")]
    with_one = open_answerer(AnswererConfig(model=folder.path), tokenizer=folder.tokenizer)
    request = Request("", prompt_ids=np.arange(3, 40), max_new_tokens=6)
    (expected,) = [answer.token_ids for _, answer in with_one.generate([request])]
    assert expected is not None
    assert lines == [f"answer {expected.tolist()}"]
    assert found[1].returncode != 0
    assert "the processes that were started are not those asked for" in found[1].stderr
