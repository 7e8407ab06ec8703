"""A corpus to a token store: plan the units, make their pieces on any executor, put them together.

job = CorpusJob(["corpus/"], tokenizer, "store")
job.encode(LocalExecutor(8))            # or a share of the units, as one job of an array
store = job.merge()                     # once all pieces are there
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from longspan.core.errors import ArgumentError, DataError, LongspanError
from longspan.core.files import behind_link, disk_errors
from longspan.core.log import get_logger
from longspan.data.chat.chat_config import ChatConfig
from longspan.data.jobs import ArrayJob, Executor, LocalExecutor
from longspan.data.jobs.job_lock import BusyError, JobLock, hold_share, share_lock
from longspan.data.readers import (
    Fields,
    ReadReport,
    check_fields,
    finish_reading,
    list_inputs,
    read_part,
)
from longspan.data.store.assemble import ShardFolder, assemble_store
from longspan.data.store.token_store import MANIFEST, TokenStore, read_manifest
from longspan.data.tokenize import sampling
from longspan.data.tokenize.encode import PieceJob, make_piece
from longspan.data.tokenize.groups import (
    DEALT,
    MAX_BUCKETS,
    DealJob,
    GroupUnit,
    deal_unit,
    group_units,
    num_buckets_of,
)
from longspan.data.tokenize.tokenize_config import TokenizeConfig
from longspan.data.tokenize.unit_pieces import UnitPieces
from longspan.data.tokenize.units import (
    MAX_UNITS,
    Unit,
    cut_units,
    file_identity,
    plain_identity,
    unit_bytes_of,
)
from longspan.data.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from longspan.data.chat import ChatFormat

ESTIMATE_CHARACTERS = 1 << 20
POLL_SECONDS, MAX_POLL_SECONDS = 0.1, 5.0


def tokenize_corpus(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    tokenizer: str | os.PathLike[str] | Tokenizer,
    out: str | os.PathLike[str],
    config: TokenizeConfig | None = None,
    *,
    chat: ChatFormat | None = None,
    num_workers: int = 1,
    executor: Executor | None = None,
    **settings: Any,
) -> TokenStore:
    """Encode every document of `inputs` into a token store at `out`, in canonical order (path, position).

    A complete store at `out` made from the same files with the same settings is opened as it is; what a
    killed run finished is kept and not made again. With more than one worker, processes are spawned: a script
    that calls this needs an `if __name__ == "__main__":` guard.

    Args:
        inputs: files, folders, glob patterns or remote addresses; see `readers`.
        tokenizer: loaded, or what `load_tokenizer` takes: a folder, a file, a name on the hub.
        config: how they are read and encoded. Its fields may also be given as keywords.
        chat: encodes conversations; None: as `config` says.
        num_workers: processes that encode; 1 encodes in this process. Does not change the result.
        executor: runs the units instead of `num_workers` processes. Does not change the result.

    Raises:
        ConfigError: settings that there are not, or that contradict one another.
        DataError: the inputs hold no document, nothing has a wanted field, or `out` holds something else.
        RunError: the disk is full, a worker died, or another job is at work on `out`; nothing is left at
            `out`, and finished pieces are kept beside it.
    """
    if num_workers < 1:
        raise ArgumentError("bad setting for tokenizing", found=f"num_workers={num_workers}", allowed=">= 1")
    if settings:
        given = {} if config is None else config.to_dict()
        config = TokenizeConfig.from_dict({**given, **settings}, where="the settings of tokenize_corpus")
    inputs = [inputs] if isinstance(inputs, str | os.PathLike) else inputs
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = load_tokenizer(tokenizer)
    job = CorpusJob(inputs, tokenizer, out, config, chat=chat)
    with executor or LocalExecutor(num_workers) as running:
        store = job.run(running)
    assert store is not None, "the only job made all pieces"
    return store


class CorpusJob:
    """The making of one store; see `tokenize_corpus` for the arguments."""

    def __init__(
        self,
        inputs: Sequence[str | os.PathLike[str]],
        tokenizer: Tokenizer,
        out: str | os.PathLike[str],
        config: TokenizeConfig | None = None,
        *,
        chat: ChatFormat | None = None,
    ) -> None:
        config = TokenizeConfig() if config is None else config
        chat = config.chat_format(tokenizer) if chat is None else chat
        messages_field = None if chat is None else config.messages_field or "messages"
        self.out, self.tokenizer, self.mix, self.seed = behind_link(out), tokenizer, config.mix, config.seed
        self._sample: list[int] | None = None
        self._report = ReadReport()
        self._files = list_inputs(inputs, report=self._report)
        self._settings: dict[str, Any] = {
            **config.model_dump(include={"text_field", "source_field", "strict", "shard_bytes"}),
            "tokenizer": tokenizer.fingerprint,
        }
        if chat is not None:
            self._settings |= {
                "messages_field": messages_field,
                "variable_fields": list(chat.fields),
                "chat": chat.fingerprint,
            }
        if config.mix is not None:
            self._settings |= {"mix": config.mix.to_dict(), "seed": config.seed}
        grouping = config.grouping
        if grouping is not None:
            self._settings |= config.model_dump(include={"group_by", "order_by", "header_field"})
        unit_bytes = unit_bytes_of(self._files, max_units=MAX_UNITS if grouping is None else MAX_BUCKETS)
        units = cut_units(self._files, unit_bytes)
        plain = [plain_identity(file) for file in self._files]
        plan = {**self._settings, "unit_bytes": unit_bytes, "units": len(units), "inputs": plain}
        self._pieces = UnitPieces(self.out, plan, grouped=grouping is not None)
        self._job = PieceJob(
            folder=str(self._pieces.folder),
            plan=self._pieces.fingerprint,
            tokenizer=tokenizer,
            fields=Fields(
                config.text_field, config.source_field, messages_field, () if chat is None else chat.fields
            ),
            strict=config.strict,
            shard_bytes=config.shard_bytes,
            chat_template=None if chat is None else chat.template,
            begin_with_user=chat is not None and chat.begin_with_user,
            conversations=ChatConfig() if chat is None else chat.config,
        )
        self._units: Sequence[Unit | GroupUnit] = units
        self._deals: Sequence[Unit] = ()
        self._wanted = (*self._job.fields.wanted, *(() if grouping is None else grouping.names))
        if grouping is not None:
            self._deals = units
            self._deal_job = DealJob(
                folder=self._job.folder,
                plan=self._job.plan,
                fields=self._job.fields,
                grouping=grouping,
                num_buckets=num_buckets_of(self._files, unit_bytes),
                strict=config.strict,
            )
            self._units = group_units(self._deal_job, units)

    @property
    def num_units(self) -> int:
        """Units of work, each of which becomes a piece."""
        return len(self._units)

    def finished(self, *, quiet: bool = False) -> TokenStore | None:
        """Return the store if it is complete and made of these inputs with these settings.

        Raises:
            DataError: `out` holds something else.
        """
        out = self.out
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return None
        if not (out / MANIFEST).is_file():
            raise DataError(
                f"{out} already exists and is not a complete token store",
                fix="remove it or choose another --out",
            )
        found = read_manifest(out).config
        wanted = {**self._settings, "inputs": [file_identity(file) for file in self._files]}
        if found != wanted:
            names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
            raise DataError(
                f"{out} is a token store made otherwise",
                found=f"other {', '.join(names) or 'settings'}",
                fix="choose another --out, or remove the store to make it again",
            )
        if not quiet:
            get_logger("data.tokenize").info("%s is complete and made from the same inputs", out)
        return TokenStore(out)

    def run(self, executor: Executor, share: ArrayJob | None = None) -> TokenStore | None:
        """Make the missing pieces (of this job's share), and the store if then all are there.

        Returns None while pieces of other jobs are missing.
        """
        share = ArrayJob() if share is None else share
        if self.mix is not None and share.count > 1:
            raise ArgumentError(
                "jobs of an array cannot sample while reading: each wave needs what the one before it gave",
                fix="use --executor local or ray with --mix",
            )
        store = self.finished()
        if store is not None:
            return store
        with hold_share(self._pieces.folder, share, what=str(self.out)):
            # Another job may have ended between the look at `out` and the lock.
            store = self.finished()
            if store is not None:
                self._pieces.remove()
                return store
            try:
                check_fields(self._files, self._wanted)
                self._pieces.open()
                if share.count == 1:
                    self.encode(executor)
                    return self.merge()
                self._deal(executor, share)
                if not self._deals:
                    self.encode(executor, share)
            except (LongspanError, KeyboardInterrupt):
                folder = self._pieces.folder
                if share.count == 1 and not any([*folder.glob("[0-9]*/"), *folder.glob(f"{DEALT}/[0-9]*/")]):
                    self._pieces.remove()
                raise
        if self._deals:
            self._encode_dealt(executor, share)
        return None

    def run_share(self, executor: Executor, share: ArrayJob) -> TokenStore | None:
        """Run one job of an array; the one that finds all pieces made puts the store together."""
        store = self.run(executor, share)
        if store is None and not self.missing():
            try:
                store = self.merge_only()
            except BusyError:
                get_logger("data.tokenize").info("another job puts %s together", self.out)
        # Another job may have made it, and removed the pieces, while this one looked for them.
        return store or self.finished()

    def merge_only(self) -> TokenStore:
        """Put the store together from pieces that are all there.

        Raises:
            DataError: pieces are missing.
            RunError: another job is at it.
        """
        store = self.finished()
        if store is not None:
            return store
        missing = self.missing()
        if self.mix is not None:
            raise ArgumentError("a sample is read and put together by one job", fix="leave out --merge-only")
        if missing:
            raise DataError(
                f"{self.out} cannot be put together yet",
                found=f"{len(missing)} of {self.num_units} pieces are missing, the first is {missing[0]}",
                fix="run the jobs that make them",
            )
        with JobLock(self._pieces.folder / "merge.lock", what=str(self.out)):
            store = self.finished()
            if store is None:
                return self.merge()
            self._pieces.remove()
            return store

    def missing(self) -> list[int]:
        """Return the numbers of the pieces that are not there."""
        return [unit.number for unit in self._units if self._pieces.read(unit) is None]

    def encode(self, executor: Executor, share: ArrayJob | None = None) -> None:
        """Make the missing pieces (of a share); of a sampled corpus those that the budgets need.

        Records of groups are all dealt before the first piece is made.
        """
        self._deal(executor, ArrayJob())
        if self.mix is None:
            units = (ArrayJob() if share is None else share).share(self._units)
            make = partial(make_piece, self._job)
            for _ in self._pieces.make(executor, make, units, total=sum(unit.size for unit in units)):
                pass
        else:
            self._sample = [unit.number for unit in self._waves(executor)]

    def merge(self) -> TokenStore:
        """Make the store of the pieces, all of which are there, and remove them."""
        report = ReadReport()
        folders: list[ShardFolder] = []
        inputs: dict[str, dict[str, Any]] = {}
        numbers = [unit.number for unit in self._units] if self._sample is None else sorted(self._sample)
        seen: dict[str, sampling.SourceCounts] = {}
        for unit in (*self._deals, *(self._units[number] for number in numbers)):
            summary = self._pieces.read(unit)
            if summary is None:
                raise DataError(f"{self._pieces.path(unit)} is missing", fix="run the same command again")
            report.add(summary.report)
            sampling.add_counts(seen, summary.seen.items())
            for file, identity in zip(unit.files, summary.inputs):
                if inputs.setdefault(file.path, identity) != identity:
                    raise DataError(
                        f"{file.path} was changed while it was read", fix=f"remove {self._pieces.folder}"
                    )
            if isinstance(unit, GroupUnit) or not self._deals:
                folders.append(self._pieces.shards(unit, summary))
        report.add(self._report)
        try:
            finish_reading(self._files, report)
        except DataError:
            self._pieces.remove()
            raise
        counts = report.to_dict()
        if self.mix is not None:
            counts["sampling"] = sampling.describe(self.mix, self.seed, seen)
        missing = [file for file in self._files if file.path not in inputs]
        inputs |= {file.path: file_identity(file) for file in missing}
        config = {**self._settings, "inputs": [inputs[file.path] for file in self._files]}
        if self.out.exists():
            with disk_errors(self.out):
                self.out.rmdir()
        store = assemble_store(
            self.out,
            folders,
            tokenizer=self.tokenizer,
            config=config,
            counts=counts,
            shard_bytes=self._job.shard_bytes,
        )
        self._pieces.remove()
        return store

    def _deal(self, executor: Executor, share: ArrayJob) -> None:
        """Deal what is missing of a share of the input; nothing to do where records are not grouped."""
        if not self._deals:
            return
        units, job = share.share(self._deals), partial(deal_unit, self._deal_job)
        size = sum(unit.size for unit in units)
        for _ in self._pieces.make(executor, job, units, total=size, title="read groups"):
            pass

    def _encode_dealt(self, executor: Executor, share: ArrayJob) -> None:
        """Make the pieces of this job's share of groups, then those of jobs of the array that have ended.

        A group may hold records that any job dealt. So this job waits while others deal, and ends where some
        have not begun: the last one then finds everything dealt, and does what is left. The lock of a job is
        held by whoever makes its share.
        """
        if not self._all_dealt(share):
            return
        for index in (share.index, *(each for each in range(share.count) if each != share.index)):
            job = ArrayJob(index, share.count)
            with ExitStack() as stack:
                try:
                    stack.enter_context(JobLock(share_lock(self._pieces.folder, job), what=str(self.out)))
                except BusyError:
                    continue
                missing = any(self._pieces.read(unit) is None for unit in job.share(self._units))
                # Asked afterwards: pieces are also missing where another job has just put them together.
                if self.finished(quiet=True) is not None:
                    self._pieces.remove()
                    return
                if missing:
                    self.encode(executor, job)

    def _all_dealt(self, share: ArrayJob) -> bool:
        """Whether all input is dealt, after waiting for the jobs of the array that are at work."""
        locks = [share_lock(self._pieces.folder, ArrayJob(k, share.count)) for k in range(share.count)]
        pause = POLL_SECONDS
        while True:
            at_work = any(JobLock(lock, what=str(self.out)).is_held() for lock in locks)
            if all(self._pieces.read(unit) is not None for unit in self._deals):
                return True
            if not at_work:
                return False
            time.sleep(pause)
            pause = min(2 * pause, MAX_POLL_SECONDS)

    def _waves(self, executor: Executor) -> Iterator[Unit | GroupUnit]:
        """Yield the units of the sample, wave after wave, until every budget is filled or the input ends."""
        assert self.mix is not None
        order = sampling.sampling_order(self._units, self.seed)
        first = sampling.sampling_order(self._deals, self.seed)[0] if self._deals else order[0]
        assert isinstance(first, Unit), "groups have input units"
        rule = sampling.Sampling(self.mix, self.seed, self._bytes_per_token(first))
        seen: dict[str, sampling.SourceCounts] = {}
        done, size = 0, sampling.FIRST_WAVE
        while done < len(order):
            wave = order[done : done + size]
            make = partial(make_piece, self._job._replace(sampling=rule))
            for unit, summary in zip(wave, self._pieces.make(executor, make, wave, total=None)):
                sampling.add_counts(seen, summary.seen.items())
                yield unit
            done += len(wave)
            state = sampling.budgets(self.mix, seen)
            if state.filled >= 1:
                return
            rule = rule._replace(full=state.full)
            size = sampling.next_wave(done, state.filled)

    def _bytes_per_token(self, unit: Unit) -> float:
        """Measure on the first documents of a unit."""
        characters = size = tokens = 0
        for part in unit.parts:
            for document in read_part(part, self._job.fields, report=ReadReport()):
                text = document.text[:ESTIMATE_CHARACTERS]
                characters += len(text)
                size += len(text.encode())
                tokens += len(self.tokenizer.encode(text))
                if characters >= ESTIMATE_CHARACTERS:
                    return size / tokens
        return size / tokens if tokens else 4.0
