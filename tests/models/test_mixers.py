"""Layers with a state on packed documents: each document as if alone, in plain torch and by the kernels' arguments."""

from __future__ import annotations

import sys
import warnings
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.minimax.modeling_minimax import MiniMaxConfig, MiniMaxLightningAttention
from transformers.models.nemotron_h import modeling_nemotron_h
from transformers.models.qwen3_next import modeling_qwen3_next

from longspan.core.errors import ArgumentError
from longspan.kernels.scans import Convolution, Scan, convolve_documents, scan_documents
from longspan.models import mixers
from longspan.models.certify_layers import LAYER_KINDS
from longspan.models.checkpointing import enable_checkpointing
from longspan.models.documents import Documents
from longspan.models.hf import enable, hidden_states
from tests.models.family_survey import survey

HYBRIDS = (
    "bailing_hybrid", "bamba", "falcon_h1", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "lfm3",
    "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_next", "zamba", "zamba2",
)  # fmt: skip


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_hybrid_computes_each_document_alone(family: str) -> None:
    """A state or a convolution that runs over a document's border, or a gradient that does."""
    assert survey(family) == ("right", "")


def _delta(length: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(length, 2, 4, generator=generator) for _ in range(2))
    v = torch.randn(length, 4, 3, generator=generator)
    g, beta = (torch.rand(length, 4, generator=generator) for _ in range(2))
    return q, k, v, -g, beta


def _run_delta(tensors: Any, weights: Any, *, state: Any, final: bool, borders: Any) -> Any:
    assert borders is None
    return modeling_qwen3_next.torch_chunk_gated_delta_rule(
        *tensors, chunk_size=8, initial_state=state, output_final_state=final, use_qk_l2norm_in_kernel=True
    )


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any), carried=st.booleans())
def test_documents_side_by_side_are_documents_alone(lengths: list[int], carried: bool) -> None:
    """Documents in the wrong order, a state given to another than the first or fetched from another than the last."""
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    tensors = _delta(int(cu_seqlens[-1]))
    state = torch.randn(4, 4, 3, generator=torch.Generator().manual_seed(1)) if carried else None
    scan = Scan(tensors, (), 4, _run_delta, takes_borders=False, chunk=8)
    out, last = scan_documents(scan, cu_seqlens, state=state, final=True)
    first, expected, found = True, [], None
    for start, length in zip(cu_seqlens, lengths):
        if length:
            part = tuple(x[None, start : start + length] for x in tensors)
            begin = state[None] if first and state is not None else None
            one, found = _run_delta(part, (), state=begin, final=True, borders=None)
            expected.append(one[0])
            first = False
    torch.testing.assert_close(out, torch.cat(expected))
    assert found is not None and last is not None
    torch.testing.assert_close(last, found[0])
    assert scan_documents(scan, cu_seqlens)[1] is None


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), tail=st.integers(0, 3))
def test_convolutions_see_zeros_or_the_tail_before_a_document(lengths: list[int], tail: int) -> None:
    """A convolution that reads the end of the document before, or a tail that is read by another than the first."""
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(int(cu_seqlens[-1]), 3, generator=generator)
    weight, bias = torch.randn(3, 4, generator=generator), torch.randn(3, generator=generator)
    before = torch.randn(tail, 3, generator=generator) if tail else None

    def run(x: torch.Tensor, weight: Any, bias: Any, borders: Any) -> torch.Tensor:
        assert borders is None
        return modeling_qwen3_next.causal_conv1d_fn(x, weight, bias, activation="silu")

    found = convolve_documents(
        Convolution(x, weight, bias, run, takes_borders=False), cu_seqlens, tail=before
    )
    expected = []
    for start, length in zip(cu_seqlens, lengths):
        if length:
            part = x[start : start + length]
            past = before if not expected and before is not None else x.new_zeros(0, 3)
            expected.append(run(torch.cat((past, part)).T[None], weight, bias, None)[0].T[len(past) :])
    torch.testing.assert_close(found, torch.cat(expected))


