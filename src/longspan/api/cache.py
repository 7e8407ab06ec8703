"""Cache of paid answers in one SQLite file: the same request is answered from there.

The key is the SHA-256 of what determines an answer: the address and what the server there says of its model (vLLM: the
path), the protocol, the body (model, messages, every parameter) and the number of the draw. No secret is part of it. A
name such as "model" says little: another server, or another model behind the same address, is asked itself. An answer
is committed as soon as it has come; the write-ahead log survives a kill at any time, and several processes may use one
file.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longspan.api.messages import LogProbs, ParsedAnswer, Usage
from longspan.core.errors import DataError, RunError

_KEY_VERSION = 2
_FORMAT = 2
_BUSY_SECONDS = 60.0


def request_key(server: Sequence[str], kind: str, body: Mapping[str, Any], sample: int) -> str:
    """Return 64 hex characters that identify what is asked; `server` is its address and what it says of itself."""
    content = {"version": _KEY_VERSION, "server": server, "kind": kind, "body": body, "sample": sample}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class AnswerCache:
    """A file of answers by key; used from several threads and processes.

    Raises:
        DataError: the file is something else.
        RunError: the disk refuses.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        with self._errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(
                self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            version = self._database.execute("PRAGMA user_version").fetchone()[0]
            tables = {row[0] for row in self._database.execute("SELECT name FROM sqlite_master")}
            if version not in (0, _FORMAT) or (tables and "answers" not in tables):
                self._database.close()
                raise DataError(
                    f"{self.path} is not a file of answers of this version",
                    fix="choose another file; answers of older versions do not say which server gave them",
                )
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS answers"
                " (key TEXT PRIMARY KEY, model TEXT NOT NULL, created REAL NOT NULL, answer TEXT NOT NULL)"
            )
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS servers"
                " (address TEXT, model TEXT, said TEXT NOT NULL, PRIMARY KEY (address, model))"
            )
            self._database.execute(f"PRAGMA user_version={_FORMAT}")

    def known_server(self, address: str, model: str, said: str | None) -> tuple[str, str | None]:
        """Return what a server says of its model, and what it said before if that was something else.

        One that does not answer, or says nothing, is taken for the one that it was.
        """
        with self._lock, self._errors():
            row = self._database.execute(
                "SELECT said FROM servers WHERE address = ? AND model = ?", (address, model)
            ).fetchone()
            before = None if row is None else str(row[0])
            if said is None:
                return before or "", None
            self._database.execute("INSERT OR REPLACE INTO servers VALUES (?, ?, ?)", (address, model, said))
        return said, before if before != said else None

    def get(self, key: str) -> ParsedAnswer | None:
        """Return a recorded answer."""
        with self._lock, self._errors():
            row = self._database.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
            return _decode(json.loads(row[0])) if row is not None else None

    def put(self, key: str, model: str, reading: ParsedAnswer) -> None:
        """Record an answer; it is on its way to the disk when this returns."""
        answer = json.dumps(reading._asdict())
        with self._lock, self._errors():
            self._database.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", (key, model, time.time(), answer)
            )

    def __len__(self) -> int:
        with self._lock, self._errors():
            return int(self._database.execute("SELECT COUNT(*) FROM answers").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.OperationalError, OSError) as error:
            raise RunError(
                f"the file of answers {self.path} cannot be used",
                found=str(error),
                fix="free space or choose another place; what is recorded is kept",
            ) from error
        except (sqlite3.DatabaseError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.path} is not a file of answers, or it is damaged",
                found=str(error),
                fix="choose another file, or remove this one and pay for its answers again",
            ) from None


def _decode(record: dict[str, Any]) -> ParsedAnswer:
    usage, logprobs = record.pop("usage"), record.pop("logprobs")
    return ParsedAnswer(
        **record,
        usage=Usage(*usage) if usage else None,
        logprobs=LogProbs(tuple(logprobs[0]), tuple(logprobs[1]), *logprobs[2:]) if logprobs else None,
    )
