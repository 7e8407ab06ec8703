"""What the certificate does not look at: heads, bytes, messages, and that a wrong schedule fails it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from longspan.core.errors import ArgumentError
from longspan.kernels.attention import AttentionForm, Bands, attention, cuda_varlen, merge
from longspan.kernels.attention.reference import ReferenceKernel
from longspan.parallel import certify
from longspan.parallel.launch import spawn_local
from longspan.parallel.schedules import SCHEDULES, build_schedule, sequence_attention
from longspan.parallel.schedules.dist_flash import blocks_at
from longspan.parallel.schedules.ring import Ring
from longspan.parallel.schedules.ulysses import head_share
from longspan.parallel.shards import SequenceShards
from tests.flash_operators import in_process_with_flash
from tests.patience import PATIENCE_SECONDS


def _certificate(
    rank: int, names: list[str], heads: tuple[tuple[int, int], ...], lengths: tuple[int, ...]
) -> tuple[list[certify.CertifyResult], dict[str, list[float]]]:
    patch = pytest.MonkeyPatch()  # of this process, which ends with the function
    patch.setattr(certify, "HEADS", heads)
    patch.setattr(certify, "LENGTHS", lengths)
    return certify.certify_world(rank, names)


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_certificate_holds_on_two_and_four_ranks(whole: bool) -> None:
    """Guards every schedule, mask and GQA ratio; whole, it is the proof that `longspan doctor --certify` runs."""
    names = [name for name in SCHEDULES if name != "none"]
    errors: dict[str, dict[int, list[float]]] = {}
    for world in (2, 4):
        every = whole or world == 2
        heads, lengths = (
            (certify.HEADS, certify.LENGTHS) if every else (certify.HEADS[1::2], certify.LENGTHS[1:])
        )
        arguments = names, heads, lengths
        results, half = spawn_local(_certificate, world, *arguments, timeout_seconds=PATIENCE_SECONDS)[0]
        failed = [result for result in results if result.passed is False]
        assert not failed, failed[:3]
        impossible = {(r.cell.schedule, r.reason) for r in results if r.reason}
        assert {name for name, _ in impossible} == ({"usp"} if world == 2 else set())
        assert {r.cell.schedule for r in results} == set(names)
        for name, by_seed in half.items():
            errors.setdefault(name, {})[world] = by_seed
    growth = {name: certify.half_growth(by_world) for name, by_world in errors.items() if len(by_world) > 1}
    assert len(growth) == 5 and max(growth.values()) <= certify.HALF_GROWTH_LIMIT


def _small_certificate(rank: int, dtype: torch.dtype | None) -> list[certify.CertifyResult]:
    patch = pytest.MonkeyPatch()  # of this process, which ends with the function
    patch.setattr(certify, "HEADS", ((8, 2),))
    patch.setattr(certify, "LENGTHS", (61,))
    patch.setattr(certify, "HALF_LENGTH", 64)
    if dtype is not None:
        patch.setattr(certify, "_trained_dtype", lambda kernel: dtype)
    results, half = certify.certify_world(rank, [name for name in SCHEDULES if name != "none"])
    assert all(0 < error < 0.01 for by_seed in half.values() for error in by_seed), half
    return results


@pytest.mark.parametrize(
    ("world", "dtype"),
    [(2, None), (2, torch.float32), pytest.param(4, torch.float32, marks=pytest.mark.slow)],
)
def test_the_certificate_holds_through_the_cuda_kernel(world: int, dtype: torch.dtype | None) -> None:
    """Guards windows and documents on ranks as the flash operators of CUDA take them: rows were lost, or NaN.

    By itself it is in bf16, the only type that the card has operators for: fp32 would prove the fallback instead.
    """
    results = spawn_local(
        in_process_with_flash,
        world, dtype is not None, _small_certificate, dtype, timeout_seconds=PATIENCE_SECONDS,
    )[0]  # fmt: skip
    ran = [result for result in results if not result.reason]
    assert {r.fast_dtype for r in ran} == {"bfloat16" if dtype is None else "float32"}
    assert {r.cell.mask for r in ran} == {"causal", "documents", "window", "documents+window"}
    assert len({r.cell.schedule for r in results if r.passed}) == (len(SCHEDULES) - (2 if world == 2 else 1))
    failed = [result for result in results if result.passed is False]
    assert not failed, failed[:3]


def _lost_by_the_flash_kernel(rank: int) -> set[str]:
    """Return the masks of the cells that fail where the CUDA kernel takes one key less than its window."""
    patch = pytest.MonkeyPatch()
    patch.setattr(certify, "HEADS", ((2, 1),))
    patch.setattr(certify, "LENGTHS", (61,))
    make = cuda_varlen.launches
    patch.setattr(cuda_varlen, "launches", lambda bands, **where: [
        launch._replace(left=launch.left - (launch.left > 0)) for launch in make(bands, **where)
    ])  # fmt: skip
    results, _ = certify.certify_world(rank, ["ring"])
    return {result.cell.mask for result in results if result.passed is False}


def test_the_certificate_fails_a_wrong_flash_kernel() -> None:
    """Guards the proof on CUDA: one that took the fallback, or limits as wide as a lost key, would find nothing."""
    failed = spawn_local(
        in_process_with_flash, 2, False, _lost_by_the_flash_kernel, timeout_seconds=PATIENCE_SECONDS
    )[0]
    assert failed == {"window", "documents+window"}


def _rounding_merge(*parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = merge(*parts)
    return out.bfloat16().to(out.dtype), lse


def _broken(rank: int, fault: str) -> tuple[int, int]:
    """Return the number of failed cells and of leaking ones for a ring with a fault."""
    from longspan.parallel.schedules import base

    patch = pytest.MonkeyPatch()  # of this process, which ends with the function
    if fault == "rounds":
        patch.setattr(base, "merge", _rounding_merge)
    if fault == "leaks":
        honest = SequenceShards.bands

        def all_one_document(self: SequenceShards, q: Any, k: Any, *, window: int | None = None) -> Bands:
            return honest(SequenceShards(self.layout, [0, self.num_tokens], self.world), q, k, window=window)

        patch.setattr(SequenceShards, "bands", all_one_document)
    if fault == "forgets":
        carry = Ring._carry

        def lose_the_gradient(self: Ring, carried: Any, *rest: Any) -> Any:
            return carry(self, None, *rest)

        patch.setattr(Ring, "_carry", lose_the_gradient)
    results, _ = certify.certify_world(rank, ["ring"])
    return sum(r.passed is False for r in results), sum(r.leaks > 0 for r in results)


@pytest.mark.parametrize(("fault", "leaks"), [("rounds", False), ("leaks", True), ("forgets", False)])
def test_the_certificate_fails_a_wrong_schedule(fault: str, leaks: bool) -> None:
    """Guards the proof itself: bf16 in the merge, a mask without documents, a lost key gradient are all found."""
    failed, leaking = spawn_local(_broken, 2, fault, timeout_seconds=PATIENCE_SECONDS)[0]
    assert failed > 0
    assert (leaking > 0) == leaks


def _not_a_number(rank: int) -> set[str]:
    """Return the masks of the cells that pass with a ring that returns NaN for the gradient of the values."""
    backward = Ring.backward

    def lose_dv(self: Ring, *rest: Any) -> Any:
        dq, dk, dv, dsinks = backward(self, *rest)
        return dq, dk, dv * float("nan"), dsinks

    patch = pytest.MonkeyPatch()
    patch.setattr(Ring, "backward", lose_dv)
    patch.setattr(certify, "HEADS", ((2, 1),))
    results, _ = certify.certify_world(rank, ["ring"])
    return {result.cell.mask for result in results if result.passed}


def test_the_certificate_fails_what_is_not_a_number() -> None:
    """Guards against `max`, which passes over a NaN that is not the first: a NaN gradient was certified."""
    assert spawn_local(_not_a_number, 2, timeout_seconds=PATIENCE_SECONDS) == [set(), set()]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "degree", "expected"),
    [
        (12, 4, 2, [((0, 6), (0, 2), None), ((6, 12), (2, 4), None)]),
        (4, 2, 4, [((0, 1), (0, 1), None), ((1, 2), (0, 1), None), ((2, 3), (1, 2), None), ((3, 4), (1, 2), None)]),
        # Ranks 0 and 2 of three see one key/value head whole and a third of another.
        (12, 4, 3, [((0, 4), (0, 2), [0, 0, 0, 1]), ((4, 8), (1, 3), None), ((8, 12), (2, 4), [0, 1, 1, 1])]),
    ],
)  # fmt: skip
def test_head_share(heads: int, kv_heads: int, degree: int, expected: list[Any]) -> None:
    """Guards against key/value heads repeated before they are sent, and against uneven groups taken for even."""
    shares = [head_share(heads, kv_heads, degree, rank) for rank in range(degree)]
    assert [tuple(share) for share in shares] == [(range(*q), range(*kv), used) for q, kv, used in expected]


def test_heads_that_cannot_be_spread_are_named() -> None:
    """Guards the message: it names the heads, the key/value heads and the degree."""
    with pytest.raises(ArgumentError, match=r"num_heads 7, num_kv_heads 1, ulysses degree 2"):
        head_share(7, 1, 2, 0)


def test_dist_flash_computes_every_causal_block_once() -> None:
    """Guards the helpers' timetable: no block twice, none missing, one a worker and step."""
    for world in range(1, 10):
        blocks = [block for step in range(1, world // 2 + 1) for block in blocks_at(step, world)]
        assert sorted((b.q_rank, b.k_rank) for b in blocks) == [
            (q, k) for q in range(world) for k in range(q)
        ]
        for step in range(1, world // 2 + 1):
            workers = [block.worker for block in blocks_at(step, world)]
            assert len(workers) == len(set(workers))


def test_one_rank_is_plain_attention() -> None:
    """Guards every schedule's degenerate case, which has no process group at all."""
    shards = SequenceShards("contiguous", [0, 5, 12], 1)
    q, k, v = (
        torch.randn(12, heads, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(heads))
        for heads in (4, 2, 2)
    )
    expected = attention(q, k, v, Bands.from_documents([0, 5, 12]), kernel=ReferenceKernel())
    for name in SCHEDULES:
        schedule = build_schedule(name)  # type: ignore[arg-type]
        layout = schedule.layouts[0]
        one = SequenceShards(layout, shards.cu_seqlens, 1)
        out = sequence_attention(q, k, v, one, schedule, kernel=ReferenceKernel())
        assert torch.allclose(out, expected, atol=1e-12), name


def test_user_mistakes_are_named() -> None:
    """Guards the messages for an unknown schedule, a wrong layout, another world and foreign tensors."""
    with pytest.raises(ArgumentError, match="unknown context-parallel schedule"):
        build_schedule("zigzag")  # type: ignore[arg-type]
    q = torch.randn(4, 2, 8)
    with pytest.raises(ArgumentError, match="does not work with this layout"):
        sequence_attention(q, q, q, SequenceShards("zigzag", [0, 4], 1), build_schedule("dist_flash"))
    with pytest.raises(ArgumentError, match="not spread over the ranks"):
        sequence_attention(q, q, q, SequenceShards("zigzag", [0, 8], 2), build_schedule("ring"))
    with pytest.raises(ArgumentError, match="do not hold this rank's tokens"):
        sequence_attention(q, q, q, SequenceShards("zigzag", [0, 5], 1), build_schedule("ring"))
    shards, ring = SequenceShards("zigzag", [0, 4], 1), build_schedule("ring")
    with pytest.raises(ArgumentError, match="differ in type"):
        sequence_attention(q, q, q.bfloat16(), shards, ring)
    with pytest.raises(ArgumentError, match="H a multiple of K"):
        sequence_attention(q, q[..., :4], q[..., :4], shards, ring)
    with pytest.raises(ArgumentError, match="at least the token itself"):
        sequence_attention(q, q, q, shards, ring, AttentionForm(window=0))


def test_a_second_derivative_is_refused() -> None:
    """Guards against one that is silently wrong: what other ranks contribute is not recorded."""
    q = torch.randn(4, 2, 8, requires_grad=True)
    out = sequence_attention(q, q, q, SequenceShards("zigzag", [0, 4], 1), build_schedule("ring"))
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def _needed_bytes(rank: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return what all-gather sends for one long document and for one that fits each rank."""
    sent = []
    for borders in ([0, 64], [0, 16, 32, 48, 64]):
        schedule = build_schedule("all_gather", ring_group=dist.group.WORLD)
        shards = SequenceShards("contiguous", borders, 4)
        q = torch.randn(16, 2, 8)
        sequence_attention(q, q, q, shards, schedule)
        sent.append(dict(schedule.channels[0].sent))
    return sent[0], sent[1]


def test_all_gather_sends_only_what_is_needed() -> None:
    """Guards against gathering keys that no query of the rank may see."""
    ranks = spawn_local(_needed_bytes, 4, timeout_seconds=PATIENCE_SECONDS)
    whole, nothing = ranks[0]
    # 3 others, 2 heads, keys and values, 16 tokens of 8 numbers of 4 bytes.
    assert whole == {"all_gather": 3 * 2 * 2 * 16 * 8 * 4}
    assert sum(nothing.values()) == 0
