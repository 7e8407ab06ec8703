"""Downloading a data set, a model, or everything below an address, so that a stopped download goes on where it was.

    OUT/train-0.parquet                  a whole file, renamed into place
    OUT/.train-1.parquet.1f0c9a2e.part   a file under way; the middle is the version it is a part of
    OUT/.fetch.jsonl                     what is whole so far, with size and version
    OUT/.fetch.json                      the list of all files, written last: the download is complete

A file that is here in the version that is there is not fetched again. A part is continued where the address
tells versions apart (an etag, a checksum, a time of change), else it is begun again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from longspan.core.errors import DataError, LongspanError, RunError
from longspan.core.files import disk_errors, read_json, sha256_file, write_json
from longspan.core.log import get_logger
from longspan.core.progress import Progress, progress
from longspan.core.records import JsonlWriter, read_jsonl
from longspan.core.units import format_bytes
from longspan.data.readers.hub import SCHEME as HUB
from longspan.data.readers.hub import Kind, choose_split, parse_address
from longspan.data.readers.opening import is_network_error, is_remote, listing, remote_filesystem

MANIFEST = ".fetch.json"
JOURNAL = ".fetch.jsonl"
LOCK = ".fetch.lock"
BLOCK_BYTES = 4 << 20
ATTEMPTS = 5
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "md5", "checksum", "blob_id", "LastModified", "mtime", "created")


class RemoteFile(NamedTuple):
    """A file to download."""

    path: str
    """Path in its file system."""
    name: str
    """Path below the output folder."""
    size: int | None
    version: str | None
    """What tells this content from an earlier one; None: the address does not say."""
    sha256: str | None = None


class FetchReport(NamedTuple):
    """What a download did."""

    files: int
    bytes: int
    fetched_files: int
    fetched_bytes: int
    """Bytes that came over the network this time."""


def fetch(
    source: str,
    out: str | os.PathLike[str],
    *,
    kind: Kind = "dataset",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
    num_workers: int = 4,
) -> FetchReport:
    """Download every file below an address into the folder `out`; run again, it goes on where it stopped.

    Args:
        source: `hf://org/name[@revision][/path-or-split]`, or a file or prefix of any address that fsspec opens
            (`s3://`, `gs://`, `https://`), or a local folder (a mounted share).
        out: folder to fill; one that holds another download is refused.
        kind: what `hf://org/name` is on the hub; "model" for models and adapters, which may also be named `org/name`.
        include: only files whose path below the source matches one of these patterns ("*.parquet").
        exclude: none of the files that match one of these.
        storage_options: settings of the file system, such as `{"requester_pays": True}` for S3.
        num_workers: files that are downloaded at once.

    Raises:
        DataError: the address is wrong or empty, a file changed or is damaged, or `out` holds something else.
        RunError: the network or the disk gave up; what is whole stays, and the same call goes on.
    """
    out = Path(out)
    filesystem, files = list_remote(
        source, kind=kind, include=include, exclude=exclude, storage_options=storage_options
    )
    job = {"source": source, "include": sorted(include), "exclude": sorted(exclude), "kind": kind}
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        have = _whole_files(out, job)
        missing = [file for file in files if not _is_here(out, file, have)]
        _check_room(out, missing)
        fetched = 0
        if missing:
            (out / MANIFEST).unlink(missing_ok=True)
            fetched = _download(filesystem, files, missing, out, have, job, num_workers)
        _finish(out, files, job)
    total = sum(os.path.getsize(out / file.name) for file in files)
    return FetchReport(len(files), total, len(missing), fetched)


def list_remote(
    source: str,
    *,
    kind: Kind = "dataset",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
) -> tuple[Any, list[RemoteFile]]:
    """Return the file system of an address and the files below it, sorted by name.

    Raises:
        DataError: nothing is there or matches, or a name leads out of the folder.
        MissingDependencyError: the package for this kind of address is not installed.
    """
    split = ""
    if kind == "model" and not is_remote(source) and not Path(source).exists():
        source = HUB + source
    if source.startswith(HUB):
        address = parse_address(source, kind)
        filesystem, root = remote_filesystem(HUB + address.repo, **dict(storage_options or {}))
        inside = f"{address.repo}/{address.path}".rstrip("/")
        with listing(source):
            if kind == "dataset" and address.path and not filesystem.exists(inside):
                split = address.path
            else:
                root = inside
    else:
        given = source if is_remote(source) else Path(source).absolute().as_uri()
        filesystem, root = remote_filesystem(given, **dict(storage_options or {}))
    with listing(source):
        # A web server does not say what is a folder: there it is what ends in a slash.
        folder = source.endswith("/")
        top = {"name": root, "type": "directory"} if folder else filesystem.info(root)
        single = top["type"] == "file"
        infos = [top] if single else list(filesystem.find(root, detail=True).values())
    root = top["name"].rstrip("/")
    base = (root.rpartition("/")[0] if single else root) + "/"
    # A page may link to other places, and to itself in another order ("?C=N").
    infos = [info for info in infos if info["type"] == "file" and str(info["name"]).startswith(base)]
    infos = [info for info in infos if "?" not in info["name"].removeprefix(base)]
    with listing(source):
        # Of what a page links to, nothing is known yet.
        infos = [info if info.get("size") is not None else filesystem.info(info["name"]) for info in infos]
    files = [_remote_file(info, base) for info in infos]
    files = [file for file in files if not any(part.startswith(".") for part in file.name.split("/"))]
    if split:
        chosen = set(choose_split([file.name for file in files], split))
        files = [file for file in files if file.name in chosen]
    if include:
        files = [file for file in files if any(_matches(file.name, pattern) for pattern in include)]
    files = [file for file in files if not any(_matches(file.name, pattern) for pattern in exclude)]
    if not files:
        patterns = f" that matches {', '.join(include)}" if include else ""
        patterns += f" but not {', '.join(exclude)}" if exclude else ""
        raise DataError(f"there is no file{patterns} at {source}")
    return filesystem, sorted(files, key=lambda file: file.name)


def _remote_file(info: Mapping[str, Any], base: str) -> RemoteFile:
    name = str(info["name"]).removeprefix(base).lstrip("/")
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or "\\" in name or "\0" in name or PurePosixPath(name).is_absolute():
        raise DataError("a name at the source leads out of the folder", found=repr(info["name"]))
    lfs = info.get("lfs")
    sha256 = lfs.get("sha256") if isinstance(lfs, Mapping) else getattr(lfs, "sha256", None)
    versions = [sha256, *(info.get(key) for key in _VERSION_KEYS)]
    version = next((str(each).strip('"') for each in versions if each), None)
    size = info.get("size")
    return RemoteFile(str(info["name"]), name, None if size is None else int(size), version, sha256)


def _matches(name: str, pattern: str) -> bool:
    return fnmatch(name, pattern) or fnmatch(name.rpartition("/")[2], pattern)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    with disk_errors(out), open(out / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another download into {out} is under way", fix="wait for it to end") from None
        try:
            yield
        finally:
            (out / LOCK).unlink(missing_ok=True)


def _whole_files(out: Path, job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what earlier runs of this download have brought, by name.

    Raises:
        DataError: the folder holds something else.
    """
    entries: list[dict[str, Any]] = []
    if (out / MANIFEST).is_file():
        manifest = read_json(out / MANIFEST)
        entries = [manifest, *manifest.get("files", [])] if isinstance(manifest, dict) else [{}]
    elif (out / JOURNAL).is_file():
        entries = list(read_jsonl(out / JOURNAL))
    elif any(path.name != LOCK for path in out.iterdir()):
        raise DataError(f"{out} is not empty and not a download", fix="choose an empty folder with --out")
    before = entries[0] if entries else job
    if {name: before.get(name) for name in job} != job:
        raise DataError(
            f"{out} holds another download",
            found=f"{entries[0].get('source')} {' '.join(entries[0].get('include') or [])}".strip(),
            fix="choose another folder with --out",
        )
    return {entry["name"]: entry for entry in entries[1:] if "name" in entry}


