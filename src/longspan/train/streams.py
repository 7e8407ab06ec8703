"""The rows of a stage: each stream's mixture and packing plan, and their interleaving by weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from longspan.core.columns import folder_kind
from longspan.core.errors import ConfigError, DataError
from longspan.core.log import get_logger
from longspan.data.packed.packed_rows import PackedRows
from longspan.data.packed.recut import HeadRows, Overflow, RecutRows, recut
from longspan.data.plans.mixture import MixturePlan, load_audit, plan_mixture
from longspan.data.plans.packing import KIND as PACK_PLAN
from longspan.data.plans.packing import PackPlan, plan_packing
from longspan.data.readers.hub import SCHEME as HUB
from longspan.data.rows.annotations import Annotations, TaughtRows
from longspan.data.rows.loader import Order, PackedRow, RowLoader, RowSource, StreamMixer
from longspan.data.rows.read_otherwise import UnmaskedRows, UnmaskedStore, WholeRows
from longspan.data.store import TokenStore, open_stores
from longspan.data.store.lengths import LengthTable
from longspan.data.tokenizer import Tokenizer, load_tokenizer
from longspan.parallel.launch import on_first_rank
from longspan.train.batch import averaged
from longspan.train.config import StageConfig
from longspan.train.left_out import left_out_words, num_cut, rest_of_epochs
from longspan.train.pose import skip_positions
from longspan.train.record_files import draw_records, record_stores
from longspan.train.stream_config import StreamConfig


class StagePlan(NamedTuple):
    """What a stage will train on, known before any step is made."""

    stage: StageConfig
    """With its steps, where the recipe counts in epochs."""
    mixer: StreamMixer | None
    """The rows of all streams; None for a stage that trains nothing."""
    sources: dict[str, RowSource]
    """Where the rows of each stream come from."""
    mixtures: dict[str, MixturePlan]
    """Of the streams that are planned here and not packed before."""
    rows_needed: dict[str, int]
    """Rows that each stream will give."""
    tokenizers: dict[str, TokenStore]
    """Fingerprint of each tokenizer that made the stores, and one of its stores."""
    left_out: dict[str, dict[str, int]]
    """What each stream leaves out of its data: documents too "short" or too "long" ...; see the module of that name."""


@dataclass(frozen=True)
class Opened:
    """What the streams of a run read, by its place: each is opened once."""

    stores: dict[Path, TokenStore] = field(default_factory=dict)
    rows: dict[str, PackedRows] = field(default_factory=dict)


def plan_stages(
    stages: Sequence[StageConfig],
    *,
    data_root: Path,
    seed: int,
    tokenizer: Callable[[], Path | None],
    opened: Opened | None = None,
) -> list[StagePlan]:
    """Plan the data of stages; every process of a run calls it, and one of them makes stores of records.

    `tokenizer` finds the tokenizer of the recipe, where there are records.
    """
    opened = Opened() if opened is None else opened
    streams = [stream for stage in stages for stream in stage.streams.values()]
    path = tokenizer() if any(stream.records for stream in streams) else None
    plans: list[StagePlan] = []

    def plan() -> None:
        encoder = None if path is None else load_tokenizer(path)
        plans.extend(
            plan_stage(stage, data_root=data_root, seed=seed, tokenizer=encoder, opened=opened)
            for stage in stages
        )

    if any(stream.records or stream.rows for stream in streams):
        # Planning makes stores and indexes; the other processes find them made.
        on_first_rank(plan)
    if not plans:
        plan()
    return plans


def stage_rows(plan: StagePlan, first: int, count: int, *, seed: int) -> list[PackedRow]:
    """Return rows `first` to `first + count` of a stage, with the positions of its PoSE and the weights of its mean."""
    assert plan.mixer is not None, "a stage of 0 steps reads no rows"
    rows, pose = averaged(plan.mixer.rows(first, count), plan.stage.loss_average), plan.stage.pose
    if pose is None:
        return rows
    return [
        skip_positions(row, pose, seed=seed, stage=plan.stage.name, number=first + index)
        for index, row in enumerate(rows)
    ]


def rows_ahead(read: Callable[[int], list[PackedRow]], steps: range) -> Generator[list[PackedRow]]:
    """Yield the rows of each step; those of the next one are read meanwhile.

    `read` is a function of the step alone, so nothing is kept of what was read and not used.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="longspan-rows") as pool:
        ahead = pool.submit(read, steps[0]) if steps else None
        for step in steps:
            assert ahead is not None
            rows = ahead.result()
            ahead = pool.submit(read, step + 1) if step + 1 in steps else None
            yield rows


