"""An HTTP server on this machine that answers what a test scripts, and remembers what it was asked."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from tests.patience import PATIENCE_SECONDS


class Asked(NamedTuple):
    """One request as it arrived."""

    number: int
    path: str
    headers: Mapping[str, str]
    body: Any
    time: float


class Reply(NamedTuple):
    """What the server sends; `cut` leaves out the end of the body that its length promises."""

    status: int = 200
    body: bytes = b""
    headers: Sequence[tuple[str, str]] = ()
    cut: int = 0
    wait: threading.Event | None = None
    """Nothing is sent before this is set."""
    hang_up: bool = False


def reply_json(payload: Any, status: int = 200, headers: Sequence[tuple[str, str]] = ()) -> Reply:
    return Reply(status, json.dumps(payload).encode(), [("content-type", "application/json"), *headers])


def chat(text: str | None, *, finish: str = "stop", usage: tuple[int, int] | None = (5, 2)) -> Reply:
    """A chat completion."""
    message = {"role": "assistant", "content": text}
    payload: dict[str, Any] = {"choices": [{"index": 0, "message": message, "finish_reason": finish}]}
    if usage is not None:
        payload["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return reply_json(payload)


def error(status: int, message: str = "no", code: str | None = None, **headers: str) -> Reply:
    payload = {"error": {"message": message, "type": "some_error", "code": code}}
    return reply_json(payload, status, [(name.replace("_", "-"), value) for name, value in headers.items()])


def events(*payloads: Any, names: bool = False, done: bool = True, cut: int = 0) -> Reply:
    """Server-sent events; with `names`, the `event:` line that Anthropic writes."""
    lines = []
    for payload in payloads:
        if names:
            lines.append(f"event: {payload['type']}\n")
        lines.append(f"data: {payload if isinstance(payload, str) else json.dumps(payload)}\n\n")
    if done:
        lines.append("data: [DONE]\n\n")
    return Reply(200, "".join(lines).encode(), [("content-type", "text/event-stream")], cut=cut)


def chunk(text: str | None = None, finish: str | None = None, usage: Any = None) -> dict[str, Any]:
    """One chunk of a streamed chat."""
    choices = [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]
    return {"choices": [] if text is None and finish is None else choices, "usage": usage}


class FakeServer:
    """Answers request number n by `script(asked)`, or by the n-th reply of a list (the last one for ever)."""

    def __init__(self, script: Callable[[Asked], Reply] | Sequence[Reply]) -> None:
        self.asked: list[Asked] = []
        self.models: list[dict[str, Any]] | None = None
        """What `/models` lists; None: the server has no such list."""
        self.under_way = self.most_under_way = 0
        self._lock = threading.Lock()
        self._script = script
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Headers and body leave in two segments: without this each answer waits 40 ms for Nagle.
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                outer._answer(self)

            def do_GET(self) -> None:
                outer._list(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients are killed in some tests

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("content-length", 0)))
        headers = {name.lower(): value for name, value in handler.headers.items()}
        with self._lock:
            asked = Asked(len(self.asked), handler.path, headers, json.loads(body), time.monotonic())
            self.asked.append(asked)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            reply = self._reply(asked)
            if reply.wait is not None:
                reply.wait.wait(PATIENCE_SECONDS)
        finally:
            with self._lock:
                self.under_way -= 1
        if reply.hang_up:
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        handler.send_response(reply.status)
        for name, value in reply.headers:
            handler.send_header(name, value)
        handler.send_header("content-length", str(len(reply.body)))
        handler.end_headers()
        handler.wfile.write(reply.body[: len(reply.body) - reply.cut])
        if reply.cut:
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)

    def _list(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer what models there are; this is not counted as asked."""
        body = json.dumps({"object": "list", "data": self.models}).encode()
        handler.send_response(404 if self.models is None else 200)
        handler.send_header("content-length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def _reply(self, asked: Asked) -> Reply:
        if callable(self._script):
            return self._script(asked)
        return self._script[min(asked.number, len(self._script) - 1)]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def serving(script: Callable[[Asked], Reply] | Sequence[Reply]) -> Iterator[FakeServer]:
    """Run a scripted server."""
    server = FakeServer(script)
    try:
        yield server
    finally:
        server.close()
