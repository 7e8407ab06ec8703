"""Models behind a server, asked like those that run here.

    openai:NAME         OpenAI's protocol, chat: OpenAI, Azure, vLLM, SGLang, llama.cpp, `transformers serve`
    completions:NAME    the same protocol, a plain text continued: base models, and `score` where the server can
    anthropic:NAME      Anthropic's messages

A server tokenizes by itself: what is sent is the text of a request or its chat, ids only where `score` measures
them. Its own stop tokens end an answer; `stop_ids` are not sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from longspan.api import ChatRequest, ChatResult, Client, Endpoint, ServerConfig, remote_model
from longspan.api.providers import KINDS
from longspan.core.errors import ArgumentError, RunError
from longspan.core.log import get_logger, log_once
from longspan.data.tokenizer import Tokenizer
from longspan.infer.requests import Answer, Request, before_stop
from longspan.infer.thinking import split_thoughts

_TOKEN_ID = "token_id:"
_COUNT_SHARE, _COUNT_RENDERED, _COUNT_TEMPLATE = 0.02, 16, 200
"""Share of a prompt's tokens, and tokens beside that, by which a server's count may differ before it is remarked on:
where the prompt holds all that its template writes, and how many more where the server's template adds to it."""
_LOOKED_AT = 16
"""Tokens before an answer by which it is found again in what a server echoes."""
_CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}
"""Tells a server that the last message, the assistant's, is the beginning of the answer."""
_log = get_logger("infer")


def open_remote(model: str, server: ServerConfig, *, tokenizer: Tokenizer | None = None) -> RemoteAnswerer:
    """Return an answerer for `openai:NAME` and the like; `ServerConfig` says how its server is asked.

    Raises:
        ArgumentError: there is no such provider.
        ConfigError: the address or the key is wrong.
        MissingDependencyError: the extra `api` is not installed.
    """
    remote = remote_model(model)
    if remote is None:
        raise ArgumentError("there is no such provider", found=repr(model), allowed=sorted(KINDS))
    return RemoteAnswerer(remote.client(server), tokenizer=tokenizer, trained_length=server.trained_length)


