"""Attention kernels against the dense reference, for bands of every kind."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.live_bytes import LiveBytes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from longspan.core.errors import ArgumentError
from longspan.kernels.attention import Bands, attention, choose_kernel, cpu_flash, merge, tiled
from longspan.kernels.attention.cpu_flash import CpuFlashKernel
from longspan.kernels.attention.cuda_varlen import CudaVarlenKernel
from longspan.kernels.attention.reference import ReferenceKernel, dense_mask
from longspan.kernels.attention.tiled import TiledKernel, tiled_bytes

CPU = torch.device("cpu")


def tensors(
    *,
    queries: int,
    keys: int,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    dtype: torch.dtype,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (queries, heads, head_dim),
        (keys, kv_heads, head_dim),
        (keys, kv_heads, head_dim),
        (queries, heads, head_dim),
    ]
    q, k, v, dout = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    )
    return q, k, v, dout


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30))


def assert_same_attention(
    bands: Bands, *, queries: int, keys: int, dtype: torch.dtype, limit: float, **shape: int
) -> None:
    """Forward, lse and backward of the kernel that is chosen against the fp64 reference."""
    q, k, v, dout = tensors(queries=queries, keys=keys, dtype=dtype, **shape)
    scale = 0.3
    wide = [x.double() for x in (q, k, v, dout)]
    true_out, true_lse = ReferenceKernel().forward(*wide[:3], bands, scale)
    true_grads = ReferenceKernel().backward(wide[3], *wide[:3], true_out, true_lse, bands, scale)
    kernel = choose_kernel(CPU)
    if not kernel.upcasts:
        limit = max(limit, 1.5e-2 if dtype == torch.bfloat16 else 2e-6)  # lse is in fp32, weights in 16 bits
    out, lse = kernel.forward(q, k, v, bands, scale)
    grads = kernel.backward(dout, q, k, v, out, lse, bands, scale)
    assert out.dtype == dtype
    unseen = true_lse == -math.inf
    assert torch.equal(lse == -math.inf, unseen)
    assert not out[unseen].any() and not grads[0][unseen].any()
    pairs = [(out, true_out), (lse[~unseen], true_lse[~unseen]), *zip(grads, true_grads)]
    for found, truth in pairs:
        assert found.shape == truth.shape and torch.isfinite(found).all()
        # With one visible key dq and dk are exactly 0: rounding is then judged against the size of dout.
        assert float((found.double() - truth).norm()) <= limit * float(
            truth.norm().clamp_min(0.2 * wide[3].norm())
        )


PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)]


@pytest.mark.both_kernels
@pytest.mark.parametrize(("dtype", "limit"), PRECISIONS)
@pytest.mark.parametrize("window", [None, 1, 5, 64])
def test_documents_with_and_without_window(window: int | None, dtype: torch.dtype, limit: float) -> None:
    """Guards the tiling of windows and the batching of equal documents (here 3 of 40, 2 of 7, one of 1)."""
    bands = Bands.from_documents([0, 40, 47, 87, 88, 128, 135, 300], window=window)
    assert_same_attention(bands, queries=300, keys=300, dtype=dtype, limit=limit)


def test_window_wider_than_one_kernel_block() -> None:
    """A row whose whole first block of 512 keys is masked must not become NaN inside the online softmax."""
    assert_same_attention(
        Bands.from_documents([0, 1500], window=100), queries=1500, keys=1500, dtype=torch.float32, limit=2e-6
    )


SEGMENT = st.integers(1, 40)
SHIFT = st.integers(-45, 45)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(SEGMENT, SEGMENT, SHIFT, st.none() | st.integers(0, 40)), min_size=1, max_size=5),
    gap=st.integers(0, 3),
    kv_heads=st.sampled_from([1, 2, 4]),
)
def test_random_bands(rows: list[tuple[int, int, int, int | None]], gap: int, kv_heads: int) -> None:
    """Guards every shifted, windowed and rectangular band, uncovered query rows and fully masked rows."""
    q_len, k_len, lo, width = (list(column) for column in zip(*rows))
    q_start = np.cumsum([gap] + [length + gap for length in q_len])[:-1]
    k_start = np.cumsum([gap] + [length + gap for length in k_len])[:-1]
    hi = [None if w is None else low + w for low, w in zip(lo, width)]
    bands = Bands(q_start, q_len, k_start, k_len, lo=lo, hi=hi)
    queries, keys = int(sum(q_len)) + gap * (len(rows) + 1), int(sum(k_len)) + gap * (len(rows) + 1)
    plain = torch.zeros(queries, keys, dtype=torch.bool)
    for qs, ql, ks, kl, low, high in zip(q_start, q_len, k_start, k_len, lo, hi):
        for i in range(ql):
            for j in range(kl):
                plain[qs + i, ks + j] = low <= i - j and (high is None or i - j <= high)
    assert torch.equal(dense_mask(bands, num_queries=queries, num_keys=keys, device=CPU), plain)
    assert bands.num_pairs() == int(plain.sum())
    assert_same_attention(
        bands, queries=queries, keys=keys, dtype=torch.float32, limit=3e-6, kv_heads=kv_heads
    )


@pytest.mark.both_kernels
def test_all_queries_see_the_first_half_of_as_many_keys() -> None:
    """Guards the uncopied fast path against taking half of the keys for all of them (a zigzag ring's late half)."""
    assert_same_attention(
        Bands([0], [32], [0], [16], lo=-100), queries=32, keys=32, dtype=torch.float32, limit=2e-6
    )


def _launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by one for each call of torch's kernel."""
    found: list[int] = []
    forward = cpu_flash._forward

    def counted(*args: Any, **options: Any) -> Any:
        found.append(1)
        return forward(*args, **options)

    monkeypatch.setattr(cpu_flash, "_forward", counted)
    return found


@pytest.mark.parametrize(
    ("starts", "lengths", "launched"),
    [
        ([0, 20, 40, 60], [7, 20, 1, 9], 1),  # at an even distance
        ([0, 0, 0, 0], [70, 3, 31, 69], 1),  # forks of a trunk
        ([0, 20, 40, 77], [7, 20, 1, 3], 2),  # one has moved away
        ([0, 2, 4, 6], [9, 20, 1, 3], 4),  # they overlap
    ],
)
@pytest.mark.parametrize("queries", [1, 2])
def test_rectangles_of_many_widths_are_one_call(
    starts: list[int], lengths: list[int], launched: int, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call for each answer of a batch; a mask that hides too little, gradients of keys behind a band."""
    count = _launched(monkeypatch)
    rows = np.arange(4) * queries
    bands = Bands(rows, [queries] * 4, starts, lengths, lo=-1000)
    CpuFlashKernel().forward(*tensors(queries=4 * queries, keys=80, dtype=torch.float32)[:3], bands, 0.3)
    assert len(count) == launched
    assert_same_attention(bands, queries=4 * queries, keys=80, dtype=torch.float32, limit=2e-6)
    assert_same_attention(bands, queries=4 * queries, keys=80, dtype=torch.float64, limit=1e-12)


def test_a_neighbour_that_is_no_number_is_not_read() -> None:
    """0 * NaN is NaN: keys behind those of a band are read with a mask, so they must not be another's."""
    q, k, v, _ = tensors(queries=3, keys=48, dtype=torch.float32)
    k[16:32] = v[16:32] = math.nan
    out, _ = CpuFlashKernel().forward(
        q, k, v, Bands([0, 1, 2], [1] * 3, [0, 16, 32], [3, 16, 5], lo=-99), 0.3
    )
    assert out.isfinite().all(-1).all(-1).tolist() == [True, False, True]


def test_a_table_may_be_used_over_fewer_keys() -> None:
    """Calls made for more keys read behind the end of fewer: an error, or what lies there in memory."""
    q, k, v, _ = tensors(queries=3, keys=48, dtype=torch.float32)
    bands = Bands([0, 1, 2], [1] * 3, [0, 16, 32], [16, 3, 2], lo=-99)
    whole = CpuFlashKernel().forward(q, k, v, bands, 0.3)
    v[34:] = math.nan
    part = CpuFlashKernel().forward(q, k[:34], v[:34], bands, 0.3)
    assert all(torch.allclose(*pair, rtol=0, atol=2e-6) for pair in zip(whole, part))


@pytest.mark.both_kernels
def test_queries_shared_by_two_bands() -> None:
    """A chunk of queries that sees two key chunks in one table must join both, not keep the last one."""
    bands = Bands([0, 0, 10], [10, 10, 10], [0, 20, 0], [20, 10, 30], lo=[-100, 0, -20])
    assert bands.queries_overlap
    assert_same_attention(bands, queries=20, keys=30, dtype=torch.float32, limit=2e-6)


@settings(max_examples=25, deadline=None)
@given(total=st.integers(8, 60), world=st.integers(2, 4), window=st.none() | st.integers(1, 30))
def test_striped_positions_are_a_shift_of_the_diagonal(total: int, world: int, window: int | None) -> None:
    """Rank r holds positions r, r+world, ...: bands between ranks must add up to the causal mask."""
    whole = torch.zeros(total, total, dtype=torch.bool)
    for r in range(world):
        for s in range(world):
            q_pos, k_pos = torch.arange(r, total, world), torch.arange(s, total, world)
            # 0 <= (a*world + r) - (b*world + s) <= window - 1, solved for a - b
            lo, hi = -((r - s) // world), None if window is None else (window - 1 + s - r) // world
            bands = Bands([0], [len(q_pos)], [0], [len(k_pos)], lo=lo, hi=hi)
            whole[q_pos[:, None], k_pos] = dense_mask(
                bands, num_queries=len(q_pos), num_keys=len(k_pos), device=CPU
            )
    truth = dense_mask(
        Bands.from_documents([0, total], window=window), num_queries=total, num_keys=total, device=CPU
    )
    assert torch.equal(whole, truth)


def test_reference_backward_is_the_derivative() -> None:
    """The judge itself is judged by autograd, with grouped heads and a row that sees nothing."""
    bands = Bands([0, 6], [5, 4], [0, 3], [3, 6], lo=[0, -2], hi=[None, 3])
    q, k, v, _ = tensors(queries=11, keys=9, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, bands, kernel=ReferenceKernel()), inputs)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, bands, kernel=CpuFlashKernel()), inputs)


