"""Arrays and plain values out of pickles, with nothing of what a pickle can call: the columns that CEPE's code writes.

A pickle is a program: it names functions, and reading it calls them. Of those names an array needs four. Here each of
them stands for a record of what it was given, made in plain Python; every other name is refused before it is looked up,
and the array is then made of dtype, shape and bytes that were checked.
"""

from __future__ import annotations

import io
import math
import pickle  # noqa: TID251  for its opcodes; nothing is looked up by name
from collections.abc import Sequence
from typing import Any

import numpy as np

_CORES = ("numpy.core.", "numpy._core.")


class _Told:
    """What a pickle says of an array or a dtype."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _ToldArray(_Told):
    """An array: its state is (version, shape, dtype, in Fortran's order, bytes)."""


class _ToldDtype(_Told):
    """A dtype: its first argument is a code such as "i8", the second part of its state a byte order."""


class _ToldBuffer(_Told):
    """An array by `_frombuffer`: its arguments are bytes, dtype, shape and order."""


class _ToldBytes(_Told):
    """Bytes as old pickles write them: its arguments are a text and "latin1"."""


_NAMES: dict[tuple[str, str], type[_Told]] = {
    ("numpy", "ndarray"): _ToldArray,
    ("numpy", "dtype"): _ToldDtype,
    ("_codecs", "encode"): _ToldBytes,
}
for _core in _CORES:
    _NAMES[_core + "multiarray", "_reconstruct"] = _ToldArray
    _NAMES[_core + "numeric", "_frombuffer"] = _ToldBuffer


# The one in C takes the numbers that a pickle gives its memo for sizes of memory.
class _PickleReader(pickle._Unpickler):
    """Reads a pickle in which names stand for the records above."""

    def find_class(self, module: str, name: str) -> Any:
        found = _NAMES.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it calls {module}.{name}")
        return found


def read_pickled(data: bytes, dtypes: Sequence[np.dtype[Any]]) -> Any:
    """Return the array, number, text or list of these that a pickle holds; no code of it is run.

    Args:
        dtypes: those that an array may have.

    Raises:
        ValueError: it holds anything else, or is damaged.
    """
    try:
        value = _PickleReader(io.BytesIO(data)).load()
        return _made(value, dtypes)
    except ValueError:
        raise
    except Exception as error:  # noqa: BLE001  a damaged pickle may raise anything
        raise ValueError(f"a pickle that is no plain array: {error}") from None


def _made(value: Any, dtypes: Sequence[np.dtype[Any]]) -> Any:
    if isinstance(value, _ToldBuffer):
        data, dtype, shape, order = value.arguments
        return _array(data, dtype, shape, order == "F", dtypes)
    if isinstance(value, _ToldArray):
        _, shape, dtype, fortran, data = value.state
        return _array(data, dtype, shape, fortran, dtypes)
    if isinstance(value, list) and not any(isinstance(each, (list, _Told)) for each in value):
        return [_made(each, dtypes) for each in value]
    if value is None or isinstance(value, (str, bytes, bool, int, float)):
        return value
    raise ValueError(f"a pickle of {type(value).__name__.removeprefix('_Told').lower()}")


def _array(data: Any, dtype: Any, shape: Any, fortran: Any, dtypes: Sequence[np.dtype[Any]]) -> np.ndarray:
    if isinstance(data, _ToldBytes) and data.arguments[1:] == ("latin1",):
        data = str(data.arguments[0]).encode("latin1")
    if not isinstance(dtype, _ToldDtype) or not isinstance(data, (bytes, bytearray)):
        raise ValueError("an array of objects")
    code, order = str(dtype.arguments[0]), dtype.state[1] if dtype.state else "<"
    known = code[:1] in "iuf" and code[1:].isdecimal() and order in ("<", "|", "=")
    kind = np.dtype(f"<{code}") if known else None
    sides = tuple(shape)
    if kind is None or kind not in dtypes or not all(type(side) is int and side >= 0 for side in sides):
        raise ValueError(f"an array of {code} {shape}")
    if math.prod(sides) * kind.itemsize != len(data):
        raise ValueError(f"{kind} {list(sides)} in {len(data)} bytes")
    return np.frombuffer(data, kind).reshape(sides, order="F" if fortran else "C")
