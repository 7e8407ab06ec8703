"""The retrieval corpus of CEPE: chunks of documents with the text that follows each, as JSON lines.

    OUT/retrieval/SHARD/DOMAIN.jsonl    {"id": "arxiv_3_0", "contents": ..., "neighbor": ...,
                                         "contents_token_ids": [...], "neighbor_token_ids": [...]}

Chunk j of a document is its tokens [512 j, 512 (j + 1)), its neighbor the up to 512 tokens after them. A document
of 1200 tokens gives [0, 512) with neighbor [512, 1024) and [512, 1024) with neighbor [1024, 1200); shorter than
512 it gives none. Chunks come from the retrieval part of the split that the pairs have, never from theirs.

Shard s takes entries s * k to (s + 1) * k of one random order of all chunks of a domain: shards share no chunk
and may be written by different machines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pydantic
from numpy.typing import NDArray

from longspan.core.config import Config, Length
from longspan.core.errors import ArgumentError, DataError
from longspan.core.files import atomic_write, write_json
from longspan.core.progress import progress
from longspan.core.shuffling import permuted
from longspan.data.exchange.token_documents import TokenDocuments
from longspan.data.pairs.windows import (
    MANIFEST,
    PARTS,
    PairCount,
    divide,
    domain_shares,
    folder_name,
    new_folder,
    split_parts,
)
from longspan.data.tokenizer import Tokenizer

FOLDER = "retrieval"


class RetrievalConfig(Config):
    """Which chunks to take."""

    samples: int = pydantic.Field(gt=0)
    """Chunks of one shard, all domains together."""
    num_shards: int = pydantic.Field(100, gt=0)
    """Shards there are to be."""
    chunk: Length = pydantic.Field(512, gt=0)
    """Tokens of a chunk, and at most of its neighbor."""
    mode: Literal["ab", "concat"] = "concat"
    """Published shares to fall back on; see `weights`."""
    weights: dict[str, float] = pydantic.Field(default_factory=dict)
    """Share of the chunks by domain, as of pairs."""


class Chunks(NamedTuple):
    """Chunks of one domain, in the order in which they are written."""

    document: NDArray[np.int64]
    start: NDArray[np.int64]
    """Tokens of the document before the chunk."""


@dataclass(frozen=True, eq=False)
class RetrievalPlan:
    """Every chunk of one shard by its place; made by `plan_retrieval`."""

    spec: RetrievalConfig
    seed: int
    shard: int
    documents: str
    """Fingerprint of the documents."""
    chunks: Mapping[str, Chunks]
    """By domain."""
    counts: tuple[PairCount, ...]
    """`pairs` counts chunks; `available` those of all shards."""

    @property
    def fingerprint(self) -> str:
        """16 hex characters over everything that decides the chunks."""
        parts = [self.spec.to_dict(), self.seed, self.shard, self.documents]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def plan_retrieval(
    spec: RetrievalConfig, documents: TokenDocuments, shard: int, seed: int = 0
) -> RetrievalPlan:
    """Choose the chunks of a shard; reads lengths alone, memory of some 40 bytes a document.

    Raises:
        ArgumentError: there is no such shard, or a weight names a domain that is not there.
        DataError: the shards before this one have taken every chunk.
    """
    if not 0 <= shard < spec.num_shards:
        raise ArgumentError("there is no such shard", found=shard, allowed=f"0 to {spec.num_shards - 1}")
    shares = domain_shares(spec.weights, spec.mode, documents.domains)
    in_part = split_parts(documents, seed) == PARTS.index(FOLDER)
    wanted = divide(spec.samples, [shares[domain] for domain in documents.domains])
    chunks: dict[str, Chunks] = {}
    counts = []
    for number, domain in enumerate(documents.domains):
        members = np.flatnonzero(in_part & (documents.domain == number))
        ends = np.cumsum(documents.tokens[members] // spec.chunk)
        available = int(ends[-1]) if len(ends) else 0
        bounds = [min(at * wanted[number], available) for at in (shard, shard + 1)]
        taken = permuted(available, np.arange(*bounds), seed, "retrieval", domain)
        member = np.searchsorted(ends, taken, side="right")
        first = ends - documents.tokens[members] // spec.chunk
        chunks[domain] = Chunks(members[member], (taken - first[member]) * spec.chunk)
        counts.append(PairCount(FOLDER, domain, len(members), available, wanted[number], len(taken)))
    if not any(count.pairs for count in counts):
        raise DataError(
            f"no chunk is left for shard {shard}",
            found=f"{sum(count.available for count in counts)} chunks of {spec.chunk} tokens",
            fix="ask for fewer samples a shard, or give more documents",
        )
    return RetrievalPlan(spec, seed, shard, documents.fingerprint, chunks, tuple(counts))


def write_retrieval(
    plan: RetrievalPlan, documents: TokenDocuments, tokenizer: Tokenizer, out: str | Path
) -> Path:
    """Write `OUT/retrieval/SHARD/DOMAIN.jsonl`; a shard that is complete and made from the same plan is kept.

    The texts leave out BOS and EOS, the ids do not.

    Raises:
        DataError: the shard stands there already, made otherwise.
        RunError: another job is at work on it.
    """
    for domain in plan.chunks:
        folder_name(domain)  # said before the first is written
    folder = Path(out) / FOLDER / str(plan.shard)
    config = {"plan": plan.fingerprint, "tokenizer": tokenizer.fingerprint}
    framing = np.array([each for each in (tokenizer.bos_id, tokenizer.eos_id) if each is not None], np.int64)
    with new_folder(folder, config) as aside:
        if aside is None:
            return folder
        for domain, chunks in plan.chunks.items():
            if not len(chunks.document):
                continue
            with (
                progress(f"chunks of {domain}", total=len(chunks.document), unit="chunks") as bar,
                atomic_write(aside / f"{folder_name(domain)}.jsonl", "w") as file,
            ):
                for count, (document, start) in enumerate(zip(*map(np.ndarray.tolist, chunks))):
                    ids = documents.ids(document, start, start + 2 * plan.spec.chunk)
                    line = _line(ids, plan.spec.chunk, tokenizer, framing)
                    file.write(json.dumps({"id": f"{domain}_{plan.shard}_{count}", **line}) + "\n")
                    bar.advance(1)
        counts = [count._asdict() for count in plan.counts]
        write_json(aside / MANIFEST, {**config, "spec": plan.spec.to_dict(), "counts": counts})
    return folder


def _line(ids: NDArray[Any], chunk: int, tokenizer: Tokenizer, framing: NDArray[np.int64]) -> dict[str, Any]:
    parts = {"contents": ids[:chunk], "neighbor": ids[chunk:]}
    texts = {name: tokenizer.decode(part[~np.isin(part, framing)]) for name, part in parts.items()}
    return {**texts, **{f"{name}_token_ids": part.tolist() for name, part in parts.items()}}
