"""Single tokens over spans of keys, and what a tree of prompts costs on a device: launches and operators a layer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longspan.infer import token_spans
from longspan.infer.kv import KvBlock, Segment, StrandPlace
from longspan.infer.prefix_tree import Strand, build_tree
from longspan.infer.states import TreeStates
from longspan.infer.token_spans import TokenSpans
from longspan.infer.tree_passes import DecodePass, PrefillPass
from longspan.kernels.attention import AttentionForm, AttentionKernel, Bands, choose_kernel
from longspan.kernels.attention.reference import ReferenceKernel
from longspan.kernels.attention.tiled import TiledKernel
from tests.flash_operators import calls, flash_operators

SPANS = {
    "one": ([7], [41]),
    "own keys": ([0, 9, 20], [9, 1, 30]),
    "forks of a trunk": ([0, 0, 0, 5], [50, 23, 1, 40]),
    "neighbours that see the same": ([0, 0, 0, 8], [37, 37, 20, 42]),
    "some see nothing": ([0, 3, 0, 50], [0, 12, 0, 0]),
}


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: list[int], length: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out and lse in the plainest words."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("thd,shd->ths", q, k) * 0.3
    keys = torch.arange(len(k))
    seen = torch.stack([(keys >= s) & (keys < s + n) for s, n in zip(start, length)])
    scores = scores.masked_fill(~seen[:, None], -math.inf)
    return torch.einsum("ths,shd->thd", scores.softmax(-1).nan_to_num(), v), scores.logsumexp(-1)


@pytest.mark.both_kernels
@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_spans_are_attention_of_each_token(
    kv_heads: int, pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the wrong head, keys cut at the wrong place, a piece that sees nothing and makes the whole NaN."""
    if pieces:
        monkeypatch.setattr(token_spans, "PIECE_KEYS", 4)
    for name, (start, length) in SPANS.items():
        generator = torch.Generator().manual_seed(len(start))
        q, k, v = (
            torch.randn(count, heads, 8, generator=generator)
            for count, heads in ((len(start), 4), (53, kv_heads), (53, kv_heads))
        )
        truth = dense(q.double(), k.double(), v.double(), start, length)
        spans = TokenSpans(np.array(start), np.array(length))
        assert spans.num_pairs == sum(length)
        kernels: list[AttentionKernel] = [choose_kernel("cpu"), ReferenceKernel(), TiledKernel()]
        for kernel in kernels:
            found = spans.attend(q, k[spans.keys], v[spans.keys], 0.3, kernel)
            for mine, theirs in zip(found, truth):
                assert torch.allclose(mine.double(), theirs, rtol=2e-6, atol=2e-6), (name, kernel.name)


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "launched"),
    [
        (1, 32, 8, 1),  # FlashAttention-2 cuts the keys where one query a sequence meets grouped heads
        (1, 32, 32, 4),  # and not where each query head has keys of its own: 4 pieces of 32 heads
        (16, 32, 8, 16),  # of one document, read once for all of them
    ],
)
def test_long_keys_keep_a_gpu_busy(tokens: int, heads: int, kv_heads: int, launched: int) -> None:
    """With the heads of a group as rows of one sequence, 8 blocks walked over 131,072 keys each."""
    spans = TokenSpans(np.zeros(tokens, dtype=np.int64), np.full(tokens, 131072))
    bands, folded, pieces = spans._layout(heads // kv_heads, kv_heads, spread_by_queries=True)
    assert len(bands) == launched and folded == (launched > 1) and pieces == max(1, launched)
    assert launched * kv_heads >= 128 or (not folded and bands.q_len.tolist() == [1])
    assert bands.num_pairs() == tokens * 131072 * (heads // kv_heads if folded else 1)


class Operators(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def place(strands: list[Strand], kernel: AttentionKernel, places: dict[Strand, StrandPlace]) -> None:
    rooms = [len(strand.ids) + 4 for strand in strands]
    block = KvBlock(sum(rooms), kernel)
    for strand, row, room in zip(strands, np.cumsum([0, *rooms[:-1]]).tolist(), rooms):
        places[strand] = StrandPlace(block, row, room)


def attend(documents: PrefillPass | DecodePass, form: AttentionForm) -> tuple[int, int]:
    """Return launches and operators of the second layer."""
    for layer in (0, 1):
        q, k, v = (torch.randn(documents.num_tokens, heads, 8) for heads in (8, 2, 2))
        calls.clear()
        with Operators() as operators:
            documents.attend(q, k, v, form, layer=layer)
    return len(calls), operators.count


@pytest.mark.parametrize("window", [None, 64])
def test_forks_of_a_needle_tree_are_one_launch(window: int | None) -> None:
    """A launch and a merge for each of 20 depths were 658 operators a layer of a pass, and 664 a step of decoding."""
    haystack = np.random.default_rng(0).integers(0, 100, 800)
    prompts = [
        np.concatenate([haystack[:cut], [200 + number, 5, 6], haystack[cut:], [255]])
        for number, cut in enumerate(range(40, 800, 38))
    ]
    trunk, *branches = build_tree(prompts).strands()
    form, places = AttentionForm(window=window), dict[Strand, StrandPlace]()
    with flash_operators(wide=True):
        kernel = choose_kernel("cpu")
        for strands in ([trunk], branches):
            place(strands, kernel, places)
            reading = PrefillPass(
                [Segment(each, 0, len(each.ids)) for each in strands], places, TreeStates(), kernel
            )
            launches, operators = attend(reading, form)
            assert (launches, operators <= 45) == (1 if strands == [trunk] else 2, True), (
                launches,
                operators,
            )
        writing = DecodePass(branches, places, TreeStates(), kernel)
        writing.step(np.zeros(len(branches), dtype=np.int64))
        launches, operators = attend(writing, form)
    assert len(branches) == 19
    # Nothing above is in reach of a short window.
    assert (launches, operators <= 40) == (2 if window is None else 1, True), (launches, operators)


def test_keys_that_several_bands_read_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathered, the trunk of a tree would lie in memory once for each branch."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, heads, 8, generator=generator) for n, heads in ((20, 4), (90, 2), (90, 2)))
    bands = Bands([0, 4, 11], [4, 7, 9], [0, 0, 30], [90, 17, 60], lo=[-90, -17, -60])
    truth = ReferenceKernel().forward(q, k, v, bands, 0.3)
    monkeypatch.setattr(torch.Tensor, "index_select", lambda *_: pytest.fail("gathered"))
    with flash_operators(wide=True):
        found = choose_kernel("cpu").forward(q, k, v, bands, 0.3)
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)
