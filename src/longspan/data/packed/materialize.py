"""Rows of a pack plan, or of a folder that is packed already, written out for other tools.

    ROWS/shard.00000.mds ...     see `row_formats`
    ROWS/index.json              MDS only
    ROWS/longspan.json           what the rows were made of, written last

A piece holds a fixed range of rows, so the bytes are the same for any number of workers, and a killed run goes
on with the pieces that are missing. About 400 million tokens a second and process as MDS.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import longspan
from longspan.core.columns import folder_kind
from longspan.core.errors import ArgumentError, DataError
from longspan.core.files import behind_link, write_json
from longspan.data.jobs import LocalExecutor
from longspan.data.jobs.piece_folder import PieceFolder
from longspan.data.packed.manifest import RowsManifest, read_rows_manifest
from longspan.data.packed.row_formats import (
    FORMATS,
    LabelledRow,
    RowFormat,
    mds_columns,
    row_frames,
    spans_of,
    write_rows,
)
from longspan.data.plans.packing import KIND, PackPlan
from longspan.data.rows.loader import RowLoader
from longspan.data.rows.plan_rows import NO_LABEL, Labels, PlanRows
from longspan.data.store import TokenStore
from longspan.data.store.shard_files import shard_entries, write_index
from longspan.data.store.token_store import MANIFEST

PIECE_BYTES = 1 << 26
"""Ids in a piece, as uint32."""
READ_ROWS = 256


def materialize(
    source: str | Path,
    out: str | Path,
    *,
    format: RowFormat = "mds",
    num_workers: int = 1,
    piece_bytes: int = PIECE_BYTES,
) -> RowsManifest:
    """Write the rows of `source`, a saved pack plan or a packed folder, to the folder `out`.

    Rows of `out` that were made of the same rows are kept as they are; what a killed run finished is used.

    Args:
        num_workers: processes that write; does not change the result.

    Raises:
        ArgumentError: the format is unknown.
        DataError: `out` holds something else, another job writes it, or the plan does not fit its stores.
        RunError: the disk is full or a worker died; run again to go on.
    """
    rows = rows_folder(source, out, format=format, piece_bytes=piece_bytes)
    with LocalExecutor(num_workers) as running:
        rows.make(running)
    return read_rows_manifest(out)


def rows_folder(
    source: str | Path,
    out: str | Path,
    *,
    format: RowFormat = "mds",
    labels: Labels = "document",
    piece_bytes: int = PIECE_BYTES,
) -> PieceFolder:
    """Return the work of `materialize`, to be shared by jobs of an array: `rows_folder(...).make(executor, share)`.

    Args:
        labels: what `labels` is in jsonl and parquet where a document ends with its row; "next" is the BOS of the next
            one, as Fu et al. wrote it.

    Raises:
        ArgumentError: the format is unknown, or has no labels, or the next document has no BOS.
        DataError: `source` is neither a pack plan nor packed rows, or is damaged.
    """
    out = behind_link(out)
    if format not in FORMATS:
        raise ArgumentError("rows cannot be written like this", found=format, allowed=FORMATS)
    _open.cache_clear()  # the plan may have been made anew since
    origin = _open(os.path.abspath(source))
    _check_labels(labels, origin, format)
    rows_per_piece = max(1, piece_bytes // (4 * origin.length))
    return PieceFolder(
        out=out,
        settings={
            "rows": origin.fingerprint,
            "format": format,
            "rows_per_piece": rows_per_piece,
            "longspan": longspan.__version__,
            **({} if labels == "document" else {"labels": labels}),
        },
        num_pieces=-(-origin.num_rows // rows_per_piece),
        write=partial(
            _write_piece,
            source=os.path.abspath(source),
            fingerprint=origin.fingerprint,
            format=format,
            labels=labels,
            rows_per_piece=rows_per_piece,
        ),
        finish=partial(_finish, origin=origin, format=format, labels=labels),
        is_done=partial(_is_done, out, origin.fingerprint, format, labels),
        title=f"write {format}",
    )


def _check_labels(labels: Labels, origin: _Origin, format: RowFormat) -> None:
    if labels == "document":
        return
    if format not in ("jsonl", "parquet"):
        raise ArgumentError("these rows have no labels", found=format, allowed="jsonl or parquet")
    if origin.plan_rows is None or not origin.plan_rows.plan.spec.num_bos:
        raise ArgumentError(
            "the label behind a document is the BOS of the next one, and documents here begin without BOS",
            fix="pack with --specials bos or both",
        )


def _finish(
    folder: Path, entries: list[dict[str, Any]], *, origin: _Origin, format: RowFormat, labels: Labels
) -> None:
    if format == "mds":
        write_index(folder, shard_entries(mds_columns(origin.has_mask), entries))
    manifest = RowsManifest(
        row_format=format,
        rows=origin.num_rows,
        length=origin.length,
        has_mask=origin.has_mask,
        vocab_size=origin.vocab_size,
        source_names=list(origin.source_names),
        fingerprint=origin.fingerprint,
        pieces=entries,
        report=origin.report,
        mask_is=origin.mask_is,
        labels=labels,
    )
    write_json(folder / MANIFEST, manifest._asdict())


class _Origin(NamedTuple):
    """Where rows come from: a plan with its stores, or a packed folder."""

    num_rows: int
    length: int
    has_mask: bool
    vocab_size: int | None
    dtype: str
    source_names: tuple[str, ...]
    fingerprint: str
    report: dict[str, Any]
    mask_is: str
    plan_rows: PlanRows | None
    packed: Any

    def read(self, first: int, stop: int, *, labels: Labels | None) -> Iterator[LabelledRow]:
        """Yield rows; a row's arrays may be overwritten by the next."""
        if self.plan_rows is None:
            for number in range(first, stop):
                row = self.packed.row(number)
                yield LabelledRow(row, NO_LABEL, next(row_frames(spans_of(row), row.source_names)))
            return
        for start in range(first, stop, READ_ROWS):
            spans, rows = self.plan_rows.read(start, min(start + READ_ROWS, stop))
            frames = row_frames(spans, self.source_names)
            for number, (row, frame) in enumerate(zip(rows, frames), start):
                label = NO_LABEL if labels is None else self.plan_rows.next_token(number, labels)
                yield LabelledRow(row, label, frame)


