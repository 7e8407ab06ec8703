"""A teacher's predictions against a direct forward pass, alone and shared among processes."""

from __future__ import annotations

import multiprocessing

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.distributed as dist

from longspan.core.errors import ArgumentError
from longspan.infer.teacher import LocalTeacher, SharedTeacher
from longspan.kernels.head import select_top_k, top_k
from longspan.models.hf import build_model
from longspan.parallel.mesh import MeshConfig, build_mesh

CONFIG = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    words=st.integers(1, 3000), share=st.floats(0, 1), rows=st.integers(1, 5), seed=st.integers(0, 99)
)
def test_selection_is_that_of_topk(words, share, rows, seed):
    """Words behind the last whole group, and a group with several of the likeliest, must not be missed."""
    k = max(1, round(share * min(words, 60)))
    logits = torch.randn(rows, words, generator=torch.Generator().manual_seed(seed))
    values, ids = select_top_k(logits, k)
    torch.testing.assert_close(values, logits.topk(k, dim=1).values, rtol=0, atol=0)
    torch.testing.assert_close(logits.gather(1, ids), values, rtol=0, atol=0)
    assert all(len(set(row)) == k for row in ids.tolist())


def test_selection_of_equal_words():
    """Ties at the border of the k: each word counts once."""
    values, ids = select_top_k(torch.zeros(2, 2048), 7)
    assert (values == 0).all() and all(len(set(row)) == 7 for row in ids.tolist())


@pytest.mark.parametrize("k", [1, 5, 97])
@pytest.mark.parametrize("chunk_tokens", [None, 3])
def test_equals_a_softmax_of_all_logits(k, chunk_tokens):
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(10, 8, generator=generator), torch.randn(97, 8, generator=generator)
    ids, logprobs, tail = top_k(head, hidden, k, chunk_tokens=chunk_tokens)
    wanted = (hidden @ head.T).log_softmax(1)
    torch.testing.assert_close(logprobs, wanted.topk(k, 1).values)
    torch.testing.assert_close(wanted.gather(1, ids), logprobs)
    mass = logprobs.exp().sum(1) + tail.exp()
    torch.testing.assert_close(mass, torch.ones(10))
    if k == 97:
        assert (tail == -torch.inf).all()
    else:
        torch.testing.assert_close(tail, wanted.scatter(1, ids, -torch.inf).logsumexp(1))


def test_a_tiny_tail_is_not_lost():
    """1 - sum of the masses would be 0 or a rounding error where the tail is 1e-12."""
    head = torch.tensor([[27.6], [0.0], [0.0]])
    _, _, tail = top_k(head, torch.ones(1, 1), 2)
    assert tail.item() == pytest.approx(-27.6, rel=1e-5)


def test_half_precision_is_normalised_in_fp32():
    """A softmax in bf16 loses all words below 0.4 % of the mass."""
    generator = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(4, 8, generator=generator), torch.randn(50, 8, generator=generator)
    _, logprobs, tail = top_k(head.bfloat16(), hidden.bfloat16(), 5)
    wanted = (hidden.bfloat16().float() @ head.bfloat16().float().T).log_softmax(1).topk(5, 1).values
    torch.testing.assert_close(logprobs, wanted)
    assert logprobs.dtype == tail.dtype == torch.float32


@pytest.mark.both_kernels
def test_entry_t_is_the_prediction_after_token_t(twins):
    """Alignment, and the borders of documents: against plain transformers, one document at a time."""
    documents = [np.arange(7) % 97, np.array([5, 90, 3, 3]), np.array([11])]
    ids = np.concatenate(documents)
    teacher = LocalTeacher(twins.ours)
    found = teacher.topk(ids, np.array([0, 7, 11, 12]), k=4)
    start = 0
    for document in documents:
        with torch.no_grad():
            logits = twins.plain(torch.from_numpy(document)[None]).logits[0]
        wanted = logits.log_softmax(1).topk(4, 1)
        end = start + len(document)
        np.testing.assert_allclose(found.logprobs[start:end], wanted.values, atol=2e-5)
        assert (found.ids[start:end] == wanted.indices.numpy()).all()
        start = end
    some = teacher.topk(ids, np.array([0, 7, 11, 12]), k=4, places=np.array([2, 11]))
    np.testing.assert_allclose(some.logprobs, found.logprobs[[2, 11]], atol=1e-6)


@pytest.mark.parametrize("k", [0, 98])
def test_refuses_more_words_than_there_are(twins, k):
    with pytest.raises(ArgumentError, match="so many words"):
        LocalTeacher(twins.ours).topk(np.arange(3), np.array([0, 3]), k=k)


def share_teacher(rank: int, store: str, schedule: str, told: multiprocessing.SimpleQueue) -> None:
    """Be one of two processes; the first tells what they find."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    degrees = MeshConfig(cp_ulysses=2) if schedule == "ulysses" else MeshConfig(cp_ring=2)
    teacher = SharedTeacher(build_model(CONFIG, seed=0), build_mesh(degrees, "cpu"), schedule)
    if rank:
        teacher.follow()
    else:
        ids, borders = np.arange(21) % 97, np.array([0, 13, 21])
        found = [
            *teacher.topk(ids, borders, k=3),
            *teacher.topk(ids, borders, k=3, places=np.array([0, 12, 13, 20])),
        ]
        teacher.close()
        told.put(found)
    dist.destroy_process_group()


@pytest.mark.both_kernels
@pytest.mark.parametrize("schedule", ["ring", "ulysses"])
def test_a_shared_teacher_says_the_same(schedule, tmp_path):
    """Tokens of several processes come back in the order of the row, without the padding of the layout."""
    # Forked, because a new process takes seconds to import what this one has.
    context = multiprocessing.get_context("fork")
    told = context.SimpleQueue()
    ranks = [
        context.Process(target=share_teacher, args=(rank, str(tmp_path / "store"), schedule, told))
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    found = told.get()
    teacher = LocalTeacher(build_model(CONFIG, seed=0))
    wanted = teacher.topk(np.arange(21) % 97, np.array([0, 13, 21]), k=3)
    for ours, theirs in zip(found, [*wanted, *(column[[0, 12, 13, 20]] for column in wanted)]):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
