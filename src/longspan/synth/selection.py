"""Which documents a set is made of: read, filtered, drawn, claimed, and written to one file with their sections.

The input is read twice: first every document is looked at and its hash kept, then the drawn ones are written. Memory
holds one document and 16 bytes for each that passes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longspan.core.files import atomic_write
from longspan.core.progress import progress
from longspan.core.seeds import derive_seed
from longspan.data.readers import Document, ReadReport, read_documents
from longspan.data.tokenizer import Tokenizer
from longspan.synth.claims import UsedDocuments
from longspan.synth.config import SetConfig
from longspan.synth.language import detect_language
from longspan.synth.sections import cut_sections


class Inputs(NamedTuple):
    """What is read."""

    paths: Sequence[str]
    text_field: str = "text"
    source_field: str | None = None

    def read(self, report: ReadReport | None = None) -> Iterator[Document]:
        """Yield the documents in canonical order."""
        return read_documents(
            self.paths, text_field=self.text_field, source_field=self.source_field, report=report
        )


class Selected(NamedTuple):
    """What the file of chosen documents holds."""

    documents: int
    sections: int
    tokens: int
    counts: dict[str, int]
    """Documents by what became of them."""


def content_hash(text: str) -> str:
    """Return 32 hex characters of a text, the same whatever its white space."""
    return hashlib.sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def select_documents(
    inputs: Inputs,
    spec: SetConfig,
    tokenizer: Tokenizer,
    out: Path,
    *,
    seed: int,
    owner: str,
    used: UsedDocuments,
    claim: bool = True,
) -> Selected:
    """Write the documents of a set to `out` (JSON lines), whole or not at all.

    `claim` false: `used` is read, so that what others have is left out, but nothing is written there.

    Raises:
        DataError: an input is missing or of another kind.
        RunError: the disk refuses.
    """
    counts: Counter[str] = Counter()
    report = ReadReport()
    passed = _eligible(inputs, spec, tokenizer, counts, report, owner=owner, used=used)
    chosen = sorted(passed, key=lambda name: derive_seed(seed, "synth", "document", name))[: spec.documents]
    counts["not drawn"] += len(passed) - len(chosen)
    if claim:
        mine = used.claim(chosen, owner)
        counts["used by another set"] += len(chosen) - len(mine)
        chosen = [name for name in chosen if name in mine]
    counts["cannot be read"] += report.num_skipped
    wanted = {name: passed[name] for name in chosen}
    documents = sections = tokens = 0
    with (
        atomic_write(out, "w") as file,
        progress("cut documents", total=len(wanted), unit="documents") as bar,
    ):
        for document in inputs.read():
            name = content_hash(document.text)
            length = wanted.pop(name, None)
            if length is None:
                continue
            record = _record(document, name, length, spec, tokenizer)
            # ASCII: half of a surrogate pair has no other form.
            file.write(json.dumps(record) + "\n")
            documents, tokens = documents + 1, tokens + length
            sections += len(record["sections"])
            bar.advance()
            if not wanted:
                break
    counts["chosen"] = documents
    return Selected(documents, sections, tokens, {name: count for name, count in counts.items() if count})


def _eligible(
    inputs: Inputs,
    spec: SetConfig,
    tokenizer: Tokenizer,
    counts: Counter[str],
    report: ReadReport,
    *,
    owner: str,
    used: UsedDocuments,
) -> dict[str, int]:
    """Return the tokens of every document that passes the filters, by hash."""
    others = {name for name, its in used.owners().items() if its != owner}
    passed: dict[str, int] = {}
    with progress(f"choose documents of {spec.name}", total=None, unit="documents") as bar:
        for document in inputs.read(report):
            counts["read"] += 1
            bar.advance()
            name = content_hash(document.text)
            reason, tokens = _judge(document.text, spec, tokenizer)
            if name in others:
                reason = "used by another set"
            elif name in passed:
                reason = "given twice"
            if reason is not None:
                counts[reason] += 1
            else:
                passed[name] = tokens
    return passed


def _judge(text: str, spec: SetConfig, tokenizer: Tokenizer) -> tuple[str | None, int]:
    """Return why a document is left out (None: it is not) and its tokens."""
    # A token is at least a byte, so most short documents need no tokenizer.
    if 4 * len(text) < spec.min_tokens:
        return "too short", 0
    if spec.language is not None:
        language = detect_language(text)
        if language != spec.language:
            return f"language: {language or 'unknown'}", 0
    tokens = sum(len(piece) for piece in tokenizer.encode_pieces(text))
    if tokens < spec.min_tokens:
        return "too short", tokens
    if spec.max_tokens is not None and tokens > spec.max_tokens:
        return "too long", tokens
    return None, tokens


def _record(
    document: Document, name: str, tokens: int, spec: SetConfig, tokenizer: Tokenizer
) -> dict[str, Any]:
    cuts_sections = spec.kind in ("one_detail", "multi_detail")
    spans = cut_sections(document.text, spec.section_tokens, tokenizer) if cuts_sections else []
    return {
        "id": name,
        "source": document.source,
        "path": document.path,
        "position": document.position,
        "tokens": tokens,
        "sections": [list(span) for span in spans],
        "text": document.text,
    }


class DocumentFile:
    """The chosen documents, read one after another or by number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts: list[int] | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with open(self.path, "rb") as file:
            for line in file:
                yield json.loads(line)

    def __len__(self) -> int:
        return len(self._index())

    def __getitem__(self, number: int) -> dict[str, Any]:
        with open(self.path, "rb") as file:
            file.seek(self._index()[number])
            record: dict[str, Any] = json.loads(file.readline())
            return record

    def _index(self) -> list[int]:
        if self._starts is None:
            self._starts = []
            with open(self.path, "rb") as file:
                place = 0
                for line in file:
                    self._starts.append(place)
                    place += len(line)
        return self._starts
