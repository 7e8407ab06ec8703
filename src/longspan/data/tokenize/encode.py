"""Documents to ids, keys and loss weights; the documents of one unit to a piece on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from longspan.data.chat.chat_config import ChatConfig
from longspan.data.readers import Document, Fields, ReadReport, read_part
from longspan.data.readers.base import SkippedRecordError
from longspan.data.store.assemble import save_rows
from longspan.data.store.document_columns import DocumentWriter, token_dtype
from longspan.data.tokenize.groups import GroupUnit
from longspan.data.tokenize.pieces import PIECE, ROWS, PieceSummary, piece_folder, read_summary, write_summary
from longspan.data.tokenize.sampling import Sampling, SourceCounts, add_counts
from longspan.data.tokenize.units import Unit, file_identity
from longspan.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from longspan.data.chat import ChatFormat

LONG_CHARACTERS = 1 << 22


class PieceJob(NamedTuple):
    """What every piece of a store has in common; can be sent to another process."""

    folder: str
    plan: str
    tokenizer: Tokenizer
    fields: Fields
    strict: bool
    shard_bytes: int
    chat_template: str | None = None
    begin_with_user: bool = False
    conversations: ChatConfig = ChatConfig()
    """See `ChatFormat`."""
    sampling: Sampling | None = None


def make_piece(job: PieceJob, unit: Unit | GroupUnit) -> PieceSummary:
    """Read, encode and write the documents of one unit; a piece that is there already is left alone."""
    path = Path(job.folder, f"{unit.number:06}")
    if (path / PIECE).is_file():
        return read_summary(path / PIECE, plan=job.plan)
    encoder = _Encoder(job)
    inputs = [file_identity(file) for file in unit.files]
    with piece_folder(path) as folder:
        writer = DocumentWriter(folder, vocab_size=job.tokenizer.vocab_size, shard_bytes=job.shard_bytes)
        for document in _documents(job, unit, encoder.report):
            encoder.encode(document, writer)
        columns = writer.finish()
        save_rows(folder / ROWS, columns)
        summary = PieceSummary(
            plan=job.plan,
            inputs=inputs,
            size=unit.size,
            documents=len(columns.rows),
            tokens=int(columns.rows["tokens"].sum(dtype="u8")),
            has_mask=columns.has_mask,
            source_names=columns.source_names,
            report=encoder.report,
            seen=encoder.seen,
        )
        write_summary(folder, summary)
    return summary


def _documents(job: PieceJob, unit: Unit | GroupUnit, report: ReadReport) -> Iterator[Document]:
    if isinstance(unit, GroupUnit):
        yield from unit.documents(report)
        return
    for part in unit.parts:
        yield from read_part(part, job.fields, strict=job.strict, report=report)


def document_key(source: str, text: bytes) -> int:
    """Return the 64-bit identity of a document: XXH3 of source, a zero byte and the UTF-8 text."""
    digest = xxhash.xxh3_64(source.encode() + b"\0")
    digest.update(text)
    return digest.intdigest()


def token_weights(
    spans: Iterable[tuple[int, int, int]],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    *,
    num_characters: int,
) -> NDArray[np.uint8]:
    """Return the loss weight of each token [tokens]: that of the first of its characters in a span, else 1.

    Where spans overlap, the later one holds. Text "a is Paris", span (5, 10, 4): " Paris" starts at 4, before
    the span, and weighs 4.
    """
    weight = np.ones(num_characters + 1, np.uint8)
    covered = np.zeros(num_characters + 1, bool)
    for start, end, value in spans:
        weight[start:end] = value
        covered[start:end] = True
    characters = np.flatnonzero(covered)
    first = np.append(characters, num_characters)[np.searchsorted(characters, starts)]
    # A token that stands for no character of its own (a trimmed space) counts as the character it stands at.
    return np.where(first < np.maximum(ends, starts + 1), weight[first], 1).astype(np.uint8)


class _Tokens(NamedTuple):
    """A document of the store."""

    ids: NDArray[Any]
    mask: NDArray[np.uint8] | None = None
    parts: NDArray[np.uint32] | None = None
    """Where it branches; see `TokenStoreWriter.add`."""


class _Encoder:
    """Encodes the documents of one unit and counts what is left out."""

    def __init__(self, job: PieceJob) -> None:
        self.report = ReadReport()
        self.seen: dict[str, SourceCounts] = {}
        self._job, self._tokenizer = job, job.tokenizer
        self._dtype = token_dtype(job.tokenizer.vocab_size)
        self._chat = (
            None
            if job.chat_template is None
            else _chat(job.tokenizer, job.chat_template, job.begin_with_user, job.conversations)
        )

    def encode(self, document: Document, writer: DocumentWriter) -> None:
        utf8 = document.text.encode() if len(document.text) <= LONG_CHARACTERS else None
        key, size = (
            _key_and_size(document) if utf8 is None else (document_key(document.source, utf8), len(utf8))
        )
        sampling = self._job.sampling
        if sampling is not None:
            add_counts(self.seen, [(document.source, SourceCounts(1, size))])
            if not sampling.wants(document.source) or not sampling.may_take(key, size, len(document.text)):
                return
        try:
            encoded = self._encoded(document, utf8)
        except SkippedRecordError as error:
            self._skip(document, error.kind, str(error))
            return
        if not any(len(each.ids) for each in encoded):
            self._skip(document, "empty_documents", "no token")
            return
        characters = 0 if self._chat is not None else len(document.text)
        if sampling is not None:
            length = sampling.length(sum(len(each.ids) for each in encoded), characters)
            if not sampling.takes(key, length):
                return
            add_counts(self.seen, [(document.source, SourceCounts(0, 0, 1, round(length)))])
        for number, (ids, mask, parts) in enumerate(encoded):
            # What a record is split into has keys of its own.
            own = key if number == 0 else xxhash.xxh3_64_intdigest(key.to_bytes(8, "little"), number)
            writer.add(ids, source=document.source, key=own, mask=mask, characters=characters, parts=parts)

    def _skip(self, document: Document, kind: str, reason: str) -> None:
        self.report.documents -= 1
        self.report.skip(kind, document.place, reason)

    def _encoded(self, document: Document, utf8: bytes | None) -> list[_Tokens]:
        if self._chat is not None:
            return _encode_chat(self._chat, document, strict=self._job.strict, report=self.report)
        if document.weights is None:
            if utf8 is not None:
                return [_Tokens(self._tokenizer.encode(document.text, utf8=utf8))]
            # In the dtype of the store at once: half of the memory where that is uint16.
            parts = [ids.astype(self._dtype) for ids in self._tokenizer.encode_pieces(document.text)]
            return [_Tokens(np.concatenate(parts))]
        ids, starts, ends = self._tokenizer.encode_with_offsets(document.text)
        weights = token_weights(document.weights, starts, ends, num_characters=len(document.text))
        return [_Tokens(ids, weights)]


def _key_and_size(document: Document) -> tuple[int, int]:
    """Return the key and the bytes of a long text, which is not copied as a whole."""
    digest = xxhash.xxh3_64(document.source.encode() + b"\0")
    size = 0
    for start in range(0, len(document.text), LONG_CHARACTERS):
        data = document.text[start : start + LONG_CHARACTERS].encode()
        digest.update(data)
        size += len(data)
    return digest.intdigest(), size


def _encode_chat(chat: ChatFormat, document: Document, *, strict: bool, report: ReadReport) -> list[_Tokens]:
    from longspan.core.errors import DataError
    from longspan.data.chat import MessagesError
    from longspan.data.chat.format import REMARKS

    try:
        encoded = chat.encode_all(document.messages, document.variables)
    except MessagesError as error:
        if strict:
            raise DataError(
                f"{document.place}: {error}", fix="mend the record, or leave out --strict to skip it"
            ) from None
        raise SkippedRecordError("broken_records", str(error)) from None
    for each in encoded:
        report.note(each.notes, remarks=REMARKS)
    return [_Tokens(each.ids, each.mask, each.parts) for each in encoded]


@lru_cache(maxsize=4)
def _chat(tokenizer: Tokenizer, template: str, begin_with_user: bool, config: ChatConfig) -> ChatFormat:
    from longspan.data.chat import ChatFormat

    return ChatFormat(tokenizer, template, begin_with_user=begin_with_user, config=config)
