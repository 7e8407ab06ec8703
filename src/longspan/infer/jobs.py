"""What an engine is asked, what came of it, and what it counts on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Job(NamedTuple):
    """A sequence to be read, and what is wanted of it."""

    ids: NDArray[np.int64]
    """[sequence]; not empty."""
    wanted: int = 1
    """The predictions behind so many of its last tokens."""
    targets: NDArray[np.int64] | None = None
    """[wanted]: tokens whose likelihood is wanted."""
    max_new_tokens: int = 0
    """The answer is generated up to this length; 0: nothing is generated."""
    push: Callable[[int], object] | None = None
    """Is given each generated token; the answer ends when it returns something true."""


class JobOutcome(NamedTuple):
    """What came of a job."""

    argmax_ids: NDArray[np.int64]
    """The most likely tokens behind the wanted positions, or the generated ones."""
    nll: NDArray[np.float32] | None
    """Negative log-likelihoods of the targets, in nats."""
    finite: bool
    """Whether all logits were numbers."""
    seconds: float
    """Share of the time since the answers before, of the trunk too if it is the first to need it."""


class Counters:
    """What an engine has run so far."""

    def __init__(self) -> None:
        self.tokens = 0
        """Tokens that went through the layers."""
        self.decoded_tokens = 0
        """Those of them that had just been generated."""
        self.logit_rows = 0
        """Positions that went through the output embedding."""
        self.attention_flops = 0
        """4 * head_dim for each head and visible (query, key) pair."""
        self.passes = 0
        """Forward passes."""
