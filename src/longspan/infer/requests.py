"""What is asked of a model and what it answers, whatever runs it: this process, several ranks or a server.

answerer.generate([Request(prompt="2, 4, 6,", prompt_ids=ids, max_new_tokens=3)])   -> Answer(text=" 8, 10", ...)
answerer.score([Request(prompt="2, 4, 6,", prompt_ids=ids, answer_ids=eight)])      -> Answer(nll=[0.1], ...)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

Finish = Literal["stop", "length"]
Thinking = Literal["unknown", "none", "expected", "opened"]
"""What is known of a model's thoughts before it answers.

unknown     it may think; where marks show it, thoughts are taken off
none        it was told not to
expected    it thinks by itself
opened      the prompt ends inside a block of thoughts
"""

NOT_FINITE = "the model's output is not a finite number"
"""`Answer.error` of a model whose logits are infinite or no numbers."""


class Request(NamedTuple):
    """A prompt and how it is to be continued, or the answer whose likelihood is wanted."""

    prompt: str
    """The text; what a server without a chat is sent."""
    prompt_ids: np.ndarray | None = None
    """The same as token ids, int64 `[prompt]`; local models need them."""
    messages: Sequence[Mapping[str, str]] | None = None
    """A chat (role, content), sent to a server that chats; None: the prompt is the only message."""
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    """Texts that end the answer; neither they nor what follows is part of it."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end the answer; they are part of `token_ids`, not of the text."""
    answer_ids: np.ndarray | None = None
    """What `score` measures after the prompt, int64 `[answer]`."""
    thinking: Thinking = "unknown"
    """Stop texts do not act inside thoughts, and these are no part of the answer."""


def before_stop(text: str, stop: Sequence[str]) -> str:
    """Return what stands before the first of the texts that end an answer; an empty one ends none."""
    places = [place for each in stop if each and (place := text.find(each)) >= 0]
    return text[: min(places)] if places else text


class Answer(NamedTuple):
    """What a model gave for one request."""

    text: str
    """The answer, without thoughts; of `score`, the most likely token at each position, decoded."""
    token_ids: np.ndarray | None = None
    """All that was written, thoughts too, as ids, int64 `[answer]`; None where a server does not say."""
    finish: Finish | None = None
    """Why generation ended; None for `score`."""
    error: str | None = None
    """Why there is no answer; the text is empty then."""
    nll: np.ndarray | None = None
    """Of `score`: negative log-likelihood of each answer token in nats, float32 `[answer]`."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None
    """What a server's answer cost, by the prices that were given; None: no prices."""
    seconds: float = 0.0
    """Time that this answer took beside those it shared work with."""
    thoughts: str = ""
    """What the model wrote before its answer, without the marks around it."""


def no_answer(answer: Answer) -> str | None:
    """Return why a generated answer is empty, in a few words that add up; None: it says something."""
    if answer.text.strip():
        return None
    if answer.finish == "length":
        return "cut while thinking" if answer.thoughts else "cut before an answer"
    return "thoughts without an answer" if answer.thoughts else "empty answer"


class Answerer(Protocol):
    """Runs requests. Answers come as they are ready, in any order, with the index of their request.

    A request that cannot be answered has an `Answer` with `error`; others go on.
    """

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the header of records says of the model: path, fingerprint, rope, trained_length, backend."""
        ...

    @property
    def max_length(self) -> int | None:
        """Tokens that prompt and answer may have together; None: not known."""
        ...

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Continue each prompt greedily."""
        ...

    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Measure each given answer after its prompt."""
        ...

    def close(self) -> None:
        """Release its processes and connections."""
        ...


def copies_of(answerer: object) -> int:
    """Return how many copies of the model share out what is asked; so many times as much is handed over at once."""
    return int(getattr(answerer, "copies", 1))


def work_of(answerer: object, tokens: int) -> float:
    """Return the work of reading a prompt of so many tokens: operations where the model is run here, else tokens."""
    known = getattr(answerer, "work_of", None)
    return float(tokens if known is None else known(tokens))


@runtime_checkable
class Watched(Protocol):
    """An answerer that says how far it has come between two answers."""

    def watch(self, on_share: Callable[[float], None] | None) -> bool:
        """Report progress while a call answers: the share of its work that is done, 0 to 1; None: no more.

        Returns:
            Whether it will be told: what runs the requests may not say.
        """
        ...