def plan_stage(
    stage: StageConfig,
    *,
    data_root: Path,
    seed: int,
    tokenizer: Tokenizer | None = None,
    opened: Opened | None = None,
) -> StagePlan:
    """Plan every stream of a stage.

    Args:
        tokenizer: tokenizes records.
        opened: what is open already; what is opened goes there.

    Raises:
        DataError: a store, records, a plan or packed rows are missing or damaged.
        ConfigError: a stream has no full row, rows of another length or no mask to fine-tune by, or the stage needs
            more epochs than it allows.
    """
    opened = Opened() if opened is None else opened
    sources: dict[str, RowSource] = {}
    mixtures: dict[str, MixturePlan] = {}
    left_out: dict[str, dict[str, int]] = {}
    stores: list[TokenStore] = []
    orders: dict[str, Order] = {}
    for name, stream in stage.streams.items():
        where = f"stage {stage.name!r}: stream {name!r}"
        if stream.rows is not None:
            sources[name], behind = _packed(stream, stage, data_root, where, opened)
            masked = _rows_have_masks(sources[name], behind)
            masks = _rows_are_answers(sources[name], behind)
            left_out[name] = getattr(sources[name], "left_out", {})
        else:
            planned = _planned(stream, stage, data_root, seed, where, tokenizer, opened)
            sources[name], behind, mixtures[name] = planned.rows, planned.stores, planned.mixture
            masked, left_out[name] = planned.masked, planned.left_out
            masks = any(_is_chat(store) and store.has_mask for store in behind)
        stores += behind
        orders[name] = _order(stream, sources[name])
        if stream.teacher is not None:
            paths = (stream.teacher,) if isinstance(stream.teacher, str) else stream.teacher
            annotations = [Annotations(data_root / path) for path in paths]
            sources[name] = TaughtRows(sources[name], annotations, stores=behind)
        if masks and not stage.learns_by_mask(name):
            sources[name] = _unmasked(sources[name], behind, where)
        if getattr(sources[name], "has_trees", False):
            _refuse_trees(stage, name, where)
        if not stage.keeps_apart(name):
            sources[name] = WholeRows(sources[name])
        if stage.needs_mask(name) and not masked:
            raise ConfigError(
                f"{where} has no masks, by which sft and loss_mask know what the assistant wrote",
                fix="tokenize conversations (`longspan data tokenize --messages-field`, or records of the recipe), or "
                "set the stream's loss_mask to false",
            )
    if not sources:
        return unplanned(stage)
    weights: dict[str, float] = {name: stream.weight for name, stream in stage.streams.items()}
    if stage.shares == "rows":
        weights = {name: rows.num_rows for name, rows in sources.items()}
    weighted = {name: (sources[name], weight) for name, weight in weights.items()}
    mixer = StreamMixer(weighted, seed, orders=orders)
    epochs = stage.epochs
    if epochs is not None:
        stage = _with_steps(stage, mixer, sources)
    needed = {
        name: progress.rows for name, progress in mixer.epochs(stage.num_steps * stage.rows_per_step).items()
    }
    if epochs is not None:
        for name, count in needed.items():
            left_out[name] = {**left_out[name], **rest_of_epochs(sources[name], orders[name], count, epochs)}
    _refuse_repeats(stage, needed, sources)
    tokenizers: dict[str, TokenStore] = {}
    for store in stores:
        tokenizers.setdefault(store.manifest.tokenizer["fingerprint"], store)
    return StagePlan(stage, mixer, sources, mixtures, needed, tokenizers, left_out)


def _refuse_trees(stage: StageConfig, name: str, where: str) -> None:
    """Refuse what a stage cannot do with documents that branch (`true_prefixes`). Raises ConfigError."""
    wrong = {
        "document_mask: false": not stage.keeps_apart(name),
        f"loss_average: {stage.loss_average}": stage.loss_average == "samples",
        "a teacher": stage.streams[name].teacher is not None,
    }
    if found := [words for words, is_wrong in wrong.items() if is_wrong]:
        raise ConfigError(
            f"{where} has documents that branch, which a stage of these settings cannot read",
            found=", ".join(found),
            fix="leave them out, or make the records without branches, or tokenize them without true_prefixes",
        )


def _refuse_repeats(stage: StageConfig, needed: Mapping[str, int], sources: Mapping[str, RowSource]) -> None:
    """Refuse a stage that reads a stream oftener than it allows. Raises ConfigError."""
    for name, count in needed.items():
        if count > sources[name].num_rows * stage.max_epochs:
            raise ConfigError(
                f"stage {stage.name!r} is longer than its data: stream {name!r} would be repeated too often",
                found=f"{count} rows needed, {sources[name].num_rows} rows in one epoch",
                allowed=f"{stage.max_epochs} epochs (max_epochs)",
                fix="lower the stage's tokens, add data, or raise max_epochs",
            )


