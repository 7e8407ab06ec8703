"""Chunked linear cross-entropy against all logits at once."""

from __future__ import annotations

import importlib.util
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmarks.live_bytes import LiveBytes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from longspan.core.errors import ArgumentError, RunError
from longspan.kernels import loss
from longspan.kernels.loss import linear_cross_entropy, reference_linear_cross_entropy

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "loss.py"


def inputs(
    *, tokens: int, vocab: int, dim: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, dim, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, dim, generator=generator).mul(2 / dim**0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.3] = -100
    return hidden, weight, labels, torch.rand(tokens, generator=generator) * 3


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-3)]
)
@pytest.mark.parametrize("chunk_tokens", [1, 37, 1000, None])
def test_equals_reference(dtype: torch.dtype, limit: float, chunk_tokens: int | None) -> None:
    """Guards value and gradients; a bf16 sum that is rounded on the way is off by percents, not by 5e-3."""
    hidden, weight, labels, loss_weights = inputs(tokens=301, vocab=517, dim=48, dtype=dtype)
    truth_in = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = reference_linear_cross_entropy(*truth_in, labels, loss_weights=loss_weights)
    (truth.loss / 7).backward()
    found = linear_cross_entropy(hidden, weight, labels, loss_weights=loss_weights, chunk_tokens=chunk_tokens)
    (found.loss / 7).backward()
    assert found.loss.dtype == found.per_token_nll.dtype == torch.promote_types(dtype, torch.float32)
    assert not found.per_token_nll.requires_grad
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    value_limit = min(limit, 1e-5)  # the value is summed in fp32 or better whatever the inputs are
    assert relative(found.loss.detach(), truth.loss.detach()) <= value_limit
    assert relative(found.per_token_nll, truth.per_token_nll) <= value_limit
    assert relative(hidden.grad, truth_in[0].grad) <= limit
    assert relative(weight.grad, truth_in[1].grad) <= limit


def test_large_bf16_vocabulary_value_is_not_rounded() -> None:
    """At 4,096 tokens x 8,192 words a bf16 mean drifts from 8.4 to 8.25; ours must not."""
    hidden, weight, labels, _ = inputs(tokens=4096, vocab=8192, dim=32, dtype=torch.bfloat16)
    found = linear_cross_entropy(hidden, weight, labels).loss.detach()
    truth = reference_linear_cross_entropy(hidden.detach().double(), weight.detach().double(), labels).loss
    assert relative(found, truth) <= 1e-6


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=4), chunk=st.integers(1, 70), seed=st.integers(0, 99))
def test_sums_add_up_over_micro_batches(cuts: list[int], chunk: int, seed: int) -> None:
    """A sum has no hidden denominator: parts of a batch, even empty ones, add up to the batch."""
    hidden, weight, labels, loss_weights = inputs(tokens=60, vocab=33, dim=8, dtype=torch.float64, seed=seed)
    whole = linear_cross_entropy(hidden, weight, labels, loss_weights=loss_weights, chunk_tokens=chunk)
    borders = [0, *sorted(cuts), 60]
    parts = [
        linear_cross_entropy(
            hidden[a:b], weight, labels[a:b], loss_weights=loss_weights[a:b], chunk_tokens=chunk
        )
        for a, b in pairwise(borders)
    ]
    whole_grads = torch.autograd.grad(whole.loss, (hidden, weight))
    part_grads = torch.autograd.grad(torch.stack([part.loss for part in parts]).sum(), (hidden, weight))
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    torch.testing.assert_close(torch.cat([part.per_token_nll for part in parts]), whole.per_token_nll)
    torch.testing.assert_close(part_grads, whole_grads)


@pytest.mark.parametrize("function", [linear_cross_entropy, reference_linear_cross_entropy])
def test_nothing_to_learn_is_zero_not_nan(function: object) -> None:
    """0 * (mean over nothing) is NaN in block-wise losses: an all-masked batch must give exact zeros."""
    hidden, weight, labels, _ = inputs(tokens=20, vocab=11, dim=4, dtype=torch.float32)
    labels.fill_(-100)
    result = function(hidden, weight, labels, loss_weights=torch.full((20,), float("inf")))
    result.loss.backward()
    assert result.loss.item() == 0.0 and not result.per_token_nll.any()
    assert not hidden.grad.any() and not weight.grad.any()
    empty = function(hidden[:0], weight, labels[:0])
    assert empty.loss.item() == 0.0 and empty.per_token_nll.shape == (0,)


