"""Parts of tensors in safetensors files: each rank writes its own, any number of ranks reads what it needs.

A tensor is cut along its first dimension, as FSDP2 does. The header of a file says of each part which tensor it
belongs to, at which row it starts and what shape the whole has, so a reader asks for rows and does not know how many
ranks there were. Nothing but tensors and JSON is read: a checkpoint cannot run code.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from longspan.core.errors import DataError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorPart(NamedTuple):
    """Rows `start` to `start + len(tensor)` of a tensor of shape `shape`; a scalar is one part."""

    tensor: torch.Tensor
    shape: tuple[int, ...]
    start: int = 0


class Written(NamedTuple):
    """What a file has to be when it is read again."""

    bytes: int
    sha256: str


def write_parts(path: Path, parts: Mapping[str, TensorPart]) -> Written:
    """Write parts, which are in host memory, to a safetensors file and hand it to the disk.

    Streamed and hashed in one pass, without a second copy in memory. Raises OSError when the disk refuses.
    """
    whole = {name: {"shape": list(part.shape), "start": part.start} for name, part in parts.items()}
    header: dict[str, Any] = {"__metadata__": {"parts": json.dumps(whole)}}
    offset = 0
    for name, part in parts.items():
        size = part.tensor.numel() * part.tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[part.tensor.dtype],
            "shape": list(part.tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    size = 0
    with open(path, "wb") as file:
        blocks: Iterable[Any] = (_bytes(part.tensor) for part in parts.values())
        for block in (len(text).to_bytes(8, "little"), text, *blocks):
            file.write(block)
            digest.update(block)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    return Written(size, digest.hexdigest())


def _bytes(tensor: torch.Tensor) -> Any:
    """Return a buffer of a tensor's values, without a copy."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


class PartFiles:
    """Tensors by name, put together from the parts in several files; only the rows asked for are read.

    Raises:
        DataError: a file is not of this kind.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._parts: dict[str, list[tuple[int, Any]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shape of each whole tensor."""
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
                wholes = json.loads(file.metadata()["parts"])
                for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    self.shapes[name] = tuple(wholes[name]["shape"])
                    self._parts.setdefault(name, []).append((wholes[name]["start"], file))
            except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
                raise DataError(f"{path} does not hold parts of tensors", found=str(error)) from error
        for parts in self._parts.values():
            parts.sort(key=lambda part: part[0])

    def read(self, name: str, start: int = 0, rows: int | None = None) -> torch.Tensor:
        """Return `rows` rows of a tensor from `start`; None = to its end.

        Raises:
            DataError: the tensor or some of its rows are not there.
        """
        if name not in self._parts:
            raise DataError("the checkpoint lacks a tensor", found=name)
        shape = self.shapes[name]
        if not shape:
            return self._parts[name][0][1].get_tensor(name)
        end = shape[0] if rows is None else start + rows
        found = []
        at = start
        for first, file in self._parts[name]:
            part = file.get_slice(name)
            last = first + part.get_shape()[0]
            if first <= at < min(last, end):
                found.append(part[at - first : min(last, end) - first])
                at = min(last, end)
        if at < end:
            raise DataError("the checkpoint lacks a part of a tensor", found=f"{name} from row {at}")
        if not found:
            return self._parts[name][0][1].get_slice(name)[0:0]
        return found[0] if len(found) == 1 else torch.cat(found)

    def read_all(self) -> dict[str, torch.Tensor]:
        """Return all tensors, whole."""
        return {name: self.read(name) for name in self.shapes}
