"""What a protocol has to give: bodies to send, and answers read out of what comes back, whole or as a stream."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

from longspan.api.endpoint import Endpoint
from longspan.api.messages import ChatRequest, ParsedAnswer


class MalformedError(Exception):
    """The server's answer is not what its protocol promises; asking again may help."""


class ErrorInBodyError(Exception):
    """The server reports an error inside an answer that began as a success."""

    def __init__(self, error: Any) -> None:
        super().__init__("error in the body")
        self.error = error


class StreamReader(Protocol):
    """Puts a streamed answer together."""

    def feed(self, event: str) -> str:
        """Take the data of one event; return the text that it adds to the answer.

        Raises:
            MalformedError: the event is not what the protocol promises.
            ErrorInBodyError: the server gives up.
        """

    def finish(self) -> ParsedAnswer | None:
        """Return the whole answer after the last event; None: the stream broke off before its end."""


class WireProtocol(Protocol):
    """How requests and answers are written on the wire."""

    stream_fields: Mapping[str, Any]
    """What is added to a body to have the answer streamed."""

    def body(self, endpoint: Endpoint, request: ChatRequest) -> dict[str, Any]:
        """Return the JSON body. Raises ArgumentError: this protocol cannot ask that."""

    def read(self, payload: Any, request: ChatRequest) -> ParsedAnswer:
        """Read an answer. Raises MalformedError, ErrorInBodyError."""

    def stream_reader(self) -> StreamReader:
        """Return a reader for one streamed answer."""


def with_extra(body: Mapping[str, Any], endpoint: Endpoint, request: ChatRequest) -> dict[str, Any]:
    """Return a body with the further fields of endpoint and request; one that is None there is left out."""
    merged = {**body, **endpoint.extra, **request.extra}
    return {name: value for name, value in merged.items() if value is not None}


def parse_json(text: str | bytes) -> Any:
    """Parse what a server sent. Raises MalformedError, also for what is nested too deeply."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise MalformedError("not JSON") from None


def member(value: Any, name: str, kind: type) -> Any:
    """Return `value[name]`, None where it is missing or null. Raises MalformedError: it is of another kind."""
    if not isinstance(value, Mapping):
        raise MalformedError(f"an object with {name!r} was expected")
    found = value.get(name)
    if found is not None and not isinstance(found, kind):
        raise MalformedError(f"{name!r} is of the wrong kind")
    return found


def count(value: Any, name: str) -> int:
    """Return a count out of an object of usage; missing is 0. Raises MalformedError."""
    found = member(value, name, int)
    return max(0, found or 0)
