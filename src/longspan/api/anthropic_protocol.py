"""Anthropic's messages: the system prompt stands apart, usage counts cached tokens apart, streams have typed events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.api.endpoint import Endpoint
from longspan.api.messages import ChatRequest, ParsedAnswer, Usage
from longspan.api.openai_protocol import chat_messages
from longspan.api.protocol import (
    ErrorInBodyError,
    MalformedError,
    StreamReader,
    count,
    member,
    parse_json,
    with_extra,
)

# What was written to or read from the provider's prompt cache is not in `input_tokens`.
_INPUT_COUNTS = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
_CUT_SHORT = ("max_tokens", "model_context_window_exceeded")


class AnthropicProtocol:
    """`/messages`."""

    stream_fields: Mapping[str, Any] = {"stream": True}

    def body(self, endpoint: Endpoint, request: ChatRequest) -> dict[str, Any]:
        """Return the JSON body. Raises ArgumentError for a prompt of token ids or `scored`."""
        messages = chat_messages(request)
        system = [message["content"] for message in messages if message["role"] == "system"]
        body: dict[str, Any] = {
            "model": endpoint.model,
            "max_tokens": request.max_tokens,
            "messages": [message for message in messages if message["role"] != "system"],
        }
        if system:
            body["system"] = "\n\n".join(system)
        for name in ("temperature", "top_p"):
            if getattr(request, name) is not None:
                body[name] = getattr(request, name)
        stops = [stop for stop in request.stop if stop.strip()]  # white space alone is refused
        if stops:
            body["stop_sequences"] = stops
        return with_extra(body, endpoint, request)

    def read(self, payload: Any, request: ChatRequest) -> ParsedAnswer:
        """Read an answer. Raises MalformedError, ErrorInBodyError."""
        if isinstance(payload, Mapping) and payload.get("type") == "error":
            raise ErrorInBodyError(payload.get("error"))
        blocks = member(payload, "content", list)
        if blocks is None:
            raise MalformedError("the answer has no 'content'")
        texts = [member(block, "text", str) or "" for block in blocks if member(block, "type", str) == "text"]
        usage = member(payload, "usage", Mapping)
        return _finished(
            "".join(texts) if texts else None,
            member(payload, "stop_reason", str),
            Usage(_input_tokens(usage), count(usage, "output_tokens")) if usage else None,
            thoughts="".join(member(block, "thinking", str) or "" for block in blocks),
        )

    def stream_reader(self) -> StreamReader:
        """Return a reader for one streamed answer."""
        return _AnthropicStream()


def _input_tokens(usage: Mapping[str, Any]) -> int:
    return sum(count(usage, name) for name in _INPUT_COUNTS)


def _finished(
    text: str | None, reason: str | None, usage: Usage | None, *, thoughts: str = ""
) -> ParsedAnswer:
    if reason == "refusal":
        return ParsedAnswer("", usage=usage, error="refused", detail="the model declined")
    if reason in _CUT_SHORT:
        return ParsedAnswer(text or "", "length", usage, thoughts=thoughts)
    if text is None and not thoughts:
        return ParsedAnswer("", usage=usage, error="no answer", detail="the answer has no text")
    return ParsedAnswer(text or "", "stop", usage, thoughts=thoughts)


class _AnthropicStream:
    def __init__(self) -> None:
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._reason: str | None = None
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._ended = False

    def feed(self, event: str) -> str:
        data = parse_json(event)
        kind = member(data, "type", str)
        if kind == "error":
            raise ErrorInBodyError(data.get("error"))
        if kind == "message_start":
            usage = member(member(data, "message", Mapping) or {}, "usage", Mapping) or {}
            self._prompt_tokens = _input_tokens(usage)
        elif kind == "content_block_delta":
            delta = member(data, "delta", Mapping) or {}
            if delta.get("type") == "thinking_delta":
                self._thoughts.append(member(delta, "thinking", str) or "")
            elif delta.get("type") == "text_delta":
                text = member(delta, "text", str) or ""
                self._texts.append(text)
                return text
        elif kind == "message_delta":
            self._reason = member(member(data, "delta", Mapping) or {}, "stop_reason", str)
            self._completion_tokens = count(member(data, "usage", Mapping) or {}, "output_tokens")
        elif kind == "message_stop":
            self._ended = True
        return ""

    def finish(self) -> ParsedAnswer | None:
        if not self._ended:
            return None
        text = "".join(self._texts) if self._texts else None
        return _finished(
            text,
            self._reason,
            Usage(self._prompt_tokens, self._completion_tokens),
            thoughts="".join(self._thoughts),
        )
