"""OpenAI's protocol, which most servers speak: chat completions, and completions of a plain text.

Besides OpenAI and Azure it is read here as vLLM, llama.cpp, text-generation-inference and `transformers serve`
write it: fields may be missing or null, streams may end without `[DONE]` or without usage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.api.echo import find_shift
from longspan.api.endpoint import Endpoint
from longspan.api.messages import ChatRequest, Finish, LogProbs, ParsedAnswer, Usage
from longspan.api.protocol import (
    ErrorInBodyError,
    MalformedError,
    StreamReader,
    count,
    member,
    parse_json,
    with_extra,
)
from longspan.core.errors import ArgumentError

_MAX_STOPS = 4
_DONE = "[DONE]"
_THOUGHTS = ("reasoning_content", "reasoning")
"""Fields of a message in which servers that part thoughts from the answer give the former."""


class _OpenAI:
    stream_fields: Mapping[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}

    def _common(self, endpoint: Endpoint, request: ChatRequest) -> dict[str, Any]:
        body: dict[str, Any] = {"model": endpoint.model, endpoint.limit_field: request.max_tokens}
        for name in ("temperature", "top_p", "seed"):
            if getattr(request, name) is not None:
                body[name] = getattr(request, name)
        if request.stop:
            body["stop"] = list(request.stop[:_MAX_STOPS])
        return with_extra(body, endpoint, request)


class ChatProtocol(_OpenAI):
    """`/chat/completions`."""

    def body(self, endpoint: Endpoint, request: ChatRequest) -> dict[str, Any]:
        """Return the JSON body. Raises ArgumentError for a prompt of token ids or `scored`."""
        return self._common(endpoint, request) | {"messages": chat_messages(request)}

    def read(self, payload: Any, request: ChatRequest) -> ParsedAnswer:
        """Read an answer. Raises MalformedError, ErrorInBodyError."""
        choice, usage = _first_choice(payload)
        if choice is None:
            return ParsedAnswer("", usage=usage, error="no answer", detail="the answer has no choices")
        message = member(choice, "message", Mapping)
        if message is None:
            raise MalformedError("a choice has no message")
        return _finished(
            _text(message.get("content")),
            member(message, "refusal", str),
            _reason(choice),
            usage,
            thoughts=_thoughts(message),
        )

    def stream_reader(self) -> StreamReader:
        """Return a reader for one streamed answer."""
        return _OpenAIStream("delta", "content")


class CompletionsProtocol(_OpenAI):
    """`/completions`; with `scored`, the prompt comes back with the log-probabilities of its tokens."""

    def body(self, endpoint: Endpoint, request: ChatRequest) -> dict[str, Any]:
        """Return the JSON body. Raises ArgumentError: there is no prompt."""
        prompt = request.prompt
        if prompt is None or request.messages:
            raise ArgumentError(
                "an endpoint of kind completions continues a text",
                found="messages" if request.messages else "no prompt",
                fix="give a prompt, or an endpoint of kind chat",
            )
        body = self._common(endpoint, request)
        body["prompt"] = prompt if isinstance(prompt, str) else [int(token) for token in prompt]
        if request.scored:
            # One new token rather than none, which some servers refuse; it is not looked at.
            body |= {"echo": True, "logprobs": 1, endpoint.limit_field: 1}
        return body

    def read(self, payload: Any, request: ChatRequest) -> ParsedAnswer:
        """Read an answer. Raises MalformedError, ErrorInBodyError."""
        choice, usage = _first_choice(payload)
        if choice is None:
            return ParsedAnswer("", usage=usage, error="no answer", detail="the answer has no choices")
        if request.scored:
            return _scored(choice, request, usage)
        return _finished(member(choice, "text", str), None, _reason(choice), usage)

    def stream_reader(self) -> StreamReader:
        """Return a reader for one streamed answer."""
        return _OpenAIStream(None, "text")


def chat_messages(request: ChatRequest) -> list[dict[str, str]]:
    """Return the messages of a request, its prompt as one of the user. Raises ArgumentError."""
    if request.scored or (request.prompt is not None and not isinstance(request.prompt, str)):
        raise ArgumentError(
            "a chat endpoint takes text and gives text",
            found="a prompt of token ids" if not request.scored else "a request for log-probabilities",
            fix="use an endpoint of kind completions",
        )
    if bool(request.messages) == (request.prompt is not None):
        raise ArgumentError("a request has either messages or a prompt")
    if request.messages:
        return [{"role": message["role"], "content": message["content"]} for message in request.messages]
    return [{"role": "user", "content": str(request.prompt)}]


def _first_choice(payload: Any) -> tuple[Any, Usage | None]:
    if not isinstance(payload, Mapping):
        raise MalformedError("the answer is not an object")
    if payload.get("error"):
        raise ErrorInBodyError(payload["error"])
    if "choices" not in payload:
        raise MalformedError("the answer has no 'choices'")
    choices = member(payload, "choices", list)
    return (choices[0] if choices else None), _usage(payload)


def _usage(payload: Mapping[str, Any]) -> Usage | None:
    usage = member(payload, "usage", Mapping)
    return Usage(count(usage, "prompt_tokens"), count(usage, "completion_tokens")) if usage else None


def _reason(choice: Any) -> str | None:
    return member(choice, "finish_reason", str)


def _text(content: Any) -> str | None:
    """Return the text of a message: a string, or parts of which some are text."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise MalformedError("'content' is of the wrong kind")
    return "".join(member(part, "text", str) or "" for part in content)