def test_lightning_attention_is_transformers_own() -> None:
    """A decay of another power, or a state that is handed from block to block undecayed."""
    config = MiniMaxConfig(
        hidden_size=24, num_attention_heads=3, head_dim=8, num_hidden_layers=2, block_size=4,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    layer = MiniMaxLightningAttention(config, 0)
    x = torch.randn(2, 11, 24)
    expected, _ = layer(x, None, None)
    q, k, v = layer.act_fn(layer.qkv_proj(x)).unflatten(-1, (3, 24)).split(8, dim=-1)
    weights = (layer.slope_rate,)
    first, state = mixers._lightning(
        4, tuple(t[:, :5] for t in (q, k, v)), weights, state=None, final=True, borders=None
    )
    second, state = mixers._lightning(
        4, tuple(t[:, 5:] for t in (q, k, v)), weights, state=state, final=True, borders=None
    )
    out = layer.norm(torch.cat((first, second), dim=1).flatten(-2))
    torch.testing.assert_close(layer.out_proj(torch.sigmoid(layer.output_gate(x)) * out), expected)
    whole, carried = mixers._lightning(4, (q, k, v), weights, state=None, final=True, borders=None)
    torch.testing.assert_close(whole, torch.cat((first, second), dim=1))
    torch.testing.assert_close(carried, state)


class _Layer(nn.Module):
    longspan_documents = None
    layer_idx = 3


@pytest.fixture
def in_a_layer() -> Any:
    """Make the table of two documents, of 3 and 2 tokens, that of the layer that runs."""
    documents = Documents.from_cu_seqlens([0, 3, 5])
    mixers._begin(_Layer(), (), {"documents": documents})
    yield documents
    mixers._end(_Layer(), (), None)


def _with_package(monkeypatch: pytest.MonkeyPatch, package: str, name: str, plain: Any, kernel: Any) -> Any:
    """Return the function that transformers makes of `plain` where a package has a kernel in its place."""
    module = ModuleType(package)
    setattr(module, name, kernel)
    monkeypatch.setitem(sys.modules, package, module)
    return use_kernel_func_from_hub_with_fallback(name, package, "")(plain)


def test_kernels_are_called_once_with_the_documents(
    monkeypatch: pytest.MonkeyPatch, in_a_layer: Documents
) -> None:
    """A kernel of CUDA that is not told where documents begin, or is called once for each."""
    calls: list[dict[str, Any]] = []

    def convolution(
        x: Any, weight: Any, bias: Any = None, seq_idx: Any = None, activation: Any = None
    ) -> Any:
        calls.append({"seq_idx": seq_idx, "stride": x.stride(1)})
        return x

    def delta(q: Any, k: Any, v: Any, g: Any, beta: Any, *, initial_state: Any = None, cu_seqlens: Any = None,
              output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False) -> Any:  # fmt: skip
        calls.append({"cu_seqlens": cu_seqlens, "norm": use_qk_l2norm_in_kernel})
        return v, None

    def mamba(x: Any, dt: Any, A: Any, B: Any, C: Any, chunk_size: int, D: Any = None, dt_bias: Any = None,
              initial_states: Any = None, seq_idx: Any = None, dt_softplus: bool = False, dt_limit: Any = None,
              return_final_states: bool = False) -> Any:  # fmt: skip
        calls.append({"seq_idx": seq_idx, "softplus": dt_softplus})
        return x

    torch_conv = modeling_qwen3_next.causal_conv1d_fn.__wrapped__
    conv = mixers._WRAPPERS["causal_conv1d_fn"](
        _with_package(monkeypatch, "longspan_stand_in", "causal_conv1d_fn", torch_conv, convolution)
    )
    conv(torch.zeros(1, 2, 5), torch.zeros(2, 4), None, activation="silu", documents=in_a_layer)
    rule = mixers._WRAPPERS["torch_chunk_gated_delta_rule"](
        _with_package(monkeypatch, "longspan_stand_in", "chunk_gated_delta_rule", torch_conv, delta)
    )
    q, k, v, g, beta = (x[None] for x in _delta(5))
    out, state = rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True, cu_seqlens=None)
    assert out.shape == v.shape and state is None
    scan = mixers._WRAPPERS["mamba2_chunk_scan"](
        _with_package(monkeypatch, "longspan_stand_in", "mamba_chunk_scan_combined", torch_conv, mamba)
    )
    x, dt, heads, group = (
        torch.zeros(1, 5, 2, 3),
        torch.zeros(1, 5, 2),
        torch.ones(2),
        torch.zeros(1, 5, 1, 4),
    )
    assert scan(x, dt, heads, group, group, chunk_size=4, D=heads, dt_softplus=True).shape == x.shape
    ids = torch.tensor([[0, 0, 0, 1, 1]], dtype=torch.int32)
    assert len(calls) == 3
    torch.testing.assert_close(calls[0]["seq_idx"], ids)
    assert calls[0]["stride"] == 1, (
        "channels lie next to each other: causal-conv1d takes documents no other way"
    )
    torch.testing.assert_close(calls[1]["cu_seqlens"], torch.tensor([0, 3, 5]))
    assert calls[1]["norm"]
    torch.testing.assert_close(calls[2]["seq_idx"], ids)
    assert calls[2]["softplus"]


def test_a_fused_kernel_is_passed_by_and_a_cache_refused(in_a_layer: Documents) -> None:
    """mamba-ssm's whole layer in one call, which would run over borders; a state of a cache that is dropped."""
    fused = mixers._WRAPPERS["mamba2_split_conv1d_scan_combined"](lambda *args, **kwargs: "whole layer")
    assert fused(torch.zeros(1, 5, 2)) is None
    rule = mixers._WRAPPERS["torch_chunk_gated_delta_rule"](modeling_qwen3_next.torch_chunk_gated_delta_rule)
    q, k, v, g, beta = (x[None] for x in _delta(5))
    with pytest.raises(ArgumentError, match="use_cache=False"):
        rule(q, k, v, g=g, beta=beta, output_final_state=True)
    mixers._end(_Layer(), (), None)
    assert fused(torch.zeros(1, 5, 2)) == "whole layer"


def test_wrappers_are_put_once() -> None:
    """A wrapper around a wrapper, and hooks once more, with every model."""
    config = modeling_nemotron_h.NemotronHConfig(
        hidden_size=16, layer_types=["linear_attention"], mamba_num_heads=4, mamba_head_dim=8, n_groups=2
    )
    block = nn.ModuleList([modeling_nemotron_h.NemotronHBlock(config, 0)])
    for _ in range(2):
        mixers.mix_documents(block)
    function = modeling_nemotron_h.mamba2_chunk_scan
    assert not hasattr(function.longspan_original, "longspan_original")
    assert len(block[0]._forward_pre_hooks) == 1 and len(block[0].mixer._forward_pre_hooks) == 1


@pytest.mark.parametrize("kind", ["mamba2", "mamba1", "lightning"])
def test_recomputed_blocks_know_their_documents(kind: str) -> None:
    """A checkpointed block that is computed again as if the row were one document; Jamba's drop the keyword, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**LAYER_KINDS[kind]), dtype=torch.float32
        )
    enable(model).train()
    ids, found = torch.arange(3, 33), []
    for mode in ("none", "full"):
        enable_checkpointing(model, mode)
        model.zero_grad()
        hidden = hidden_states(model, ids, Documents.from_cu_seqlens([0, 7, 19, 30]))
        hidden.square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
