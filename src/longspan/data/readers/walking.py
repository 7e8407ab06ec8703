"""Walking local folders: links are followed, and what cannot be read is counted."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator

from longspan.core.errors import DataError
from longspan.data.readers.base import ReadReport
from longspan.data.readers.folders import Entry


def expand_local(given: str, report: ReadReport) -> Iterator[Entry]:
    """Yield the files that a path or a pattern on this machine stands for; `report` counts what is left out.

    Raises:
        DataError: there is nothing, or a link to nothing.
    """
    if os.path.isdir(given):
        yield from _walk(os.path.abspath(given), report)
    elif os.path.isfile(given):
        path = os.path.abspath(given)
        yield Entry(path, os.path.getsize(path), real=os.path.realpath(path))
    elif glob.has_magic(given):
        matches = sorted(glob.glob(given, recursive=True))
        if not matches:
            raise DataError(f"the pattern {given!r} matches no file")
        met: set[str] = set()
        for path in matches:
            if os.path.islink(path) and not os.path.exists(path):
                _dead(path, report)
                continue
            for entry in expand_local(path, report):
                # A pattern with ** stands for folders and for what is in them.
                if entry.path not in met:
                    met.add(entry.path)
                    yield entry
    elif os.path.islink(given):
        raise DataError(
            f"{given} is a link to nothing", found=os.readlink(given), fix="mend or remove the link"
        )
    else:
        raise DataError(f"{given} does not exist", fix="give a file, a folder, a glob pattern or an address")


def files_below(folder: str | os.PathLike[str]) -> list[str]:
    """Return the files below a folder, sorted, links followed, each file once; says what of them is left out."""
    report = ReadReport()
    found: dict[str, str] = {}
    for entry in sorted(
        _walk(os.path.abspath(folder), report), key=lambda each: (each.path != each.real, each.path)
    ):
        kept = found.setdefault(entry.real, entry.path)
        if kept != entry.path:
            report.skip("duplicate_files", entry.path, f"the same file as {kept}")
    report.log()
    return sorted(found.values())


def _dead(path: str, report: ReadReport) -> None:
    report.skip("dead_links", path, f"a link to nothing ({os.readlink(path)})")


def _walk(root: str, report: ReadReport) -> Iterator[Entry]:
    """Yield the files below a folder; hidden ones are left out. No folder is read twice, whatever links lead there.

    Real folders come before linked ones, so that a loop is found where it begins.
    """

    def unreadable(error: OSError) -> None:
        report.skip("unreadable", str(error.filename), error.strerror or str(error))

    seen: set[str] = set()
    tops = [root]
    for top in tops:  # grows while it is walked
        real_top = os.path.realpath(top)
        if real_top in seen:
            report.skip("linked_loops", top, f"a link to {real_top}, which is read already")
            continue
        for folder, folders, names in os.walk(top, onerror=unreadable):
            real = real_top + folder[len(top) :]
            if real in seen:
                report.skip("linked_loops", folder, f"leads to {real}, which is read already")
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            tops += [path for name in folders if os.path.islink(path := os.path.join(folder, name))]
            for name in sorted(names):
                if not name.startswith("."):
                    yield from _entry(os.path.join(folder, name), real, root, report)


def _entry(path: str, real_folder: str, root: str, report: ReadReport) -> Iterator[Entry]:
    is_link = os.path.islink(path)
    if not os.path.isfile(path):
        if is_link and not os.path.exists(path):
            _dead(path, report)
        else:
            report.ignore(path)  # a pipe, a device
    elif not os.access(path, os.R_OK):
        report.skip("unreadable", path, "may not be read")
    else:
        real = os.path.realpath(path) if is_link else os.path.join(real_folder, os.path.basename(path))
        yield Entry(path, os.path.getsize(path), root, real=real)
