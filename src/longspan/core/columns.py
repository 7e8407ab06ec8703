"""A folder of named numpy columns: `head.json` plus one `.npy` file per column, memory-mapped on reading.

    PLAN/head.json          kind, schema, free head values, dtype and length of every column
    PLAN/documents.npy      little-endian, one dimension

The folder appears whole or not at all. Length tables, mixture plans and pack plans are stored this way.
"""

from __future__ import annotations

import tokenize
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from longspan.core.errors import DataError
from longspan.core.files import atomic_dir, atomic_write, read_json, write_json

SCHEMA = 1
HEAD = "head.json"
# numpy reads the header of a .npy file as a Python literal, and a damaged one fails as such.
NPY_ERRORS = (OSError, ValueError, EOFError, tokenize.TokenError, SyntaxError, TypeError, OverflowError)


def folder_kind(path: str | Path) -> str | None:
    """Return what a folder of columns holds, such as "mixture-plan", or None if it is not such a folder."""
    if not (Path(path) / HEAD).is_file():
        return None
    head = read_json(Path(path) / HEAD)
    return head.get("kind") if isinstance(head, dict) else None


def save_columns(
    path: str | Path, *, kind: str, head: Mapping[str, Any], columns: Mapping[str, np.ndarray]
) -> None:
    """Write the folder aside and rename it to `path`; a folder of the same kind there is replaced.

    Raises:
        DataError: something else already stands at `path`.
    """
    path = Path(path)
    if path.exists() and folder_kind(path) != kind:
        raise DataError(
            f"{path} already exists and is not a {kind}", fix="choose another place or remove it first"
        )
    layout = {name: {"dtype": column.dtype.name, "length": len(column)} for name, column in columns.items()}
    with atomic_dir(path, replace=True) as folder:
        for name, column in columns.items():
            with atomic_write(folder / f"{name}.npy") as file:
                np.save(file, column, allow_pickle=False)
        write_json(folder / HEAD, {"kind": kind, "schema": SCHEMA, "columns": layout, "head": dict(head)})


def load_columns(
    path: str | Path,
    *,
    kind: str,
    dtypes: Mapping[str, DTypeLike],
    optional: Mapping[str, DTypeLike] | None = None,
    mmap: bool = True,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read the head and the columns named in `dtypes`, memory-mapped (no bytes are read until used).

    A column of `optional` is read if the folder has it.

    Raises:
        DataError: a file is missing or truncated, or has another kind, schema, dtype or length than its head.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path} is not a {kind}", found="no such folder")
    content = read_json(path / HEAD)
    found_kind = content.get("kind") if isinstance(content, dict) else None
    if found_kind != kind:
        raise DataError(f"{path} is not a {kind}", found=found_kind)
    if content.get("schema") != SCHEMA:
        raise DataError(
            f"{path} was written by another version", found=f"schema {content.get('schema')}", allowed=SCHEMA
        )
    layout, head = content.get("columns"), content.get("head")
    if isinstance(layout, dict):
        dtypes = {**dtypes, **{name: dtype for name, dtype in (optional or {}).items() if name in layout}}
    if not isinstance(layout, dict) or not isinstance(head, dict) or set(layout) != set(dtypes):
        raise DataError(f"{path / HEAD} does not describe a {kind}", allowed=f"columns {', '.join(dtypes)}")
    columns = {
        name: _load_column(path / f"{name}.npy", layout[name], dtype, mmap) for name, dtype in dtypes.items()
    }
    return head, columns


def _load_column(path: Path, layout: Any, dtype: DTypeLike, mmap: bool) -> np.ndarray:
    length = layout.get("length") if isinstance(layout, dict) else None
    if not path.is_file():
        raise DataError(f"{path} does not exist", fix="the folder is incomplete: make it again")
    try:
        # An empty file cannot be memory-mapped.
        column = np.load(path, mmap_mode="r" if mmap and length else None, allow_pickle=False)
    except NPY_ERRORS as error:
        raise DataError(
            f"{path} cannot be read as a column", found=str(error), fix="make the folder again"
        ) from None
    if column.dtype != np.dtype(dtype) or column.shape != (length,):
        raise DataError(
            f"{path} does not match its head",
            found=f"{column.dtype} {list(column.shape)}",
            allowed=f"{np.dtype(dtype)} [{length}]",
            fix="make the folder again",
        )
    return column
