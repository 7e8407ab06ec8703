"""What a teacher predicts for the rows of a store, beside the store: an MDS directory with a row for each row.

    OUT/index.json, shard.00000.mds ...
    OUT/longspan.json      the manifest, written last: teacher, k, the rows that were annotated

Row i belongs to row i of the pack plan, the packed rows or the token store (there a row is a document), and entry t of
its columns is the distribution of the word AFTER token t:

    topk_ids        uint16 | uint32 [T, k]    the likeliest word first; uint16 where the vocabulary allows
    topk_logprobs   float16 | float32 [T, k]  natural logarithms
    tail_logprob    float16 | float32 [T]     logarithm of the mass of all other words
    length          int                       T
    row_digest      int                       of the row's token ids: shows rows that are not those annotated

Where each token keeps as many words as hold a given mass, ids and logprobs are [N], one token's words after another's,
and token t has those from topk_offsets[t] to topk_offsets[t + 1] (uint32 [T + 1]). A token of padding has no words
(k of probability 0), and all mass in the tail.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

import longspan
from longspan.core.errors import DataError
from longspan.core.files import read_json, write_json
from longspan.core.log import get_logger
from longspan.data.plans.packing import PAD_DOCUMENT
from longspan.data.rows.loader import PackedRow, RowLoader, RowSource, TeacherRow
from longspan.data.rows.read_otherwise import RowsOver
from longspan.data.store import Column, MDSDirectory, TokenStore
from longspan.data.store.lengths import LengthTable
from longspan.data.store.mds import encode_sample
from longspan.data.store.shard_files import shard_entries, write_index, write_shard
from longspan.data.store.token_store import MANIFEST

FORMAT = "longspan teacher annotations"
SCHEMA = 1

Kind = Literal["rows", "documents", "pairs"]


class AnnotationManifest(NamedTuple):
    """Content of `longspan.json` in a folder of annotations."""

    kind: str
    """rows: of a pack plan or packed rows. documents: of a token store. pairs: decoder windows, in CEPE's columns."""
    first: int
    """Row of the source that row 0 belongs to; above 0 in all shards but the first."""
    rows: int
    source_rows: int
    """Rows of the source."""
    tokens: int
    words: int
    """Words kept of all tokens."""
    k: int
    mass: float | None
    """Mass that the kept words hold where that takes fewer than k; None: always k."""
    dtype: str
    """Of the logarithms."""
    vocab_size: int
    """Of the teacher."""
    source: dict[str, Any]
    """path and fingerprint of what was annotated."""
    teacher: dict[str, Any]
    """path, fingerprint, rope, dtype and quantization of the teacher."""
    settings: dict[str, Any]
    """Other settings that decide the content; of documents `bos`, the token read before each, where there is one."""
    pieces: list[dict[str, Any]]
    """file, rows, bytes, tokens and words of each shard file."""
    format: str = FORMAT
    schema: int = SCHEMA
    longspan: str = longspan.__version__

    @property
    def stop(self) -> int:
        """Row of the source after the last."""
        return self.first + self.rows

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the content of a row: alike in all shards of one annotation."""
        names = ("kind", "source_rows", "k", "mass", "dtype", "vocab_size", "settings")
        return {
            **{name: getattr(self, name) for name in names},
            "source": self.source["fingerprint"],
            "teacher": self.teacher["fingerprint"],
            "model_dtype": self.teacher.get("dtype"),
            "quantization": self.teacher.get("quantization"),
        }

    @property
    def fingerprint(self) -> str:
        """16 hex characters over what decides the content."""
        parts = [self.identity, self.first, self.rows]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def read_annotation_manifest(path: str | Path) -> AnnotationManifest:
    """Read the manifest of a folder of annotations.

    Raises:
        DataError: there is none, it is of something else, of another version, or malformed.
    """
    file = Path(path) / MANIFEST
    if not file.is_file():
        raise DataError(
            f"{path} holds no annotations of a teacher",
            found=f"no {MANIFEST}" if Path(path).is_dir() else "no such folder",
            fix="make them with `longspan annotate topk`",
        )
    content = read_json(file)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise DataError(f"{path} holds no annotations of a teacher", found=found, allowed=FORMAT)
    if content.get("schema") != SCHEMA:
        raise DataError(f"{file} was written by another version", found=content.get("schema"), allowed=SCHEMA)
    counts = ("first", "rows", "source_rows", "tokens", "words", "k", "vocab_size")
    tables = ("source", "teacher", "settings")
    if (
        set(content) != set(AnnotationManifest._fields)
        or not all(isinstance(content[name], int) and content[name] >= 0 for name in counts)
        or not all(isinstance(content[name], dict) for name in tables)
        or "fingerprint" not in content["source"].keys() & content["teacher"].keys()
        or not isinstance(content["pieces"], list)
    ):
        raise DataError(f"{file} is malformed", fix="annotate again")
    return AnnotationManifest(**content)


def topk_columns(*, ragged: bool, vocab_size: int, dtype: str) -> list[Column]:
    """Return the columns of annotations, sorted by name."""
    columns = [
        Column("length", "int"),
        Column("row_digest", "int"),
        Column("tail_logprob", f"ndarray:{dtype}"),
        Column("topk_ids", f"ndarray:{id_dtype(vocab_size)}"),
        Column("topk_logprobs", f"ndarray:{dtype}"),
    ]
    if ragged:
        columns.insert(4, Column("topk_offsets", "ndarray:uint32"))
        columns.sort(key=lambda column: column.name)
    return columns


def cepe_columns() -> list[Column]:
    """Return CEPE's columns: target_prob [D, k + 1], the last one the mass of all other words, target_index [D, k]."""
    return [Column("target_index", "ndarray:int32"), Column("target_prob", "ndarray:float16")]


