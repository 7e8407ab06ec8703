"""CEPE token files: the documents of one text file as a one-dimensional `.npy` array of int64.

    [n] [length 1 ... length n] [tokens of document 1] ... [tokens of document n]

so [5 6 7] and [8] are `2 3 1 5 6 7 8`. Each document holds its own BOS and EOS. A file without documents is `0`;
CEPE's own writer makes that a float64 array, which is read as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from longspan.core.columns import NPY_ERRORS
from longspan.core.errors import DataError
from longspan.core.files import atomic_write


class CepeFile(NamedTuple):
    """An open token file."""

    path: str
    lengths: NDArray[np.int64]
    """Tokens of each document [documents]."""
    tokens: NDArray[np.int64]
    """All documents' tokens, one after another [tokens]; memory-mapped."""


def read_cepe(path: str | os.PathLike[str]) -> CepeFile:
    """Open a token file; only its lengths are read, the tokens are memory-mapped.

    Raises:
        DataError: the file is missing or damaged, holds something else, or its lengths do not add up.
    """
    try:
        data = np.load(path, mmap_mode="r", allow_pickle=False)
    except NPY_ERRORS as error:
        raise DataError(f"{path} cannot be read as a token file", found=str(error)) from None
    if data.dtype.kind == "f" and data.shape == (1,) and data[0] == 0:
        data = np.zeros(1, np.int64)
    if data.ndim != 1 or data.dtype.kind not in "iu" or not len(data):
        raise DataError(
            f"{path} is not a token file",
            found=f"{data.dtype} {list(data.shape)}",
            allowed="one dimension of integers: [n] [lengths] [tokens]",
        )
    count = int(data[0])
    lengths = np.array(data[1 : 1 + max(count, 0)], np.int64)
    if (
        len(lengths) != count
        or bool(np.any((lengths < 0) | (lengths > len(data))))
        or 1 + count + int(lengths.sum()) != len(data)
    ):
        raise DataError(
            f"{path} is cut off, or is not a token file",
            found=f"{count} documents in an array of {len(data)}",
            fix="tokenize the file again",
        )
    return CepeFile(os.fspath(path), lengths, data[1 + count :])


def write_cepe(
    path: str | os.PathLike[str], lengths: Sequence[int], documents: Iterable[NDArray[np.integer]]
) -> None:
    """Write a token file, whole or not at all, holding one document in memory.

    Args:
        lengths: tokens of each document, in the order of `documents`.
        documents: token ids of each document [tokens].

    Raises:
        DataError: the documents are not as long, or as many, as `lengths` says.
    """
    wanted = np.array(lengths, "<i8")
    total = 1 + len(wanted) + int(wanted.sum())
    with atomic_write(Path(path)) as file:
        header = {"descr": "<i8", "fortran_order": False, "shape": (total,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(np.array([len(wanted)], "<i8").tobytes())
        file.write(wanted.tobytes())
        number = -1
        for number, ids in enumerate(documents):
            if number >= len(wanted) or len(ids) != wanted[number]:
                raise DataError(f"document {number} of {path} has another length", found=len(ids))
            file.write(np.ascontiguousarray(ids, "<i8").data)
        if number + 1 != len(wanted):
            raise DataError(f"too few documents for {path}", found=number + 1, allowed=len(wanted))
