"""The CUDA kernel through its operators' rules, which `tests.flash_operators` computes on the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.kernels.attention import Bands
from longspan.kernels.attention.cuda_varlen import ALL, MAX_SEQUENCES, CudaVarlenKernel, launches
from longspan.kernels.attention.reference import ReferenceKernel, dense_mask
from tests.flash_operators import calls, flash_operators, real_window
from tests.kernels.test_attention import relative, tensors

CPU = torch.device("cpu")


@pytest.fixture
def flash() -> Iterator[None]:
    with flash_operators():
        yield


@pytest.fixture
def wide_flash() -> Iterator[None]:
    with flash_operators(wide=True):
        yield


def seen_by_launches(bands: Bands, queries: int, keys: int, *, gathered: bool) -> np.ndarray:
    """Return how often each pair is seen, by the rules of the operators."""
    found = np.zeros((queries, keys), dtype=np.int64)
    for launch in launches(bands, num_queries=queries, num_keys=keys, device=CPU, gathered=gathered):
        assert launch.k_used is None or not gathered
        assert launch.left >= -1 and launch.right >= -1
        left, right = real_window(launch.left, launch.right, launch.max_k, causal=False)
        q_rows, k_rows = (
            np.arange(count)[rows if isinstance(rows, slice) else rows.numpy()]
            for rows, count in ((launch.q_rows, queries), (launch.k_rows, keys))
        )
        cu_q, cu_k = launch.cu_q.tolist(), launch.cu_k.tolist()
        ends = cu_k[1:] if launch.k_used is None else (launch.cu_k[:-1] + launch.k_used).tolist()
        assert cu_q[-1] == len(q_rows) and (cu_k[-1] == len(k_rows))
        for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, ends):
            assert q1 - q0 <= launch.max_q and k1 - k0 <= launch.max_k
            ahead = np.arange(k1 - k0) - np.arange(q1 - q0)[:, None] - ((k1 - k0) - (q1 - q0))
            seen = ((left < 0) | (ahead >= -left)) & ((right < 0) | (ahead <= right))
            assert seen.any(axis=1).all(), "a row that sees nothing has lse +inf"
            found[q_rows[q0:q1, None], k_rows[k0:k1]] += seen
    return found


def random_table(draw: np.random.Generator) -> tuple[Bands, int, int]:
    """Return bands of one of the kinds that documents, windows, chunks, rings and trees make, and the lengths."""
    count = int(draw.integers(1, 6))
    longest = int(draw.choice([3, 12, 40]))
    q_len, k_len = draw.integers(1, longest + 1, (2, count))
    kind = draw.integers(5)
    if kind == 0:  # packed documents
        window = None if draw.random() < 0.2 else int(draw.integers(1, longest + 2))
        return Bands.from_documents([0, *np.cumsum(q_len)], window=window), int(q_len.sum()), int(q_len.sum())
    lo = draw.integers(-longest, longest // 2 + 1, count)
    width = draw.integers(0, longest + 1, count)
    if kind == 1:  # one window, keys before the queries
        lo[:], width[:] = lo[0], width[0]
    hi = [None if draw.random() < 0.3 else int(low + w) for low, w in zip(lo, width)]
    lo = np.where(draw.random(count) < 0.3, -(1 << 62), lo)
    q_start, k_start = np.cumsum(q_len) - q_len, np.cumsum(k_len) - k_len
    queries, keys = int(q_len.sum()), int(k_len.sum())
    if kind == 4:  # forks: keys that several read, or none
        k_start = draw.integers(0, keys - k_len + 1)
    if kind == 3:  # queries that see several parts of the keys
        q_start, q_len, queries = q_start * 0, np.minimum(q_len, q_len[0]), int(q_len[0])
    return Bands(q_start, q_len, k_start, k_len, lo=lo, hi=hi), queries, keys


def assert_launches_show_the_bands(draw: np.random.Generator, tables: int) -> None:
    for number in range(tables):
        bands, queries, keys = random_table(draw)
        truth = dense_mask(bands, num_queries=queries, num_keys=keys, device=CPU).numpy()
        for gathered in (False, True):
            found = seen_by_launches(bands, queries, keys, gathered=gathered)
            assert (found == truth).all(), (number, bands.groups())


def test_launches_show_the_pairs_of_the_bands_by_the_operators_rules() -> None:
    """Guards against windows that are right as they are asked for, and wrong as the operator takes them."""
    assert_launches_show_the_bands(np.random.default_rng(7), 800)


@pytest.mark.slow
def test_launches_of_many_tables() -> None:
    """The same on as many tables as a release deserves."""
    assert_launches_show_the_bands(np.random.default_rng(8), 40_000)


@pytest.mark.parametrize(
    ("borders", "window"),
    [([0, 40, 41, 47, 87, 88, 300], None), ([0, 40, 41, 47, 300], 16), ([0, 1, 2, 3], None), ([0, 5, 8], 9)],
)
@pytest.mark.usefixtures("flash")
def test_packed_documents_are_one_launch(borders: list[int], window: int | None) -> None:
    """A document of one token, or one shorter than the window, must not cost gathered copies and fp32 sums."""
    bands = Bands.from_documents(borders, window=window)
    (launch,) = launches(bands, num_queries=borders[-1], num_keys=borders[-1], device=CPU)
    assert launch.q_rows == launch.k_rows == ALL
    q, k, v, dout = tensors(queries=borders[-1], keys=borders[-1], dtype=torch.bfloat16)
    out, lse = CudaVarlenKernel().forward(q, k, v, bands, 0.3)
    CudaVarlenKernel().backward(dout, q, k, v, out, lse, bands, 0.3)
    assert calls == [("forward", len(borders) - 1), ("backward", len(borders) - 1)]


def test_more_documents_than_a_grid_holds_are_split() -> None:
    """A launch of 65,536 sequences is refused by the card."""
    count = MAX_SEQUENCES + 5
    bands = Bands.from_documents(np.arange(count + 1))
    parts = launches(bands, num_queries=count, num_keys=count, device=CPU)
    assert [len(part.cu_q) - 1 for part in parts] == [MAX_SEQUENCES, 5]


def assert_kernel_is_right(bands: Bands, queries: int, keys: int, dtype: torch.dtype, limit: float) -> None:
    """Forward, lse and backward against the fp64 reference."""
    q, k, v, dout = tensors(queries=queries, keys=keys, dtype=dtype)
    wide = [x.double() for x in (q, k, v, dout)]
    true_out, true_lse = ReferenceKernel().forward(*wide[:3], bands, 0.3)
    true_grads = ReferenceKernel().backward(wide[3], *wide[:3], true_out, true_lse, bands, 0.3)
    kernel = CudaVarlenKernel()
    out, lse = kernel.forward(q, k, v, bands, 0.3)
    grads = kernel.backward(dout, q, k, v, out, lse, bands, 0.3)
    unseen = true_lse == -math.inf
    assert out.dtype == dtype and torch.equal(lse == -math.inf, unseen)
    for found, truth in [(out, true_out), (lse[~unseen], true_lse[~unseen]), *zip(grads, true_grads)]:
        assert torch.isfinite(found).all()
        assert float((found.double() - truth).norm()) <= limit * float(
            truth.norm().clamp_min(0.2 * wide[3].norm())
        )


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_random_bands_in_fp32(seed: int) -> None:
    """Guards the kernel's own part at limits that 16 bits would hide: gathers, merges, sums, unseen rows."""
    with flash_operators(wide=True):
        assert_kernel_is_right(*random_table(np.random.default_rng(seed)), torch.float32, 3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("flash")
def test_bands_in_16_bits(dtype: torch.dtype) -> None:
    """Guards the types that the operators take: what is merged, summed and handed back."""
    for bands in (
        Bands.from_documents([0, 40, 47, 300]),
        Bands.from_documents([0, 40, 300], window=32),
        Bands([0, 0], [300, 150], [0, 200], [200, 100], lo=[-50, 60]),
        Bands([0], [300], [0], [20], lo=-100, hi=290),
        Bands([100], [100], [50], [100], hi=30),
    ):
        assert_kernel_is_right(bands, 300, 300, dtype, 1e-2)


@pytest.mark.usefixtures("wide_flash")
def test_a_table_used_with_longer_keys() -> None:
    """A plan kept for the first tensors must not leave rows of longer ones undefined."""
    bands = Bands.from_documents([0, 4, 9])
    kernel = CudaVarlenKernel()
    for length in (9, 12):
        q, k, v, dout = tensors(queries=length, keys=length, dtype=torch.float32)
        out, lse = kernel.forward(q, k, v, bands, 0.5)
        grads = kernel.backward(dout, q, k, v, out, lse, bands, 0.5)
        assert not any(x[9:].any() for x in (out, *grads)), length


@pytest.mark.usefixtures("wide_flash")
@pytest.mark.parametrize(("causal", "q_len"), [(True, 12), (False, 7)])
def test_the_operators_are_attention(causal: bool, q_len: int) -> None:
    """The stand-in itself is judged by torch's own attention and its derivative."""
    q, k, v, dout = (x.requires_grad_() for x in tensors(queries=q_len, keys=12, dtype=torch.float32))
    rows = [x.transpose(0, 1) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *rows, is_causal=causal, enable_gqa=True, scale=0.3
    ).transpose(0, 1)
    expected_grads = torch.autograd.grad(expected, (q, k, v), dout)
    bands = Bands([0], [q_len], [0], [12], lo=0 if causal else -12)
    with torch.no_grad():
        out, lse = CudaVarlenKernel().forward(q, k, v, bands, 0.3)
        grads = CudaVarlenKernel().backward(dout, q, k, v, out, lse, bands, 0.3)
    assert len(calls) == 2
    for found, truth in zip((out, *grads), (expected, *expected_grads)):
        torch.testing.assert_close(found, truth, rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures("flash")
def test_the_operators_refuse_what_the_card_refuses() -> None:
    """A stand-in that takes anything would prove nothing."""
    q, k, v, _ = tensors(queries=9, keys=9, dtype=torch.bfloat16)
    borders = torch.tensor([0, 9], dtype=torch.int32)
    forward = torch.ops.aten._flash_attention_forward

    def call(q: torch.Tensor, cu_q: torch.Tensor = borders, max_q: int = 9) -> tuple[torch.Tensor, ...]:
        return forward(q, k, v, cu_q, borders, max_q, 9, 0.0, True, False, scale=0.3)

    assert torch.isfinite(call(q)[0]).all()
    cut = torch.tensor([0, 5], dtype=torch.int32)
    assert call(q, cut)[0][5:].isnan().all()
    for wrong in (
        lambda: call(q.float()),
        lambda: call(q.transpose(0, 2).contiguous().transpose(0, 2)),
        lambda: call(q, borders.long()),
        lambda: call(q, max_q=8),
    ):
        with pytest.raises(AssertionError):
            wrong()


def test_windows_as_the_operators_take_them() -> None:
    """The rules, each once: causal, a limit beyond the keys, a missing side."""
    assert real_window(-1, 0, 10, causal=True) == (-1, 0)
    assert real_window(10, 3, 10, causal=False) == (10, 3)
    assert real_window(4, -1, 10, causal=False) == (4, 10)
    assert real_window(4, 10, 10, causal=False) == (4, 10)
    assert real_window(12, 12, 10, causal=False) == (-1, -1)


def test_cuda_kernel_sends_fp32_to_the_reference() -> None:
    """The flash kernels take 16-bit inputs only; anything else must still be right."""
    q, k, v, dout = tensors(queries=9, keys=9, dtype=torch.float32)
    bands = Bands.from_documents([0, 4, 9])
    out, lse = CudaVarlenKernel().forward(q, k, v, bands, 0.5)
    assert torch.equal(out, ReferenceKernel().forward(q, k, v, bands, 0.5)[0])
    assert len(CudaVarlenKernel().backward(dout, q, k, v, out, lse, bands, 0.5)) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cuda_kernel_against_reference(dtype: torch.dtype) -> None:
    """The CUDA kernel on packed documents, windows, a shifted chunk and a window with few keys."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    for bands in (
        Bands.from_documents([0, 40, 47, 300]),
        Bands.from_documents([0, 40, 300], window=32),
        Bands([0, 0], [300, 150], [0, 200], [200, 100], lo=[-50, 60]),
        Bands([0], [300], [0], [20], lo=-100, hi=290),
    ):
        inputs = [x.cuda() for x in tensors(queries=300, keys=300, head_dim=64, dtype=dtype)]
        q, k, v, dout = inputs
        wide = [x.double() for x in inputs]
        true_out, true_lse = ReferenceKernel().forward(*wide[:3], bands, 0.2)
        true_grads = ReferenceKernel().backward(wide[3], *wide[:3], true_out, true_lse, bands, 0.2)
        out, lse = CudaVarlenKernel().forward(q, k, v, bands, 0.2)
        grads = CudaVarlenKernel().backward(dout, q, k, v, out, lse, bands, 0.2)
        for found, truth in [(out, true_out), *zip(grads, true_grads)]:
            assert relative(found, truth) <= 1e-2


@pytest.mark.parametrize(
    ("bands", "copies"),
    [
        (Bands.from_documents([0, 40, 250]), 0),  # 50 rows of padding behind it
        (Bands([150], [150], [0], [300], lo=-150), 0),  # a half of the queries, all keys
        (Bands([0, 0], [300, 150], [0, 200], [200, 100], lo=[-50, 60]), 0),  # queries that see two parts
        (
            Bands([0, 200], [100, 100], [0, 200], [100, 100]),
            7,
        ),  # a hole: q, and in the backward pass q, k, v, dout, out, lse
    ],
)
@pytest.mark.usefixtures("flash")
def test_rows_that_follow_each_other_are_not_gathered(bands: Bands, copies: int) -> None:
    """Padding, half of a zigzag rank's queries, queries that see several parts: views, where each was a copy."""
    q, k, v, dout = tensors(queries=300, keys=300, dtype=torch.bfloat16)
    gathered: list[int] = []
    select = torch.Tensor.index_select
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.Tensor, "index_select", lambda x, *args: gathered.append(x.nbytes) or select(x, *args)
        )
        kernel = CudaVarlenKernel()
        out, lse = kernel.forward(q, k, v, bands, 0.3)
        kernel.backward(dout, q, k, v, out, lse, bands, 0.3)
    assert len(gathered) == copies
