"""Compiled blocks are compiled: graphs are counted, and what they compute is the same."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longspan.train.objectives import ModelWithLoss
from longspan.train.runtime import prepare_blocks
from tests.train.test_recurrent import BORDERS, batch_of, gradients, model_of


@pytest.mark.parametrize("checkpointing", ["none", "full", "offload"])
# torch warns of its own doings while it compiles.
@pytest.mark.filterwarnings("default")
def test_blocks_are_compiled_beside_checkpointing(
    checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled from outside, a checkpointed block was given up as a whole, and nothing said so."""
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    config: Any = SimpleNamespace(
        memory=SimpleNamespace(tiled_mlp=None, activation_checkpointing=checkpointing),
        runtime=SimpleNamespace(compile_blocks=True),
    )
    batch = batch_of(BORDERS)
    plain, compiled = model_of(), model_of()
    prepare_blocks(compiled, config)
    losses = []
    for model in (plain, compiled):
        result = ModelWithLoss(model)(batch)
        result.loss.backward()
        losses.append(result.loss.detach())
    torch.testing.assert_close(losses[1], losses[0])
    truth, found = gradients(plain), gradients(compiled)
    for name, gradient in truth.items():
        torch.testing.assert_close(found[name.replace("_orig_mod.", "")], gradient, msg=name)
    # Before and behind attention, the same for all three blocks.
    assert 2 <= len(graphs) <= 6 and max(graphs) > 10