def _is_here(out: Path, file: RemoteFile, have: Mapping[str, Mapping[str, Any]]) -> bool:
    entry = have.get(file.name)
    if entry is None or entry.get("version") != file.version:
        return False
    path = out / file.name
    sizes = {entry.get("bytes"), file.size if file.size is not None else entry.get("bytes")}
    return path.is_file() and sizes == {path.stat().st_size}


def _check_room(out: Path, files: Sequence[RemoteFile]) -> None:
    needed, free = sum(file.size or 0 for file in files), shutil.disk_usage(out).free
    if needed > free:
        raise RunError(
            f"{out} has no room for the download",
            found=f"{format_bytes(free)} free, {format_bytes(needed)} needed",
            fix="free space, or fetch a part of it with --include",
        )


def _download(
    filesystem: Any,
    files: Sequence[RemoteFile],
    missing: Sequence[RemoteFile],
    out: Path,
    have: Mapping[str, dict[str, Any]],
    job: dict[str, Any],
    num_workers: int,
) -> int:
    """Download what is missing; return the bytes that came."""
    here = [file for file in files if file not in set(missing)]
    known = all(file.size is not None for file in files)
    total = sum(file.size or 0 for file in files) if known else None
    fresh = not (out / JOURNAL).exists()
    fetched, failures = 0, []
    with (
        progress("fetch", total=total, unit="bytes", done=sum(file.size or 0 for file in here)) as bar,
        JsonlWriter(out / JOURNAL) as journal,
        ThreadPoolExecutor(num_workers) as pool,
    ):
        if fresh:
            for entry in (job, *have.values()):
                journal.write(entry)
        futures = {pool.submit(_fetch_file, filesystem, file, out, bar): file for file in missing}
        try:
            for future in as_completed(futures):
                file = futures[future]
                try:
                    size, new = future.result()
                except _GaveUpError as error:
                    failures.append((file.name, str(error)))
                    continue
                fetched += new
                journal.write({"name": file.name, "bytes": size, "version": file.version})
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if failures:
        raise RunError(
            f"{len(failures)} of {len(files)} files could not be fetched",
            found="; ".join(f"{name}: {reason}" for name, reason in sorted(failures)[:3]),
            fix="run the same command again: it goes on where it stopped",
        )
    return fetched