def id_dtype(vocab_size: int) -> str:
    """Return the narrowest dtype that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write_annotation_shard(
    folder: Path, number: int, columns: Sequence[Column], samples: Iterable[Mapping[str, Any]], num_rows: int
) -> dict[str, Any]:
    """Write one shard file, whole or not at all, holding one sample in memory; return file, rows and bytes.

    Raises:
        DataError: the samples are 4 GiB or more.
    """
    name = f"shard.{number:05}.mds"
    encoded = (encode_sample(columns, sample) for sample in samples)
    write_shard(folder / name, columns, encoded, num_rows, fix="lower --k, or give --mass")
    return {"file": name, "rows": num_rows, "bytes": (folder / name).stat().st_size}


def seal_annotations(folder: Path, columns: Sequence[Column], manifest: AnnotationManifest) -> None:
    """Write index and manifest beside finished shard files."""
    write_index(folder, shard_entries(columns, manifest.pieces))
    write_json(folder / MANIFEST, manifest._asdict())


def row_digest(ids: NDArray[Any]) -> int:
    """Return a hash of token ids, whatever their dtype, as an int64."""
    digest = hashlib.blake2b(np.ascontiguousarray(ids, dtype="<u4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class Annotations:
    """Annotations by row, read from memory-mapped shards.

    Raises:
        DataError: they are missing, damaged, incomplete (a shard of several), or lack a column.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_annotation_manifest(path)
        self._rows = MDSDirectory(self.path)
        if len(self._rows) != self.manifest.rows:
            raise DataError(
                f"{path} contradicts itself", found=f"{len(self._rows)} rows", allowed=self.manifest.rows
            )
        wanted = {"tail_logprob", "topk_ids", "topk_logprobs"}
        for info in self._rows.shards:
            missing = sorted(wanted - {column.name for column in info.columns})
            if missing:
                names = ", ".join(column.name for column in info.columns)
                raise DataError(
                    f"{path} lacks columns of a teacher's predictions",
                    found=f"{names}; no {', '.join(missing)}",
                    fix="annotate with `longspan annotate topk` in its default format",
                )

    def __len__(self) -> int:
        return self.manifest.rows

    def row(self, index: int, ids: NDArray[Any] | None = None) -> TeacherRow:
        """Return the predictions of a row of T tokens, each with the row's most words.

        Raises:
            DataError: it is damaged, or was annotated for other token ids than `ids`.
        """
        sample = self._rows[index]
        where = f"row {index} of {self.path}"
        digest = None if ids is None else row_digest(ids)
        if digest is not None and sample.get("row_digest", digest) != digest:
            raise DataError(
                f"{where} was annotated for other tokens",
                fix="annotate the rows that are trained on, in the same order",
            )
        words, logprobs, tail = sample["topk_ids"], sample["topk_logprobs"], sample["tail_logprob"]
        if "topk_offsets" in sample:
            words, logprobs = _padded(words, logprobs, sample["topk_offsets"], where)
        if words.ndim != 2 or words.shape != logprobs.shape or tail.shape != words.shape[:1]:
            raise DataError(
                f"{where} is damaged",
                found=f"topk_ids {list(words.shape)}, topk_logprobs {list(logprobs.shape)}, "
                f"tail_logprob {list(tail.shape)}",
            )
        return TeacherRow(words.astype(np.int32), logprobs.astype(np.float32), tail.astype(np.float32))


def _padded(ids: np.ndarray, logprobs: np.ndarray, offsets: np.ndarray, where: str) -> tuple[np.ndarray, ...]:
    """Return ids [T, K] and logprobs [T, K], -inf behind the words of a token."""
    counts = np.diff(offsets.astype(np.int64))
    fits = ids.ndim == logprobs.ndim == 1 and len(ids) == len(logprobs)
    if not len(counts) or offsets[0] != 0 or (counts < 0).any() or not fits or offsets[-1] > len(ids):
        raise DataError(f"{where} is damaged", found="topk_offsets that do not fit topk_ids")
    width = max(1, int(counts.max()))
    there = np.arange(width) < counts[:, None]
    wide_ids = np.zeros(there.shape, ids.dtype)
    wide = np.full(there.shape, -np.inf, logprobs.dtype)
    wide_ids[there], wide[there] = ids[: offsets[-1]], logprobs[: offsets[-1]]
    return wide_ids, wide


