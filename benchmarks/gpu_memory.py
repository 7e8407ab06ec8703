"""Sections of benchmarks/gpu.py about memory: the loss, the MLP in tiles, what blocks keep for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from gpu_measure import Deadline, Row, Scale, Tensors, borders, difference, measure, normal
from longspan.kernels.loss import linear_cross_entropy
from longspan.kernels.tiled_mlp import enable_tiled_mlp


def loss(scale: Scale, deadline: Deadline) -> Iterator[Row]:
    """Cross-entropy in chunks against all logits at once."""
    for tokens in scale.loss_tokens:
        for method in ("chunked", "all logits"):
            case = {"tokens": tokens, "vocabulary": scale.vocabulary, "method": method}
            yield deadline.row(case, lambda t=tokens, m=method: _loss_case(scale, t, m))


def _loss_case(scale: Scale, tokens: int, method: str) -> Row:
    hidden = normal(scale, tokens, scale.hidden, seed=0).requires_grad_()
    weight = normal(scale, scale.vocabulary, scale.hidden, seed=1, std=scale.hidden**-0.5).requires_grad_()
    labels = torch.arange(tokens, device=scale.device) * 7919 % scale.vocabulary

    def forward() -> torch.Tensor:
        if method == "chunked":
            return linear_cross_entropy(hidden, weight, labels).loss / tokens
        # As model code has it: logits in the model's type, the loss in fp32.
        return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), labels)

    def backward(value: torch.Tensor) -> None:
        torch.autograd.grad(value, (hidden, weight))

    return measure(forward, backward, scale) | {"loss": float(forward().detach())}


class GatedMLP(torch.nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        sizes = {"device": scale.device, "dtype": scale.dtype, "bias": False}
        self.gate_proj = torch.nn.Linear(scale.hidden, scale.intermediate, **sizes)
        self.up_proj = torch.nn.Linear(scale.hidden, scale.intermediate, **sizes)
        self.down_proj = torch.nn.Linear(scale.intermediate, scale.hidden, **sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def tiled_mlp(scale: Scale, deadline: Deadline) -> Iterator[Row]:
    """The MLP of one block in tiles against the whole row at once."""
    for tokens in scale.mlp_tokens:
        truth: list[Tensors] = []
        for tile in (None, *scale.mlp_tiles):
            case = {"tokens": tokens, "tile": tile or "whole row"}
            yield deadline.row(case, lambda t=tokens, s=tile, r=truth: _mlp_case(scale, t, s, r))


def _mlp_case(scale: Scale, tokens: int, tile: int | None, truth: list[Tensors]) -> Row:
    torch.manual_seed(0)
    mlp = GatedMLP(scale)
    if tile is not None:
        block = torch.nn.Module()
        block.mlp = mlp
        enable_tiled_mlp(torch.nn.Sequential(torch.nn.ModuleList([block])), tile)
    x = normal(scale, 1, tokens, scale.hidden, seed=0).requires_grad_()
    dout = normal(scale, 1, tokens, scale.hidden, seed=1)

    def backward(out: torch.Tensor) -> Tensors:
        return torch.autograd.grad(out, (x, *mlp.parameters()), dout)

    grads = backward(mlp(x))[1:]
    row: Row = {"difference": difference(grads, truth[0])} if truth else {}
    if tile is None:
        truth.append(grads)
    del grads
    return row | measure(lambda: mlp(x), backward, scale)


def checkpointing(scale: Scale, deadline: Deadline) -> Iterator[Row]:
    """A stack of blocks: what is kept for the backward pass, where, and what it costs."""
    truth: list[Tensors] = []
    for mode, tile in (("full", None), ("offload", None), ("offload", scale.mlp_tiles[0]), ("none", None)):
        case = {
            "mode": mode,
            "tile": tile or "whole row",
            "layers": scale.layers,
            "tokens": scale.layer_tokens,
        }
        yield deadline.row(case, lambda m=mode, t=tile: _checkpointing_case(scale, m, t, truth))


def _checkpointing_case(scale: Scale, mode: Any, tile: int | None, truth: list[Tensors]) -> Row:
    from transformers import LlamaConfig, LlamaForCausalLM

    from longspan.models.checkpointing import enable_checkpointing
    from longspan.models.hf import Documents, enable, hidden_states

    config = LlamaConfig(
        hidden_size=scale.hidden,
        intermediate_size=scale.intermediate,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.heads,
        num_key_value_heads=scale.kv_heads,
        head_dim=scale.head_dim,
        vocab_size=256,
        max_position_embeddings=scale.layer_tokens,
    )
    torch.manual_seed(0)
    with torch.device(scale.device):
        model = enable(LlamaForCausalLM(config)).to(scale.dtype).train()
    enable_checkpointing(model, mode)
    if tile is not None:
        enable_tiled_mlp(model, tile)
    ids = torch.arange(scale.layer_tokens, device=scale.device) % 256
    documents = Documents.from_cu_seqlens(borders(scale.layer_tokens, scale.document_tokens))
    parameters = tuple(model.base_model.parameters())

    # Not the mean square, which the last norm makes constant: its gradient would be rounding.
    directions = normal(scale, scale.layer_tokens, scale.hidden, seed=0)

    def forward() -> torch.Tensor:
        return (hidden_states(model, ids, documents) * directions).sum(dtype=torch.float32)

    def backward(value: torch.Tensor) -> Tensors:
        return torch.autograd.grad(value, parameters)

    first = tuple(grad.cpu() for grad in backward(forward())[:8])
    row: Row = {"difference": difference(first, truth[0])} if truth else {}
    truth.append(first)
    return row | measure(forward, backward, scale)
