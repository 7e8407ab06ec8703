"""What `longspan.json` says of a folder of packed rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import longspan
from longspan.core.errors import DataError
from longspan.core.files import read_json
from longspan.data.packed.row_formats import FORMATS
from longspan.data.rows.plan_rows import Labels
from longspan.data.store.token_store import MANIFEST

FORMAT = "longspan packed rows"


SCHEMA = 1


class RowsManifest(NamedTuple):
    """Content of `longspan.json` in a folder of rows."""

    row_format: str
    rows: int
    length: int
    """Tokens in a row."""
    has_mask: bool
    vocab_size: int | None
    source_names: list[str]
    fingerprint: str
    """That of the plan and its stores, the same in every format."""
    pieces: list[dict[str, Any]]
    """file, rows, bytes and id_sum of each."""
    report: dict[str, Any]
    """Report of the plan; empty if the rows came from elsewhere."""
    mask_is: str = ""
    """What the masks are: "answers" = which tokens the assistant wrote, "weights" = of the loss; "" is not known."""
    labels: Labels = "document"
    format: str = FORMAT
    schema: int = SCHEMA
    longspan: str = longspan.__version__


def read_rows_manifest(path: str | Path) -> RowsManifest:
    """Read the manifest of a folder of rows. Raises DataError when there is none, or it is malformed."""
    file = Path(path) / MANIFEST
    content = read_json(file)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(
            f"{file} is not the manifest of packed rows",
            fix="give a token store as a store, or pack it with `longspan data pack`",
        )
    fields = set(RowsManifest._fields)
    wanted = fields - {"mask_is", "labels"}  # which rows of earlier versions do not have
    if content.get("schema") != SCHEMA or not wanted <= set(content) <= fields:
        raise DataError(f"{file} was written by another version or is damaged", fix="write the rows again")
    manifest = RowsManifest(**content)
    counts = (manifest.rows, manifest.length)
    pieces = manifest.pieces if isinstance(manifest.pieces, list) else [None]
    if not (
        all(isinstance(count, int) and count >= 0 for count in counts)
        and all(
            isinstance(piece, dict) and {"file", "rows", "bytes", "id_sum"} <= set(piece) for piece in pieces
        )
        and isinstance(manifest.source_names, list)
        and manifest.row_format in FORMATS
    ):
        raise DataError(f"{file} is malformed", fix="write the rows again")
    return manifest


def is_token_store(path: str | Path) -> bool:
    """Whether a folder has the manifest of a token store, or one that is of nothing else."""
    file = Path(path) / MANIFEST
    if not file.is_file():
        return False
    content = read_json(file)
    return not (isinstance(content, dict) and content.get("format") == FORMAT)
