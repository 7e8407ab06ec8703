"""Packed rows in every form in which others published theirs, made by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longspan.data.store import Column, MDSWriter

FORMS = ("jsonl", "parquet", "saved", "hub", "mds")


def chunk(first: int, *documents: tuple[str, int]) -> dict[str, Any]:
    """Return a row as Fu et al. published theirs, ids from `first` on, of documents (source, tokens)."""
    ends = np.cumsum([0, *(tokens for _, tokens in documents)]).tolist()
    spans = [
        {"source": name, "start": start, "end": end}
        for (name, _), start, end in zip(documents, ends, ends[1:])
    ]
    return {"input_ids": list(range(first, first + ends[-1])), "labels": first + ends[-1], "source": spans}


def publish(folder: Path, rows: Sequence[dict[str, Any]], form: str, *, group: int = 2) -> Path:
    """Write rows to `folder`: JSON lines, parquet, a saved data set, one as downloaded from the hub, or MDS."""
    folder.mkdir(parents=True)
    half = -(-len(rows) // 2)
    parts = [part for part in (rows[:half], rows[half:]) if part]
    if form == "mds":
        write_mds(folder, rows)
    elif form == "saved":
        names = [f"data-{number:05}-of-{len(parts):05}.arrow" for number in range(len(parts))]
        for name, part in zip(names, parts):
            table = pa.Table.from_pylist(list(part))
            with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
        state = {"_data_files": [{"filename": name} for name in names]}
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "dataset_info.json").write_text("{}")
    else:
        place = folder / "data" if form == "hub" else folder
        place.mkdir(exist_ok=True)
        suffix = "jsonl" if form == "jsonl" else "parquet"
        for number, part in enumerate(parts):
            path = place / f"train-{number:05}-of-{len(parts):05}.{suffix}"
            if form == "jsonl":
                path.write_text("\n".join(map(json.dumps, part)))  # the last line has no end, as theirs
            else:
                pq.write_table(pa.Table.from_pylist(list(part)), path, row_group_size=group)
        if form == "hub":
            (folder / "README.md").write_text("# A data set")
            other = pa.Table.from_pylist([chunk(90_000, ("other", 3))])
            pq.write_table(other, place / "validation-00000-of-00001.parquet")
    return folder


def write_mds(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as ProLong's: `indices`, one domain a row; shards of a few rows."""
    columns = [
        Column("domain", "str"),
        Column("indices", "ndarray:uint32"),
        Column("input_ids", "ndarray:uint32"),
        Column("length", "int"),
    ]
    writer = MDSWriter(folder, columns, size_limit=400)
    for row in rows:
        spans = row.get("source") or [{"source": ".", "start": 0, "end": len(row["input_ids"])}]
        indices = np.array([[span["start"], span["end"]] for span in spans], np.uint32)
        ids = np.array(row["input_ids"], np.uint32)
        writer.write({"domain": spans[0]["source"], "indices": indices, "input_ids": ids, "length": len(ids)})
    writer.finish()
