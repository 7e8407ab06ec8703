"""torch.compile for the blocks of a model, inside of their checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from longspan.core.errors import ArgumentError
from longspan.models.attention import keep_out_of_compiler
from longspan.models.mixers import mixers

__all__ = ["compile_blocks"]


def compile_blocks(model: nn.Module) -> None:
    """Compile each block of a model at its first use, in place; attention stays as it is.

    Call it after `enable_checkpointing`. A block under checkpointing is compiled for training only: in eval mode it
    runs as it is.

    Raises:
        ArgumentError: a model with layers that carry a state, whose functions take tables of documents.
    """
    if any(mixers(model)):
        raise ArgumentError(
            f"blocks of {type(model).__name__} are not compiled: layers with a state are handed tables of documents",
            fix="set runtime.compile_blocks to false",
        )
    keep_out_of_compiler()
    compiled = _Compiled()
    for module in model.modules():
        if not isinstance(module, nn.ModuleList):
            continue
        for block in module:
            if getattr(block, "gradient_checkpointing", False):
                layer = cast(Any, block)
                layer._gradient_checkpointing_func = partial(
                    _inside, layer._gradient_checkpointing_func, compiled
                )
            else:
                block.compile()


class _Compiled(dict[Callable[..., Any], Callable[..., Any]]):
    """The compiled form of functions: one for all blocks of a class, which so share their graphs."""

    def __missing__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        self[function] = torch.compile(function)
        return self[function]


def _inside(checkpointed: Callable[..., Any], compiled: _Compiled, block: partial[Any], *args: Any) -> Any:
    # transformers hands over the block as partial(forward, module, ...). Compiled from outside, torch.compile meets
    # attention, which it must leave alone, within a checkpoint, gives up the whole block and says nothing.
    return checkpointed(partial(compiled[block.func], *block.args, **block.keywords), *args)
