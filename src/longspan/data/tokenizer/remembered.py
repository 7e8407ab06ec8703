"""What was found out about tokenizers, remembered between runs in the user's cache folder.

Comparing two libraries costs 0.1 s and more at every start. Each tokenizer has one small file, under
`$XDG_CACHE_HOME/longspan/tokenizers` (`~/.cache` where that is not set), named by the SHA-256 of its files. It
holds for the versions and the processor that it was made with; otherwise all is found out anew. A file that
cannot be read or written is as good as none.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

import longspan
from longspan.core.errors import LongspanError
from longspan.core.files import read_json, sha256_bytes, write_json
from longspan.data.tokenizer.engine import ROLES, FoundOut


def recall(digest: str) -> FoundOut | None:
    """Return what `remember` was given for these files; None: nothing, or by other versions, or damaged."""
    try:
        stored = read_json(_path(digest))
        if stored["versions"] != versions():
            return None
        values = stored["found_out"]
        found = FoundOut(**values | {name: tuple(values[name]) for name in ("special_ids", "notes")})
    except (LongspanError, OSError, RuntimeError, KeyError, TypeError):
        return None
    return found if _is_sound(found) else None


def remember(digest: str, found: FoundOut) -> None:
    """Keep what was found out about the tokenizer whose files have this SHA-256; no error where it cannot be."""
    try:
        write_json(_path(digest), {"versions": versions(), "found_out": found._asdict()})
    except (LongspanError, OSError, RuntimeError):
        return


@cache
def versions() -> str:
    """Return what else decides the findings: libraries, this room's code, the processor."""
    parts = [longspan.__version__, platform.machine(), _processor()]
    for name in ("tokenizers", "gigatoken"):
        try:
            parts.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            parts.append(f"no {name}")
    parts += [file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.glob("*.py"))]
    return sha256_bytes("\0".join(parts).encode())


def _processor() -> str:
    """Return what instructions the processor has: gigatoken runs other code on another."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except (OSError, UnicodeDecodeError):
        return platform.processor()


def _path(digest: str) -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "longspan" / "tokenizers" / f"{digest}.json"


def _is_sound(found: FoundOut) -> bool:
    def number(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    return (
        all(isinstance(text, str) for text in (found.fingerprint, found.backend_reason, *found.notes))
        and number(found.vocab_size)
        and len(found.special_ids) == len(ROLES)
        and all(each is None or number(each) for each in found.special_ids)
        and found.backend in ("gigatoken", "hf")
        and isinstance(found.cuts, bool)
    )
