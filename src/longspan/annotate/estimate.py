"""What annotations will take on disk, and what other settings would save, from a short sample of the teacher."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from longspan.annotate.job import OpenJob
from longspan.annotate.rounding import words_for_mass
from longspan.annotate.sources import check_row
from longspan.data.rows.annotations import id_dtype

__all__ = ["AnnotateEstimate", "Option", "bytes_per_token", "estimate"]

SAMPLE_TOKENS = 2048
SAMPLE_ROWS = 8
MASSES = (0.9, 0.99, 0.999)
FEWER_WORDS = (10, 20)
OFFSET_BYTES = 4


class Option(NamedTuple):
    """One way to keep what the teacher says."""

    name: str
    """As options of the command."""
    words: float
    """Kept of a token, in the mean."""
    bytes_per_token: float
    num_bytes: int
    saves: float
    """Share of the bytes that it saves against what was asked for; negative: it takes more."""
    mass: float
    """Mass of the kept words, in the mean of the sample."""


class AnnotateEstimate(NamedTuple):
    """What a job will write."""

    rows: int
    tokens: int
    num_bytes: int
    sample_tokens: int
    """Tokens that the teacher was asked about to say so."""
    options: list[Option]
    """The first is what was asked for."""


def bytes_per_token(words: float, *, id_bytes: int, logprob_bytes: int, ragged: bool) -> float:
    """Return the bytes of one token with so many words: ids, logarithms, tail, and where they stand if that varies."""
    return words * (id_bytes + logprob_bytes) + logprob_bytes + (OFFSET_BYTES if ragged else 0)


def estimate(job: OpenJob, first: int, stop: int) -> AnnotateEstimate:
    """Ask the teacher about the beginnings of a few rows, and count what each setting would keep.

    Cost: `SAMPLE_TOKENS` tokens of forward pass, however long the job is.

    Raises:
        ConfigError, DataError: a row that the teacher cannot read.
    """
    spec = job.spec
    tokens = int(job.source.lengths[first:stop].sum())
    sampled = list(_sample(job, first, stop))
    logprobs = np.concatenate(sampled) if sampled else np.full((1, spec.k), -np.log(spec.k), np.float32)
    masses = np.exp(logprobs, dtype=np.float64)
    id_bytes = 4 if spec.pairs is not None else np.dtype(id_dtype(job.teacher.vocab_size)).itemsize

    def option(k: int, dtype: str, mass: float | None) -> Option:
        name = f"--k {k}" if mass is None else f"--k {k} --mass {mass:g}"
        name += f" --dtype {dtype}" if dtype != "float16" else ""
        kept = np.arange(logprobs.shape[1]) < k
        words = float(min(k, logprobs.shape[1]))
        if mass is not None:
            counts = words_for_mass(logprobs[:, :k], mass)
            kept, words = np.arange(logprobs.shape[1]) < counts[:, None], float(counts.mean())
        size = bytes_per_token(
            words, id_bytes=id_bytes, logprob_bytes=np.dtype(dtype).itemsize, ragged=mass is not None
        )
        held = float(np.where(kept, masses, 0.0).sum(1).mean())
        return Option(name, words, size, round(size * tokens), 0.0, held)

    asked = option(spec.k, spec.dtype, spec.mass)
    others = [option(k, spec.dtype, spec.mass) for k in FEWER_WORDS if k < spec.k]
    if spec.pairs is None:
        others += [option(spec.k, spec.dtype, mass) for mass in MASSES if mass != spec.mass]
        others += [option(spec.k, spec.dtype, None)] if spec.mass is not None else []
        others.append(option(spec.k, "float32" if spec.dtype == "float16" else "float16", spec.mass))
    options = [
        each._replace(saves=1 - each.num_bytes / asked.num_bytes if asked.num_bytes else 0.0)
        for each in others
    ]
    return AnnotateEstimate(stop - first, tokens, asked.num_bytes, sum(map(len, sampled)), [asked, *options])


def _sample(job: OpenJob, first: int, stop: int) -> Iterator[np.ndarray]:
    """Yield logprobs [N, k] after tokens of some rows, spread over all of them."""
    numbers = np.unique(np.linspace(first, stop - 1, min(SAMPLE_ROWS, stop - first)).astype(int))
    share = -(-SAMPLE_TOKENS // len(numbers))
    for number in numbers.tolist():
        row = job.source.row(number)
        check_row(row, number, job.source, context=job.context, vocab_size=job.teacher.vocab_size)
        ids = row.ids[:share]
        if not len(ids):
            continue  # nothing but padding
        borders = np.append(row.cu_seqlens[row.cu_seqlens < len(ids)], len(ids))
        yield job.teacher.topk(ids.astype(np.int64), borders, k=job.spec.k).logprobs