def unplanned(stage: StageConfig) -> StagePlan:
    """Return the plan of a stage that reads no data, or whose data are not at hand."""
    return StagePlan(stage, None, {}, {}, {}, {}, {})


def _with_steps(stage: StageConfig, mixer: StreamMixer, sources: Mapping[str, RowSource]) -> StageConfig:
    """Return the stage with as many steps as its epochs hold, the last one whole, at least one."""
    epochs = stage.epochs
    assert epochs is not None

    def fits(steps: int) -> bool:
        return all(
            progress.rows <= sources[name].num_rows * epochs
            for name, progress in mixer.epochs(steps * stage.rows_per_step).items()
        )

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if low == 0:
        raise ConfigError(
            f"stage {stage.name!r}: its epochs are less than one step",
            found=f"{sum(rows.num_rows for rows in sources.values())} rows in all streams, epochs {epochs:g}",
            allowed=f"{stage.rows_per_step} rows a step (batch_tokens)",
            fix="lower batch_tokens or add data",
        )
    return stage.model_copy(update={"steps": low, "epochs": None, "max_epochs": max(1, math.ceil(epochs))})


class _PlannedStream(NamedTuple):
    rows: RowSource
    stores: list[TokenStore]
    mixture: MixturePlan
    masked: bool
    left_out: dict[str, int]


def _planned(
    stream: StreamConfig,
    stage: StageConfig,
    data_root: Path,
    seed: int,
    where: str,
    tokenizer: Tokenizer | None,
    opened: Opened,
) -> _PlannedStream:
    """Return rows planned from token stores or records."""
    if stream.records is not None:
        parts = record_stores(
            stream.records,
            data_root=data_root,
            tokenizer=tokenizer,
            template=stream.chat_template,
            begin_with_user=stream.begin_with_user,
            conversations=stream.conversations,
            opened=opened.stores,
        )
        stores = [part.store for part in parts]
    else:
        paths = (stream.store,) if isinstance(stream.store, str) else stream.store
        assert paths is not None
        parts = []
        stores = open_stores((data_root / path for path in paths), opened.stores)
    lengths = LengthTable.concatenate([store.lengths for store in stores])
    mixture = plan_mixture(stream.mixture, lengths, seed, audit=load_audit(stream.mixture, data_root))
    chats = np.array([_is_chat(store) for store in stores])
    pack = stream.pack
    settled = pack.settle(
        stores,
        length=stage.context_length,
        where=where,
        ids={"pad_id": 0},
        answers=stage.objective == "sft",
        # A document of its own row is shorter than the row: the rest is padding, which weighs nothing. A stage of so
        # many tokens reads full rows; an epoch reads all of its text.
        pads=lambda strategy: not strategy.flows or stage.epochs is not None,
    )
    documents = mixture.documents
    short = lengths.tokens[documents] < pack.min_length
    long = settled.too_long(lengths, documents)
    left_out = {"unwanted": mixture.report.excluded, "short": int(short.sum()), "long": int(long.sum())}
    documents = documents[~(short | long)]
    if parts:
        documents = draw_records(parts, lengths, documents, seed)
    if pack.group_by_length:
        documents = grouped_by_length(documents, lengths.tokens, stretch=50 * stage.rows_per_step)
    # Rows in an order of their own would undo the grouping. Those that are too short are out already.
    shuffle = stream.shuffle and pack.shuffle and not pack.group_by_length
    spec = settled.pack.model_copy(update={"shuffle": shuffle, "min_length": 1})
    plan = plan_packing(spec, lengths, documents, seed)
    if plan.num_rows == 0:
        raise ConfigError(
            f"{where} has not enough text for one row",
            found=f"{int(lengths.tokens[documents].sum())} tokens in {len(documents)} documents; "
            f"left out: {left_out_words(left_out) or 'none'}",
            allowed=f"at least {stage.context_length} tokens",
            fix="give it more documents, other limits of their lengths, or a shorter context_length",
        )
    dropped = dict(plan.report.dropped)
    if beyond := dropped.pop("overflow", 0):
        heads = int((lengths.tokens[documents] > settled.room).sum())
        left_out |= {"heads": heads, "overflow_tokens": beyond}
    left_out |= {"tail_tokens": sum(dropped.values()), "cut_chats": num_cut(plan, lengths, chats)}
    masked = bool(np.any(lengths.mask_offset[documents] != 0))
    return _PlannedStream(RowLoader(stores, plan), stores, mixture, masked, left_out)


