"""Files that torch.save wrote, of which nothing but tensors, numbers, texts and their containers is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from longspan.core.errors import DataError

__all__ = ["read_torch_file"]


def read_torch_file(path: Path) -> Any:
    """Return what a file holds, its tensors mapped from disk: whatever else it names is not run.

    Raises:
        DataError: it cannot be read so.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises what a damaged file makes it raise
        raise DataError(
            f"{path} cannot be read",
            found=str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__,
            allowed="a file of torch.save (1.6 or newer) with tensors and plain values alone",
        ) from error
