"""Settings of an audit."""

from __future__ import annotations

import pydantic

from longspan.core.config import Config


class AuditConfig(Config):
    """What is measured of documents, and from where on two of them are the same."""

    similarity: float = pydantic.Field(0.8, ge=0.5, le=0.95)
    """Documents are near duplicates from this Jaccard similarity of their sets of `shingle_tokens` tokens in a row."""
    shingle_tokens: int = pydantic.Field(5, ge=1, le=64)
    """Tokens in a row that are compared as one."""
    boilerplate_documents: int = pydantic.Field(10, ge=2, le=255)
    """A line is boilerplate from so many documents on that have it."""
