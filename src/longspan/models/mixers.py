"""Layers with a state (gated delta net, Mamba, short convolutions, lightning attention) on the document table.

In transformers each such layer, a mixer, calls functions of its modeling file: a causal convolution, and a recurrence
that works head by head. `mix_documents` puts wrappers of ours in their places, once a modeling file. A wrapper calls
the function as it was unless the layer that runs was handed a document table; then the table does the work, as it
does for attention: it is given the tensors and the function (`kernels.scans`), by its methods `convolve` and `scan`.

The function may be that of a package (flash-linear-attention, mamba-ssm, causal-conv1d), which keeps documents apart,
or the plain one in transformers, which knows no documents.

Shape legend: B = batch, L = tokens, H = heads, K = key heads, G = groups, D = head dim, N = state size, C = channels.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import nn

from longspan.core.errors import ArgumentError
from longspan.core.log import log_once
from longspan.kernels.scans import Convolution, Recurrence, Scan, document_ids
from longspan.parallel.sharded_scans import check_state_heads

__all__ = ["check_states", "mix_documents", "mixers"]


class _Running(NamedTuple):
    """The layer that is computed."""

    documents: Any
    """Its document table."""
    layer: int | None


_running: ContextVar[_Running | None] = ContextVar("longspan_mixer", default=None)

LIGHTNING = "MiniMaxLightningAttention"


def mixers(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield each layer with a state that is known, and the block it is in."""
    for block in model.modules():
        for layer in block.children():
            if _functions(type(layer)) or type(layer).__name__ == LIGHTNING:
                yield layer, block


def check_states(model: nn.Module, world: int) -> None:
    """Refuse a model whose states have fewer heads than ranks share a row.

    Raises:
        ArgumentError: with both numbers.
    """
    for mixer, _ in mixers(model):
        check_state_heads(_heads(mixer), world)


def _heads(mixer: Any) -> int:
    """Return the heads of a layer's state: what can be dealt out to ranks."""
    for name in ("num_v_heads", "num_heads", "num_attention_heads", "mamba_head_dim", "intermediate_size"):
        # Mamba-1 has a state for each channel, Zamba's for each of those of a head.
        if hasattr(mixer, name):
            return int(getattr(mixer, name))
    return next(layer.in_channels for layer in mixer.modules() if isinstance(layer, nn.Conv1d))


def mix_documents(model: nn.Module) -> None:
    """Let the layers with a state of a model start anew at document borders; calling it again is harmless."""
    for mixer, block in mixers(model):
        if type(mixer).__name__ == LIGHTNING:
            if not hasattr(type(mixer).forward, "longspan_original"):
                type(mixer).forward = _lightning_forward(type(mixer).forward)
        else:
            module = sys.modules[type(mixer).__module__]
            for name, wrap in _WRAPPERS.items():
                function = getattr(module, name, None)
                if function is not None and not hasattr(function, "longspan_original"):
                    setattr(module, name, wrap(function))
        if not hasattr(mixer, "longspan_documents"):
            mixer.longspan_documents = None  # type: ignore[assignment]
            block.register_forward_pre_hook(_note, with_kwargs=True)
            mixer.register_forward_pre_hook(_begin, with_kwargs=True)
            mixer.register_forward_hook(_end, always_call=True)


def _note(block: Any, args: Any, kwargs: dict[str, Any]) -> None:
    # For blocks that do not hand it on. Hooks of a checkpointed block are not called again when it is recomputed.
    for layer in block.children():
        if hasattr(layer, "longspan_documents"):
            layer.longspan_documents = kwargs.get("documents")


def _begin(mixer: Any, args: Any, kwargs: dict[str, Any]) -> None:
    documents = kwargs.get("documents", mixer.longspan_documents)
    running = None if documents is None else _Running(documents, getattr(mixer, "layer_idx", None))
    _running.set(running)


def _end(mixer: Any, args: Any, output: Any) -> None:
    _running.set(None)


