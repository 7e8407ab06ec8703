"""What is annotated: rows of a pack plan, packed rows, documents of a token store, or CEPE's windows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from longspan.annotate.config import PairWindows
from longspan.core.columns import folder_kind
from longspan.core.errors import ConfigError, DataError
from longspan.core.files import read_json, sha256_bytes
from longspan.data.packed.manifest import FORMAT as ROWS_FORMAT
from longspan.data.packed.manifest import read_rows_manifest
from longspan.data.packed.packed_rows import PackedRows
from longspan.data.plans.framing import text_bos
from longspan.data.plans.packing import KIND as PACK_PLAN
from longspan.data.plans.packing import PAD_DOCUMENT, PackPlan
from longspan.data.rows.annotations import Kind, row_digest
from longspan.data.rows.loader import PackedRow, RowLoader
from longspan.data.store import MDSDirectory, TokenStore
from longspan.data.store.mds import INDEX
from longspan.data.store.token_store import FORMAT as STORE_FORMAT
from longspan.data.store.token_store import MANIFEST

__all__ = [
    "AnnotateSource",
    "AskedRow",
    "DocumentSource",
    "PairSource",
    "RowSourceToAsk",
    "cepe_folder",
    "check_row",
    "open_source",
    "pair_domains",
    "too_long",
]


class AskedRow(NamedTuple):
    """One row for a teacher; padding is left out."""

    ids: NDArray[Any]
    """Integers [n]: what the teacher reads."""
    cu_seqlens: NDArray[np.int64]
    """Borders of the documents in `ids`."""
    asked: NDArray[np.int64] | None
    """Places in `ids` after which a prediction is asked for; None: all."""
    places: NDArray[np.int64] | None
    """Places in the row that these predictions belong to; None: all, in order."""
    length: int
    """Tokens of the row as it is written."""
    digest: int


class AnnotateSource(Protocol):
    """Rows by number."""

    kind: Kind
    path: str
    fingerprint: str
    vocab_size: int | None
    """Of the tokenizer that made it; None: not known."""
    tokenizer: str | None
    """Fingerprint of the tokenizer; None: not known."""
    lengths: NDArray[np.int64]
    """Tokens that are written for each row."""
    longest: int | None
    """Tokens of the longest document; None: known only when it is read."""

    def row(self, index: int, /) -> AskedRow:
        """Read one row."""


class RowSourceToAsk:
    """Rows of a pack plan, or packed rows."""

    kind: Kind = "rows"

    def __init__(
        self, path: str, rows: RowLoader | PackedRows, *, stores: Sequence[TokenStore], longest: int | None
    ) -> None:
        self._rows = rows
        self.path, self.fingerprint = path, rows.fingerprint
        self.lengths = np.full(rows.num_rows, rows.length, np.int64)
        tokenizers = {store.manifest.tokenizer["fingerprint"] for store in stores}
        self.tokenizer = tokenizers.pop() if len(tokenizers) == 1 else None
        self.vocab_size = max((store.vocab_size for store in stores), default=None)
        self.longest = rows.length if longest is None and isinstance(rows, RowLoader) else longest

    def row(self, index: int) -> AskedRow:
        """See `AnnotateSource`."""
        return _without_padding(self._rows.row(index))


class DocumentSource:
    """Documents of a token store, each by itself, behind BOS where their tokenizer begins texts with it."""

    kind: Kind = "documents"

    def __init__(self, path: str, store: TokenStore) -> None:
        self._store = store
        self.path, self.fingerprint = path, store.fingerprint
        self.lengths = store.lengths.tokens.astype(np.int64)
        self.tokenizer: str | None = store.manifest.tokenizer["fingerprint"]
        self.vocab_size: int | None = store.vocab_size
        self.bos = text_bos(store)
        self.longest: int | None = int(self.lengths.max()) + (self.bos is not None)

    def row(self, index: int) -> AskedRow:
        """See `AnnotateSource`."""
        ids = self._store.tokens(index)
        digest = row_digest(ids)
        if self.bos is None:
            return AskedRow(ids, np.array([0, len(ids)]), None, None, len(ids), digest)
        read = np.concatenate([[self.bos], ids.astype(np.int64)])
        return AskedRow(read, np.array([0, len(read)]), np.arange(1, len(read)), None, len(ids), digest)


class PairSource:
    """CEPE's windows of one domain: the decoder's tokens, after the encoder's last ones or after retrieved passages.

    input = prev_token_ids[-E:] + token_ids[:D]               predictions after each of the D
    input = retrieved_token_ids[:k], end to end, + token_ids[:D]

    Raises:
        DataError: a column is missing, or the folders do not have the same rows.
    """

    kind: Kind = "pairs"

    def __init__(self, path: Path, windows: PairWindows) -> None:
        self._windows = windows
        self._pairs = MDSDirectory(path, allow_pickle=windows.allow_pickle)
        retrieval = None if windows.retrieval is None else Path(windows.retrieval)
        self._retrieved = None
        if retrieval is not None:
            self._retrieved = MDSDirectory(retrieval, allow_pickle=windows.allow_pickle)
        _need_columns(path, self._pairs, {"token_ids"} if retrieval else {"token_ids", "prev_token_ids"})
        if retrieval is not None and self._retrieved is not None:
            _need_columns(retrieval, self._retrieved, {"retrieved_token_ids"})
            if len(self._retrieved) != len(self._pairs):
                raise DataError(
                    f"{retrieval} was retrieved for other windows",
                    found=f"{len(self._retrieved)} rows",
                    allowed=f"{len(self._pairs)}, those of {path}",
                )
        self.path = str(path)
        self.fingerprint = _mds_fingerprint(path, self._pairs)
        if retrieval is not None and self._retrieved is not None:
            parts = f"{self.fingerprint} {_mds_fingerprint(retrieval, self._retrieved)}"
            self.fingerprint = sha256_bytes(parts.encode())[:16]
        self.lengths = np.full(len(self._pairs), windows.decoder_tokens, np.int64)
        self.tokenizer: str | None = None
        self.vocab_size: int | None = None
        self.longest: int | None = None

    def row(self, index: int) -> AskedRow:
        """See `AnnotateSource`."""
        sample = self._pairs[index]
        decoder = np.asarray(sample["token_ids"]).reshape(-1)[: self._windows.decoder_tokens]
        if self._retrieved is None:
            # As a length from the end: 0 is no token, not all of them.
            before = np.asarray(sample["prev_token_ids"]).reshape(-1)
            before = before[max(0, len(before) - self._windows.encoder_tokens) :]
        else:
            wanted = self._windows.retrieval_k
            passages = np.asarray(self._retrieved[index]["retrieved_token_ids"])
            if passages.ndim != 2 or len(passages) < wanted:
                raise DataError(
                    f"row {index} of {self._retrieved.path} has too few passages",
                    found=f"retrieved_token_ids {list(passages.shape)}",
                    allowed=f"[{wanted} or more, tokens] (--retrieval-k)",
                )
            before = passages[:wanted].reshape(-1)
        ids = np.concatenate([before.astype(np.int64), decoder.astype(np.int64)])
        asked = np.arange(len(before), len(ids))
        return AskedRow(ids, np.array([0, len(ids)]), asked, None, len(decoder), row_digest(ids))


def open_source(path: str | Path) -> AnnotateSource:
    """Open rows by what stands at a path: a pack plan, packed rows or a token store.

    Raises:
        DataError: it is none of these, or damaged.
    """
    path = Path(path)
    kind = folder_kind(path)
    if kind == PACK_PLAN:
        plan = PackPlan.load(path)
        if not plan.stores:
            raise DataError(f"the plan {path} does not say which stores it was made from", fix="pack again")
        stores = [TokenStore(store) for store in plan.stores]
        real = plan.span_document != PAD_DOCUMENT
        longest = int(np.asarray(plan.span_tokens)[real].max()) if real.any() else 0
        return RowSourceToAsk(str(path), RowLoader(stores, plan), stores=stores, longest=longest)
    if kind is not None:
        raise DataError(
            f"{path} says which documents are used, but not how they stand in rows",
            found=kind,
            fix="pack it: longspan data pack PLAN --length N --out ROWS",
        )
    manifest = read_json(path / MANIFEST) if (path / MANIFEST).is_file() else None
    form = manifest.get("format") if isinstance(manifest, dict) else None
    if form == STORE_FORMAT:
        return DocumentSource(str(path), TokenStore(path))
    if (path / INDEX).is_file():
        names = {column.name for info in MDSDirectory(path).shards for column in info.columns}
        if "input_ids" not in names:
            raise DataError(
                f"{path} has no rows that a teacher could read",
                found=f"columns {', '.join(sorted(names))}",
                allowed="input_ids; or token_ids and prev_token_ids with --format cepe",
            )
    rows = PackedRows(path)
    source = RowSourceToAsk(str(path), rows, stores=(), longest=None)
    if form == ROWS_FORMAT:
        source.vocab_size = read_rows_manifest(path).vocab_size
    return source


def pair_domains(path: Path) -> dict[str, Path]:
    """Return the folders of pairs by domain: `path` itself, or the folders in it.

    Raises:
        DataError: there is none.
    """
    if (path / INDEX).is_file():
        return {path.name: path}
    found = {index.parent.name: index.parent for index in sorted(path.glob(f"*/{INDEX}"))}
    if not found:
        raise DataError(
            f"{path} holds no pairs",
            found="no MDS folder" if path.is_dir() else "no such folder",
            allowed="the folder of a part that `longspan data pairs` writes, such as pairs/train, or of one domain",
        )
    return found


def cepe_folder(pairs: Path, windows: PairWindows, model: str) -> Path:
    """Return where CEPE's code looks for the annotations of a domain's pairs: the folder around the domain's."""
    name = Path(model).name
    if windows.retrieval is not None:
        around = Path(windows.retrieval).parent
        return around.with_name(
            f"{around.name}-ret_k{windows.retrieval_k}-dec{windows.decoder_tokens}-{name}"
        )
    around = pairs.parent
    return around.with_name(
        f"{around.name}-logits-enc{windows.encoder_tokens}-dec{windows.decoder_tokens}-{name}"
    )


