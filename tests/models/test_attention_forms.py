"""Sinks, values of another width, chunks and capped scores: packed documents against transformers' eager attention."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

from longspan.core.errors import ArgumentError
from longspan.kernels.attention import AttentionForm, Bands, attention, cut_documents
from longspan.kernels.attention.cpu_flash import CpuFlashKernel
from longspan.kernels.attention.cuda_varlen import CudaVarlenKernel
from longspan.kernels.attention.reference import ReferenceKernel, dense_mask
from longspan.kernels.attention.tiled import TiledKernel
from longspan.kernels.loss import linear_cross_entropy
from longspan.models.attention import longspan_attention
from longspan.models.documents import Documents
from longspan.models.head import output_head
from longspan.models.hf import hidden_states
from tests.attention_forms import FORMS, eager, with_ours
from tests.flash_operators import calls, flash_operators
from tests.train.test_recurrent import batch_of, check_equal

BORDERS = [0, 23, 24, 61]
"""Documents longer than windows and chunks, and one of a single token."""


@pytest.fixture(scope="module", params=FORMS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return eager(request.param)


@pytest.fixture(params=["cpu", "cuda operators"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cpu":
        yield request.param
        return
    with flash_operators(wide=True):
        yield request.param


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_packed_documents_train_as_each_alone(model: PreTrainedModel, kernels: str) -> None:
    """Logits off by a share of a sink, or a gradient that misses it: nothing fails, and the model is another."""
    ids = torch.randint(0, 256, (BORDERS[-1],), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1)
    labels[torch.tensor(BORDERS[1:]) - 1] = -100
    parts = [slice(a, b) for a, b in itertools.pairwise(BORDERS)]
    alone = torch.cat([model(ids[None, part], use_cache=False).logits[0] for part in parts])
    torch.nn.functional.cross_entropy(alone, labels, reduction="sum").backward()
    expected = gradients(model)

    ours = with_ours(model)
    hidden = hidden_states(ours, ids, Documents.from_cu_seqlens(BORDERS))
    head = output_head(ours)
    torch.testing.assert_close(head.logits(hidden), alone.detach(), rtol=1e-4, atol=1e-4)
    linear_cross_entropy(hidden, head, labels).loss.backward()
    found = gradients(ours)
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        error = float((found[name] - gradient).norm())
        # A bias of keys changes nothing: its gradient is rounding alone.
        assert error <= 1e-5 * float(gradient.norm()) + 1e-6 * largest, (name, error)
    assert not any("sinks" in name for name in expected) or any("sinks" in name for name in found)


def test_rows_in_chunks_train_as_at_once(model: PreTrainedModel, kernels: str) -> None:
    """Sinks counted once a chunk instead of once a query, or keys kept by the documents and not by the cuts."""
    ours = with_ours(model).train()
    check_equal(ours, batch_of([0, 20, 32, 33, 150, 171]), chunk_tokens=32)


def test_a_cache_gives_the_same_states(model: PreTrainedModel) -> None:
    """A prompt in pieces, then a token at a time: chunks count from the first token and not from the cache's."""
    ours, ids = with_ours(model), torch.randint(0, 256, (1, 31), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        found, cache = [], None
        for part in ids.split([5, 13, 7, 1, 1, 1, 1, 1, 1], dim=1):
            output = ours(ids[:, :0] if part is None else part, past_key_values=cache, use_cache=True)
            found.append(output.logits)
            cache = output.past_key_values
    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=1e-4, atol=1e-4)


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, form: AttentionForm
) -> torch.Tensor:
    """Return what the form says in the plainest words: sinks are one column of scores more."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("thd,shd->hts", q, k) * form.factor(q)
    if form.softcap is not None:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if form.sinks is not None:
        column = form.sinks[:, None, None].expand(-1, len(q), 1)
        scores = torch.cat((scores, column), -1)
    return torch.einsum("hts,shd->thd", torch.softmax(scores, -1)[..., : len(k)], v)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("kernel", [ReferenceKernel, TiledKernel, CpuFlashKernel, CudaVarlenKernel])
def test_every_kernel_in_fp64(kernel: type, chunk: int | None, softcap: float | None) -> None:
    """Output and gradients of queries, keys, values and sinks against autograd through all scores."""
    if softcap is not None and kernel not in (ReferenceKernel, TiledKernel):
        return
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(19, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4)
    )
    sinks = torch.randn(4, generator=generator, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (q, k, v, sinks)]
    form = AttentionForm(scale=0.7, window=6, attention_chunk=chunk, softcap=softcap, sinks=sinks)
    borders = cut_documents(torch.tensor([0, 12, 13, 19]).numpy(), chunk)
    bands = Bands.from_documents(borders, window=form.window)
    mask = dense_mask(bands, num_queries=19, num_keys=19, device=torch.device("cpu"))
    truth = dense(q, k, v, mask, form)
    expected = torch.autograd.grad(truth, leaves, dout)
    with flash_operators(wide=True):
        made = kernel() if softcap is None else kernel(softcap=softcap)
        found = attention(q, k, v, bands, scale=form.scale, kernel=made, sinks=sinks)
        mine = torch.autograd.grad(found, leaves, dout)
        assert bool(calls) == (kernel is CudaVarlenKernel)
    # The CUDA kernel keeps sums of scores in fp32.
    limit = 1e-6 if kernel is CudaVarlenKernel else 1e-12
    torch.testing.assert_close((found, *mine), (truth, *expected), rtol=limit, atol=limit)


def test_cuts_count_from_the_start_of_each_document() -> None:
    """Multiples of the chunk in the row, and not in the document, would cut packed documents elsewhere."""
    borders = torch.tensor([0, 5, 5, 12, 13]).numpy()
    assert cut_documents(borders, 3).tolist() == [0, 3, 5, 8, 11, 12, 13]
    assert cut_documents(borders, 100).tolist() == [0, 5, 12, 13]
    assert cut_documents(borders, None) is borders


def test_layers_that_do_not_say_whether_they_attend_in_chunks_are_refused() -> None:
    """Whole attention in their place would be another model, without a word."""
    layer = torch.nn.Linear(1, 1)
    layer.config = SimpleNamespace(attention_chunk_size=4, layer_types=None)
    x = torch.zeros(1, 2, 6, 8)
    with pytest.raises(ArgumentError, match="Linear does not say which of its layers attend in chunks"):
        longspan_attention(layer, x, x, x, None)
