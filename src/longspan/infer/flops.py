"""Floating-point operations of evaluation grids, in closed form: each cell by itself, and with a shared prefix.

A token that is read costs 2 operations for each weight of the linear layers, and 4 * head_dim for each head and each
key that it sees: reading n tokens from the first is n * linear + n (n + 1) / 2 * pair. With cells c of n_c tokens
that leave a common trunk behind p_c tokens, P = max p_c:

    by themselves   sum n_c                 tokens     sum n_c (n_c + 1) / 2                             pairs
    shared          P + sum (n_c - p_c)     tokens     P (P + 1) / 2
                                                       + sum [n_c (n_c + 1) - p_c (p_c + 1)] / 2         pairs

On a ladder, lengths L_1 .. L_m by d even depths, half of every cell lies behind its needle on average, so the factor
in the linear layers is 2 / (1 + 2 L_m / (d sum L)): 1.92 for 11 depths and 8 even lengths. In attention it is the
late half, which is the dear one: about 1.5.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class ModelFlops(NamedTuple):
    """What a model's forward pass costs."""

    per_token: float
    """In the linear layers of all blocks, for each token."""
    per_pair: float
    """In attention, all layers and heads, for each query and key that it sees; sliding windows are not counted."""
    per_logit_row: float
    """In the output embedding, for each position whose logits are wanted."""

    @classmethod
    def of(cls, config: Any) -> ModelFlops:
        """Return the costs of a config of transformers with blocks like Llama's (grouped queries, gated MLP)."""
        from longspan.models.hf_config import (  # keeps this module light
            attention_width,
            head_counts,
            text_config,
            widest,
        )

        config = text_config(config)
        hidden, layers = config.hidden_size, config.num_hidden_layers
        heads, kv_heads = head_counts(config)
        channels = attention_width(config)
        inner = widest(config, "intermediate_size") or 4 * hidden
        attention = hidden * channels * (2 * heads + 2 * kv_heads)
        return cls(
            per_token=2.0 * layers * (attention + 3 * hidden * inner),
            per_pair=4.0 * layers * heads * channels,
            per_logit_row=2.0 * hidden * config.vocab_size,
        )

    @classmethod
    def of_model(cls, model: Any) -> ModelFlops:
        """Return the costs of a model: of one with a state in some layers, those of its own weights and states."""
        from longspan.models.states import layers_with_keys, operations_per_token  # keeps this module light

        plain = cls.of(model.config)
        per_token = operations_per_token(model)
        if per_token is None:
            return plain
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        return plain._replace(per_token=per_token, per_pair=plain.per_pair * layers_with_keys(model) / layers)

    def reading(self, start: int, tokens: int) -> float:
        """Return the operations of reading some tokens behind `start` others, without output embedding."""
        return self.per_token * tokens + self.per_pair * (tokens * start + _triangle(tokens))


class GridPrompt(NamedTuple):
    """A prompt of a grid."""

    branch: int
    """Tokens at its start that it has in common with every cell that goes on at least so far."""
    tokens: int
    """All its tokens."""


class Work(NamedTuple):
    """What is read, in numbers."""

    tokens: int
    pairs: int
    """(query, key) pairs of full attention."""
    logit_rows: int


def work_by_themselves(cells: Iterable[GridPrompt]) -> Work:
    """Return the work of reading every cell from its first token."""
    lengths = [cell.tokens for cell in cells]
    return Work(sum(lengths), sum(map(_triangle, lengths)), len(lengths))


def work_shared(cells: Sequence[GridPrompt]) -> Work:
    """Return the work of reading the trunk once and of each cell what follows its branch."""
    trunk = max((cell.branch for cell in cells), default=0)
    tokens = trunk + sum(cell.tokens - cell.branch for cell in cells)
    pairs = _triangle(trunk) + sum(_triangle(cell.tokens) - _triangle(cell.branch) for cell in cells)
    return Work(tokens, pairs, len(cells))


def ladder(lengths: Iterable[int], depths: Sequence[float], *, rest: int = 0) -> list[GridPrompt]:
    """Return the cells of a needle grid over one haystack.

    Args:
        lengths: tokens of each prompt.
        depths: 0 = at the start of the haystack, 1 = at its end.
        rest: tokens of each prompt that are no haystack (needle, question); they stand behind the branch.
    """
    return [GridPrompt(round(depth * (length - rest)), length) for length in lengths for depth in depths]


def _triangle(tokens: int) -> int:
    return tokens * (tokens + 1) // 2
