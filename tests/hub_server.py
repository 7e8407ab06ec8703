"""A stand-in for the hub's interface for uploads: repositories in memory, behind HTTP on this machine."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = (".safetensors", ".gguf")
TOKEN = "hf_standInToken"


class HubServer(ThreadingHTTPServer):
    """Repositories by name: their files and whether they are private; every request that came."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, str]] = []
        """Method, path and the header with the token."""
        self.broken: str | None = None
        """A part of the paths that are answered with an error."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run a hub."""
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        repo = "/".join(self.path.split("?")[0].split("/")[3:5])
        if self._refused():
            return
        if repo not in self.server.files:
            self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in self.path:
            files = self.server.files[repo]
            oids = [
                {"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()
            ]
            self._answer(oids)
        else:
            self._answer({"id": repo, "private": self.server.private[repo], "sha": "0", "siblings": []})

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if self._refused():
            return
        if self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            modes = [
                {
                    **file,
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": modes})
        elif self.path.endswith("/objects/batch"):
            wanted = json.loads(body)["objects"]
            places = [
                {**each, "actions": {"upload": {"href": f"{self.server.address}/put/{each['oid']}"}}}
                for each in wanted
            ]
            self._answer({"objects": places, "transfer": "basic"})
        elif "/commit/" in self.path:
            self._commit("/".join(self.path.split("/")[3:5]), body)
        else:
            self._answer({"error": f"unknown: {self.path}"}, 500)

    def _create(self, asked: dict[str, Any]) -> None:
        name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        there = name in self.server.files
        if not there:
            self.server.files[name] = {".gitattributes": b""}
            self.server.private[name] = bool(asked.get("private") or asked.get("visibility") == "private")
        self._answer({"url": f"{self.server.address}/{name}", "id": name}, 409 if there else 200)

    def _commit(self, repo: str, body: bytes) -> None:
        files = self.server.files[repo]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = {"commitUrl": f"{self.server.address}/{repo}/commit/1", "commitOid": "1", "hookOutput": ""}
        self._answer({"success": True, **commit})

    def _refused(self) -> bool:
        """Note a request; answer with an error that repeats the token where this is wanted."""
        said = self.headers.get("Authorization", "")
        self.server.asked.append((self.command, self.path, said))
        if self.server.broken is None or self.server.broken not in self.path:
            return False
        self._answer({"error": f"no rights to write with {said}"}, 403)
        return True

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, content in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, content)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
