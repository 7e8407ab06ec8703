"""A cache of the hub filled by hand, with which hub names work offline."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from longspan.models.places import adapter_on_hub

REVISION = "0123456789abcdef0123456789abcdef01234567"


def use_cache(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """Let this process look for hub names in `cache` alone."""
    patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    adapter_on_hub.cache_clear()


def publish(folder: Path, cache: Path, name: str) -> None:
    """Put a folder into the cache under a hub name, as a download leaves it."""
    home = cache / ("models--" + name.replace("/", "--"))
    shutil.copytree(folder, home / "snapshots" / REVISION)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(REVISION)
