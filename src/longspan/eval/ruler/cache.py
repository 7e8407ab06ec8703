"""Composed samples on disk, one file each, named by everything that determines it.

    {"ids": 131000, "dtype": "<u2", "prompt": 561034, ...}\\n     what is known of the sample, and sizes in bytes
    token ids, then the prompt's text, both as they are

A file is there whole or not at all. Reading one takes as long as copying its bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from longspan.core.errors import DataError
from longspan.core.files import atomic_write

HEAD_BYTES = 256


class CachedSample(NamedTuple):
    """A composed sample."""

    prompt: str
    prompt_ids: np.ndarray
    """int64 `[prompt]`."""
    details: dict[str, Any]
    """Whatever else is known of it, in JSON values."""


class SampleCache:
    """A folder of composed samples. Several processes may use one."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._buffer = bytearray()  # kept: fresh memory for every file costs more than reading it

    def load(self, key: str) -> CachedSample | None:
        """Return the sample of a key; None where it is not there.

        Raises:
            DataError: its file is not what was written.
        """
        path = self._path(key)
        try:
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size > len(self._buffer):
                    self._buffer = bytearray(2 * size)
                with memoryview(self._buffer) as buffer:
                    size = file.readinto(buffer[:size])
        except FileNotFoundError:
            return None
        try:
            with memoryview(self._buffer) as buffer:
                return _parsed(buffer[:size])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not a cached sample", found=error, fix="remove it") from None

    def save(self, key: str, sample: CachedSample) -> None:
        """Write a sample."""
        ids = sample.prompt_ids
        dtype = np.dtype("<u2" if ids.max(initial=0) < 1 << 16 else "<u4")
        text = sample.prompt.encode("utf-8", "surrogatepass")
        details = orjson.dumps(sample.details)
        head = {"ids": len(ids), "dtype": dtype.str, "prompt": len(text), "details": len(details)}
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(orjson.dumps(head) + b"\n")
            file.write(ids.astype(dtype).tobytes())
            file.write(text)
            file.write(details)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key[2:]}.sample"


def _parsed(content: memoryview) -> CachedSample:
    # The first line is short; nothing else is looked for a line break.
    start = bytes(content[:HEAD_BYTES]).find(b"\n") + 1
    if not start:
        raise ValueError("it does not begin with a line of JSON")
    head = orjson.loads(content[: start - 1])
    ids = np.frombuffer(content, np.dtype(head["dtype"]), head["ids"], start)
    start += ids.nbytes
    if len(content) != start + head["prompt"] + head["details"]:
        raise ValueError(f"{len(content)} bytes")
    prompt = str(content[start : start + head["prompt"]], "utf-8", "surrogatepass")
    details = orjson.loads(content[start + head["prompt"] :])
    return CachedSample(prompt, ids.astype(np.int64), details)


def cache_key(settings: Mapping[str, Any]) -> str:
    """Return 32 hex characters that change with any of the settings."""
    content = orjson.dumps(settings, option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(content).hexdigest()[:32]
