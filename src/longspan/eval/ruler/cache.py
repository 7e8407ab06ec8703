"""Composed samples on disk, one file each, named by everything that determines it.

    {"ids": 131000, "dtype": "<u2", "prompt": 561034, ...}\\n     what is known of the sample, and sizes in bytes
    token ids, then the prompt's text, both as they are

A file is there whole or not at all. Reading one takes about as long as copying its bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from longspan.core.errors import DataError
from longspan.core.files import atomic_write


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

    def load(self, key: str) -> CachedSample | None:
        """Return the sample of a key; None where it is not there.

        Raises:
            DataError: its file is not what was written.
        """
        path = self._path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            start = content.index(b"\n") + 1
            head = orjson.loads(content[: start - 1])
            dtype = np.dtype(head["dtype"])
            ids = np.frombuffer(content, dtype, head["ids"], start)
            start += ids.nbytes
            if len(content) != start + head["prompt"]:
                raise ValueError(f"{len(content)} bytes")
            prompt = str(memoryview(content)[start:], "utf-8", "surrogatepass")
            return CachedSample(prompt, ids.astype(np.int64), head["details"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not a cached sample", found=error, fix="remove it") from None

    def save(self, key: str, sample: CachedSample) -> None:
        """Write a sample."""
        ids = sample.prompt_ids
        dtype = np.dtype("<u2" if ids.max(initial=0) < 1 << 16 else "<u4")
        text = sample.prompt.encode("utf-8", "surrogatepass")
        head = {"ids": len(ids), "dtype": dtype.str, "prompt": len(text), "details": sample.details}
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(orjson.dumps(head) + b"\n")
            file.write(ids.astype(dtype).tobytes())
            file.write(text)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key[2:]}.sample"


def cache_key(settings: Mapping[str, Any]) -> str:
    """Return 32 hex characters that change with any of the settings."""
    content = orjson.dumps(settings, option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(content).hexdigest()[:32]
