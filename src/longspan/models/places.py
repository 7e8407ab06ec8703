"""Where the files of a model are: in a folder, on the hub, or with the base that an adapter names."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from longspan.core.errors import DataError
from longspan.core.files import read_json
from longspan.core.hub import look_for_hub
from longspan.models.side_files import TOKENIZER_FILES

__all__ = [
    "ADAPTER_FILES",
    "adapter_base",
    "adapter_folder",
    "config_on_hub",
    "has_tokenizer",
    "is_hub_name",
    "tokenizer_folder",
    "tokenizer_home",
]

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
OLD_WEIGHTS = "adapter_model.bin"
"""What peft wrote before it wrote safetensors."""
OWN_FILE = "longspan_adapter.json"
"""What we write beside peft's files."""
_NOT_THERE = (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError)


def adapter_folder(path: str | Path) -> Path | None:
    """Return the local folder of an adapter, fetched from the hub where `path` is a name; None: it is not an adapter.

    None, too, for a name that cannot be had: whoever loads it says so.
    """
    if Path(path).exists():
        return Path(path) if (Path(path) / ADAPTER_FILES[0]).is_file() else None
    return adapter_on_hub(str(path)) if is_hub_name(path) else None


def is_hub_name(path: str | Path) -> bool:
    """Return whether something may be `org/name` on the hub; no request is made."""
    return not Path(path).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)) is not None


@lru_cache
def adapter_on_hub(name: str) -> Path | None:
    """Return what `adapter_folder` does for a hub name; the hub is asked once in a process."""
    cached = huggingface_hub.try_to_load_from_cache(name, ADAPTER_FILES[0])
    if cached is not None and not isinstance(cached, str):
        # Known to have none.
        return None
    look_for_hub()
    try:
        huggingface_hub.hf_hub_download(name, ADAPTER_FILES[0])
        wanted = [*ADAPTER_FILES, OLD_WEIGHTS, OWN_FILE, "config.json", *TOKENIZER_FILES]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except _NOT_THERE:
        return None


def config_on_hub(name: str) -> Path | None:
    """Return the config.json of a model on the hub, fetched where it is not in the cache; None: it cannot be had."""
    if not is_hub_name(name):
        return None
    look_for_hub()
    try:
        return Path(huggingface_hub.hf_hub_download(name, "config.json"))
    except _NOT_THERE:
        return None


def adapter_base(folder: str | Path) -> str:
    """Return the folder or hub name of the model that an adapter was trained beside.

    Raises:
        DataError: the adapter does not say.
    """
    settings = read_json(Path(folder) / ADAPTER_FILES[0])
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not base:
        raise DataError(f"{folder} does not say which model it belongs to", fix="name it with --base")
    return str(base)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a tokenizer lies in a folder."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def tokenizer_home(path: str | Path, *, base: str | None = None) -> str:
    """Return the folder or hub name with the tokenizer of a model: its own, or that of the base of an adapter.

    `base` replaces the one that the adapter names.
    """
    folder = adapter_folder(path)
    return str(path) if folder is None or has_tokenizer(folder) else base or adapter_base(folder)


def tokenizer_folder(path: str | Path) -> Path:
    """Return the local folder with the tokenizer files of a model, fetched from the hub where `path` is a name.

    Raises:
        DataError: neither a folder nor a name that the hub, or its cache here, knows.
    """
    if Path(path).exists():
        return Path(path)
    look_for_hub()
    try:
        return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=list(TOKENIZER_FILES)))
    except _NOT_THERE as error:
        raise DataError(
            f"the tokenizer files of {path} cannot be had",
            found=str(error).strip().splitlines()[0],
            fix="name a local tokenizer folder instead",
        ) from error
