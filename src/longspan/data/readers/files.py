"""Finding input files: folders, globs, lists, addresses; their formats; the source that a place suggests."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath

from longspan.core.errors import DataError
from longspan.core.log import printable
from longspan.data.readers.base import InputFile, Reader, ReadReport, extension_of
from longspan.data.readers.folders import Entry, leave_out_cards, resolve_folders
from longspan.data.readers.hub import SCHEME as HUB
from longspan.data.readers.hub import expand_hub
from longspan.data.readers.opening import (
    COMPRESSION,
    is_remote,
    listing,
    open_input,
    open_raw,
    remote_filesystem,
)
from longspan.data.readers.sniff import sniff, sniff_json
from longspan.data.readers.walking import expand_local

_SHARD_NUMBER = re.compile(r"-\d{5}-of-\d{5}$")
_AS_TEXT = "give a text of another ending one of these (a copy, or a link: notes.txt for NOTES)"
_SPLITS = {"train", "validation", "valid", "test", "data"}


def find_files(
    inputs: Sequence[str | os.PathLike[str]], *, readers: Mapping[str, Reader], report: ReadReport
) -> list[InputFile]:
    """Return the files under `inputs` in canonical order (sorted by path, each once); files of a folder that
    no reader knows are counted in `report`.

    An input is a file, a folder (searched in depth, hidden entries left out), a glob pattern, an address,
    a data set on the hub (`hf://org/name`), or `@list.txt`: a file with one input a line, relative to its own
    folder, `#` for comments. The format is that of the extension, or of the content where the extension
    says nothing. MDS folders and data sets saved by Hugging Face `datasets` are recognised at any depth.

    The source a file's place suggests is the first folder below the input folder; else, directly in that
    folder, the folder's name for a text file and the stem for a file of records; the stem of a file named
    alone; the name of a saved or hub data set.

    Raises:
        DataError: an input is missing or of unknown kind, or nothing is left to read.
    """
    found: dict[str, InputFile] = {}
    reals: dict[str, str] = {}
    for given in _expand_lists([os.fspath(each) for each in inputs]):
        known = []
        for entry in _expand(given, readers, report):
            extension = entry.extension or _format_of(entry, readers)
            if extension is not None:
                known.append((entry, extension))
            elif entry.root is None:
                raise DataError(
                    f"no reader for {entry.path}",
                    found=f"extension {extension_of(entry.path)!r}",
                    allowed=[*readers, "and those of text with " + " ".join(COMPRESSION)],
                    fix=_AS_TEXT,
                )
            else:
                report.ignore(entry.path)
        for entry, extension in leave_out_cards(known, readers, report):
            source, name = _place_of(entry, readers[extension], extension)
            file = InputFile(entry.path, extension, printable(source), entry.size, name)
            _add(file, entry.real or entry.path, found, reals, report)
    if not found:
        raise DataError(
            f"no input files under {', '.join(map(str, inputs))}",
            found=report.warning() or "nothing",
            allowed=list(readers),
            fix=_AS_TEXT if report.ignored_files else None,
        )
    return [found[path] for path in sorted(found)]


def _add(
    file: InputFile, real: str, found: dict[str, InputFile], reals: dict[str, str], report: ReadReport
) -> None:
    """Add a file, once: of a file and links to it the file stays, or else the first in order."""
    other = reals.get(real)
    if other is None:
        found[file.path], reals[real] = file, file.path
        return
    if other == file.path:
        report.skip("duplicate_files", file.path, "given twice")
        return
    kept, left = sorted((other, file.path), key=lambda path: (path != real, path))
    report.skip("duplicate_files", left, f"the same file as {kept}")
    if kept == file.path:
        del found[other]
        found[kept], reals[real] = file, kept


def _expand_lists(inputs: list[str], seen: tuple[str, ...] = ()) -> Iterator[str]:
    """Replace `@list.txt` by the lines of the list."""
    for given in inputs:
        if not given.startswith("@"):
            yield given
            continue
        path = given[1:]
        if path in seen:
            raise DataError(f"the list {path} names itself", found=" -> ".join([*seen, path]))
        with open_input(path) as stream:
            # Names that are not UTF-8 stay what they are; no other character than a line feed ends a line.
            text = stream.read().decode("utf-8-sig", "surrogateescape")
        if "\0" in text:
            raise DataError(f"the list {path} is not text", found="a zero byte")
        lines = text.split("\n")
        entries = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        yield from _expand_lists([_beside(path, entry) for entry in entries], (*seen, path))


def _beside(path: str, entry: str) -> str:
    """Return an entry of a list as seen from where the list stands."""
    mark = "@" * entry.startswith("@")
    entry = entry.removeprefix("@")
    if is_remote(entry) or os.path.isabs(entry):
        return mark + entry
    if is_remote(path):
        return f"{mark}{path.rpartition('/')[0]}/{entry}"
    return mark + os.path.join(os.path.dirname(path), entry)


def _expand(given: str, readers: Mapping[str, Reader], report: ReadReport) -> Iterator[Entry]:
    if given.startswith(HUB):
        entries = expand_hub(given, is_data=lambda path: _is_container(path, readers))
    else:
        entries = list(_expand_remote(given) if is_remote(given) else expand_local(given, report))
    yield from (entry for entry in entries if entry.root is None)
    yield from resolve_folders((entry for entry in entries if entry.root is not None), report)


def _expand_remote(given: str) -> Iterator[Entry]:
    filesystem, path = remote_filesystem(given)
    with listing(given):
        if glob.has_magic(path):
            infos = list(filesystem.glob(path, detail=True).values())
        elif given.endswith("/"):
            # A web server does not say what is a folder: there it is what ends in a slash.
            infos = [{"name": path, "type": "directory"}]
        else:
            infos = [filesystem.info(path)]
        for info in infos:
            address = filesystem.unstrip_protocol(info["name"]).rstrip("/")
            if info["type"] != "directory":
                yield Entry(address, int(info.get("size") or 0))
                continue
            for inner in filesystem.find(info["name"], detail=True).values():
                name = filesystem.unstrip_protocol(inner["name"])
                # A page may link to other places, and to itself in another order ("?C=N").
                if name.startswith(address + "/") and "?" not in name and not _is_hidden(name, address):
                    yield Entry(name, int(inner.get("size") or 0), address)


def _is_hidden(path: str, root: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(path).relative_to(root).parts)


def _is_container(path: str, readers: Mapping[str, Reader]) -> bool:
    extension = extension_of(path)
    return extension in readers and not readers[extension].one_text


def _format_of(entry: Entry, readers: Mapping[str, Reader]) -> str | None:
    """Return the extension whose reader reads the file, by its name or else by its content."""
    extension = extension_of(entry.path)
    compressed = PurePosixPath(entry.path).suffix.lower() in COMPRESSION
    if extension == ".json":
        return sniff_json(entry.path)
    if extension == ".mds":
        return None  # a folder with an index is read, a shard alone is not
    if extension in readers:
        return extension if readers[extension].compressible or not compressed else None
    # Asking every unknown file of a remote folder would cost a request each.
    if entry.root is not None and extension and is_remote(entry.path):
        return None
    return sniff(entry.path, json_too=entry.root is None or not extension)


def _place_of(entry: Entry, reader: Reader, extension: str) -> tuple[str, str]:
    """Return the source and the path below the input folder."""
    name = PurePosixPath(entry.path).name
    stem = name[: name.lower().rfind(extension)] if extension in name.lower() else name.partition(".")[0]
    stem = _SHARD_NUMBER.sub("", stem) or name
    if entry.root is None:
        return stem, name
    root = PurePosixPath(entry.root)
    path = PurePosixPath(entry.path)
    below = path.relative_to(root) if path.is_relative_to(root) else PurePosixPath(name)
    if entry.home is not None:
        home = PurePosixPath(entry.home)
        inside = home.parts[len(root.parts) :]
        return (inside[0] if inside else home.name), str(below)
    if len(below.parts) > 1:
        return below.parts[0], str(below)
    return (root.name if reader.one_text or stem in _SPLITS else stem), str(below)


__all__ = ["COMPRESSION", "find_files", "open_input", "open_raw"]
