"""Rows for training: read through a pack plan from memory-mapped stores, interleaved from several streams.

Row number k of a run is a pure function of the plan, the weights and the seed, so a single number, the
position, is the whole state of the loader. Reading a row casts each document's view into it once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from longspan.core.errors import ArgumentError, ConfigError, DataError
from longspan.core.seeds import rng
from longspan.data.plans.packing import PAD_DOCUMENT, PackPlan
from longspan.data.store.lengths import LengthTable

PAD_SOURCE = "padding"
"""Name of the source of padding, the last name of rows from a plan that pads."""
MAX_PERIOD = 2**16
"""Longest cycle of an interleaving; weights that need a longer one are rounded to it (error below 1e-4)."""


class DocumentStore(Protocol):
    """What the loader needs of a token store."""

    @property
    def lengths(self) -> LengthTable:
        """Return the length table of the store."""

    @property
    def fingerprint(self) -> str:
        """Return what identifies the store's content."""

    def tokens(self, index: int, /) -> np.ndarray:
        """Return the tokens of a document, uint16 or uint32."""

    def mask(self, index: int, /) -> np.ndarray | None:
        """Return uint8 loss weights, one a token, or None."""


@runtime_checkable
class BranchingStore(DocumentStore, Protocol):
    """A store that may hold documents that branch, as a `TokenStore` does."""

    @property
    def branching(self) -> np.ndarray:
        """Return the documents that branch."""

    def tree_tokens(self, index: int, /) -> np.ndarray:
        """Return the tokens of a document, also of one that branches."""

    def parts(self, index: int, /) -> np.ndarray | None:
        """Return the parts of a document that branches, or None."""


class TeacherRow(NamedTuple):
    """What a teacher predicts after each of T tokens: its K likeliest words and the mass of the others."""

    ids: np.ndarray
    """int32 [T, K]."""
    logprobs: np.ndarray
    """float32 [T, K], natural logarithms; -inf behind the words that a token has, all -inf: it has no teacher."""
    tail: np.ndarray
    """float32 [T], logarithm of the mass of all other words."""


class PackedRow(NamedTuple):
    """One row of T tokens and the n documents in it (padding is a document of its own, the last)."""

    input_ids: np.ndarray
    """int64 [T]."""
    cu_seqlens: np.ndarray
    """int32 [n + 1]: document j stands at cu_seqlens[j] to cu_seqlens[j + 1]."""
    documents: np.ndarray
    """uint32 [n] index into the length table, PAD_DOCUMENT for padding."""
    sources: np.ndarray
    """uint16 [n] index into `source_names`."""
    source_names: tuple[str, ...]
    continuation: np.ndarray
    """bool [n]: the document began in another row."""
    weights: np.ndarray
    """uint8 [T] loss weight of each token as a target: the store's mask, else 1; BOS, EOS and MOS 1; padding
    and tokens that overlapping pieces repeat 0."""
    positions: np.ndarray | None = None
    """int64 [T] positions that do not count on within each document; None = they do."""
    teacher: TeacherRow | None = None
    """What a teacher predicts after each token; None = nobody was asked."""
    branches: np.ndarray | None = None
    """int64 [n, 2] where documents are parts of trees: the part of the row that each branches off, -1 = none, and the
    position of its first token; None = each is a document of its own. See `models.tree_documents`."""
    token_sources: np.ndarray | None = None
    """uint16 [T] index into `source_names` of each token, where a document has several; None = as `sources` says."""

    @property
    def follows(self) -> np.ndarray:
        """int64 [n, 2] as `branches`, also of rows without any: a copy."""
        if self.branches is None:
            return np.repeat([[-1, 0]], len(self.cu_seqlens) - 1, axis=0)
        return self.branches.astype(np.int64)

    @property
    def first_positions(self) -> np.ndarray:
        """int64 [n] tokens that stand before each document's first: those that a branch follows, else 0."""
        return self.follows[:, 1]


Order = Literal["planned", "shuffled", "stored"]
"""How a stream's rows follow one another: planned = as they stand first, then in an order of each epoch's own;
shuffled = in such an order from the first epoch on; stored = as they stand, always."""
BLOCKS_TOGETHER = 4
"""Blocks whose rows are shuffled among one another."""


