"""Checking what is on disk: every file, every sample, every count, and what of an input is still missing.

Nothing is repaired. Each problem is one line; a damaged shard does not hide the next one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longspan.core.columns import folder_kind
from longspan.core.errors import ArgumentError, DataError
from longspan.core.files import read_json, sha256_file
from longspan.core.progress import progress
from longspan.data.packed.manifest import is_token_store, read_rows_manifest
from longspan.data.packed.packed_rows import PackedRows
from longspan.data.packed.row_formats import id_sum
from longspan.data.plans import mixture, packing
from longspan.data.plans.mixture import MixturePlan
from longspan.data.plans.packing import PackPlan
from longspan.data.rows.loader import RowLoader
from longspan.data.store import MDSDirectory, TokenStore, read_manifest
from longspan.data.store.directory import stay_inside
from longspan.data.store.document_columns import mask_digest
from longspan.data.store.lengths import LengthTable
from longspan.data.store.mds import INDEX, ShardInfo, parse_index
from longspan.data.store.token_store import MANIFEST

MAX_PROBLEMS = 100


class VerifyReport(NamedTuple):
    """What was checked and what was found."""

    path: str
    kind: str
    """"token store", "packed rows", "mixture plan", "pack plan" or "MDS folder"."""
    counts: dict[str, int]
    """Such as documents, tokens, shards."""
    problems: list[str]
    """One line each, at most 100."""
    missing: list[str] | None
    """Documents of the input that are not in the store, as path:position; None: not asked."""

    @property
    def is_whole(self) -> bool:
        """Whether nothing is wrong; documents that are still missing are not wrong."""
        return not self.problems


def verify(path: str | Path, *, against: Sequence[str] = ()) -> VerifyReport:
    """Check a token store, packed rows (also of other tools), a plan or any MDS folder; reads every byte.

    Args:
        path: what to check.
        against: inputs of a token store, read as the store was made; documents not in it are listed.

    Raises:
        DataError: `path` is none of these, or is so damaged that it cannot be told what it is.
        ArgumentError: `against` is given for something that is not a token store.
    """
    path = Path(path)
    kind, check = _check_of(path)
    if against and kind != "token store":
        raise ArgumentError("only a token store is compared with its input", found=str(path))
    problems = _Problems()
    counts: dict[str, int] = {}
    try:
        check(path, counts, problems)
    except DataError as error:
        problems.add(str(error))
    missing = _missing(path, against) if against and not problems.lines else None
    return VerifyReport(str(path), kind, counts, problems.lines, missing)


def _check_of(path: Path) -> tuple[str, Check]:
    """Return what stands at a path, and what checks it."""
    kind = folder_kind(path)
    if is_token_store(path):
        return "token store", _check_store
    if (path / MANIFEST).is_file():
        return "packed rows", _check_rows
    if kind == mixture.KIND:
        return "mixture plan", _check_mixture
    if kind == packing.KIND:
        return "pack plan", _check_packing
    if (path / INDEX).is_file():
        return "MDS folder", _check_shards
    try:
        return "packed rows", partial(_check_published, PackedRows(path))
    except DataError as error:
        raise DataError(
            f"{path} is not something that can be verified",
            found=str(error).splitlines()[0],
            allowed="stores, rows, plans, MDS folders",
        ) from None


class _Problems:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, text: str) -> None:
        """Note a problem, on one line."""
        if len(self.lines) < MAX_PROBLEMS:
            self.lines.append(" ".join(text.split()))

    def full(self) -> bool:
        """Whether enough is known."""
        return len(self.lines) >= MAX_PROBLEMS


Check = Callable[[Path, dict[str, int], _Problems], None]
"""Fills the counts. Raises DataError where nothing more can be checked, which is then a problem too."""


def _check_shards(path: Path, counts: dict[str, int], problems: _Problems) -> None:
    """Check index, sizes, hashes, and decode every sample of the shards that are there."""
    infos = parse_index(read_json(path / INDEX), where=str(path / INDEX))
    stay_inside(path, [info.basename for info in infos])
    good = [number for number, info in enumerate(infos) if _check_file(path, info, problems)]
    counts |= {"shards": len(infos), "samples": sum(info.num_samples for info in infos)}
    if len(good) < len(infos):
        return
    folder = MDSDirectory(path)
    for number in good:
        try:
            shard = folder.shard(number)
            for sample in range(len(shard)):
                shard[sample]
        except DataError as error:
            problems.add(str(error))


def _check_file(path: Path, info: ShardInfo, problems: _Problems) -> bool:
    file = path / info.basename
    if not file.is_file():
        if info.zip_basename is not None and (path / info.zip_basename).is_file():
            return True
        problems.add(f"{info.basename} is missing")
    elif file.stat().st_size != info.num_bytes:
        problems.add(f"{info.basename} has {file.stat().st_size:,} bytes instead of {info.num_bytes:,}")
    elif "sha256" in info.hashes and sha256_file(file) != info.hashes["sha256"]:
        problems.add(f"{info.basename} was changed or damaged: its SHA-256 differs")
    else:
        return True
    return False


def _check_store(path: Path, counts: dict[str, int], problems: _Problems) -> None:
    manifest = read_manifest(path)
    counts |= {"documents": manifest.documents, "tokens": manifest.tokens}
    _check_shards(path, counts, problems)
    if problems.lines:
        return
    store = TokenStore(path)
    digests = np.zeros(len(store), np.uint64)
    with progress("verify", total=len(store), unit="docs") as bar:
        for document, sample in enumerate(MDSDirectory(path)):
            if problems.full():
                return
            problem, digests[document] = _check_document(store, document, sample)
            if problem:
                problems.add(f"document {document}: {problem}")
            bar.advance()
    digest = hashlib.sha256()
    for column in (store.lengths.key, store.lengths.tokens, digests):
        digest.update(np.ascontiguousarray(column).data)
    digest.update(store.part_table.tobytes())
    if not problems.lines and digest.hexdigest() != manifest.fingerprint:
        problems.add("the fingerprint in the manifest is not that of the documents")


def _check_document(store: TokenStore, document: int, sample: dict[str, Any]) -> tuple[str | None, int]:
    """Return what is wrong with a document, and the digest of its mask (0 where all weights are 1)."""
    try:
        ids, mask = store.tree_tokens(document), store.mask(document)
        name = store.source(document)
    except (DataError, IndexError) as error:
        return str(error), 0
    if int(ids.max()) >= store.vocab_size:
        return f"token {ids.max()} in a vocabulary of {store.vocab_size}", 0
    if not name:
        return "its source has no name", 0
    same = sample.get("domain", name) == name and np.array_equal(sample["input_ids"].reshape(-1), ids)
    if not same or not (mask is None or np.array_equal(sample["mask"], mask)):
        return "it is not what the length table says", 0
    return None, mask_digest(mask)


def _check_rows(path: Path, counts: dict[str, int], problems: _Problems) -> None:
    manifest = read_rows_manifest(path)
    counts |= {
        "rows": manifest.rows,
        "tokens": manifest.rows * manifest.length,
        "pieces": len(manifest.pieces),
    }
    for piece in manifest.pieces:
        file = path / Path(str(piece["file"])).name
        if not file.is_file():
            problems.add(f"{file.name} is missing")
        elif file.stat().st_size != piece["bytes"]:
            problems.add(f"{file.name} has {file.stat().st_size:,} bytes instead of {piece['bytes']:,}")
    if problems.lines:
        return
    rows = PackedRows(path)
    if (rows.num_rows, rows.length) != (manifest.rows, manifest.length):
        problems.add(f"{rows.num_rows} rows of {rows.length} tokens, but the manifest says otherwise")
        return
    first = 0
    for piece in manifest.pieces:
        total = 0
        for index in range(first, first + int(piece["rows"])):
            try:
                ids = rows.row(index).input_ids
            except (DataError, ArgumentError) as error:
                problems.add(str(error))
                continue
            total = (total + id_sum(ids)) % 2**64
            if manifest.vocab_size is not None and int(ids.max()) >= manifest.vocab_size:
                problems.add(f"row {index}: token {ids.max()} in a vocabulary of {manifest.vocab_size}")
        if total != piece["id_sum"]:
            problems.add(f"{piece['file']} was changed or damaged: its ids have another sum")
        first += int(piece["rows"])


def _check_published(rows: PackedRows, path: Path, counts: dict[str, int], problems: _Problems) -> None:
    """Read every row of a folder that another tool packed."""
    counts |= {"rows": rows.num_rows, "tokens": 0}
    with progress("verify", total=rows.num_rows, unit="rows") as bar:
        for index in range(rows.num_rows):
            if problems.full():
                break
            try:
                counts["tokens"] += len(rows.row_of_any_length(index).input_ids)
            except DataError as error:
                problems.add(str(error))
            bar.advance()


def _check_mixture(path: Path, counts: dict[str, int], problems: _Problems) -> None:
    plan = MixturePlan.load(path)
    lengths = _lengths(plan.stores)
    if lengths is not None and lengths.fingerprint != plan.lengths_fingerprint:
        problems.add("the stores have changed since the plan was made")
    counts |= {"documents": plan.report.documents, "tokens": plan.report.tokens}
    if len(plan.documents) != plan.report.documents:
        problems.add(f"{len(plan.documents):,} documents, but its report says {plan.report.documents:,}")
    if lengths is not None and not problems.lines:
        found = int(lengths.tokens[plan.documents].sum(dtype=np.uint64))
        if found != plan.report.tokens:
            problems.add(f"{found:,} tokens, but its report says {plan.report.tokens:,}")


def _check_packing(path: Path, counts: dict[str, int], problems: _Problems) -> None:
    plan = PackPlan.load(path)
    loader = RowLoader([TokenStore(store) for store in plan.stores], plan)
    report = plan.report
    counts |= {"rows": plan.num_rows, "tokens": report.tokens_packed}
    if report.rows != plan.num_rows:
        problems.add(f"{plan.num_rows} rows, but its report says {report.rows}")
    if report.tokens_in != report.tokens_packed + sum(report.dropped.values()):
        problems.add("tokens in are not tokens packed plus tokens dropped")
    for index in range(plan.num_rows):
        if problems.full():
            break
        try:
            loader.row(index)
        except (DataError, IndexError) as error:
            problems.add(str(error))


def _lengths(stores: Sequence[str]) -> LengthTable | None:
    return LengthTable.concatenate([TokenStore(store).lengths for store in stores]) if stores else None


def _missing(path: Path, inputs: Sequence[str]) -> list[str]:
    """Return where the documents stand that the store lacks, by the key of source and text."""
    store = TokenStore(path)
    keys = np.sort(np.asarray(store.lengths.key))
    return [
        place
        for place, key in _keys_of(inputs, store.manifest.config)
        if (at := int(np.searchsorted(keys, np.uint64(key)))) == len(keys) or int(keys[at]) != key
    ]


def _keys_of(inputs: Sequence[str], config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    from longspan.data.readers import read_documents
    from longspan.data.tokenize import document_key

    names = (
        "text_field",
        "source_field",
        "messages_field",
        "variable_fields",
        "group_by",
        "order_by",
        "header_field",
    )
    fields = {name: config[name] for name in names if config.get(name) is not None}
    for document in read_documents(inputs, **fields):
        yield (
            f"{document.path}:{document.position}",
            document_key(document.source, document.text.encode()),
        )
