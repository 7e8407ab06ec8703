"""Progress of a call, reported layer by layer: a pass over a whole prompt may take minutes.

Work is reckoned in operations beforehand (`infer.flops`), and told as the share of it that is done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import nn
from transformers import PreTrainedModel

from longspan.infer.flops import ModelFlops
from longspan.models.head import backbone

STEP_TOKENS = 32
"""Reading so many tokens takes about as long as one step of decoding, which waits for memory."""


class Share:
    """The share of a call's work that is done; `on_share` is called with it whenever it grows.

    Args:
        model: its config says what tokens cost, its layers when they have run.
        ranks: processes that share what is spread.
    """

    def __init__(self, model: PreTrainedModel, *, ranks: int = 1) -> None:
        self.on_share: Callable[[float], None] | None = None
        self._flops, self._ranks = ModelFlops.of_model(model), ranks
        self._layers = _layers(model)
        self._done, self._total = 0.0, 1.0

    def begin(self, total: float) -> None:
        """Begin a call with this much work, in operations."""
        self._done, self._total = 0.0, max(total, 1.0)

    def reading(self, start: int, tokens: int) -> float:
        """Return the operations of reading tokens behind `start` others, all of it spread over the ranks."""
        return self._flops.reading(start, tokens) / self._ranks

    def steps(self, count: int) -> float:
        """Return the operations of that number of decoding steps."""
        return max(count, 0) * STEP_TOKENS * self._flops.per_token

    def done(self, operations: float) -> None:
        """Report that this much more is done."""
        self._done += operations
        if self.on_share is not None and operations > 0:
            self.on_share(min(1.0, self._done / self._total))

    @contextlib.contextmanager
    def part(self, operations: float) -> Iterator[None]:
        """Do a part of the call's work; what it leaves undone, such as the end of a short answer, is told behind it."""
        end = self._done + operations
        yield
        self.done(end - self._done)

    @contextlib.contextmanager
    def a_pass(self, operations: float) -> Iterator[None]:
        """Run one forward pass of so much work, told as its layers end."""
        if self.on_share is None:
            yield
            return
        each = operations / len(self._layers)
        hooks = [layer.register_forward_hook(lambda *_: self.done(each)) for layer in self._layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers that a pass goes through, or the whole model where they are not to be told."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    return [backbone(model)]
