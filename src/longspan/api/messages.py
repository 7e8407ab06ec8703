"""What is asked of an endpoint and what comes back, whoever's protocol it speaks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

Finish = Literal["stop", "length"]
Reason = Literal["refused", "no answer", "too long", "rejected", "failed"]
"""Why there is no answer.

refused     by the model or by a content filter
no answer   the server answered without any choice
too long    the request does not fit into the endpoint's window
rejected    this request is not acceptable; others may be
failed      no attempt succeeded: overload, timeouts, broken answers
"""

# English has about 4 bytes a token and code 3; too many tokens reserved is the safe side of a limit.
_BYTES_PER_TOKEN = 3
_TOKENS_PER_MESSAGE = 4
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Usage(NamedTuple):
    """Tokens of one answer as the server counts them."""

    prompt_tokens: int
    completion_tokens: int
    estimated: bool = False
    """Whether the server said nothing and these were guessed from the texts."""


class LogProbs(NamedTuple):
    """Log-probabilities (natural log) of the last tokens of a prompt."""

    values: tuple[float | None, ...]
    """Of each token itself."""
    top_tokens: tuple[str, ...]
    """The most likely token in its place, as the server writes it."""
    shift: int = 0
    """By how many places the server's tokens stand behind those that were sent: 1 where it adds a BOS, -1 where it
    leaves out the first."""


class ChatRequest(NamedTuple):
    """One request; a chat by `messages`, or a text (or token ids) to be continued by `prompt`."""

    messages: Sequence[Mapping[str, str]] = ()
    """Role and content each; empty: the prompt, as the only message of the user."""
    prompt: str | Sequence[int] | None = None
    max_tokens: int = 256
    temperature: float | None = 0.0
    """None: not sent, for models that refuse it."""
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    scored: int = 0
    """Log-probabilities of that many last tokens of the prompt are wanted, instead of an answer."""
    token_texts: tuple[str, ...] = ()
    """Texts of the last tokens of a prompt of ids, to find them again among those that a server names by text."""
    extra: Mapping[str, Any] = _NOTHING
    """Further fields of the body, sent as they are."""
    sample: int = 0
    """Tells several draws for the same prompt apart; it is not sent."""
    prompt_tokens: int | None = None
    """Tokens of the prompt, where the caller knows; else they are estimated."""

    def estimate_prompt_tokens(self) -> int:
        """Return `prompt_tokens`, or a guess on the safe side (a token every 3 bytes)."""
        if self.prompt_tokens is not None:
            return self.prompt_tokens
        if self.prompt is not None and not isinstance(self.prompt, str):
            return len(self.prompt)
        texts = [message["content"] for message in self.messages] or [self.prompt or ""]
        return sum(estimate_tokens(text) + _TOKENS_PER_MESSAGE for text in texts)

    def estimate_tokens(self) -> int:
        """Return an estimate of the most tokens that this request may take, prompt and answer."""
        return self.estimate_prompt_tokens() + self.max_tokens


class ChatResult(NamedTuple):
    """What came of one request."""

    text: str
    """The answer; empty where there is none, and what had come of a stream that broke off."""
    finish: Finish | None = None
    """Why the answer ended; None where there is none."""
    usage: Usage = Usage(0, 0)
    cost: float | None = 0.0
    """What it cost now (nothing when it was recorded already); None: no prices were given."""
    cached: bool = False
    attempts: int = 0
    """HTTP requests that it took."""
    seconds: float = 0.0
    """From the last of them to its answer."""
    error: Reason | None = None
    detail: str = ""
    """What is behind `error`, for people."""
    logprobs: LogProbs | None = None
    """Where `scored` asked for them."""
    thoughts: str = ""
    """What the model thought before its answer, where the server gives that apart."""


class ParsedAnswer(NamedTuple):
    """What a protocol reads out of one answer of the server."""

    text: str
    finish: Finish | None = None
    usage: Usage | None = None
    error: Reason | None = None
    detail: str = ""
    logprobs: LogProbs | None = None
    thoughts: str = ""


def estimate_tokens(text: str) -> int:
    """Return about how many tokens a text has, rather too many than too few."""
    return math.ceil(len(text.encode("utf-8", "surrogatepass")) / _BYTES_PER_TOKEN)
