"""Finding and opening input files: folders, globs, remote addresses, compression by extension."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import IO, Any

from longspan.core.errors import DataError
from longspan.data.readers.base import InputFile


def _open_zstd(stream: IO[bytes]) -> IO[bytes]:
    import zstandard

    return _ZstdFrames(zstandard.ZstdDecompressor(), stream)


def _open_gzip(stream: IO[bytes]) -> IO[bytes]:
    return gzip.GzipFile(fileobj=stream, mode="rb")  # type: ignore[return-value]


def _open_bz2(stream: IO[bytes]) -> IO[bytes]:
    return bz2.BZ2File(stream, "rb")


COMPRESSION: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
    ".gz": _open_gzip,
    ".zst": _open_zstd,
    ".zstd": _open_zstd,
    ".bz2": _open_bz2,
}


class _ZstdFrames(io.BufferedReader):
    """Reads concatenated frames; a frame cut short is an error, where zstandard's own reader just ends."""

    def __init__(self, decompressor: Any, stream: IO[bytes]) -> None:
        super().__init__(_ZstdRaw(decompressor, stream), buffer_size=1 << 20)


class _ZstdRaw(io.RawIOBase):
    def __init__(self, decompressor: Any, stream: IO[bytes]) -> None:
        self._decompressor, self._stream = decompressor, stream
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input:
                self._input = self._stream.read(1 << 17)
                if not self._input:
                    if self._frame is not None:
                        raise EOFError("the file ends inside a zstd frame")
                    return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._output = memoryview(self._frame.decompress(self._input))
            self._input = b""
            if self._frame.eof:
                self._input = self._frame.unused_data
                self._frame = None
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


@contextmanager
def open_input(path: str) -> Iterator[IO[bytes]]:
    """Open a local or remote file for reading, decompressed.

    Raises:
        DataError: the file cannot be opened, or its compressed stream is damaged or cut short.
    """
    import zstandard

    try:
        with open_raw(path) as raw:
            opener = COMPRESSION.get(PurePosixPath(path).suffix.lower())
            yield opener(raw) if opener else raw
    except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
        # An OSError without a number comes from gzip and bz2, not from the system.
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"cannot read {path}", found=error.strerror) from None
        raise DataError(
            f"{path} is a damaged or cut-off compressed file", found=str(error), fix="fetch it again"
        ) from None


def open_raw(path: str) -> Any:
    """Open the bytes of a local or remote file as they are on disk."""
    if "://" in path:
        import fsspec

        return fsspec.open(path, "rb").open()
    return open(path, "rb")


def extension_of(path: str) -> str:
    """Return the extension that names the format: ".jsonl" for "a.jsonl.zst"."""
    pure = PurePosixPath(path)
    if pure.suffix.lower() in COMPRESSION:
        pure = pure.with_suffix("")
    return pure.suffix.lower()


def find_files(
    inputs: Sequence[str | os.PathLike[str]], *, extensions: Sequence[str]
) -> tuple[list[InputFile], int]:
    """Return the files under `inputs` in canonical order (sorted by path, each once) and how many were
    ignored.

    An input is a file, a folder (searched in depth, hidden entries left out), a glob pattern or a remote
    address. The source a file's place suggests is the first folder below the input folder; else, directly in
    that folder, the folder's name for a text file and the stem for a JSON-lines file; the stem of a file
    named alone.

    Raises:
        DataError: an input is missing or of unknown kind, or nothing is left to read.
    """
    found: dict[str, InputFile] = {}
    ignored = 0
    for given in [os.fspath(each) for each in inputs]:
        for root, path, size in _expand(given):
            extension = extension_of(path)
            if extension in extensions:
                found.setdefault(path, InputFile(path, extension, _source_of(path, root, extension), size))
            elif root is None:
                raise DataError(
                    f"no reader for {path}",
                    found=f"extension {extension!r}",
                    allowed=[*extensions, "and any of these with " + " ".join(COMPRESSION)],
                )
            else:
                ignored += 1
    if not found:
        raise DataError(
            "no input files",
            found=f"{ignored} files of unknown kind under {', '.join(map(str, inputs))}",
            allowed=extensions,
        )
    return [found[path] for path in sorted(found)], ignored


def _expand(given: str) -> Iterator[tuple[str | None, str, int]]:
    """Yield (input folder or None, canonical path, bytes)."""
    if "://" in given:
        yield from _expand_remote(given)
    elif os.path.isdir(given):
        root = os.path.abspath(given)
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                path = os.path.join(folder, name)
                if not name.startswith(".") and os.path.isfile(path):
                    yield root, path, os.path.getsize(path)
    elif os.path.isfile(given):
        yield None, os.path.abspath(given), os.path.getsize(given)
    elif glob.has_magic(given):
        matches = [path for path in glob.glob(given, recursive=True) if os.path.isfile(path)]
        if not matches:
            raise DataError(f"the pattern {given!r} matches no file")
        for path in matches:
            yield None, os.path.abspath(path), os.path.getsize(path)
    else:
        raise DataError(f"{given} does not exist", fix="give a file, a folder, a glob pattern or an address")


def _expand_remote(given: str) -> Iterator[tuple[str | None, str, int]]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(given)
        names = filesystem.glob(path) if glob.has_magic(path) else [path]
        for name in names:
            if filesystem.isdir(name):
                root = filesystem.unstrip_protocol(name)
                for inner in filesystem.find(name):
                    yield root, filesystem.unstrip_protocol(inner), filesystem.size(inner) or 0
            else:
                yield None, filesystem.unstrip_protocol(name), filesystem.size(name) or 0
    except (OSError, ImportError, ValueError) as error:
        raise DataError(f"cannot list {given}", found=str(error)) from None


def _source_of(path: str, root: str | None, extension: str) -> str:
    name = PurePosixPath(path).name
    stem = name[: name.lower().rfind(extension)] or name
    if root is None:
        return stem
    below = PurePosixPath(path).relative_to(root).parts
    if len(below) > 1:
        return below[0]
    return stem if extension == ".jsonl" else PurePosixPath(root).name
