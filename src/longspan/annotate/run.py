"""Running a job: in this process, in others of this machine or a cluster, or with the teacher shared among several."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from longspan.annotate.config import AnnotateConfig
from longspan.annotate.estimate import AnnotateEstimate, estimate
from longspan.annotate.job import OpenJob, annotation_folder, open_job, shard_range
from longspan.core.errors import ArgumentError
from longspan.core.launched import launched
from longspan.core.log import get_logger, setup_logging
from longspan.core.units import format_bytes, format_count
from longspan.data.jobs import ArrayJob, Executor, LocalExecutor
from longspan.infer.teacher import SharedTeacher
from longspan.parallel.launch import process_group, spawn_local
from longspan.parallel.mesh import MeshConfig, build_mesh

__all__ = ["AnnotateOutcome", "annotate", "estimate_job", "shard_folder"]

Found = TypeVar("Found")
WAIT_SECONDS = 14 * 24 * 3600.0
"""How long processes that share a teacher wait for each other: the first one writes, and may wait for a slow disk."""


class AnnotateOutcome(NamedTuple):
    """How far a folder is."""

    pieces: int
    missing: int
    """Pieces that other jobs have not made yet; 0: the folder is complete."""


def annotate(
    spec: AnnotateConfig,
    out: str | Path,
    *,
    shard: ArrayJob | None = None,
    executor: Executor | None = None,
    share: ArrayJob | None = None,
) -> AnnotateOutcome:
    """Write the annotations of a spec to `out`; a killed job goes on with the pieces that are there.

    Says first what it will take on disk, and what other settings would save.

    Args:
        shard: which part of the rows, a folder of its own (`merge` joins them); None: all.
        executor: runs the pieces; None: this process.
        share: which of several jobs that write one folder this is; None: the only one.

    Returns:
        What is there: of several jobs that share a folder, the last one to end makes the whole.

    Raises:
        DataError, ConfigError, ArgumentError: teacher, data and settings do not fit; before anything is written.
        RunError: another job is at work on it, a process died, or the disk refuses.
    """
    if executor is not None and executor.num_workers > 1 and spec.teacher.cp > 1:
        raise ArgumentError(
            "a teacher that is shared among processes runs one piece at a time",
            found=f"--cp {spec.teacher.cp} with {executor.num_workers} workers",
            fix="leave one of them out",
        )
    alone = spec.teacher.cp == 1
    run = partial(
        _run,
        out=Path(out),
        shard=shard or ArrayJob(),
        share=share or ArrayJob(),
        executor=executor if alone and executor is not None else LocalExecutor(),
    )
    return _with_teacher(spec, run, AnnotateOutcome(0, 0))


def estimate_job(spec: AnnotateConfig, *, shard: ArrayJob | None = None) -> AnnotateEstimate:
    """Return what a job would write, from a short sample of the teacher; nothing is written."""
    run = partial(_estimate, shard=shard or ArrayJob())
    return _with_teacher(spec, run, AnnotateEstimate(0, 0, 0, 0, []))


def shard_folder(out: str | Path, shard: ArrayJob) -> Path:
    """Return where a shard is written: OUT-2 for shard 2 of several, else OUT."""
    out = Path(out)
    return out if shard.count == 1 else out.with_name(f"{out.name}-{shard.index}")


def _with_teacher(spec: AnnotateConfig, run: Callable[[OpenJob], Found], nothing: Found) -> Found:
    """Return what `run` does with the open job; of processes that share a teacher the others have `nothing`."""
    if spec.teacher.cp == 1:
        return run(open_job(spec))
    if launched() is None:
        args = (spec, run, nothing)
        return spawn_local(_rank, spec.teacher.cp, *args, timeout_seconds=WAIT_SECONDS)[0]
    with process_group(timeout_seconds=WAIT_SECONDS) as device:
        return _shared(spec, run, nothing, device)


def _rank(rank: int, spec: AnnotateConfig, run: Callable[[OpenJob], Found], nothing: Found) -> Found:
    if rank == 0:
        setup_logging()
    return _shared(spec, run, nothing, torch.device("cpu"))


def _shared(
    spec: AnnotateConfig, run: Callable[[OpenJob], Found], nothing: Found, device: torch.device
) -> Found:
    """Be one of the processes that share a teacher; the first one runs the job."""
    degrees = MeshConfig.of_schedule(spec.teacher.schedule, spec.teacher.cp)
    mesh = build_mesh(degrees, device, timeout_seconds=WAIT_SECONDS)
    job = open_job(spec, mesh=mesh)
    teacher = job.teacher
    assert isinstance(teacher, SharedTeacher)
    if not mesh.is_first:
        teacher.follow()
        return nothing
    found = run(job)
    teacher.close()
    return found


def _estimate(job: OpenJob, *, shard: ArrayJob) -> AnnotateEstimate:
    return estimate(job, *shard_range(job.source.lengths, shard))


def _run(job: OpenJob, *, out: Path, shard: ArrayJob, share: ArrayJob, executor: Executor) -> AnnotateOutcome:
    first, stop = shard_range(job.source.lengths, shard)
    folder = annotation_folder(job, out, first=first, stop=stop)
    if folder.missing():
        _announce(estimate(job, first, stop), out)
    with executor as running:
        folder.make(running, share)
    return AnnotateOutcome(folder.num_pieces, folder.missing())


def _announce(found: AnnotateEstimate, out: Path) -> None:
    """Say what the job will take on disk, and what would take less."""
    log = get_logger("annotate")
    asked, *others = found.options
    log.info(
        "%s tokens in %s rows will take about %s: %.0f bytes a token, %.1f words that hold %.1f %% of the mass",
        format_count(found.tokens),
        format_count(found.rows),
        format_bytes(found.num_bytes),
        asked.bytes_per_token,
        asked.words,
        100 * asked.mass,
    )
    for other in others:
        if other.saves > 0:
            log.info(
                "%s would save %.0f %%: %s, %.1f words a token that hold %.1f %%",
                other.name,
                100 * other.saves,
                format_bytes(other.num_bytes),
                other.words,
                100 * other.mass,
            )
    there = next(folder for folder in out.resolve().parents if folder.exists())
    free = shutil.disk_usage(there).free
    if free < found.num_bytes:
        log.warning("the disk of %s has %s left", there, format_bytes(free))