def _beginning(bos: int | None) -> str:
    return "without BOS" if bos is None else f"behind BOS {bos}"


class TaughtRows(RowsOver):
    """Rows with what a teacher predicts after each token; takes the place of the `RowSource` that they are of.

    Annotations of the very rows are taken row by row. Those of documents (of a token store) follow the spans of a plan:
    the teacher has then read each document from its beginning, wherever the row cuts it, and BOS, EOS and padding have
    no teacher.

    Args:
        rows: a `RowLoader` or `PackedRows`.
        annotations: one; or, of documents, one for each store of the plan, in the order of the stores.
        stores: the token stores of the plan.

    Raises:
        DataError: the annotations are of other rows or documents, or of a part of them.
    """

    def __init__(
        self, rows: RowSource, annotations: Sequence[Annotations], *, stores: Sequence[TokenStore] = ()
    ) -> None:
        super().__init__(rows, how=" ".join(each.manifest.fingerprint for each in annotations))
        self._annotations = list(annotations)
        self._documents: LengthTable | None = None
        kinds = {each.manifest.kind for each in annotations}
        if kinds == {"documents"}:
            wanted = [store.fingerprint for store in stores]
            if not isinstance(rows, RowLoader):
                raise DataError(
                    "the teacher's predictions are of documents, and these rows are packed already",
                    found=str(annotations[0].path),
                    fix="annotate the packed rows",
                )
            self._documents = LengthTable.concatenate([store.lengths for store in stores])
            self._say_other_beginnings(rows)
        else:
            wanted = [rows.fingerprint]
        for each, fingerprint in zip(annotations, wanted, strict=False):
            self._check(each, fingerprint)
        if len(annotations) != len(wanted):
            raise DataError(
                "a teacher's predictions are needed for each store",
                found=f"{len(annotations)} folders of annotations, {len(wanted)} of rows or stores",
            )

    def _check(self, each: Annotations, fingerprint: str) -> None:
        manifest = each.manifest
        if manifest.source["fingerprint"] != fingerprint:
            raise DataError(
                f"{each.path} was annotated for other {manifest.kind}",
                found=f"{manifest.source.get('path')} {manifest.source['fingerprint']}",
                allowed=fingerprint,
                fix="annotate what is trained on: for rows planned by the recipe, the token store, or a plan of "
                "`longspan data pack` that the stream names in `rows`",
            )
        if manifest.first or manifest.rows != manifest.source_rows:
            raise DataError(
                f"{each.path} is a part of the annotations",
                found=f"rows {manifest.first} to {manifest.stop} of {manifest.source_rows}",
                fix="join all parts with `longspan annotate merge`",
            )

    def _say_other_beginnings(self, rows: RowLoader) -> None:
        spec = rows.plan.spec
        student = spec.bos_id if spec.num_bos else None
        for each in self._annotations:
            if (teacher := each.manifest.settings.get("bos")) != student:
                get_logger("data").warning(
                    "%s: the teacher read each document %s, the student reads it %s: the predictions at its beginning "
                    "are of another text. Set `specials` of the stream as the teacher had it, or annotate again",
                    each.path,
                    _beginning(teacher),
                    _beginning(student),
                )

    def row(self, index: int) -> PackedRow:
        """Read one row with its `teacher`.

        Raises:
            ArgumentError: there is no such row.
            DataError: it is damaged, or was annotated for other tokens.
        """
        row = self._rows.row(index)
        if self._documents is None:
            return row._replace(teacher=self._annotations[0].row(index, row.input_ids))
        return row._replace(teacher=self._of_spans(index, row, self._documents))

    def _of_spans(self, index: int, row: PackedRow, documents: LengthTable) -> TeacherRow:
        assert isinstance(self._rows, RowLoader)
        plan = self._rows.plan
        spans = slice(int(plan.row_offsets[index]), int(plan.row_offsets[index + 1]))
        width = max(each.manifest.k for each in self._annotations)
        taught = TeacherRow(
            np.zeros((self.length, width), np.int32),
            np.full((self.length, width), -np.inf, np.float32),
            np.zeros(self.length, np.float32),
        )
        for number, (document, start) in enumerate(
            zip(plan.span_document[spans].tolist(), plan.span_start[spans].tolist())
        ):
            if document == PAD_DOCUMENT:
                continue
            begin, end = int(row.cu_seqlens[number]), int(row.cu_seqlens[number + 1])
            if plan.spec.mos_id is not None and start:
                begin += 1
            known = self._annotations[int(documents.store[document])].row(int(documents.position[document]))
            # Token p of the document stands at framed position p + num_bos.
            shift = begin - start + plan.spec.num_bos
            low, high = max(begin, shift), min(end, shift + len(known.tail))
            for into, values in zip(taught, known):
                if values.ndim == 2:
                    into[low:high, : values.shape[1]] = values[low - shift : high - shift]
                else:
                    into[low:high] = values[low - shift : high - shift]
        return taught