def test_all_masked_chunk_between_others() -> None:
    """A chunk without a label in the middle contributes nothing."""
    hidden, weight, labels, _ = inputs(tokens=30, vocab=11, dim=4, dtype=torch.float64)
    labels[:] = 3
    labels[10:20] = -100
    found = linear_cross_entropy(hidden, weight, labels, chunk_tokens=10)
    torch.testing.assert_close(found.loss, reference_linear_cross_entropy(hidden, weight, labels).loss)


def test_huge_logits_do_not_overflow() -> None:
    """exp(1000) is infinite: the largest logit is subtracted first."""
    hidden = torch.full((2, 1), 1000.0, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    found = linear_cross_entropy(hidden, weight, torch.tensor([0, 1]))
    found.loss.backward()
    assert found.per_token_nll.tolist() == [0.0, 2000.0]
    assert torch.isfinite(weight.grad).all()


def test_only_the_gradients_that_are_needed() -> None:
    """Frozen embeddings (LoRA) and evaluation must not pay for a [V, D] gradient."""
    hidden, weight, labels, _ = inputs(tokens=20, vocab=11, dim=4, dtype=torch.float32)
    linear_cross_entropy(hidden, weight.detach(), labels).loss.backward()
    truth = torch.autograd.grad(reference_linear_cross_entropy(hidden, weight, labels).loss, hidden)[0]
    torch.testing.assert_close(hidden.grad, truth)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).loss.requires_grad


def test_backward_twice_is_refused() -> None:
    """Gradients are scaled in place and handed over: a second backward would scale them again."""
    hidden, weight, labels, _ = inputs(tokens=20, vocab=11, dim=4, dtype=torch.float32)
    loss = linear_cross_entropy(hidden, weight, labels).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RunError, match="twice"):
        loss.backward()


def test_user_mistakes_are_named() -> None:
    """A label beyond the vocabulary means the wrong tokenizer; a wrong shape means unshifted labels."""
    hidden, weight, labels, _ = inputs(tokens=20, vocab=11, dim=4, dtype=torch.float32)
    labels[0] = 11
    with pytest.raises(ArgumentError, match="outside the vocabulary"):
        linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(ArgumentError, match="labels"):
        linear_cross_entropy(hidden, weight, labels[1:])
    with pytest.raises(ArgumentError, match="int64"):
        linear_cross_entropy(hidden, weight, labels.int())
    with pytest.raises(ArgumentError, match="chunk_tokens"):
        linear_cross_entropy(hidden, weight, labels.clamp_max(10), chunk_tokens=0)


def _benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("loss_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_peak_memory_small() -> None:
    """4,096 x 32,768 logits are 512 MiB a copy; the whole pass must stay under 200 MiB."""
    found = _benchmark().measure_in_subprocess(
        tokens=4096, vocab=32768, dim=32, dtype="float32", method="chunked"
    )
    assert found["extra_mib"] <= 200


@pytest.mark.slow
def test_peak_memory_of_a_large_vocabulary() -> None:
    """65,536 x 128,256 logits are 31 GiB a copy; the whole pass must stay under 600 MiB."""
    found = _benchmark().measure_in_subprocess(
        tokens=65536, vocab=128256, dim=64, dtype="float32", method="chunked"
    )
    assert found["extra_mib"] <= 600


class Counted(TorchDispatchMode):
    """Calls of each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func).removeprefix("aten.")] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("in_product", [True, False])
def test_chunks_on_an_accelerator_cost_time_and_not_memory(
    in_product: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """261 tokens a chunk at 128,256 words, and a gradient of 2.1 GB made beside its sum, took twice the time.

    Shapes of Llama-3-8B at 65,536 tokens, without data.
    """
    monkeypatch.setattr(loss, "sums_in_product", lambda device, dtype: in_product)
    hidden, weight = (
        torch.empty(rows, 4096, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for rows in (65536, 128256)
    )
    labels = torch.empty(65536, dtype=torch.int64, device="meta")
    with LiveBytes() as alive, Counted() as counted:
        loss.linear_cross_entropy(hidden, weight, labels, places=labels)
    if in_product:
        assert counted.calls["addmm.dtype_out"] == 65536 // loss.INTENSE_ROWS == 32
        assert alive.peak < 5.45 * 2**30
    else:
        assert counted.calls["mm.dtype"] == -(-65536 // 261)
        assert alive.peak > 5.5 * 2**30


def test_a_device_that_cannot_sum_in_the_product_is_asked_once() -> None:
    """torch has the operation for CUDA alone, and older ones do not take an fp32 sum."""
    assert not loss.sums_in_product(torch.device("cpu"), torch.bfloat16)
    assert loss.sums_in_product(torch.device("meta"), torch.bfloat16)
    assert not loss.sums_in_product(torch.device("meta"), torch.float32)
