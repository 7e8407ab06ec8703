"""Finding input files: folders, globs, remote addresses, the source that a file's place suggests."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath

from longspan.core.errors import DataError
from longspan.data.readers.base import InputFile, Reader, ReadReport, extension_of
from longspan.data.readers.opening import COMPRESSION, open_input, open_raw


def find_files(
    inputs: Sequence[str | os.PathLike[str]], *, readers: Mapping[str, Reader], report: ReadReport
) -> list[InputFile]:
    """Return the files under `inputs` in canonical order (sorted by path, each once); files of a folder that
    no reader knows are counted in `report`.

    An input is a file, a folder (searched in depth, hidden entries left out), a glob pattern or a remote
    address. The source a file's place suggests is the first folder below the input folder; else, directly in
    that folder, the folder's name for a text file and the stem for a JSON-lines file; the stem of a file
    named alone.

    Raises:
        DataError: an input is missing or of unknown kind, or nothing is left to read.
    """
    found: dict[str, InputFile] = {}
    for given in [os.fspath(each) for each in inputs]:
        for root, path, size in _expand(given):
            extension = extension_of(path)
            if extension in readers:
                source, name = _source_of(path, root, readers[extension], extension)
                found.setdefault(path, InputFile(path, extension, source, size, name))
            elif root is None:
                raise DataError(
                    f"no reader for {path}",
                    found=f"extension {extension!r}",
                    allowed=[*readers, "and any of these with " + " ".join(COMPRESSION)],
                )
            else:
                report.ignore(path)
    if not found:
        raise DataError(
            "no input files",
            found=f"{report.ignored_files} files of unknown kind under {', '.join(map(str, inputs))}",
            allowed=list(readers),
        )
    return [found[path] for path in sorted(found)]


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


def _source_of(path: str, root: str | None, reader: Reader, extension: str) -> tuple[str, str]:
    """Return the source and the path below the input folder."""
    name = PurePosixPath(path).name
    stem = name[: name.lower().rfind(extension)] or name
    if root is None:
        return stem, name
    below = PurePosixPath(path).relative_to(root)
    if len(below.parts) > 1:
        return below.parts[0], str(below)
    return (PurePosixPath(root).name if reader.one_text else stem), str(below)


__all__ = ["COMPRESSION", "find_files", "open_input", "open_raw"]
