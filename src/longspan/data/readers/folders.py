"""Folders that are one thing: data sets that Hugging Face `datasets` saved, MDS folders, token stores; and what of a
folder is about its data."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from longspan.core.errors import DataError
from longspan.core.log import get_logger
from longspan.data.readers.base import Reader, ReadReport
from longspan.data.readers.opening import is_remote, open_input
from longspan.data.store.token_store import MANIFEST

_CARD = re.compile(
    r"(readme|licen[cs]e|notice|citation|changelog|datasheet|data(set)?_?card)\b.*", re.IGNORECASE
)
_CARD_KEYS = re.compile(
    rb"^(dataset_info|configs|task_categories|task_ids|size_categories|pretty_name|source_datasets):",
    re.MULTILINE,
)
_CARD_BYTES = 1 << 16


class Entry(NamedTuple):
    """Something to read that was found below an input, before its format is known."""

    path: str
    size: int
    root: str | None = None
    """The input folder; None for a file that was named itself."""
    extension: str | None = None
    """Format, where the folder says it."""
    home: str | None = None
    """Folder of the data set it is a piece of; the source is named after that, not after the piece."""
    real: str = ""
    """Path without links; empty for an address."""


def resolve_folders(entries: Iterable[Entry], report: ReadReport) -> list[Entry]:
    """Replace the files of MDS folders by the folder, and keep of saved data sets only their data.

    Token stores, and rows made of them, are passed over and counted: they hold no text, and one of them may be what
    the job itself made.
    Of a saved DatasetDict the split "train" is read, or its only one; name the folder of a split to read it.
    """
    folders: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        folder, _, name = entry.path.rpartition("/")
        folders.setdefault(folder, {})[name] = entry
    kept: list[Entry] = []
    homes: dict[str, str] = {}
    dropped: set[str] = set()
    for folder, files in sorted(folders.items()):
        if any(folder == each or folder.startswith(each + "/") for each in dropped):
            continue
        shards = _mds_shards(files)
        data_files = _data_files(files)
        if MANIFEST in files:
            dropped.add(folder)
            report.skip("token_stores", folder, "holds tokens, no text")
        elif "dataset_dict.json" in files:
            chosen, others = _split(folder, files["dataset_dict.json"].path)
            homes[chosen] = folder
            dropped.update(others)
        elif shards is not None:
            # Everything else there belongs to the store, and so do the folders that its index names.
            tops = {f"{folder}/{shard.partition('/')[0]}" for shard in shards if "/" in shard}
            dropped |= tops
            inside = [each for each in folders if any(f"{each}/".startswith(f"{top}/") for top in tops)]
            held = [entry for each in (folder, *inside) for entry in folders[each].values()]
            held = [entry for entry in held if not entry.path.endswith("/index.json")]
            size = sum(entry.size for entry in held)
            real = os.path.dirname(next(iter(files.values())).real)
            kept.append(Entry(folder, size, _root_of(files, folder), ".mds", folder, real))
            _warn_of_unnamed(folder, shards, held)
        elif data_files is not None:
            home = homes.get(folder, folder)
            pieces = [files[name] for name in data_files if name in files]
            missing = [name for name in data_files if name not in files]
            if missing:
                raise DataError(f"{folder} is a saved data set without its file {missing[0]}")
            kept += [piece._replace(extension=".arrow", home=home) for piece in pieces]
        else:
            kept += files.values()
    return kept


def leave_out_cards(
    found: list[tuple[Entry, str]], readers: Mapping[str, Reader], report: ReadReport
) -> list[tuple[Entry, str]]:
    """Leave out what is about a data set instead of in it: README, LICENSE and the like, where all else is records.

    Of such a file in the input folder, the whole folder is looked at; of one further below, the first folder below
    the input, which is a source of its own. A README.md whose head has the keys of a Hugging Face data set card is
    left out wherever there are records with it.
    """
    texts: Counter[str] = Counter()
    records: Counter[str] = Counter()
    for entry, extension in found:
        is_text = readers[extension].one_text
        if not (is_text and _CARD.fullmatch(PurePosixPath(entry.path).name)):
            counts = texts if is_text else records
            counts.update({entry.root or "", _unit(entry)})
    kept = []
    for entry, extension in found:
        unit = _unit(entry)
        name = PurePosixPath(entry.path).name
        may_be = readers[extension].one_text and records[unit] and _CARD.fullmatch(name)
        if may_be and (not texts[unit] or (name.lower() == "readme.md" and _has_card_keys(entry))):
            report.skip("cards", entry.path, "about the data set")
        else:
            kept.append((entry, extension))
    return kept


def _unit(entry: Entry) -> str:
    """Return the first folder below the input that holds the file, or the input folder itself."""
    root = entry.root or ""
    below = entry.path.removeprefix(root + "/").split("/")
    return f"{root}/{below[0]}" if len(below) > 1 else root


def _has_card_keys(entry: Entry) -> bool:
    if is_remote(entry.path):
        return False
    with open(entry.path, "rb") as file:
        head = file.read(_CARD_BYTES)
    return head.startswith(b"---") and _CARD_KEYS.search(head.partition(b"\n---")[0]) is not None


def _warn_of_unnamed(folder: str, shards: list[str], held: list[Entry]) -> None:
    """Say which shards no index names: they came after it was merged."""
    named = {f"{folder}/{shard}" for shard in shards}
    unnamed = sorted(entry.path for entry in held if entry.path.endswith(".mds") and entry.path not in named)
    if unnamed:
        get_logger("data.readers").warning(
            "%s: its index does not name %d shards below it, the first %s; they are not read",
            folder,
            len(unnamed),
            unnamed[0],
        )


def _root_of(files: dict[str, Entry], folder: str) -> str:
    return next((entry.root for entry in files.values() if entry.root is not None), folder)


def _mds_shards(files: dict[str, Entry]) -> list[str] | None:
    """Return the names of the shards if the folder is an MDS folder."""
    index = _json(files, "index.json")
    shards = index.get("shards") if isinstance(index, dict) else None
    if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
        return None
    names = [(shard.get("raw_data") or {}).get("basename") for shard in shards]
    is_mds = all(shard.get("format") == "mds" for shard in shards) and "version" in index
    return list(map(str, names)) if is_mds else None


def _data_files(files: dict[str, Entry]) -> list[str] | None:
    """Return the names of the Arrow files if the folder is a saved data set."""
    state = _json(files, "state.json")
    listed = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(listed, list):
        return None
    return [str(each.get("filename")) for each in listed if isinstance(each, dict)]


def _split(folder: str, path: str) -> tuple[str, list[str]]:
    with open_input(path) as stream:
        try:
            splits = [str(each) for each in json.load(stream)["splits"]]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} does not list splits", found=str(error)) from None
    chosen = splits[0] if len(splits) == 1 else "train"
    if chosen not in splits:
        raise DataError(
            f"{folder} holds several splits, none of them called train",
            found=", ".join(splits),
            fix=f"name one: {folder}/{splits[0] if splits else '...'}",
        )
    if len(splits) > 1:
        get_logger("data.readers").info("%s: the split train of %s is read", folder, ", ".join(splits))
    return f"{folder}/{chosen}", [f"{folder}/{each}" for each in splits if each != chosen]


def _json(files: dict[str, Entry], name: str) -> Any:
    if name not in files:
        return None
    try:
        with open_input(files[name].path) as stream:
            return json.load(stream)
    except (ValueError, RecursionError, DataError):
        return None
