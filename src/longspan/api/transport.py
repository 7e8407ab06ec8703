"""One attempt over HTTP: a body is posted, and an answer, a reason to ask again or a UserError comes back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from longspan.api.clock import Clock
from longspan.api.endpoint import Endpoint
from longspan.api.events import EventDecoder
from longspan.api.failures import Retry, judge_error_in_body, judge_failure
from longspan.api.messages import ChatRequest, ParsedAnswer
from longspan.api.protocol import ErrorInBodyError, MalformedError, WireProtocol, parse_json
from longspan.api.providers import PROVIDERS
from longspan.core.optional import require

if TYPE_CHECKING:
    import httpx

_MAX_ERROR_BYTES = 1 << 16
_DESCRIBE_SECONDS = 10.0
_SAID = ("id", "root", "parent", "owned_by", "max_model_len", "meta")
"""What tells one model from another in `/models`: vLLM's path, llama.cpp's sizes; not when the list was made."""


class Transport:
    """Posts bodies to one endpoint; lives in one event loop, which `open` and `close` run in too."""

    def __init__(self, endpoint: Endpoint, protocol: WireProtocol, *, connections: int, clock: Clock) -> None:
        """Raises ConfigError: no key; MissingDependencyError: httpx is not installed."""
        self._httpx = require("httpx", extra="api", feature="asking an endpoint")
        self._endpoint, self._protocol, self._clock = endpoint, protocol, clock
        self._connections = connections
        self._key = endpoint.read_key()
        self._client: httpx.AsyncClient | None = None
        # Some servers refuse to be asked for usage in a stream; then it is not asked for again.
        self._stream_fields = dict(protocol.stream_fields)

    async def open(self) -> None:
        """Make the pool of connections."""
        limits = self._httpx.Limits(
            max_connections=self._connections, max_keepalive_connections=self._connections
        )
        # The time of a whole attempt is limited here: a server that drips bytes never lets a read time out.
        self._client = self._httpx.AsyncClient(timeout=None, limits=limits)

    async def close(self) -> None:
        """Close all connections."""
        if self._client is not None:
            await self._client.aclose()

    async def describe(self) -> str | None:
        """Return what the server says of the model behind the name, as JSON; None where it does not say."""
        if not PROVIDERS[self._endpoint.kind].lists_models or self._endpoint.is_azure:
            return None
        assert self._client is not None, "open() comes first"
        try:
            async with asyncio.timeout(min(_DESCRIBE_SECONDS, self._endpoint.timeout)):
                response = await self._client.get(
                    f"{self._endpoint.address}/models", headers=self._endpoint.headers(self._key)
                )
            models = json.loads(response.content)["data"] if response.status_code == 200 else []
            found = next((each for each in models if each["id"] == self._endpoint.model), None)
        except (TimeoutError, self._httpx.HTTPError, ValueError, LookupError, TypeError):
            return None
        if found is None:
            return None
        return json.dumps(
            {name: found[name] for name in _SAID if found.get(name) is not None}, sort_keys=True
        )

    async def ask(self, body: Mapping[str, Any], request: ChatRequest) -> ParsedAnswer | Retry:
        """Post a body and read the whole answer. Raises UserError: no request can succeed."""

        async def attempt(client: httpx.AsyncClient) -> ParsedAnswer | Retry:
            response = await client.post(
                self._endpoint.url, content=_encode(body), headers=self._endpoint.headers(self._key)
            )
            if response.status_code != 200:
                return self._failure(response.status_code, response.headers, response.text)
            return self._protocol.read(parse_json(response.content), request)

        return await self._attempt(attempt)

    async def stream(self, body: Mapping[str, Any], on_text: Callable[[str], None]) -> ParsedAnswer | Retry:
        """Post a body and pass the answer's text on as it comes. Raises UserError: no request can succeed."""

        async def attempt(client: httpx.AsyncClient) -> ParsedAnswer | Retry:
            reader, decoder = self._protocol.stream_reader(), EventDecoder()
            streamed = {**body, **self._stream_fields}
            async with client.stream(
                "POST",
                self._endpoint.url,
                content=_encode(streamed),
                headers=self._endpoint.headers(self._key),
            ) as response:
                if response.status_code != 200:
                    text = (await _read_some(response)).decode("utf-8", "replace")
                    unknown_field = response.status_code in (400, 422) and "stream_options" in text
                    if unknown_field and "stream_options" in streamed:
                        self._stream_fields.pop("stream_options", None)
                        return await attempt(client)
                    return self._failure(response.status_code, response.headers, text)
                async for chunk in response.aiter_bytes():
                    for event in decoder.feed(chunk):
                        if piece := reader.feed(event):
                            on_text(piece)
            return reader.finish() or Retry("truncated", detail="the stream broke off")

        return await self._attempt(attempt)

    async def _attempt(self, attempt: Callable[[httpx.AsyncClient], Any]) -> ParsedAnswer | Retry:
        assert self._client is not None, "open() comes first"
        httpx = self._httpx
        try:
            async with asyncio.timeout(self._endpoint.timeout):
                result: ParsedAnswer | Retry = await attempt(self._client)
                return result
        except TimeoutError:
            return Retry("timeout", detail=f"no whole answer within {self._endpoint.timeout:g} s")
        except MalformedError as error:
            return Retry("malformed", detail=str(error))
        except ErrorInBodyError as error:
            return judge_error_in_body(
                error.error, endpoint=self._endpoint, key=self._key, wall=self._clock.wall()
            )
        except (httpx.RemoteProtocolError, httpx.DecodingError) as error:
            return Retry("truncated", detail=self._say(error))
        except httpx.TransportError as error:
            return Retry("connection", detail=self._say(error))

    def _failure(self, status: int, headers: Mapping[str, str], text: str) -> ParsedAnswer | Retry:
        return judge_failure(
            status, headers, text, endpoint=self._endpoint, key=self._key, wall=self._clock.wall()
        )

    def _say(self, error: Exception) -> str:
        return self._key.scrub(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def _encode(body: Mapping[str, Any]) -> bytes:
    # Half of a surrogate pair has no UTF-8 form; as a JSON escape it can be sent.
    return json.dumps(body).encode()


async def _read_some(response: httpx.Response) -> bytes:
    """Read the beginning of an error's body: it is only quoted."""
    text = b""
    async for chunk in response.aiter_bytes():
        text += chunk
        if len(text) >= _MAX_ERROR_BYTES:
            break
    return text