@pytest.mark.both_kernels
def test_split_keys_merge_to_the_whole_forward_and_backward() -> None:
    """Keys split in two, joined by lse, gradients from the global lse: what schedules rely on."""
    q, k, v, dout = tensors(queries=50, keys=50, dtype=torch.float32)
    kernel, scale = choose_kernel(CPU), 0.35
    whole = Bands.from_documents([0, 50])
    parts = [(slice(0, 30), Bands([0], [50], [0], [30])), (slice(30, 50), Bands([0], [50], [0], [20], lo=30))]
    true_out, true_lse = kernel.forward(q, k, v, whole, scale)
    true_grads = kernel.backward(dout, q, k, v, true_out, true_lse, whole, scale)
    out, lse = torch.zeros_like(q), torch.full(q.shape[:2], -math.inf)
    for keys, bands in parts:
        out, lse = merge(out, lse, *kernel.forward(q, k[keys], v[keys], bands, scale))
    assert relative(out, true_out) <= 1e-6 and relative(lse, true_lse) <= 1e-6
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for keys, bands in parts:
        part = kernel.backward(dout, q, k[keys], v[keys], out, lse, bands, scale)
        dq, dk[keys], dv[keys] = dq + part[0], part[1], part[2]
    for found, truth in zip((dq, dk, dv), true_grads):
        assert relative(found, truth) <= 2e-6


