"""Data sets on the Hugging Face hub: `hf://org/name[@revision][/path-or-split]`, read as they stand there."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from longspan.core.errors import ArgumentError, DataError
from longspan.core.log import get_logger
from longspan.data.readers.folders import Entry
from longspan.data.readers.opening import listing, remote_filesystem

SCHEME = "hf://"
Kind = Literal["dataset", "model"]
"""What an address names on the hub."""
_ADDRESS = re.compile(r"(?:datasets/)?([^/@]+)/([^/@]+)(@refs/[^/]+/[^/]+|@[^/]+)?(?:/(.*))?")
_NO_DATA = {"README.md", "dataset_infos.json", "LICENSE.txt"}


class HubAddress(NamedTuple):
    """A parsed `hf://` address."""

    repo: str
    """Path of the repository in the hub's file system, with its revision."""
    path: str
    """What is asked for inside: a file, a folder, a pattern, a split, or nothing."""


def parse_address(given: str, kind: Kind = "dataset") -> HubAddress:
    """Parse `hf://org/name@revision/path`. Raises ArgumentError for anything else."""
    found = _ADDRESS.fullmatch(given.removeprefix(SCHEME).rstrip("/"))
    if found is None:
        raise ArgumentError(
            f"not the address of a {'data set' if kind == 'dataset' else kind} on the hub",
            found=given,
            allowed="hf://org/name, hf://org/name@revision, hf://org/name/path or hf://org/name/split",
        )
    org, name, revision, path = found.groups()
    folder = "datasets/" if kind == "dataset" else ""
    return HubAddress(f"{folder}{org}/{name}{revision or ''}", path or "")


def expand_hub(given: str, *, is_data: Callable[[str], bool]) -> list[Entry]:
    """Return the files of a data set that an address stands for.

    Without a path: the files of the split "train" if there are such, else all data files. A path that is
    neither file, folder nor pattern is a split or configuration: "validation" stands for the files with
    that word between `/ . _ -` in their path.

    Raises:
        DataError: the hub has no such data set, or nothing in it matches.
    """
    address = parse_address(given)
    filesystem, _ = remote_filesystem(SCHEME + address.repo)
    inside = f"{address.repo}/{address.path}"
    with listing(given):
        if address.path and glob.has_magic(address.path):
            return [_entry(info, None) for _, info in sorted(filesystem.glob(inside, detail=True).items())]
        if address.path and filesystem.isfile(inside):
            return [_entry(filesystem.info(inside), None)]
        if address.path and filesystem.isdir(inside):
            return [_entry(info, inside) for info in filesystem.find(inside, detail=True).values()]
        found = filesystem.find(address.repo, detail=True)
    files = [_entry(info, address.repo) for info in found.values()]
    files = [file for file in files if is_data(file.path) and file.path.rpartition("/")[2] not in _NO_DATA]
    # The file system may write a revision otherwise than it was asked for, so paths are parsed, not cut off.
    inside_of = {parse_address(file.path).path: file.path for file in files}
    chosen = choose_split(list(inside_of), address.path)
    if not chosen:
        raise DataError(
            f"nothing to read at {given}",
            found=", ".join(file.path.rpartition("/")[2] for file in files[:5]) or "no data files",
            fix="name a file, a folder or a split of the data set",
        )
    if len(chosen) < len(files):
        get_logger("data.readers").info("%s: %d of %d data files are read", given, len(chosen), len(files))
    keep = {inside_of[path] for path in chosen}
    home = SCHEME + address.repo.partition("@")[0]
    return [file._replace(home=home) for file in files if file.path in keep]


def choose_split(paths: list[str], split: str) -> list[str]:
    """Return the paths inside a data set that belong to a split; with no split those of "train", or all if
    there are none."""
    pattern = re.compile(rf"(?:^|[/._-]){re.escape(split or 'train')}(?:[/._-]|$)")
    chosen = [path for path in paths if pattern.search(path)]
    return chosen if chosen or split else paths


def _entry(info: dict[str, Any], root: str | None) -> Entry:
    size = int(info.get("size") or 0)
    return Entry(SCHEME + info["name"].lstrip("/"), size, None if root is None else SCHEME + root)