class RowSource(Protocol):
    """Rows of one length by number: a `RowLoader`, or `PackedRows` of a store that is packed already.

    One whose rows are read block by block says in `blocks` how many rows each has.
    """

    @property
    def num_rows(self) -> int:
        """Return the number of rows."""

    @property
    def length(self) -> int:
        """Return the tokens in a row."""

    @property
    def source_names(self) -> tuple[str, ...]:
        """Return the names that the rows' source numbers stand for."""

    @property
    def fingerprint(self) -> str:
        """Return 16 hex characters that stand for the content."""

    def row(self, index: int, /) -> PackedRow:
        """Read one row."""


def check_row(index: int, num_rows: int) -> None:
    """Raise ArgumentError where there is no such row."""
    if not 0 <= index < num_rows:
        raise ArgumentError("there is no such row", found=index, allowed=f"0 to {num_rows - 1}")


class RowLoader:
    """The rows of one pack plan.

    `stores` are the token stores in the order in which their length tables were joined for planning.

    Raises:
        DataError: the plan was made for other stores.
    """

    def __init__(self, stores: DocumentStore | Sequence[DocumentStore], plan: PackPlan) -> None:
        self._stores: list[DocumentStore] = list(stores) if isinstance(stores, Sequence) else [stores]
        self._lengths = LengthTable.concatenate([store.lengths for store in self._stores])
        self.plan, self.num_rows, self.length = plan, plan.num_rows, plan.spec.length
        if self._lengths.fingerprint != plan.lengths_fingerprint:
            raise DataError(
                "the pack plan was made for other token stores",
                found=f"length table {self._lengths.fingerprint}",
                allowed=plan.lengths_fingerprint,
                fix="give the same stores in the same order, or pack again",
            )
        self.has_trees = any(len(_branching(store)) for store in self._stores)
        """Whether documents branch: `PackedRow.branches` says how."""
        if self.has_trees:
            self._refuse_cut_trees()
        pads = plan.spec.remainder == "pad"
        self.source_names = self._lengths.source_names + ((PAD_SOURCE,) if pads else ())

    @property
    def fingerprint(self) -> str:
        """Return 16 hex characters over the plan and the content of the stores."""
        parts = [self.plan.fingerprint, *(store.fingerprint for store in self._stores)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]

    def row(self, index: int) -> PackedRow:
        """Read one row.

        Raises:
            ArgumentError: there is no such row.
            DataError: the plan does not fit the documents in the store.
        """
        plan = self.plan
        check_row(index, plan.num_rows)
        spans = slice(int(plan.row_offsets[index]), int(plan.row_offsets[index + 1]))
        documents = np.array(plan.span_document[spans])
        starts = plan.span_start[spans]
        repeated = None if plan.span_untrained is None else plan.span_untrained[spans]
        cu_seqlens = np.zeros(len(documents) + 1, np.int64)
        np.cumsum(plan.span_tokens[spans], out=cu_seqlens[1:])
        if cu_seqlens[-1] != self.length:
            raise DataError(
                f"row {index} of the pack plan is damaged",
                found=f"{cu_seqlens[-1]} tokens",
                allowed=self.length,
                fix="pack again",
            )
        input_ids = np.empty(self.length, np.int64)
        weights = np.ones(self.length, np.uint8)
        for number, document in enumerate(documents.tolist()):
            place = slice(int(cu_seqlens[number]), int(cu_seqlens[number + 1]))
            again = 0 if repeated is None else int(repeated[number])
            self._fill(document, int(starts[number]), again, input_ids[place], weights[place])
        branches = None
        if self.has_trees:
            documents, starts, cu_seqlens, branches = self._parts(documents, starts, cu_seqlens)
        sources = np.full(len(documents), len(self._lengths.source_names), np.uint16)
        real = documents != PAD_DOCUMENT
        sources[real] = self._lengths.source[documents[real]]
        return PackedRow(
            branches=branches,
            input_ids=input_ids,
            cu_seqlens=cu_seqlens.astype(np.int32),
            documents=documents,
            sources=sources,
            source_names=self.source_names,
            continuation=np.array(starts > 0),
            weights=weights,
        )

    def _refuse_cut_trees(self) -> None:
        """Refuse a plan that cuts or frames documents that branch. Raises DataError."""
        spec, plan = self.plan.spec, self.plan
        branching = np.zeros(len(self._lengths), bool)
        for number, store in enumerate(self._stores):
            positions = np.flatnonzero(self._lengths.store == number)
            branching[positions] = np.isin(self._lengths.position[positions], _branching(store))
        spans = np.flatnonzero(plan.span_document != PAD_DOCUMENT)
        spans = spans[branching[plan.span_document[spans]]]
        cut = self._lengths.tokens[plan.span_document[spans]] != plan.span_tokens[spans]
        if cut.any() or (len(spans) and spec.num_bos + spec.num_eos):
            raise DataError(
                "documents that branch cannot be cut, nor framed by special tokens",
                found=f"{int(cut.sum())} of {len(spans)} do not stand in a row as a whole",
                fix="pack them without a strategy, or with best_fit, overflow drop and specials none",
            )

    def _parts(
        self, documents: np.ndarray, starts: np.ndarray, cu_seqlens: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return documents, starts and borders with the parts of trees as documents, and where they branch."""
        counts, borders, branches = [], [], []
        total = 0
        for number, document in enumerate(documents.tolist()):
            parts = None
            if document != PAD_DOCUMENT:
                store = self._stores[int(self._lengths.store[document])]
                position = int(self._lengths.position[document])
                parts = store.parts(position) if isinstance(store, BranchingStore) else None
            table = np.zeros((1, 3), np.int64) if parts is None else parts.astype(np.int64)
            own = table[:, 1] == np.arange(len(table))
            counts.append(len(table))
            borders.append(cu_seqlens[number] + table[:, 0])
            branches.append(np.stack([np.where(own, -1, total + table[:, 1]), table[:, 2]], axis=1))
            total += len(table)
        every = np.append(np.concatenate(borders), cu_seqlens[-1])
        return np.repeat(documents, counts), np.repeat(starts, counts), every, np.concatenate(branches)

    def _fill(self, document: int, start: int, repeated: int, ids: np.ndarray, weights: np.ndarray) -> None:
        """Fill `ids`, and `weights` that are 1, with a span from framed token `start` on."""
        spec, lengths = self.plan.spec, self._lengths
        if document == PAD_DOCUMENT:
            assert spec.pad_id is not None
            ids[:], weights[:] = spec.pad_id, 0
            return
        store, position = self._stores[int(lengths.store[document])], int(lengths.position[document])
        tokens = store.tree_tokens(position) if isinstance(store, BranchingStore) else store.tokens(position)
        if spec.mos_id is not None and start:
            ids[0] = spec.mos_id
            ids, weights = ids[1:], weights[1:]
        end, num_bos = start + len(ids), spec.num_bos
        framed = num_bos + len(tokens) + spec.num_eos
        if len(tokens) != lengths.tokens[document] or end > framed:
            raise DataError(
                f"document {position} of the token store does not have the length that was planned",
                found=f"{len(tokens)} tokens",
                allowed=int(lengths.tokens[document]),
                fix="verify the store, then pack again",
            )
        if num_bos and start == 0:
            ids[0] = spec.bos_id
        if spec.num_eos and end == framed:
            ids[-1] = spec.eos_id
        # Framed position p is token p - num_bos; [low, high) are the document's own tokens in this span.
        low, high = max(start - num_bos, 0), min(end - num_bos, len(tokens))
        if low < high:
            place = slice(low + num_bos - start, high + num_bos - start)
            ids[place] = tokens[low:high]
            mask = store.mask(position)
            if mask is not None:
                weights[place] = mask[low:high]
        weights[:repeated] = 0


def _branching(store: DocumentStore) -> np.ndarray:
    return store.branching if isinstance(store, BranchingStore) else np.zeros(0, np.uint32)


class RowAddress(NamedTuple):
    """Where a row of a mixed run comes from."""

    stream: str
    epoch: int
    row: int


class StreamProgress(NamedTuple):
    """How far a stream is: rows drawn in all, complete epochs, rows of the present epoch."""

    rows: int
    epochs: int
    rows_in_epoch: int


class StreamMixer:
    """Interleaves the rows of several loaders by weight, evenly and without randomness.

    With weights 2 and 1 the streams follow one another as a b a a b a: after any number of rows each stream
    is within a row or so of its share. A stream that ends begins again; `orders` says how its rows follow one
    another, "planned" where it does not name the stream.

    Raises:
        ConfigError: no stream, a weight that is not positive, or rows of different lengths.
        DataError: a stream has no rows.
    """

    def __init__(
        self,
        streams: Mapping[str, tuple[RowSource, float]],
        seed: int,
        *,
        orders: Mapping[str, Order] | None = None,
    ) -> None:
        if not streams:
            raise ConfigError("there is no stream to draw rows from")
        self._orders: dict[str, Order] = {name: (orders or {}).get(name, "planned") for name in streams}
        self._names = tuple(streams)
        self._loaders = {name: loader for name, (loader, _) in streams.items()}
        self._seed = seed
        self._check()
        self._counts = _cycle_counts({name: weight for name, (_, weight) in streams.items()})
        self._cycle = _interleave(self._counts)
        # drawn[k, s]: rows of stream s among the first k of a cycle; [cycle + 1, streams].
        drawn = np.zeros((len(self._cycle) + 1, len(self._names)), np.int64)
        drawn[np.arange(len(self._cycle)) + 1, self._cycle] = 1
        self._drawn = np.cumsum(drawn, axis=0)
        self._row_order = lru_cache(maxsize=2 * len(self._names))(self._permute)

    def _check(self) -> None:
        empty = [name for name, loader in self._loaders.items() if loader.num_rows == 0]
        if empty:
            raise DataError(
                "a stream has no rows",
                found=", ".join(empty),
                fix="pack with remainder pad, shorter rows, or more documents",
            )
        lengths = {name: loader.length for name, loader in self._loaders.items()}
        if len(set(lengths.values())) > 1:
            raise ConfigError(
                "streams that are mixed need rows of one length", found=lengths, fix="pack them alike"
            )

    @property
    def length(self) -> int:
        """Return the tokens in a row."""
        return self._loaders[self._names[0]].length

    @property
    def fingerprint(self) -> str:
        """Return 16 hex characters over streams, weights and seed: everything that decides the rows."""
        parts = [str(self._seed)]
        for name, count in self._counts.items():
            order = "" if self._orders[name] == "planned" else f"\x1f{self._orders[name]}"
            parts.append(f"{name}\x1f{self._loaders[name].fingerprint}\x1f{count}{order}")
        return hashlib.sha256("\x1e".join(parts).encode()).hexdigest()[:16]

    def locate(self, position: int) -> RowAddress:
        """Return where row number `position` (from 0) comes from. Raises ArgumentError below 0."""
        stream = int(self._cycle[position % len(self._cycle)])
        name = self._names[stream]
        epoch, index = divmod(int(self._rows_before(position)[stream]), self._loaders[name].num_rows)
        order = self._orders[name]
        as_they_stand = order == "stored" or (order == "planned" and epoch == 0)
        return RowAddress(name, epoch, index if as_they_stand else int(self._row_order(name, epoch)[index]))

    def rows(self, position: int, count: int) -> list[PackedRow]:
        """Return `count` rows from row number `position` on."""
        addresses = [self.locate(number) for number in range(position, position + count)]
        return [self._loaders[address.stream].row(address.row) for address in addresses]

    def epochs(self, position: int) -> dict[str, StreamProgress]:
        """Return how far each stream is after `position` rows."""
        progress = {}
        for name, rows in zip(self._names, self._rows_before(position).tolist()):
            progress[name] = StreamProgress(rows, *divmod(rows, self._loaders[name].num_rows))
        return progress

    def state(self, position: int) -> dict[str, Any]:
        """Return what a checkpoint keeps: the position and what it counts."""
        return {"position": position, "fingerprint": self.fingerprint}

    def check_state(self, state: Mapping[str, Any]) -> int:
        """Return the position of a state. Raises DataError if data, weights or seed are others now."""
        position = state.get("position")
        if state.get("fingerprint") != self.fingerprint or not isinstance(position, int) or position < 0:
            raise DataError(
                "the saved data position belongs to other data, weights or seed",
                found=state.get("fingerprint"),
                allowed=self.fingerprint,
                fix="resume with the recipe and the data of the interrupted run, or begin a new run",
            )
        return position

    def _rows_before(self, position: int) -> np.ndarray:
        if position < 0:
            raise ArgumentError("a position is not negative", found=position)
        cycles, rest = divmod(position, len(self._cycle))
        return cycles * self._drawn[-1] + self._drawn[rest]

    def _permute(self, name: str, epoch: int) -> np.ndarray:
        generator = rng(self._seed, "stream-epoch", name, epoch)
        blocks = np.asarray(getattr(self._loaders[name], "blocks", ()), np.int64)
        if len(blocks) <= 1:
            return generator.permutation(self._loaders[name].num_rows)
        return _shuffled_blocks(blocks, generator)


def _shuffled_blocks(blocks: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return a random order that needs few blocks at a time: blocks in random order, a few of them mixed.

    A row whose block is not at hand costs reading all of it: in an order without regard to blocks, nearly every row.
    """
    starts = np.cumsum(blocks) - blocks
    order = generator.permutation(len(blocks))
    parts = []
    for first in range(0, len(order), BLOCKS_TOGETHER):
        some = order[first : first + BLOCKS_TOGETHER]
        rows = np.concatenate([np.arange(starts[block], starts[block] + blocks[block]) for block in some])
        parts.append(generator.permutation(rows))
    return np.concatenate(parts)


def balance(costs: Sequence[int] | np.ndarray, num_ranks: int) -> np.ndarray:
    """Deal the rows of one optimizer step to ranks so that they finish together; int64 [num_ranks, rows / num_ranks].

    Rows that run at the same time (a column of the result) are neighbours in cost, and in each column the
    dearest row goes to the rank that has least so far. The most expensive column comes first. Equal costs
    keep their order, so the result is a function of the costs.

    costs [9, 1, 8, 2], 2 ranks -> [[0, 1], [2, 3]]: 9 + 1 and 8 + 2

    Raises:
        ArgumentError: the rows do not divide among the ranks.
    """
    cost = np.asarray(costs, np.int64)
    if num_ranks < 1 or len(cost) % num_ranks:
        raise ArgumentError(
            "the rows of a step do not divide among the ranks",
            found=f"{len(cost)} rows, {num_ranks} ranks",
            fix="choose batch_tokens as a multiple of the ranks' rows",
        )
    order = np.argsort(-cost, kind="stable")
    dealt = np.empty((num_ranks, len(cost) // num_ranks), np.int64)
    total = np.zeros(num_ranks, np.int64)
    for column in range(dealt.shape[1]):
        rows = order[column * num_ranks : (column + 1) * num_ranks]
        ranks = np.argsort(total, kind="stable")
        dealt[ranks, column] = rows
        total[ranks] += cost[rows]
    return dealt


def _cycle_counts(weights: Mapping[str, float]) -> dict[str, int]:
    """Return how many rows of each stream a cycle holds: {a: 0.3, b: 0.7} -> {a: 3, b: 7}."""
    wrong = {name: weight for name, weight in weights.items() if not 0 < weight < math.inf}
    if wrong:
        raise ConfigError("the weight of a stream is a positive number", found=wrong)
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    scale = math.lcm(*(weight.denominator for weight in exact.values()))
    counts = {name: int(weight * scale) for name, weight in exact.items()}
    divisor = math.gcd(*counts.values())
    total = sum(counts.values())
    if total // divisor <= MAX_PERIOD:
        return {name: count // divisor for name, count in counts.items()}
    return {name: max(1, round(Fraction(count, total) * MAX_PERIOD)) for name, count in counts.items()}


def _interleave(counts: Mapping[str, int]) -> np.ndarray:
    """Return the stream of each row of a cycle: row j of a stream with n rows is due at time (2 j + 1) / 2 n.

    {a: 2, b: 1} -> due a 1/4, b 1/2, a 3/4 -> [0, 1, 0]. Streams due together follow in the given order.
    """
    due = np.concatenate([(2 * np.arange(count) + 1) / (2 * count) for count in counts.values()])
    stream = np.repeat(np.arange(len(counts)), list(counts.values()))
    return stream[np.lexsort((stream, due))]