def _thoughts(message: Mapping[str, Any]) -> str:
    """Return what a server gives apart as the model's thoughts, by whichever of its names."""
    for name in _THOUGHTS:
        if isinstance(message.get(name), str) and message[name]:
            return str(message[name])
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    texts = [part.get("thinking") for part in parts if isinstance(part, Mapping)]
    return "".join(_text(text) or "" for text in texts if isinstance(text, (str, list)))


def _finished(
    text: str | None, refusal: str | None, reason: str | None, usage: Usage | None, *, thoughts: str = ""
) -> ParsedAnswer:
    if refusal:
        return ParsedAnswer("", usage=usage, error="refused", detail=refusal)
    if reason == "content_filter":
        return ParsedAnswer("", usage=usage, error="refused", detail="content filter")
    finish: Finish = "length" if reason == "length" else "stop"
    if text is None and finish == "stop" and not thoughts:
        return ParsedAnswer("", usage=usage, error="no answer", detail="the answer has no content")
    # A reasoning model may spend all its tokens before it says anything: an empty answer, cut short.
    return ParsedAnswer(text or "", finish, usage, thoughts=thoughts)


def _scored(choice: Any, request: ChatRequest, usage: Usage | None) -> ParsedAnswer:
    """Read the log-probabilities of the last `scored` tokens of the prompt."""
    table = member(choice, "logprobs", Mapping)
    values = member(table, "token_logprobs", list) if table is not None else None
    top = member(table, "top_logprobs", list) if table is not None else None
    prompt = request.prompt if request.prompt is not None else ()
    if isinstance(prompt, str) or not values or len(values) < len(prompt) - 1:
        return ParsedAnswer(
            "", usage=usage, error="rejected", detail="the server gives no log-probabilities of the prompt"
        )
    shift = find_shift(request, values, member(table, "tokens", list))
    if shift is None:
        return ParsedAnswer(
            "",
            usage=usage,
            error="rejected",
            detail="the tokens that the server echoes are not those it was sent",
        )
    stop = len(prompt) + shift
    start = stop - request.scored
    best = []
    for place in range(start, stop):
        entries = top[place] if top and place < len(top) else None
        best.append(max(entries, key=entries.__getitem__) if isinstance(entries, Mapping) and entries else "")
    chosen = values[start:stop]
    if not all(value is None or isinstance(value, (int, float)) for value in chosen):
        raise MalformedError("'token_logprobs' is of the wrong kind")
    return ParsedAnswer("", "stop", usage, logprobs=LogProbs(tuple(chosen), tuple(best), shift))


class _OpenAIStream:
    """Adds up `choices[0]` of the chunks; `part` is where the text stands in it."""

    def __init__(self, part: str | None, field: str) -> None:
        self._part, self._field = part, field
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._refusals: list[str] = []
        self._reason: str | None = None
        self._usage: Usage | None = None
        self._ended = False

    def feed(self, event: str) -> str:
        if event.strip() == _DONE:
            self._ended = True
            return ""
        chunk = parse_json(event)
        if not isinstance(chunk, Mapping):
            raise MalformedError("a chunk of the stream is not an object")
        if chunk.get("error"):
            raise ErrorInBodyError(chunk["error"])
        self._usage = _usage(chunk) or self._usage
        choices = member(chunk, "choices", list)
        if not choices:
            return ""
        self._reason = _reason(choices[0]) or self._reason
        part = member(choices[0], self._part, Mapping) if self._part else choices[0]
        if part is None:
            return ""
        self._refusals.append(member(part, "refusal", str) or "")
        self._thoughts.append(_thoughts(part))
        text = _text(part.get(self._field)) or ""
        self._texts.append(text)
        return text

    def finish(self) -> ParsedAnswer | None:
        if self._reason is None and not self._ended:
            return None
        if not self._texts and self._reason is None:
            return ParsedAnswer("", usage=self._usage, error="no answer", detail="the stream has no choices")
        return _finished(
            "".join(self._texts),
            "".join(self._refusals),
            self._reason,
            self._usage,
            thoughts="".join(self._thoughts),
        )