def check_row(
    row: AskedRow, index: int, source: AnnotateSource, *, context: int | None, vocab_size: int
) -> None:
    """Refuse a row that the teacher cannot read.

    Raises:
        ConfigError: a document is longer than the teacher's context.
        DataError: an id has no embedding.
    """
    longest = int(np.diff(row.cu_seqlens).max(initial=0))
    if context is not None and longest > context:
        raise too_long(f"row {index} of {source.path}", longest, context)
    highest = int(row.ids.max(initial=0))
    if highest >= vocab_size:
        raise DataError(
            f"row {index} of {source.path} holds a token that the teacher does not know",
            found=f"token id {highest}",
            allowed=f"0 to {vocab_size - 1}, the teacher's vocabulary",
            fix="choose a teacher with the tokenizer of the data",
        )


def too_long(what: str, tokens: int, context: int) -> ConfigError:
    """Return the error for text that is longer than what the teacher was made for."""
    return ConfigError(
        f"{what} is longer than the teacher's context",
        found=f"{tokens} tokens",
        allowed=f"{context} (max_position_embeddings)",
        fix="pack shorter rows; or say with --context, and --rope, that the teacher reaches further",
    )


def _without_padding(row: PackedRow) -> AskedRow:
    digest = row_digest(row.input_ids)
    borders, real = row.cu_seqlens.astype(np.int64), row.documents != PAD_DOCUMENT
    if real.all():
        return AskedRow(row.input_ids, borders, None, None, len(row.input_ids), digest)
    sizes = np.diff(borders)
    places = np.flatnonzero(np.repeat(real, sizes))
    kept = np.concatenate([[0], np.cumsum(sizes[real])])
    return AskedRow(row.input_ids[places], kept, None, places, len(row.input_ids), digest)


def _need_columns(path: Path, folder: MDSDirectory, wanted: set[str]) -> None:
    names = {column.name for info in folder.shards for column in info.columns}
    if missing := sorted(wanted - names):
        raise DataError(
            f"{path} lacks columns",
            found=f"{', '.join(sorted(names)) or 'no shard'}; no {', '.join(missing)}",
            allowed="token_ids and prev_token_ids as `longspan data pairs` writes them; retrieved_token_ids "
            "[passages, tokens] with --retrieval",
        )


def _mds_fingerprint(path: Path, folder: MDSDirectory) -> str:
    """Return 16 hex characters over the index, which may hold hashes of the shards, and the first and last row."""
    parts = [(path / INDEX).read_bytes()]
    for number in sorted({0, len(folder) - 1}) if len(folder) else ():
        values = folder[number].values()
        parts += [value.tobytes() for value in values if isinstance(value, np.ndarray)]
    return sha256_bytes(b"\0".join(parts))[:16]
