"""Held-out documents: the texts that evaluations read, never those that training saw."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pydantic

from longspan.core.config import Config
from longspan.core.errors import ArgumentError, DataError
from longspan.core.files import sha256_bytes
from longspan.data.readers import read_documents


class HeldOutDocument(NamedTuple):
    """A text for evaluation, named by a stable id; `source` groups texts of one kind (code, books, ...)."""

    id: str
    text: str
    source: str = ""


class TaskDataConfig(Config):
    """What a task reads beside its settings; the records name it by its content, not by where it stands."""

    paths: tuple[str, ...] = ()
    """Files, folders, patterns; many times. Default: the task's own."""
    text_field: str = "text"
    """Field of a JSON line that holds the text."""
    source_field: str | None = None
    """Field that names the source of a text. None: the place of the file does."""
    questions: tuple[str, ...] = ()
    """SQuAD's dev-v2.0.json (qa_1), HotpotQA's hotpot_dev_distractor_v1.json (qa_2)."""
    strict: bool = False
    """Stop at the first record that is no question. Default: they are left out and counted."""
    cache: str | None = None
    """Folder of composed samples, which cost the next model nothing. None: in the run folder."""

    @pydantic.field_validator("cache")
    @classmethod
    def _is_a_folder(cls, cache: str | None) -> str | None:
        if cache is not None and Path(cache).is_file():
            raise ValueError(f"{cache} is a file, not a folder")
        return cache

    def named(self, what: str) -> tuple[str, ...]:
        """Return the paths. Raises ArgumentError: none are given, and there is no default for `what`."""
        if not self.paths:
            raise ArgumentError(f"{what} are read from files", fix="name them with --data")
        return self.paths

    def documents(self) -> list[HeldOutDocument]:
        """Return the texts, or the reference prose of Python where none are named. Raises DataError."""
        if not self.paths:
            return default_documents()
        return read_held_out(self.paths, text_field=self.text_field, source_field=self.source_field)


def read_held_out(
    data: Sequence[str], *, text_field: str = "text", source_field: str | None = None
) -> list[HeldOutDocument]:
    """Return the documents, named by their content so that records do not depend on where the files stand.

    They come in the order of their paths, and of their places in a file.
    """
    documents: dict[str, HeldOutDocument] = {}
    for document in read_documents(data, text_field=text_field, source_field=source_field):
        name = sha256_bytes(f"{document.source}\0{document.text}".encode())[:16]
        documents.setdefault(name, HeldOutDocument(name, document.text, document.source))
    return list(documents.values())


def describe_documents(documents: Sequence[HeldOutDocument]) -> dict[str, Any]:
    """Return count and SHA-256 of the documents in their order, for the header of the records.

    Raises:
        DataError: there are no documents, or two share an id.
    """
    if not documents:
        raise DataError("an evaluation needs held-out documents", found="none")
    ids = [document.id for document in documents]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise DataError("two held-out documents have the same id", found=repr(twice))
    digest = hashlib.sha256()
    for document in documents:
        for part in document:
            data = part.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
    return {"count": len(documents), "sha256": digest.hexdigest()}


def default_documents() -> list[HeldOutDocument]:
    """Return the default haystack: the reference prose that comes with every CPython.

    About 460 thousand characters on 79 topics, read on this machine; the exact texts follow the
    interpreter's version and are identified in the header of the records. A model trained on public text
    has seen them, which does not help it to find what was planted.
    """
    from longspan.data.texts.python_corpus import reference_documents

    return [
        HeldOutDocument(document.name, document.text, document.source) for document in reference_documents()
    ]