def grouped_by_length(documents: np.ndarray, tokens: np.ndarray, *, stretch: int) -> np.ndarray:
    """Return the documents with every `stretch` of them sorted, the longest first; the stretches stay in order.

    lengths 3 9 | 1 2 7 with a stretch of 2 and a rest of 3 would be 9 3 | 2 1 | 7
    """
    lengths = tokens[documents].astype(np.int64)
    place = np.arange(len(documents)) // stretch
    return documents[np.lexsort((-lengths, place))]


def _order(stream: StreamConfig, rows: RowSource) -> Order:
    if not stream.shuffle:
        return "stored"
    # A plan has shuffled its rows already, where it was asked to.
    return "planned" if isinstance(rows, RowLoader) else "shuffled"


def _rows_have_masks(rows: RowSource, stores: list[TokenStore]) -> bool:
    if isinstance(rows, PackedRows | RecutRows | HeadRows):
        return rows.has_mask
    return any(bool(np.any(store.lengths.mask_offset != 0)) for store in stores)


def _rows_are_answers(rows: RowSource, stores: list[TokenStore]) -> bool:
    """Whether the masks of packed rows say what an assistant wrote, and are not loss weights of texts."""
    if isinstance(rows, PackedRows | RecutRows | HeadRows):
        return rows.mask_is == "answers"
    return any(_is_chat(store) and store.has_mask for store in stores)


def _is_chat(store: TokenStore) -> bool:
    return bool(store.manifest.config.get("chat"))


def _unmasked(rows: RowSource, stores: list[TokenStore], where: str) -> RowSource:
    get_logger("train").info("%s: every token is learnt, its masks are not used (loss_mask)", where)
    if isinstance(rows, RowLoader):
        return RowLoader([UnmaskedStore(store) if _is_chat(store) else store for store in stores], rows.plan)
    return UnmaskedRows(rows)


def _packed(
    stream: StreamConfig, stage: StageConfig, data_root: Path, where: str, opened: Opened
) -> tuple[RowSource, list[TokenStore]]:
    """Return the rows of a pack plan, whose stores are looked for from here and from `data_root`, or packed rows."""
    assert stream.rows is not None
    path = data_root / stream.rows
    of_hub = stream.rows.startswith(HUB)
    if not of_hub and folder_kind(path) == PACK_PLAN:
        return _plan_rows(stream, stage, path, data_root, where, opened)
    if stream.rows not in opened.rows:
        opened.rows[stream.rows] = PackedRows(stream.rows if of_hub else path)
    rows = opened.rows[stream.rows]
    again = stream.pack.strategy not in (None, "concat") or stream.pack.overflow == "drop_tail"
    if rows.lengths_are(stage.context_length) and not again:
        return rows, []
    if rows.longest < stage.context_length:
        raise _other_length(where, rows.longest, stage)
    if stream.teacher is not None:
        raise ConfigError(
            f"{where} has a teacher that read rows of another length",
            found=f"{rows.longest} tokens",
            allowed=f"{stage.context_length}, the stage's context_length",
            fix="write them at that length with `longspan data pack`, and annotate those",
        )
    strategy = stream.pack.strategy or ("best_fit" if stage.objective == "sft" else "concat")
    return recut(rows, length=stage.context_length, strategy=strategy, overflow=_of_rows(stream)), []


def _of_rows(stream: StreamConfig) -> Overflow:
    return "drop_tail" if stream.pack.overflow == "drop_tail" else "split"


def _plan_rows(
    stream: StreamConfig, stage: StageConfig, path: Path, data_root: Path, where: str, opened: Opened
) -> tuple[RowSource, list[TokenStore]]:
    plan = PackPlan.load(path)
    places = [Path(store) if Path(store).exists() else data_root / store for store in plan.stores]
    stores = open_stores(places, opened.stores)
    if not stores:
        raise DataError(
            f"{path} does not say which stores it was made from", fix="pack again with `longspan data pack`"
        )
    if plan.spec.length != stage.context_length:
        raise _other_length(where, plan.spec.length, stage)
    if stream.pack.strategy not in (None, "concat") or stream.pack.overflow == "drop_tail":
        raise ConfigError(f"{where}: strategy and overflow have no effect on a pack plan", found=str(path))
    return RowLoader(stores, plan), stores


def _other_length(where: str, length: int, stage: StageConfig) -> ConfigError:
    return ConfigError(
        f"{where} has rows of another length",
        found=f"{length} tokens",
        allowed=f"{stage.context_length}, the stage's context_length; packed rows may be longer",
        fix="pack them at that length",
    )
