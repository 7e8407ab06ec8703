"""Pairs of an encoder and a decoder window, as CEPE trains on (Yen et al. 2024, arXiv:2402.16617).

Window j of a stream of tokens is [j * D, P + (j + 1) * D): the last D tokens are the decoder's, the P before
them the encoder's. Decoder windows never share a token; encoder windows overlap. With P = 8, D = 4 a document
of 20 tokens gives

    encoder  0..8  4..12  8..16
    decoder  8..12 12..16 16..20

    ab        a stream is one document, of at least P + D tokens
    concat    a stream is all documents of a part one after another (of one file where files are split)

Each domain is split 1 : 49 : 50 into test, train and retrieval, by whole files where it has 100 or more, else
by documents. The split depends on the documents and the seed alone: it is the same for all windows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pydantic
from numpy.typing import NDArray

from longspan.core.config import Config, Length
from longspan.core.errors import ArgumentError, DataError
from longspan.core.files import atomic_dir, read_json, remove_leftovers, write_json
from longspan.core.progress import progress
from longspan.core.shuffling import hashed, permuted
from longspan.data.exchange.token_documents import TokenDocuments
from longspan.data.jobs.job_lock import JobLock
from longspan.data.store.directory import MDSWriter
from longspan.data.store.mds import Column
from longspan.data.store.token_store import SHARD_BYTES

PARTS = ("test", "train", "retrieval")
MIN_FILES = 100
"""From so many files on, a domain is split by files: 1% is a file."""
MANIFEST = "pairs.json"

CEPE_SHARES: dict[str, dict[str, float]] = {
    "ab": {"arxiv": 0.5, "book": 0.5},
    "concat": {
        "arxiv": 0.025,
        "book": 0.045,
        "c4-rp": 0.15,
        "cc": 0.67,
        "github": 0.045,
        "stackexchange": 0.02,
        "wiki": 0.045,
    },
}
"""Shares of the samples by domain, as published."""

PairFormat = Literal["mds", "cepe"]


class PairConfig(Config):
    """Which windows to take."""

    mode: Literal["ab", "concat"]
    """ab: windows inside long documents. concat: windows of documents one after another."""
    encoder: Length = pydantic.Field(4096, gt=0)
    """Tokens before the decoder's (P), such as 4k."""
    decoder: Length = pydantic.Field(4096, gt=0)
    """Tokens of the decoder (D)."""
    test: int = pydantic.Field(0, ge=0)
    """Pairs for evaluation, all domains together; 0: none."""
    train: int = pydantic.Field(0, ge=0)
    """Pairs for training; 0: none."""
    weights: dict[str, float] = pydantic.Field(default_factory=dict)
    """Share of the pairs by domain, in any unit; a domain that is not named gets none. Without any: CEPE's shares if
    every domain is one of theirs, else equal ones."""


class PairCount(NamedTuple):
    """What one domain gives to one part."""

    part: str
    domain: str
    documents: int
    """Documents of the part."""
    available: int
    """Windows there are."""
    wanted: int
    pairs: int
    """Windows taken: fewer than wanted where there are not so many."""


class PlacedWindows(NamedTuple):
    """Where the windows of one part and domain begin; each is encoder + decoder tokens long."""

    order: NDArray[np.int64]
    """Documents in the order in which a window runs through them."""
    first: NDArray[np.int64]
    """Index into `order` of the document in which each window begins [windows]."""
    offset: NDArray[np.int64]
    """Tokens of that document before the window [windows]."""


