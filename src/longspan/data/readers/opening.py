"""Opening files: local or by address, decompressed by their ending or by their first bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import IO, Any

from longspan.core.errors import DataError, MissingDependencyError

BUFFER_BYTES = 1 << 20
MAX_WINDOW_BYTES = 1 << 31


def _open_zstd(stream: IO[bytes]) -> IO[bytes]:
    import zstandard

    # Windows of up to 2 GiB, as `zstd --long=31` writes them: the file itself says how much memory it takes.
    frames = _ZstdFrames(zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES), stream)
    return io.BufferedReader(frames, BUFFER_BYTES)


def _open_gzip(stream: IO[bytes]) -> IO[bytes]:
    return io.BufferedReader(gzip.GzipFile(fileobj=stream, mode="rb"), BUFFER_BYTES)


def _open_bz2(stream: IO[bytes]) -> IO[bytes]:
    return bz2.BZ2File(stream, "rb")


Opener = Callable[[IO[bytes]], IO[bytes]]

COMPRESSION: dict[str, Opener] = {
    ".gz": _open_gzip,
    ".zst": _open_zstd,
    ".zstd": _open_zstd,
    ".bz2": _open_bz2,
}
_MAGIC: dict[bytes, Opener] = {
    b"\x1f\x8b\x08": _open_gzip,
    b"\x28\xb5\x2f\xfd": _open_zstd,
    **{b"BZh%d1AY&SY" % level: _open_bz2 for level in range(1, 10)},
}
MAGIC_BYTES = 16
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
_NETWORK_LIBRARIES = {
    "aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "httpcore", "httpx", "httpx2", "huggingface_hub",
    "requests", "urllib3",
}  # fmt: skip


class _ZstdFrames(io.RawIOBase):
    """Reads concatenated frames; a frame cut short is an error, where zstandard's own reader just ends."""

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


def is_remote(path: str) -> bool:
    """Whether `path` is an address ("s3://..."), which fsspec opens."""
    return "://" in path


def opener_of(path: str, head: bytes) -> Opener | None:
    """Return what decompresses the file, by its first bytes or else its ending; None: it is not compressed."""
    opener = next((opener for magic, opener in _MAGIC.items() if head.startswith(magic)), None)
    return opener or COMPRESSION.get(PurePosixPath(path).suffix.lower())


def is_compressed(path: str) -> bool:
    """Whether the file is compressed; reads its first bytes if its ending does not say so."""
    if PurePosixPath(path).suffix.lower() in COMPRESSION:
        return True
    with reading(path), open_raw(path) as raw:
        return opener_of(path, raw.read(MAGIC_BYTES)) is not None


def is_network_error(error: BaseException) -> bool:
    """Whether an exception was raised by a library that talks to a server; few of them are OSErrors."""
    return any(kind.__module__.partition(".")[0] in _NETWORK_LIBRARIES for kind in type(error).__mro__)


def remote_filesystem(address: str, **options: Any) -> tuple[Any, str]:
    """Return the fsspec file system of an address, and the address as a path in it.

    Raises:
        MissingDependencyError: the package for this kind of address is not installed.
        DataError: no such kind of address, or settings that it does not know.
    """
    import fsspec

    scheme = address.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(address, **options)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        fix = f"pip install 'longspan[{extra}]'" if extra else str(error)
        raise MissingDependencyError(
            f"reading {scheme}:// needs a package that is not there", fix=fix
        ) from None
    except (ValueError, TypeError, OSError) as error:
        raise DataError(f"cannot open {address}", found=str(error)) from None


class DamagedFileError(DataError):
    """A file that cannot be read on from some place, whatever is read from it: it is left out and counted."""


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what goes wrong while reading bytes into a DataError that names the file."""
    import zstandard

    try:
        yield
    except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
        # An OSError without a number comes from gzip and bz2, not from the system.
        if isinstance(error, OSError) and (error.errno is not None or is_network_error(error)):
            raise DataError(f"cannot read {path}", found=error.strerror or str(error)) from None
        if isinstance(error, FileNotFoundError):
            raise DataError(f"cannot read {path}", found="no such file") from None
        raise DamagedFileError(
            f"{path} is a damaged or cut-off compressed file", found=str(error), fix="fetch it again"
        ) from None
    except Exception as error:
        if not is_network_error(error):
            raise
        raise DataError(f"cannot read {path}", found=f"{type(error).__name__}: {error}") from None


@contextmanager
def listing(address: str) -> Iterator[None]:
    """Turn what goes wrong while asking what is at an address into a DataError that names it."""
    try:
        yield
    except Exception as error:
        if not (isinstance(error, (OSError, NotImplementedError)) or is_network_error(error)):
            raise
        found = f"{type(error).__name__}: {error}"
        raise DataError(f"cannot list {address}", found=found) from None


@contextmanager
def open_input(path: str) -> Iterator[IO[bytes]]:
    """Open a local or remote file for reading, decompressed.

    Raises:
        DataError: the file cannot be opened, or its compressed stream is damaged or cut short.
    """
    with reading(path), open_raw(path) as raw:
        head = raw.read(MAGIC_BYTES)
        raw.seek(0)
        opener = opener_of(path, head)
        yield opener(raw) if opener else raw


def open_raw(path: str) -> Any:
    """Open the bytes of a local or remote file as they are on disk."""
    if is_remote(path):
        from fsspec.spec import AbstractBufferedFile

        filesystem, inside = remote_filesystem(path)
        stream = filesystem.open(inside, "rb")
        # These files read ahead, but have no readline with a limit.
        return io.BufferedReader(stream, BUFFER_BYTES) if isinstance(stream, AbstractBufferedFile) else stream
    return open(path, "rb", buffering=BUFFER_BYTES)