def test_merge_survives_huge_scores_and_empty_parts() -> None:
    """exp(lse) overflows at 89 in fp32; -inf minus -inf is NaN: neither may reach the output."""
    out_a, out_b = torch.tensor([[1.0], [1.0], [7.0], [7.0]]), torch.tensor([[3.0], [3.0], [9.0], [9.0]])
    lse_a = torch.tensor([5e4, 5e4, -math.inf, -math.inf])
    lse_b = torch.tensor([5e4, -math.inf, -5e4, -math.inf])
    out, lse = merge(out_a, lse_a, out_b, lse_b)
    assert out.flatten().tolist() == [2.0, 1.0, 9.0, 0.0]
    assert lse[1:].tolist() == [5e4, -5e4, -math.inf]
    assert merge(out_a.bfloat16(), lse_a, out_b.bfloat16(), lse_b)[0].dtype == torch.float32
    assert merge(out_a.double(), lse_a, out_b, lse_b)[0].dtype == torch.float64


@pytest.mark.both_kernels
def test_other_documents_do_not_change_a_bit() -> None:
    """Changing the keys of one document must leave the outputs of the others bit-equal."""
    q, k, v, _ = tensors(queries=90, keys=90, dtype=torch.float32)
    bands = Bands.from_documents([0, 30, 60, 90])
    before = attention(q, k, v, bands)
    k[30:60] += 1.0
    after = attention(q, k, v, bands)
    assert torch.equal(before[:30], after[:30]) and torch.equal(before[60:], after[60:])
    assert not torch.equal(before[30:60], after[30:60])


def test_no_bands_and_empty_bands() -> None:
    """A rank may hold only padding: nothing to see is zeros, not an error."""
    q, k, v, dout = tensors(queries=4, keys=4, dtype=torch.float32)
    for bands in (
        Bands([], [], [], []),
        Bands([0, 2], [2, 0], [0, 0], [0, 4]),
        Bands([0], [4], [0], [4], lo=4),
    ):
        assert len(bands) == 0 and bands.num_pairs() == 0
        for kernel in (CpuFlashKernel(), ReferenceKernel()):
            out, lse = kernel.forward(q, k, v, bands, 1.0)
            assert not out.any() and (lse == -math.inf).all()
            assert not any(grad.any() for grad in kernel.backward(dout, q, k, v, out, lse, bands, 1.0))