def _functions(kind: type[nn.Module]) -> frozenset[str]:
    """Return the functions with a wrapper that a layer calls."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return frozenset(() if code is None else code.co_names) & _WRAPPERS.keys()


def _takes_borders(function: Callable[..., Any]) -> bool:
    """Whether transformers has found the package whose function this is: the plain one takes no document borders."""
    found = inspect.getclosurevars(function).nonlocals.get("is_new_implementation", False)
    if not found:
        log_once(
            "models",
            f"{function.__name__}: documents are computed apart in plain torch, which is slow; "
            "pip install 'longspan[hybrid]' brings kernels for CUDA",
        )
    return bool(found)


def _wrapper(
    make: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turn `make(function)`, which computes by the table `_Running`, into what takes the place of the function."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        by_table = make(function)

        @functools.wraps(function)
        def either(*args: Any, **kwargs: Any) -> Any:
            running = _running.get()
            if running is None:
                return function(*args, **kwargs)
            return by_table(running, *args, **kwargs)

        either.longspan_original = function  # type: ignore[attr-defined]
        return either

    return wrap


def _refuse_cache(*states: Any) -> None:
    if any(state is not None and state is not False for state in states):
        raise ArgumentError(
            "a document table and a cache exclude each other in layers with a state",
            fix="pass use_cache=False",
        )


def _convolution(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(
        activation: str | None,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        borders: torch.Tensor | None,
    ) -> torch.Tensor:
        apart = {} if borders is None else {"seq_idx": document_ids(borders)}
        return function(x, weight, bias, activation=activation, **apart)

    def by_table(
        running: _Running,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        **_: Any,
    ) -> torch.Tensor:
        batch, _channels, length = hidden_states.shape
        x = hidden_states.transpose(1, 2).flatten(0, 1)
        call = Convolution(x, weight, bias, functools.partial(run, activation), _takes_borders(function))
        out = running.documents.convolve(call, layer=running.layer)
        return out.unflatten(0, (batch, length)).transpose(1, 2)

    return by_table


def _delta_rule(function: Callable[..., Any]) -> Callable[..., Any]:
    """Gated delta rule, with a decay for each head (gdn) or for each of its channels (KDA)."""

    def by_table(
        running: _Running,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        chunk_size: int = 64,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        _refuse_cache(initial_state, output_final_state)
        options = {"use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}

        def run(tensors: Any, weights: Any, *, state: Any, final: bool, borders: Any) -> Any:
            apart = {}
            if borders is not None:
                apart["cu_seqlens"] = borders
                if state is not None:
                    # One state a document: all but the first start from zeros.
                    state = torch.cat((state, state.new_zeros(len(borders) - 2, *state.shape[1:])))
            out, last = function(*tensors, initial_state=state, output_final_state=final, **apart, **options)
            return out, None if last is None else last[-1:] if borders is not None else last

        tensors = (query, key, value, g, beta)
        out = _scan(running, tensors, (), value.shape[2], run, _takes_borders(function), chunk_size)
        return out, None

    return by_table


def _mamba2(function: Callable[..., Any]) -> Callable[..., Any]:
    def by_table(
        running: _Running,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        chunk_size: int,
        D: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        initial_states: torch.Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **_: Any,
    ) -> torch.Tensor:
        _refuse_cache(initial_states, return_final_states)
        options = {"dt_softplus": dt_softplus, "dt_limit": dt_limit}

        def run(tensors: Any, weights: Any, *, state: Any, final: bool, borders: Any) -> Any:
            (x, dt, B, C), (A, D, dt_bias) = tensors, weights
            # A state that is given is of document 0, which mamba-ssm takes as the one before the row.
            apart = {} if borders is None else {"seq_idx": document_ids(borders)}
            found = function(
                x, dt, A, B, C, chunk_size=_filled(chunk_size, x.shape[1]), D=D, dt_bias=dt_bias,
                initial_states=state, return_final_states=final, **apart, **options,
            )  # fmt: skip
            return found if final else (found, None)

        tensors, weights = (hidden_states, dt, B, C), (A, D, dt_bias)
        return _scan(
            running, tensors, weights, hidden_states.shape[2], run, _takes_borders(function), chunk_size
        )

    return by_table


def _filled(chunk_size: int, length: int) -> int:
    """Return a chunk that so few tokens fill: a step of decoding would cost one of 256. Kernels want a power of two."""
    return min(chunk_size, max(16, 1 << (length - 1).bit_length()))


def _mamba1(function: Callable[..., Any]) -> Callable[..., Any]:
    """A state for each channel; mamba-ssm's function takes neither documents nor a state, and so does the plain one."""

    def by_table(
        running: _Running,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        delta_bias: torch.Tensor | None = None,
        return_last_state: bool = False,
        **options: Any,
    ) -> torch.Tensor:
        _refuse_cache(return_last_state)

        def run(tensors: Any, weights: Any, *, state: Any, final: bool, borders: Any) -> Any:
            x, dt, B, C, *gates = (x.transpose(1, -1) if x.ndim == 3 else x[:, :, 0].mT for x in tensors)
            A, D, delta_bias = weights
            z = gates[0] if gates else None
            found = function(
                x, dt, A, B, C, D=D, z=z, delta_bias=delta_bias, return_last_state=final, **options
            )
            out, last = found if final else (found, None)
            return out.mT, last

        # Tokens before channels; the one group of B and C is shared by all channels.
        tensors = [hidden_states.mT, dt.mT, B.mT[:, :, None], C.mT[:, :, None]]
        if z is not None:
            tensors.append(z.mT)
        weights = (A, D, delta_bias)
        out = _scan(running, tuple(tensors), weights, A.shape[0], run, False, MAMBA1_CHUNK, carries=False)
        return out.mT

    return by_table


