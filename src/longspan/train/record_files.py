"""Records as a recipe names them: JSON lines of texts or conversations, whole or so many of them.

    books.jsonl              all records
    redpajama.json[5000]     5000 of them, drawn by the seed from those within the stream's limits
    long-llm:papers.json     below the recipe's data_root, whichever folder the command runs in
    sft.jsonl[:5000]         the first 5000

A record with `messages`, `conversations` or `trajectory` is written out by the chat template and masked, as `longspan
data tokenize` does it; one with `text` is text. The first record with any of them says which a file holds. Each file
becomes a token store in `stores/` below `data_root`, once for each tokenizer and template.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from longspan.core.errors import ArgumentError, ConfigError, DataError
from longspan.core.seeds import rng
from longspan.core.units import parse_count
from longspan.data.chat import ChatFormat, load_chat_format
from longspan.data.chat.chat_config import ChatConfig
from longspan.data.readers import ReadReport, read_objects
from longspan.data.store import TokenStore
from longspan.data.store.lengths import LengthTable
from longspan.data.tokenize import tokenize_corpus
from longspan.data.tokenizer import Tokenizer

__all__ = ["RecordStore", "Records", "draw_records", "parse_records", "record_stores"]

DATA_ROOT_PREFIX = "long-llm:"
CONVERSATIONS = ("messages", "conversations", "trajectory")
"""Fields that hold a conversation; the first of them that a record has."""
_SAMPLED = re.compile(r"(?P<path>.*?)(?:\[(?P<first>:?)(?P<count>[^\[\]]*)\])?", re.DOTALL)


class Records(NamedTuple):
    """One entry of a recipe's `records`."""

    path: str
    limit: int | None
    """Records to take; None = all."""
    first: bool
    """The first ones instead of a draw."""


class RecordStore(NamedTuple):
    """A file's token store and how many of its records are wanted."""

    store: TokenStore
    records: Records


def parse_records(entry: str) -> Records:
    """Return the parts of `path`, `path[5000]` or `path[:5000]`.

    Raises:
        ConfigError: what stands in the brackets is not a positive number.
    """
    match = _SAMPLED.fullmatch(entry)
    assert match is not None, "the pattern takes any text"
    count = match["count"]
    if count is None:
        return Records(match["path"], None, False)
    try:
        limit = parse_count(count)
    except ArgumentError:
        limit = 0
    if limit == 0:
        raise ConfigError(
            "records are sampled by a number in brackets",
            found=entry,
            allowed="such as file.json[5000] (drawn) or file.json[:5000] (the first)",
        )
    return Records(match["path"], limit, match["first"] == ":")


def record_stores(
    entries: Sequence[str],
    *,
    data_root: Path,
    tokenizer: Tokenizer | None,
    template: str | None,
    begin_with_user: bool = False,
    conversations: ChatConfig | None = None,
    opened: dict[Path, TokenStore],
) -> list[RecordStore]:
    """Return the token store of each entry, made now unless it is there; the same file may be named twice.

    Those in `opened` are not opened again, and what is opened goes there.

    Raises:
        ConfigError: a wrong entry, or no tokenizer to make a store with.
        DataError: a file is missing, or its first record is neither a text nor a conversation.
    """
    parsed = [parse_records(entry) for entry in entries]
    if tokenizer is None:
        raise ConfigError("records need a tokenizer", fix="set the recipe's tokenizer")

    def load() -> ChatFormat:
        return load_chat_format(tokenizer, template, begin_with_user=begin_with_user, config=conversations)

    return [
        RecordStore(_store_of(data_root / _plain(each.path), load, tokenizer, data_root, opened), each)
        for each in parsed
    ]


def _plain(path: str) -> str:
    # Only a prefix: a second one further on is part of the name.
    return path.removeprefix(DATA_ROOT_PREFIX)


def _store_of(
    file: Path,
    load: Callable[[], ChatFormat],
    tokenizer: Tokenizer,
    data_root: Path,
    opened: dict[Path, TokenStore],
) -> TokenStore:
    if not file.is_file():
        raise DataError(
            "a file of records is missing", found=str(file), fix="relative paths start at data_root"
        )
    field = _field_of(file)
    chat = load() if field in CONVERSATIONS else None
    identity = [str(file.resolve()), tokenizer.fingerprint, chat.fingerprint if chat else None]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]
    place = data_root / "stores" / f"{file.stem}-{name}"
    if place not in opened:
        opened[place] = tokenize_corpus(
            [str(file)], tokenizer, place, messages_field=field if chat else None, chat=chat
        )
    return opened[place]


def _field_of(file: Path) -> str:
    """Return the field that holds a file's conversations or texts."""
    # One record that is neither ends no job: the store counts it, or says that it has none of its field.
    fields: list[str] | None = None
    for _, record in read_objects(file, report=ReadReport()):
        for field in (*CONVERSATIONS, "text"):
            if record.get(field) is not None:
                return field
        fields = list(map(str, record)) if fields is None else fields
    raise DataError(
        f"{file} holds neither texts nor conversations",
        found="nothing" if fields is None else f"fields {', '.join(fields)}"[:200],
        allowed="JSON lines with `text`, or with conversations in `messages`, `conversations` or `trajectory`",
    )


def draw_records(
    parts: Sequence[RecordStore], lengths: LengthTable, documents: np.ndarray, seed: int
) -> np.ndarray:
    """Return the documents of `documents` that the entries ask for, in their order.

    `lengths` is the table of all parts' stores together. A draw is made from what `documents` holds of a file, so
    that `[5000]` means 5000 usable records.
    """
    chosen = np.zeros(len(documents), bool)
    of_store = lengths.store[documents]
    for number, part in enumerate(parts):
        places = np.flatnonzero(of_store == number)
        count = part.records.limit
        if count is not None and count < len(places):
            if part.records.first:
                places = places[np.argsort(documents[places], kind="stable")][:count]
            else:
                drawn = rng(seed, "records", part.records.path, number)
                places = drawn.choice(places, count, replace=False)
        chosen[places] = True
    return documents[chosen]
