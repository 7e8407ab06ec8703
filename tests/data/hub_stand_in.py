"""A folder that stands for the hub: what is at <folder>/datasets/org/name is hf://org/name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import HfFileSystem


@contextmanager
def hub_at(folder: Path) -> Iterator[Path]:
    """Answer hf:// addresses from a folder."""

    class Hub(DirFileSystem):
        protocol = "hf"
        cachable = False

        def __init__(self, **options: Any) -> None:
            super().__init__(str(folder), LocalFileSystem())

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return path.removeprefix("hf://").strip("/")

    fsspec.register_implementation("hf", Hub, clobber=True)
    try:
        yield folder
    finally:
        fsspec.register_implementation("hf", HfFileSystem, clobber=True)