MAMBA1_CHUNK = 64
"""The plain recurrence goes token by token: documents run side by side when they differ by less than this."""


def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """A whole layer in one function, which knows no documents: what it returns in plain torch lets the layer go on."""
    return lambda running, *args, **kwargs: None


def _scan(
    running: _Running,
    tensors: tuple[torch.Tensor, ...],
    weights: tuple[torch.Tensor | None, ...],
    num_heads: int,
    run: Recurrence,
    takes_borders: bool,
    chunk: int,
    *,
    carries: bool = True,
) -> torch.Tensor:
    """Return what the table makes of tensors [B, L, ...], in the same shape."""
    batch, length = tensors[0].shape[:2]
    flat = tuple(x.flatten(0, 1) for x in tensors)
    scan = Scan(flat, weights, num_heads, run, takes_borders, chunk, carries)
    return running.documents.scan(scan, layer=running.layer).unflatten(0, (batch, length))


def _lightning_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward pass of lightning attention, which has no function of its own."""

    @functools.wraps(original)
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        running = _running.get()
        if running is None:
            return original(self, hidden_states, *args, **kwargs)
        _refuse_cache(kwargs.get("past_key_values"))
        qkv = self.act_fn(self.qkv_proj(hidden_states))
        qkv = qkv.unflatten(-1, (self.num_attention_heads, 3 * self.head_dim))
        run = functools.partial(_lightning, self.block_size)
        out = _scan(
            running, qkv.split(self.head_dim, dim=-1), (self.slope_rate,), self.num_attention_heads, run,
            False, self.block_size,
        )  # fmt: skip
        out = torch.sigmoid(self.output_gate(hidden_states)) * self.norm(out.flatten(-2))
        return self.out_proj(out), None

    forward.longspan_original = original  # type: ignore[attr-defined]
    return forward


def _lightning(
    block: int,
    tensors: tuple[torch.Tensor, ...],
    weights: tuple[torch.Tensor | None, ...],
    *,
    state: torch.Tensor | None,
    final: bool,
    borders: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Linear attention whose state decays by exp(-slope) a token, in blocks (Lightning Attention-2, algorithm 1)."""
    q, k, v = (x.transpose(1, 2) for x in tensors)
    (slope,) = weights
    assert slope is not None
    if state is None:
        state = v.new_zeros(v.shape[0], v.shape[1], k.shape[-1], v.shape[-1])
    outs = []
    for q_part, k_part, v_part in zip(*(x.split(block, dim=2) for x in (q, k, v))):
        step = torch.arange(1, q_part.shape[2] + 1, device=q.device)[:, None]
        apart = step - step.T
        decay = torch.exp(torch.where(apart >= 0, -slope * apart, float("-inf")))
        out = (q_part @ k_part.mT * decay) @ v_part + (q_part * torch.exp(-slope * step)) @ state
        outs.append(out)
        left = torch.exp(-slope * (len(step) - step))
        state = state * torch.exp(-slope * len(step)) + (k_part * left).mT @ v_part
    return torch.cat(outs, dim=2).transpose(1, 2), state if final else None


_WRAPPERS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "causal_conv1d_fn": _wrapper(_convolution),
    "chunk_kimi_delta_attention": _wrapper(_delta_rule),
    "mamba2_chunk_scan": _wrapper(_mamba2),
    "mamba2_split_conv1d_scan_combined": _wrapper(_fused),
    "mamba_inner_fn": _wrapper(_fused),
    "mamba_selective_scan": _wrapper(_mamba1),
    "torch_chunk_gated_delta_rule": _wrapper(_delta_rule),
}
"""Functions of modeling files that mix tokens."""