@lru_cache(maxsize=1)
def _open(source: str) -> _Origin:
    if folder_kind(source) != KIND:
        from longspan.data.packed.packed_rows import PackedRows

        packed = PackedRows(source)
        return _Origin(
            num_rows=packed.num_rows,
            length=packed.length,
            has_mask=packed.has_mask,
            vocab_size=None,
            dtype="uint32",
            source_names=packed.source_names,
            fingerprint=packed.fingerprint,
            report={},
            mask_is=packed.mask_is,
            plan_rows=None,
            packed=packed,
        )
    plan = PackPlan.load(source)
    if not plan.stores:
        raise DataError(f"the plan {source} does not say which stores it was made from", fix="pack again")
    stores = [TokenStore(store) for store in plan.stores]
    loader, rows = RowLoader(stores, plan), PlanRows(stores, plan)
    dtypes = {store.manifest.dtype for store in stores}
    special = max(
        (
            i
            for i in (plan.spec.bos_id, plan.spec.eos_id, plan.spec.mos_id, plan.spec.pad_id)
            if i is not None
        ),
        default=0,
    )
    return _Origin(
        num_rows=plan.num_rows,
        length=loader.length,
        has_mask=rows.has_mask,
        vocab_size=max(max(store.vocab_size for store in stores), special + 1),
        dtype="uint16" if dtypes == {"uint16"} and special < 1 << 16 else "uint32",
        source_names=rows.source_names,
        fingerprint=loader.fingerprint,
        report=plan.report.to_dict(),
        mask_is=_mask_is(stores, plan) if rows.has_mask else "",
        plan_rows=rows,
        packed=None,
    )


def _mask_is(stores: list[TokenStore], plan: PackPlan) -> str:
    # What overlapping pieces repeat has weight 0, whoever wrote it.
    chats = all(store.manifest.config.get("chat") for store in stores if store.has_mask)
    return "answers" if chats and not plan.spec.overlap else "weights"


def _write_piece(
    folder: Path,
    number: int,
    *,
    source: str,
    fingerprint: str,
    format: RowFormat,
    labels: Labels,
    rows_per_piece: int,
) -> dict[str, Any]:
    origin = _open(source)
    if origin.fingerprint != fingerprint:
        # A process that outlives one call has opened what stood there before.
        _open.cache_clear()
        origin = _open(source)
    if origin.fingerprint != fingerprint:
        raise DataError(f"{source} was changed while its rows were written", fix="write them again")
    first = number * rows_per_piece
    stop = min(first + rows_per_piece, origin.num_rows)
    return write_rows(
        folder,
        number,
        origin.read(first, stop, labels=labels if format in ("jsonl", "parquet") else None),
        num_rows=stop - first,
        format=format,
        has_mask=origin.has_mask,
        dtype=origin.dtype,
    )


def _is_done(out: Path, fingerprint: str, format: RowFormat, labels: Labels) -> bool:
    """Whether `out` holds these rows in this format. Raises DataError if it holds others."""
    if not (out / MANIFEST).is_file():
        return False
    found = read_rows_manifest(out)
    if (found.fingerprint, found.row_format, found.labels) != (fingerprint, format, labels):
        raise DataError(
            f"{out} already exists and holds other rows", fix="choose another place or remove it first"
        )
    return True
