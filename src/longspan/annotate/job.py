"""The job: rows through the teacher, piece by piece, into a folder that a killed job goes on with.

A piece is a range of rows and becomes one shard file, written whole or not at all; the manifest is written when all
are there. A shard of several machines is a folder of its own, of rows `shard_range`; `merge` joins them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from longspan.annotate.config import AnnotateConfig, TeacherConfig
from longspan.annotate.rounding import cut_to_mass, round_masses
from longspan.annotate.sources import (
    AnnotateSource,
    AskedRow,
    DocumentSource,
    PairSource,
    check_row,
    open_source,
    too_long,
)
from longspan.core.errors import ArgumentError, DataError
from longspan.core.files import behind_link, read_json
from longspan.data.jobs import ArrayJob
from longspan.data.jobs.piece_folder import PieceFolder
from longspan.data.rows.annotations import (
    FORMAT,
    AnnotationManifest,
    cepe_columns,
    id_dtype,
    read_annotation_manifest,
    seal_annotations,
    topk_columns,
    write_annotation_shard,
)
from longspan.data.store import Column
from longspan.data.store.token_store import MANIFEST
from longspan.data.tokenizer import load_tokenizer
from longspan.infer.teacher import LocalTeacher, SharedTeacher, Teacher, TopK, check_k
from longspan.models.hf import evaluated_dtype, load_model, usable_device
from longspan.models.identity import model_identity
from longspan.models.lora_config import Quantization
from longspan.models.places import tokenizer_folder, tokenizer_home
from longspan.models.quantize import quantize
from longspan.models.rotary import hold_frequencies
from longspan.models.stand_in import check_unknown_family
from longspan.parallel.mesh import Mesh

__all__ = ["OpenJob", "annotation_folder", "open_job", "open_spec_source", "shard_range"]


class OpenJob(NamedTuple):
    """A teacher and what it is to read, both checked against each other."""

    spec: AnnotateConfig
    teacher: Teacher
    source: AnnotateSource
    identity: dict[str, Any]
    """path, fingerprint, rope, dtype and quantization of the teacher."""
    context: int | None
    """Tokens that it may read."""

    def rows(self, first: int, stop: int) -> Iterator[tuple[AskedRow, TopK]]:
        """Yield rows with the predictions asked for, several rows in a forward pass.

        Raises:
            ConfigError: a document is longer than the teacher's context.
            DataError: a row is damaged, or holds a token that the teacher does not know.
        """
        waiting: list[AskedRow] = []
        tokens = 0
        for number in range(first, stop):
            row = self.source.row(number)
            check_row(row, number, self.source, context=self.context, vocab_size=self.teacher.vocab_size)
            if waiting and tokens + len(row.ids) > self.spec.teacher.batch_tokens:
                yield from self._ask(waiting)
                waiting, tokens = [], 0
            waiting.append(row)
            tokens += len(row.ids)
        yield from self._ask(waiting)

    def _ask(self, rows: list[AskedRow]) -> Iterator[tuple[AskedRow, TopK]]:
        rows_to_read = [row for row in rows if len(row.ids)]
        if not rows_to_read:
            yield from ((row, _nothing(self.spec.k)) for row in rows)
            return
        starts = np.cumsum([0, *(len(row.ids) for row in rows_to_read)])
        borders = [row.cu_seqlens[1:] + start for row, start in zip(rows_to_read, starts)]
        asked = [
            (np.arange(len(row.ids)) if row.asked is None else row.asked) + start
            for row, start in zip(rows_to_read, starts)
        ]
        whole = all(row.asked is None for row in rows_to_read)
        found = self.teacher.topk(
            np.concatenate([row.ids for row in rows_to_read]).astype(np.int64),
            np.concatenate([np.zeros(1, np.int64), *borders]),
            k=self.spec.k,
            places=None if whole else np.concatenate(asked),
        )
        ends = iter(np.cumsum([len(places) for places in asked]).tolist())
        begin = 0
        for row in rows:
            end = next(ends) if len(row.ids) else begin
            yield row, TopK(*(column[begin:end] for column in found))
            begin = end


def _nothing(k: int) -> TopK:
    return TopK(np.zeros((0, k), np.int32), np.zeros((0, k), np.float32), np.zeros(0, np.float32))


def open_spec_source(spec: AnnotateConfig) -> AnnotateSource:
    """Open what is to be annotated. Raises DataError if it is not what the spec says."""
    if spec.pairs is None:
        return open_source(spec.data)
    return PairSource(Path(spec.data), spec.pairs)


def open_job(spec: AnnotateConfig, *, mesh: Mesh | None = None) -> OpenJob:
    """Load the teacher and open the data; with a `mesh` the teacher is shared among its processes.

    Raises:
        DataError: model or data cannot be read, or have different tokenizers.
        ConfigError: a document is longer than the teacher's context.
        ArgumentError: k is beyond the vocabulary.
    """
    source = open_spec_source(spec)
    config = spec.teacher
    device = mesh.device if mesh is not None else usable_device()
    dtype = evaluated_dtype(config.model, device, config.dtype)
    model = load_model(config.model, rope=config.rope, max_position_embeddings=config.context, dtype=dtype)
    check_unknown_family(model.config)
    model = model.to(device).eval()
    identity = {
        **model_identity(model, config.model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": config.quantize,
    }
    if config.quantize is not None:
        # The names of an adapter's own layers end so.
        quantize(model, Quantization(kind=config.quantize), keep=("default",))
    teacher: Teacher = LocalTeacher(model)
    if mesh is not None:
        teacher = SharedTeacher(model, mesh, config.schedule)
    check_k(spec.k, teacher.vocab_size)
    own = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    context = max(filter(None, (config.context, own)), default=None)
    if context is not None:
        # One for all documents, whatever they are packed with and whoever reads which part.
        hold_frequencies(model, context)
    if context is not None and source.longest is not None and source.longest > context:
        raise too_long(f"a document of {source.path}", source.longest, context)
    _check_tokenizer(config, source, teacher.vocab_size)
    return OpenJob(spec, teacher, source, identity, context)


def _check_tokenizer(config: TeacherConfig, source: AnnotateSource, vocab_size: int) -> None:
    """Refuse data of another tokenizer, as far as can be told."""
    if source.vocab_size is not None and source.vocab_size > vocab_size:
        raise DataError(
            "the data were tokenized with another vocabulary than the teacher's",
            found=f"{source.path}: {source.vocab_size} words",
            allowed=f"at most {vocab_size}, those of {config.model}",
            fix="choose a teacher with the tokenizer of the data, or tokenize with the teacher's",
        )
    if source.tokenizer is None:
        return
    folder = tokenizer_folder(tokenizer_home(config.model))
    if not (folder / "tokenizer.json").is_file():
        return
    own = load_tokenizer(folder, backend="hf").fingerprint
    if own != source.tokenizer:
        raise DataError(
            "the data were tokenized with another tokenizer than the teacher's",
            found=f"{source.path}: {source.tokenizer}",
            allowed=f"{own}, in {folder}",
            fix="choose a teacher with the tokenizer of the data, or tokenize with the teacher's",
        )


def shard_range(lengths: NDArray[np.int64], share: ArrayJob) -> tuple[int, int]:
    """Return first and last-but-one row of a shard: ranges with about as many tokens each, of one row or more.

    Raises:
        ArgumentError: there are fewer rows than shards.
    """
    rows = len(lengths)
    if share.count > rows:
        raise ArgumentError("there are fewer rows than shards", found=f"{rows} rows, {share.count} shards")
    ends = np.cumsum(lengths)
    bounds = [0]
    for part in range(1, share.count):
        cut = int(np.searchsorted(ends, ends[-1] * part / share.count))
        # Each shard has a row, and leaves one for each of those behind it.
        bounds.append(max(bounds[-1] + 1, min(cut, rows - (share.count - part))))
    return [*bounds, rows][share.index], [*bounds, rows][share.index + 1]


def annotation_folder(job: OpenJob, out: Path, *, first: int, stop: int) -> PieceFolder:
    """Return the work of annotating rows `first` to `stop`: `annotation_folder(...).make(executor, share)`."""
    out = behind_link(out)
    lengths = job.source.lengths[first:stop]
    piece_of = (np.cumsum(lengths) - lengths) // job.spec.piece_tokens
    starts = np.flatnonzero(np.diff(piece_of, prepend=-1)) + first
    bounds = tuple(int(bound) for bound in (*starts, stop))
    manifest = _manifest(job, first, stop, [])
    _JOBS[job.spec.fingerprint()] = job
    return PieceFolder(
        out=out,
        settings={**manifest.identity, "first": first, "rows": stop - first, "pieces": len(bounds) - 1},
        num_pieces=len(bounds) - 1,
        write=partial(
            _write_piece,
            spec=job.spec,
            bounds=bounds,
            source=job.source.fingerprint,
            teacher=job.identity["fingerprint"],
        ),
        finish=partial(_finish, job=job, first=first, stop=stop),
        is_done=partial(_is_done, out, manifest),
        title="annotate",
    )


_JOBS: dict[str, OpenJob] = {}
"""The job of this process, by the fingerprint of its spec: other processes load the teacher once."""


def _manifest(job: OpenJob, first: int, stop: int, entries: list[dict[str, Any]]) -> AnnotationManifest:
    spec, pairs = job.spec, job.spec.pairs
    settings: dict[str, Any] = {}
    if pairs is not None:
        settings = {
            **pairs.to_dict(),
            "retrieval": None if pairs.retrieval is None else Path(pairs.retrieval).name,
        }
    elif isinstance(job.source, DocumentSource) and job.source.bos is not None:
        settings = {"bos": job.source.bos}
    return AnnotationManifest(
        kind=job.source.kind,
        first=first,
        rows=stop - first,
        source_rows=len(job.source.lengths),
        tokens=sum(entry["tokens"] for entry in entries),
        words=sum(entry["words"] for entry in entries),
        k=spec.k,
        mass=spec.mass,
        dtype=spec.dtype,
        vocab_size=job.teacher.vocab_size,
        source={"path": job.source.path, "fingerprint": job.source.fingerprint},
        teacher=job.identity,
        settings=settings,
        pieces=entries,
    )


def _columns(job: OpenJob) -> list[Column]:
    if job.spec.pairs is not None:
        return cepe_columns()
    return topk_columns(
        ragged=job.spec.mass is not None, vocab_size=job.teacher.vocab_size, dtype=job.spec.dtype
    )


def _finish(folder: Path, entries: list[dict[str, Any]], *, job: OpenJob, first: int, stop: int) -> None:
    seal_annotations(folder, _columns(job), _manifest(job, first, stop, entries))


def _is_done(out: Path, wanted: AnnotationManifest) -> bool:
    """Whether `out` holds these annotations. Raises DataError if it holds others."""
    if not (out / MANIFEST).is_file():
        return False
    content = read_json(out / MANIFEST)
    if isinstance(content, dict) and content.get("format") != FORMAT:
        raise DataError(
            f"{out} already exists and holds something else",
            found=content.get("format"),
            fix="choose another --out",
        )
    found = read_annotation_manifest(out)
    ours = {**wanted.identity, "first": wanted.first, "rows": wanted.rows}
    theirs = {**found.identity, "first": found.first, "rows": found.rows}
    if ours != theirs:
        names = [name for name in ours if ours[name] != theirs[name]]
        raise DataError(
            f"{out} already exists and was annotated with other settings",
            found=", ".join(f"{name} {theirs[name]}" for name in names),
            allowed=", ".join(f"{name} {ours[name]}" for name in names),
            fix="choose another --out, or remove it to make it again",
        )
    return True


def _write_piece(
    folder: Path, number: int, *, spec: AnnotateConfig, bounds: tuple[int, ...], source: str, teacher: str
) -> dict[str, Any]:
    key = spec.fingerprint()
    job = _JOBS.get(key)
    if job is None:
        _JOBS.clear()
        job = _JOBS[key] = open_job(spec)
    if (job.source.fingerprint, job.identity["fingerprint"]) != (source, teacher):
        raise DataError("data or teacher were changed while the job ran", fix="run it again")
    first, stop = bounds[number], bounds[number + 1]
    counted = {"tokens": 0, "words": 0}

    def samples() -> Iterator[dict[str, Any]]:
        for row, found in job.rows(first, stop):
            sample, words = _cepe_sample(found) if spec.pairs is not None else _sample(job, row, found)
            counted["tokens"] += row.length
            counted["words"] += words
            yield sample

    entry = write_annotation_shard(folder, number, _columns(job), samples(), stop - first)
    return {**entry, **counted}


def _sample(job: OpenJob, row: AskedRow, found: TopK) -> tuple[dict[str, Any], int]:
    """Return the columns of a row, and how many words are kept."""
    spec = job.spec
    ids = found.ids.astype(id_dtype(job.teacher.vocab_size))
    counts = None
    if spec.mass is not None:
        found, counts = cut_to_mass(found, spec.mass)
    logprobs, tail = round_masses(found, spec.dtype)
    words = found.ids.size if counts is None else int(counts.sum())
    if row.places is not None:
        ids, logprobs, tail = _spread(row, ids, logprobs, tail)
        if counts is not None:
            spread = np.zeros(row.length, np.int64)
            spread[row.places] = counts
            counts = spread
    sample = {"length": row.length, "row_digest": row.digest, "tail_logprob": tail}
    if counts is None:
        return {**sample, "topk_ids": ids, "topk_logprobs": logprobs}, words
    kept = np.arange(spec.k) < counts[:, None]
    offsets = np.fromiter(itertools.accumulate(counts.tolist(), initial=0), np.uint32)
    if not words:  # a row of padding: an array needs an element
        kept[0, 0] = True
    return {**sample, "topk_ids": ids[kept], "topk_logprobs": logprobs[kept], "topk_offsets": offsets}, words


def _spread(row: AskedRow, ids: Any, logprobs: Any, tail: Any) -> tuple[Any, Any, Any]:
    """Return the columns of a row with padding: no word, and all mass in the tail."""
    wide_ids = np.zeros((row.length, ids.shape[1]), ids.dtype)
    wide = np.full((row.length, ids.shape[1]), -np.inf, logprobs.dtype)
    wide_tail = np.zeros(row.length, tail.dtype)
    wide_ids[row.places], wide[row.places], wide_tail[row.places] = ids, logprobs, tail
    return wide_ids, wide, wide_tail


def _cepe_sample(found: TopK) -> tuple[dict[str, Any], int]:
    masses = np.exp(np.concatenate([found.logprobs, found.tail[:, None]], axis=1))
    return {"target_index": found.ids, "target_prob": masses.astype(np.float16)}, found.ids.size
