"""Stand-ins for models: one that always answers right, and ones that fail in a given way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from longspan.data.tokenizer import Tokenizer
from longspan.infer.requests import Answer, Request

IDENTITY = {
    "path": "model",
    "fingerprint": "f",
    "rope": {"rope_type": "default"},
    "trained_length": 256,
    "backend": "test",
}


class Knowing:
    """Scores every given answer as certain, and generates what `knows` says of the prompt."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        knows: Callable[[str], str] = lambda prompt: "",
        max_length: int | None = None,
        nll: float = 0.0,
        fails: Mapping[int, str] | None = None,
    ) -> None:
        self.identity: Mapping[str, Any] = IDENTITY
        self.max_length = max_length
        self.seen: list[Request] = []
        self.calls: list[int] = []
        self._tokenizer, self._knows, self._nll, self._fails = tokenizer, knows, nll, dict(fails or {})

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        self.calls.append(len(requests))
        for index, request in enumerate(requests):
            self.seen.append(request)
            yield index, self._failing(Answer(self._knows(request.prompt), finish="stop", seconds=0.25))

    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        self.calls.append(len(requests))
        # In reverse: answers come in any order.
        for index, request in reversed(list(enumerate(requests))):
            self.seen.append(request)
            assert request.answer_ids is not None
            ids = request.answer_ids
            nll = np.full(len(ids), self._nll, np.float32)
            yield index, self._failing(Answer(self._tokenizer.decode(ids), ids, nll=nll, seconds=0.25))

    def close(self) -> None:
        pass

    def _failing(self, answer: Answer) -> Answer:
        reason = self._fails.pop(len(self.seen), None)
        return answer if reason is None else Answer("", error=reason)
