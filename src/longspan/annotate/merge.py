"""Shards of annotations, made on machines that share no disk, joined into one folder; nothing is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from longspan.core.errors import ArgumentError, DataError
from longspan.core.files import atomic_dir, link_file, remove_leftovers
from longspan.data.rows.annotations import AnnotationManifest, read_annotation_manifest, seal_annotations
from longspan.data.store import MDSDirectory
from longspan.data.store.token_store import MANIFEST

__all__ = ["merge"]


def merge(parts: Sequence[str | Path], out: str | Path) -> AnnotationManifest:
    """Join shards, given in any order; their files are linked, or copied where the disk has no hard links.

    A complete `out` of the same shards is kept.

    Raises:
        DataError: shards of different annotations, rows that stand in two shards or in none, files that are lost or
            cut short, or something at `out`.
    """
    if not parts:
        raise ArgumentError("there are no shards to merge")
    out = Path(out)
    found = sorted(
        ((read_annotation_manifest(part), Path(part)) for part in parts), key=lambda each: each[0].first
    )
    _check(found)
    for manifest, path in found:
        _check_files(manifest, path)
    first = found[0][0]
    pieces = [piece for manifest, _ in found for piece in manifest.pieces]
    whole = first._replace(
        rows=first.source_rows,
        tokens=sum(manifest.tokens for manifest, _ in found),
        words=sum(manifest.words for manifest, _ in found),
        pieces=[{**piece, "file": f"shard.{number:05}.mds"} for number, piece in enumerate(pieces)],
    )
    if (out / MANIFEST).is_file() and read_annotation_manifest(out).fingerprint == whole.fingerprint:
        return read_annotation_manifest(out)
    if out.exists():
        raise DataError(f"{out} already exists", fix="choose another place or remove it first")
    remove_leftovers(out.parent, out.name)
    folders = [path for manifest, path in found for _ in manifest.pieces]
    columns = MDSDirectory(found[0][1]).shards[0].columns
    with atomic_dir(out) as aside:
        for folder, old, new in zip(folders, pieces, whole.pieces):
            link_file(folder / old["file"], aside / new["file"])
        seal_annotations(aside, columns, whole)
    return whole


def _check(found: Sequence[tuple[AnnotationManifest, Path]]) -> None:
    wanted, at = found[0]
    for manifest, path in found[1:]:
        if manifest.identity != wanted.identity:
            names = [name for name, value in wanted.identity.items() if manifest.identity[name] != value]
            raise DataError(
                f"{path} and {at} are not of the same annotations",
                found=", ".join(f"{name} {manifest.identity[name]}" for name in names),
                allowed=", ".join(f"{name} {wanted.identity[name]}" for name in names),
            )
    row, before = 0, None
    for manifest, path in found:
        if manifest.first < row:
            raise DataError(
                f"{before} and {path} hold the same rows",
                found=f"rows {manifest.first} to {min(row, manifest.stop)} in both",
                fix="give each shard once",
            )
        if manifest.first > row:
            raise _missing(row, manifest.first, wanted)
        row, before = manifest.stop, path
    if row != wanted.source_rows:
        raise _missing(row, wanted.source_rows, wanted)


def _check_files(manifest: AnnotationManifest, path: Path) -> None:
    """Refuse a shard that was not copied whole."""
    for piece in manifest.pieces:
        file = path / piece["file"]
        size = file.stat().st_size if file.is_file() else None
        if size != piece["bytes"]:
            raise DataError(
                f"{path} is not whole",
                found=f"{piece['file']} " + ("is lost" if size is None else f"has {size} bytes"),
                allowed=f"{piece['bytes']} bytes",
                fix="copy it again, or make it again with `longspan annotate topk --num-shards N --shard I`",
            )


def _missing(first: int, stop: int, wanted: AnnotationManifest) -> DataError:
    return DataError(
        "a shard is missing",
        found=f"no shard with rows {first} to {stop} of {wanted.source_rows}",
        fix="make it with `longspan annotate topk --num-shards N --shard I`, or name it too",
    )