@dataclass(frozen=True, eq=False)
class PairPlan:
    """Every pair by the place of its tokens; made by `plan_pairs`."""

    spec: PairConfig
    seed: int
    documents: str
    """Fingerprint of the documents."""
    windows: Mapping[tuple[str, str], PlacedWindows]
    """By (part, domain), in the order in which they are written."""
    counts: tuple[PairCount, ...]

    @property
    def fingerprint(self) -> str:
        """16 hex characters over everything that decides the pairs."""
        parts = [self.spec.to_dict(), self.seed, self.documents]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def split_parts(documents: TokenDocuments, seed: int) -> NDArray[np.uint8]:
    """Return the part of each document, an index into PARTS [documents].

    Of n files (or documents) of a domain, in an order drawn from the seed, max(1, n // 100) are test, those up
    to n // 2 train (at least one if n > 1), the rest retrieval. Documents of one key stay together.
    """
    part = np.zeros(len(documents.tokens), np.uint8)
    for number, domain in enumerate(documents.domains):
        members = np.flatnonzero(documents.domain == number)
        if splits_by_files(documents, members):
            units, unit_of = np.unique(documents.file[members], return_inverse=True)
            keys = np.arange(len(units), dtype=np.uint64)
        else:
            keys, unit_of = np.unique(documents.key[members], return_inverse=True)
        count = len(keys)
        num_test = max(1, count // 100)
        num_train = max(count // 2 - num_test, 1)
        # Hashes of distinct keys are distinct: the finaliser is a bijection.
        rank = np.argsort(np.argsort(hashed(keys, seed, "pairs-split", domain)))
        part[members] = np.searchsorted([num_test, num_test + num_train], rank, side="right")[unit_of]
    return part


def splits_by_files(documents: TokenDocuments, members: NDArray[np.int64]) -> bool:
    """Whether a domain has enough files to be split by them."""
    return bool(len(documents.files)) and len(np.unique(documents.file[members])) >= MIN_FILES


def plan_pairs(spec: PairConfig, documents: TokenDocuments, seed: int = 0) -> PairPlan:
    """Choose windows at random, without replacement; reads lengths alone.

    Memory: some 50 bytes a document and 24 a pair; 10 million documents take 4 s.

    Raises:
        ArgumentError: a weight names a domain that is not there.
    """
    shares = domain_shares(spec.weights, spec.mode, documents.domains)
    part_of = split_parts(documents, seed)
    windows: dict[tuple[str, str], PlacedWindows] = {}
    counts = []
    for part, samples in (("test", spec.test), ("train", spec.train)):
        wanted = divide(samples, [shares[domain] for domain in documents.domains])
        for number, domain in enumerate(documents.domains):
            if not wanted[number]:
                continue
            in_domain = documents.domain == number
            members = np.flatnonzero(in_domain & (part_of == PARTS.index(part)))
            by_files = splits_by_files(documents, np.flatnonzero(in_domain))
            streams = _streams(spec, documents, members, by_files)
            chosen, available = _choose(
                spec, documents, members, streams, wanted[number], (seed, part, domain)
            )
            windows[part, domain] = chosen
            counts.append(PairCount(part, domain, len(members), available, wanted[number], len(chosen.first)))
    return PairPlan(spec, seed, documents.fingerprint, windows, tuple(counts))


def domain_shares(given: Mapping[str, float], mode: str, domains: tuple[str, ...]) -> dict[str, float]:
    """Return the share of each domain, normalised; see `PairConfig.weights`.

    Raises:
        ArgumentError: a weight names a domain that is not there, or none is above zero.
    """
    published = CEPE_SHARES[mode]
    shares = dict(given)
    if not shares:
        shares = dict(published) if set(domains) <= set(published) else dict.fromkeys(domains, 1.0)
        shares = {domain: shares[domain] for domain in domains}
    unknown = sorted(set(shares) - set(domains))
    total = sum(shares.values())
    if unknown or not 0 < total < float("inf") or min(shares.values()) < 0:
        raise ArgumentError(
            "bad weights of the domains",
            found=", ".join(f"{name}={share}" for name, share in shares.items()),
            allowed=f"weights above 0 of {', '.join(domains)}",
        )
    return {domain: shares.get(domain, 0.0) / total for domain in domains}


def divide(samples: int, shares: list[float]) -> list[int]:
    """Divide samples by shares that sum to 1, to the last one: the largest remainders are rounded up."""
    exact = [samples * share for share in shares]
    whole = [int(each) for each in exact]
    order = sorted(range(len(shares)), key=lambda number: (whole[number] - exact[number], number))
    for number in order[: samples - sum(whole)]:
        whole[number] += 1
    return whole


def read_window(documents: TokenDocuments, windows: PlacedWindows, number: int, length: int) -> NDArray[Any]:
    """Return the tokens of a window [length]."""
    parts: list[NDArray[Any]] = []
    place, offset, missing = int(windows.first[number]), int(windows.offset[number]), length
    while missing:
        ids = documents.ids(int(windows.order[place]), offset, offset + missing)
        parts.append(ids)
        missing -= len(ids)
        place, offset = place + 1, 0
    return np.concatenate(parts)


def write_pairs(
    plan: PairPlan, documents: TokenDocuments, out: str | Path, *, format: PairFormat = "mds"
) -> list[Path]:
    """Write `OUT/{test,train}/DOMAIN/`, MDS folders with columns token_ids, prev_token_ids and domain.

    A part that is complete and made from the same plan is kept. Holds one shard in memory.

    Args:
        format: "cepe" writes int64 arrays, which CEPE's loader makes tensors of; "mds" the store's own dtype.

    Raises:
        DataError: a part stands there already, made otherwise; or a domain cannot name a folder.
        RunError: another job is at work on a part.
    """
    dtype = np.dtype(np.int64) if format == "cepe" else documents.dtype
    for _, domain in plan.windows:
        folder_name(domain)  # said before the first is written
    written = []
    for part in PARTS[:2]:
        domains = {domain: rows for (of, domain), rows in plan.windows.items() if of == part}
        if not domains:
            continue
        folder = Path(out) / part
        written.append(folder)
        config = {"plan": plan.fingerprint, "dtype": dtype.name, "part": part}
        counts = [count._asdict() for count in plan.counts if count.part == part]
        with new_folder(folder, config) as aside:
            if aside is None:
                continue
            for domain, rows in domains.items():
                if len(rows.first):
                    _write_domain(aside / folder_name(domain), plan.spec, documents, domain, rows, dtype)
            write_json(aside / MANIFEST, {**config, "spec": plan.spec.to_dict(), "counts": counts})
    return written


@contextmanager
def new_folder(folder: Path, config: Mapping[str, Any]) -> Iterator[Path | None]:
    """Yield a place to write that becomes `folder` at the end, or None if `folder` was made from this config.

    What a killed run left behind is removed.

    Raises:
        DataError: something else stands there.
        RunError: another job is at work on it.
    """
    with JobLock(folder.parent / f".{folder.name}.lock", what=str(folder)) as lock:
        try:
            remove_leftovers(folder.parent, folder.name)
            if _is_complete(folder, config):
                yield None
            else:
                with atomic_dir(folder) as aside:
                    yield aside
        finally:
            lock.path.unlink()


def _is_complete(folder: Path, config: Mapping[str, Any]) -> bool:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    found = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    if not isinstance(found, dict) or any(found.get(name) != value for name, value in config.items()):
        raise DataError(
            f"{folder} already exists and was made otherwise",
            fix="choose another --out, or remove it to make it again",
        )
    return True


def folder_name(domain: str) -> str:
    """Return the domain as the name of a folder or file. Raises DataError if it cannot be one."""
    if domain in ("", ".", "..") or set(domain) & set("/\\\0") or domain == MANIFEST:
        raise DataError(f"the domain {domain!r} cannot name a folder", fix="name the source otherwise")
    return domain


class _Streams(NamedTuple):
    """Streams of tokens: where each begins, counted over the members of a part, and its windows."""

    start: NDArray[np.int64]
    windows: NDArray[np.int64]


def _streams(
    spec: PairConfig, documents: TokenDocuments, members: NDArray[np.int64], by_files: bool
) -> _Streams:
    tokens = documents.tokens[members]
    ends = np.cumsum(tokens)
    if spec.mode == "ab":
        start, size = ends - tokens, tokens
    else:
        stream = documents.file[members] if by_files else np.zeros(len(members), np.uint32)
        # Members are in canonical order, so those of one file stand together.
        first = np.flatnonzero(np.diff(stream, prepend=np.uint32(2**32 - 1)))
        start = (ends - tokens)[first]
        size = np.diff(start, append=ends[-1] if len(ends) else 0)
    return _Streams(start, np.maximum((size - spec.encoder) // spec.decoder, 0))


def _choose(
    spec: PairConfig,
    documents: TokenDocuments,
    members: NDArray[np.int64],
    streams: _Streams,
    wanted: int,
    purpose: tuple[int, str, str],
) -> tuple[PlacedWindows, int]:
    """Return the windows taken, in random order, and how many there were."""
    ends = np.cumsum(streams.windows)
    available = int(ends[-1]) if len(ends) else 0
    seed, *names = purpose
    taken = permuted(available, np.arange(min(wanted, available)), seed, "pairs", *names)
    stream = np.searchsorted(ends, taken, side="right")
    window = taken - (ends - streams.windows)[stream]
    place = streams.start[stream] + window * spec.decoder
    tokens = documents.tokens[members]
    first = np.searchsorted(np.cumsum(tokens), place, side="right")
    return PlacedWindows(members, first, place - (np.cumsum(tokens) - tokens)[first]), available


def _write_domain(
    folder: Path,
    spec: PairConfig,
    documents: TokenDocuments,
    domain: str,
    rows: PlacedWindows,
    dtype: np.dtype[Any],
) -> None:
    folder.mkdir()
    array = f"ndarray:{dtype.name}"
    columns = [Column("token_ids", array), Column("prev_token_ids", array), Column("domain", "str")]
    writer = MDSWriter(folder, columns, size_limit=SHARD_BYTES)
    for ids in _rows(documents, rows, spec.encoder + spec.decoder, domain):
        ids = ids.astype(dtype)
        writer.write({
            "token_ids": ids[spec.encoder :],
            "prev_token_ids": ids[: spec.encoder],
            "domain": domain,
        })  # fmt: skip
    writer.finish()


def _rows(documents: TokenDocuments, rows: PlacedWindows, length: int, domain: str) -> Iterator[NDArray[Any]]:
    with progress(f"pairs of {domain}", total=len(rows.first), unit="pairs") as bar:
        for number in range(len(rows.first)):
            yield read_window(documents, rows, number, length)
            bar.advance(1)
