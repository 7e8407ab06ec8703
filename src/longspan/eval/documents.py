"""Held-out documents: the texts that evaluations read, never those that training saw."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from longspan.core.errors import DataError


class HeldOutDocument(NamedTuple):
    """A text for evaluation, named by a stable id; `source` groups texts of one kind (code, books, ...)."""

    id: str
    text: str
    source: str = ""


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
    """Return the haystack of those who bring none: the reference prose that comes with every CPython.

    About 460 thousand characters on 79 topics, read on this machine; the exact texts follow the
    interpreter's version and are identified in the header of the records. A model trained on public text
    has seen them, which does not help it to find what was planted.
    """
    from longspan.data.texts.python_corpus import reference_documents

    return [
        HeldOutDocument(document.name, document.text, document.source) for document in reference_documents()
    ]