def test_user_mistakes_are_named() -> None:
    """Bad tables and shapes end in one message."""
    with pytest.raises(ArgumentError, match="start at 0"):
        Bands.from_documents([0, 5, 3])
    with pytest.raises(ArgumentError, match="window"):
        Bands.from_documents([0, 5], window=0)
    with pytest.raises(ArgumentError, match="differ in length"):
        Bands([0], [1, 2], [0], [1])
    with pytest.raises(ArgumentError, match="before the tensor"):
        Bands([-1], [1], [0], [1])
    q, k, v, _ = tensors(queries=4, keys=4, dtype=torch.float32)
    with pytest.raises(ArgumentError, match="past the end"):
        attention(q, k, v, Bands.from_documents([0, 5]))
    with pytest.raises(ArgumentError, match="multiple"):
        attention(q[:, :3], k, v, Bands.from_documents([0, 4]))


def test_cpu_gets_the_flash_kernel() -> None:
    """The fast path must be the one that runs."""
    assert choose_kernel("cpu").name == "cpu_flash"
    assert choose_kernel("meta").name == "reference"


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.tuples(SEGMENT, SEGMENT, SHIFT, st.none() | st.integers(0, 40)), min_size=1, max_size=4),
    shared=st.booleans(),
)
def test_tiles_are_the_whole(rows: list[tuple[int, int, int, int | None]], shared: bool) -> None:
    """Guards the limits of a band that a tile cuts, keys that only some tiles see, and tiles that see nothing."""
    q_len, k_len, lo, width = (list(column) for column in zip(*rows))
    q_start, k_start = np.cumsum([0, *q_len])[:-1] * (not shared), np.cumsum([0, *k_len])[:-1]
    hi = [None if w is None else low + w for low, w in zip(lo, width)]
    bands = Bands(q_start, q_len, k_start, k_len, lo=lo, hi=hi)
    q, k, v, dout = tensors(queries=sum(q_len) + 3, keys=sum(k_len) + 2, dtype=torch.float64)
    out, lse = ReferenceKernel().forward(q, k, v, bands, 0.3)
    expected = [out, lse, *ReferenceKernel().backward(dout, q, k, v, out, lse, bands, 0.3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "TILE_BYTES", 7 * len(k) * q.shape[1] * 8)
        found = [*TiledKernel().forward(q, k, v, bands, 0.3)]
        found += TiledKernel().backward(dout, q, k, v, out, lse, bands, 0.3)
    for mine, truth in zip(found, expected):
        torch.testing.assert_close(mine, truth, rtol=1e-11, atol=1e-11)


def test_the_dense_fallback_holds_no_square() -> None:
    """Evaluating in fp32, or with heads of 512, made the scores of all pairs at once: 256 GiB at 128K tokens."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    q, k, v, dout = tensors(queries=600, keys=600, head_dim=16, dtype=torch.float32)
    bands = Bands.from_documents([0, 600])
    kernel = CudaVarlenKernel()
    with pytest.MonkeyPatch.context() as patch, Watch():
        patch.setattr(tiled, "TILE_BYTES", 600 * 4 * 4 * 10)
        out, lse = kernel.forward(q, k, v, bands, 0.3)
        kernel.backward(dout, q, k, v, out, lse, bands, 0.3)
    assert largest <= 600 * 4 * 16


@pytest.mark.parametrize(("kv_heads", "head_dim", "tokens"), [(2, 16, 1024), (2, 16, 4096), (1, 512, 2048)])
def test_the_estimate_of_tiles_is_what_is_alive(
    kv_heads: int, head_dim: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation in fp32 on CUDA was refused too late: its memory was that of a flash kernel."""
    monkeypatch.setattr(tiled, "TILE_BYTES", 1 << 20)
    shapes = [(tokens, heads, head_dim) for heads in (4, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16) for shape in shapes)
    with LiveBytes() as counted:
        out, lse = TiledKernel().forward(q, k, v, Bands.from_documents([0, tokens]), 0.2)
    alive = counted.peak - out.nbytes - lse.nbytes
    estimate = tiled_bytes(heads=4, kv_heads=kv_heads, head_dim=head_dim, keys=tokens)
    assert 0.95 * alive < estimate < 1.3 * alive