class _GaveUpError(Exception):
    """A file that could not be read from its source, after several attempts."""


def _fetch_file(filesystem: Any, file: RemoteFile, out: Path, bar: Progress) -> tuple[int, int]:
    """Bring one file; return its size and the bytes that came."""
    path = out / file.name
    mark = hashlib.sha256(f"{file.version}\0{file.size}".encode()).hexdigest()[:8]
    part = path.with_name(f".{path.name}.{mark}.part")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in path.parent.iterdir():
            # A part of another version, or one that nothing can be compared with, is of no use.
            is_part = other.name.startswith(f".{path.name}.") and other.suffix == ".part"
            if is_part and (other != part or file.version is None):
                other.unlink()
    before = part.stat().st_size if part.exists() else 0
    bar.advance(before)
    _with_patience(lambda: _copy(filesystem, file, part, bar), file)
    size = part.stat().st_size
    if file.size is not None and size != file.size:
        part.unlink()
        raise DataError(
            f"{file.path} changed while it was fetched", found=f"{size} bytes", allowed=f"{file.size}"
        )
    if file.sha256 is not None and sha256_file(part) != file.sha256:
        part.unlink()
        raise DataError(
            f"{file.path} came damaged", found="another SHA-256 than announced", fix="fetch again"
        )
    with disk_errors(path):
        os.replace(part, path)
    return size, size - before


def _copy(filesystem: Any, file: RemoteFile, part: Path, bar: Progress) -> None:
    """Append to the part what is still missing."""
    with disk_errors(part):
        target = open(part, "ab")  # noqa: SIM115 (an error of the network is not one of this disk)
    with target:
        start = target.tell()
        if file.size is not None and start >= file.size:
            return
        with filesystem.open(file.path, "rb") as stream:
            if start:
                stream.seek(start)
            while block := stream.read(BLOCK_BYTES):
                with disk_errors(part):
                    target.write(block)
                bar.advance(len(block))
        with disk_errors(part):
            target.flush()
            os.fsync(target.fileno())


def _with_patience(action: Callable[[], None], file: RemoteFile) -> None:
    """Run an action that reads from the network, several times if it fails, with growing pauses."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except LongspanError:
            raise
        except Exception as error:
            if not (isinstance(error, (OSError, ValueError)) or is_network_error(error)):
                raise
            reason = f"{type(error).__name__}: {error}"
            if attempt == ATTEMPTS or isinstance(error, (FileNotFoundError, PermissionError)):
                raise _GaveUpError(reason) from error
            get_logger("data.fetch").warning("%s: %s; trying again", file.name, reason)
            _pause(2.0**attempt)


def _pause(seconds: float) -> None:
    time.sleep(seconds)


def _finish(out: Path, files: Sequence[RemoteFile], job: dict[str, Any]) -> None:
    """Write the manifest, and remove what only an unfinished download needs."""
    entries = [
        {"name": file.name, "bytes": os.path.getsize(out / file.name), "version": file.version}
        for file in files
    ]
    write_json(out / MANIFEST, {**job, "files": entries})
    with disk_errors(out):
        (out / JOURNAL).unlink(missing_ok=True)