class RemoteAnswerer:
    """A model behind a server; closing it closes its client.

    Args:
        client: asks the server.
        tokenizer: the server's, where it is known: decodes the most likely tokens of `score`, counts prompts.
        trained_length: of the model, which its server does not say.
        temperature: None for models that refuse to be given one; else 0, which is greedy.
    """

    def __init__(
        self,
        client: Client,
        *,
        tokenizer: Tokenizer | None = None,
        trained_length: int | None = None,
        temperature: float | None = 0.0,
    ) -> None:
        self.client = client
        self.max_length = client.endpoint.max_length
        self._tokenizer, self._temperature = tokenizer, temperature
        self._explained: set[str] = set()
        self._reached = False
        self.sends_ids = False
        """Whether a prompt is sent as the ids of its request, for servers that take them."""
        self.identity = identify_endpoint(client.endpoint, trained_length)

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Continue each prompt greedily, several at a time.

        Raises:
            UserError: no request can succeed (bad key, unknown model).
            RunError: the server does not answer, or the budget is used up.
        """
        asked = ((index, self._chat_request(request)) for index, request in enumerate(requests))
        for index, result in self._all(asked, len(requests)):
            yield index, self._answer(requests[index], result)

    def generate_stream(self, request: Request, on_text: Callable[[str], None]) -> Answer:
        """Continue one prompt; `on_text` is given the answer piece by piece as it comes. Raises as `generate`.

        A stop text that the server sends along is given to `on_text`, but is no part of the answer.
        """
        return self._answer(request, self.client.stream(self._chat_request(request), on_text))

    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Measure each given answer after its prompt; the ids have to be of the server's tokenizer.

        Raises:
            ArgumentError: this endpoint does not say how likely given tokens are.
            UserError, RunError: as `generate`.
        """
        if self.client.endpoint.kind != "completions":
            raise _no_scores(f"an endpoint of kind {self.client.endpoint.kind}")
        asked = ((index, self._scored_request(request)) for index, request in enumerate(requests))
        for index, result in self._all(asked, len(requests)):
            if result.error == "rejected":
                raise _no_scores(result.detail)
            yield index, self._scored_answer(requests[index], result)

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def _chat_request(self, request: Request) -> ChatRequest:
        kind = self.client.endpoint.kind
        chats = request.messages is not None and kind != "completions"
        messages = tuple(request.messages or ()) if chats else ()
        begun = kind == "chat" and bool(messages) and messages[-1]["role"] == "assistant"
        # A server looks for stop texts in thoughts too, and whether a chat's model thinks may not be known.
        thinks = ("expected", "opened") if kind == "completions" else ("unknown", "expected", "opened")
        text: str | list[int] = request.prompt
        if self.sends_ids and request.prompt_ids is not None:
            text = request.prompt_ids.tolist()
        return ChatRequest(
            messages=messages,
            prompt=None if chats else text,
            max_tokens=request.max_new_tokens,
            temperature=self._temperature,
            stop=() if request.thinking in thinks else request.stop,
            extra=_CONTINUE if begun else {},
            prompt_tokens=self._count(request),
        )

    def _scored_request(self, request: Request) -> ChatRequest:
        if request.prompt_ids is None or request.answer_ids is None or not len(request.answer_ids):
            raise ArgumentError("prompt and answer are measured as token ids", found="a request without them")
        ids = [*map(int, request.prompt_ids), *map(int, request.answer_ids)]
        return ChatRequest(
            prompt=ids,
            max_tokens=1,
            temperature=self._temperature,
            scored=len(request.answer_ids),
            token_texts=self._texts(ids[-len(request.answer_ids) - _LOOKED_AT :]),
            prompt_tokens=len(ids),
        )

    def _texts(self, ids: Sequence[int]) -> tuple[str, ...]:
        return () if self._tokenizer is None else tuple(self._tokenizer.decode([token]) for token in ids)

    def _count(self, request: Request) -> int | None:
        if request.prompt_ids is not None:
            return len(request.prompt_ids)
        if self._tokenizer is None or request.messages is not None:
            return None
        return len(self._tokenizer.encode(request.prompt))

    def _all(self, asked: Iterator[tuple[int, ChatRequest]], count: int) -> Iterator[tuple[int, ChatResult]]:
        """Yield every result.

        Raises:
            RunError: no connection to the server was ever made, or the budget stopped the client before the
                last one.
        """
        answered = 0
        for index, result in self.client.complete(asked):
            answered += 1
            lost = result.error == "failed" and result.detail.startswith("connection ")
            if lost and not self._reached:
                # Recorded as unscored, these would not be asked again once the server is there.
                raise RunError(
                    f"{self.client.endpoint.address} cannot be reached",
                    found=result.detail,
                    fix="start the server or correct --base-url, and run again",
                )
            self._reached = self._reached or not lost
            yield index, result
        if answered < count:
            raise RunError(
                f"{count - answered:,} requests were not sent: {self.client.report().stopped} is reached",
                fix="raise it and run again: recorded answers are not asked for again",
            )

    def _answer(self, request: Request, result: ChatResult) -> Answer:
        if result.error is not None:
            return self._failed(result)
        self._compare_counts(request, result)
        answer, thoughts = self._spoken(request, result)
        answer = self._continued(request, answer, result)
        text = before_stop(answer, request.stop)
        return Answer(
            text,
            finish=result.finish if text == answer else "stop",
            prompt_tokens=result.usage.prompt_tokens,
            completion_tokens=result.usage.completion_tokens,
            cost=result.cost,
            seconds=result.seconds,
            thoughts=thoughts,
        )

    def _continued(self, request: Request, text: str, result: ChatResult) -> str:
        """Return an answer without the beginning that it was given: llama.cpp repeats that, the others do not.

        Which it is, the tokens that the server has counted tell: a model may begin as it was begun.
        """
        last = request.messages[-1] if request.messages and self.client.endpoint.kind == "chat" else {}
        begun = str(last.get("content") or "") if last.get("role") == "assistant" else ""
        if not begun or not text.startswith(begun) or self._tokenizer is None or result.usage.estimated:
            return text
        rest, written = text[len(begun) :], result.usage.completion_tokens
        whole, alone = (len(self._tokenizer.encode(part)) for part in (text, rest))
        return rest if abs(alone - written) < abs(whole - written) else text

    def _compare_counts(self, request: Request, result: ChatResult) -> None:
        """Warn once that the server counts other tokens than we do: lengths are then not what they are stated to be."""
        ours, theirs = self._count(request) or 0, result.usage.prompt_tokens
        if not ours or not theirs or result.usage.estimated or "tokens" in self._explained:
            return
        # A template writes something around each message, which only some prompts hold already.
        rendered = self.client.endpoint.kind == "completions" or request.messages is not None
        more = _COUNT_RENDERED if rendered else _COUNT_TEMPLATE
        if -_COUNT_RENDERED <= theirs - ours - np.sign(theirs - ours) * ours * _COUNT_SHARE <= more:
            return
        self._explained.add("tokens")
        _log.warning(
            "%s: the server counts %s tokens in a prompt that has %s by --tokenizer: that is another tokenizer than "
            "the server's, or the server writes more around a prompt. Lengths that are asked for are in ours",
            self.client.endpoint.model,
            f"{theirs:,}",
            f"{ours:,}",
        )

    def _spoken(self, request: Request, result: ChatResult) -> tuple[str, str]:
        """Return the answer and the thoughts before it.

        A chat's server may part them by itself, so that it alone knows whether a text without marks is thought: it is
        when a model that thinks was cut short.
        """
        continued = self.client.endpoint.kind == "completions"
        spoken = split_thoughts(result.text, opened=continued and request.thinking == "opened")
        answer, thoughts = spoken.answer, "\n".join(filter(None, (result.thoughts, spoken.thoughts)))
        thinks = request.thinking in ("expected", "opened") and not continued
        if thinks and not thoughts and spoken.answered and result.finish == "length":
            return "", answer
        return answer, thoughts

    def _scored_answer(self, request: Request, result: ChatResult) -> Answer:
        if result.error is not None:
            return self._failed(result)
        assert request.prompt_ids is not None and request.answer_ids is not None
        if result.logprobs is None or any(value is None for value in result.logprobs.values):
            return Answer("", error="the server gave no log-probability of a token")
        if result.logprobs.shift:
            log_once(
                "infer",
                f"{self.client.endpoint.model}: the server "
                f"{'adds a token to' if result.logprobs.shift > 0 else 'leaves out the first token of'} each prompt "
                "in the log-probabilities that it gives; they are read shifted",
            )
        nll = -np.array(result.logprobs.values, dtype=np.float32)
        best = result.logprobs.top_tokens
        ids = None
        if all(token.startswith(_TOKEN_ID) for token in best):
            ids = np.array([int(token.removeprefix(_TOKEN_ID)) for token in best], dtype=np.int64)
        text = self._tokenizer.decode(ids) if self._tokenizer and ids is not None else "".join(best)
        return Answer(
            text,
            ids,
            nll=nll,
            prompt_tokens=len(request.prompt_ids),
            completion_tokens=len(request.answer_ids),
            cost=result.cost,
            seconds=result.seconds,
        )

    def _failed(self, result: ChatResult) -> Answer:
        """Return an answer that names the reason alone, so that equal reasons add up; say once what is behind."""
        assert result.error is not None
        if result.error not in self._explained:
            self._explained.add(result.error)
            _log.warning(
                "%s: no answer to a request (%s): %s", self.client.endpoint.model, result.error, result.detail
            )
        return Answer(
            "",
            error=f"endpoint: {result.error}",
            prompt_tokens=result.usage.prompt_tokens,
            completion_tokens=result.usage.completion_tokens,
            cost=result.cost,
        )


def identify_endpoint(endpoint: Endpoint, trained_length: int | None = None) -> dict[str, Any]:
    """Return what records say of a model behind a server; the address is one without secrets."""
    parts = "\n".join((endpoint.kind, endpoint.model, endpoint.address))
    return {
        "path": endpoint.model,
        "fingerprint": hashlib.sha256(parts.encode()).hexdigest()[:16],
        "rope": {},
        "trained_length": trained_length,
        "backend": endpoint.kind,
        "address": endpoint.address,
        **({"extra": dict(endpoint.extra)} if endpoint.extra else {}),
    }


def _no_scores(found: str) -> ArgumentError:
    return ArgumentError(
        "this endpoint does not say how likely given tokens are",
        found=found,
        allowed="kind completions with `echo` and `logprobs`, as vLLM has them",
        fix="let the model generate its answers instead of measuring given ones",
    )
