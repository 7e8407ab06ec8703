"""Mixture: which documents are trained on, how often and in which order; a function of the length table.

    none         every document
    global       documents shorter than the threshold are kept with probability r, whatever their source
    per_source   the same, but every source keeps its share of the tokens: length upsampling that preserves
                 the domain mixture (Fu et al. 2024, arXiv:2402.10171, section 3)
    upsample     named sources get a new weight, the others keep their share; normalised
    proportions  named sources get exactly these shares, the others nothing
    repeat       every source is used whole; named ones so many times, parts of a time included

A document's coin is a hash of its key: whether it stays depends neither on file order nor on its neighbours.
All budgets are in counted tokens. A source stops at the document that reaches its budget.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from longspan.core.columns import load_columns, save_columns
from longspan.core.config import Config
from longspan.core.errors import ConfigError, DataError
from longspan.core.shuffling import hashed
from longspan.data.plans.mixture_config import MixtureConfig
from longspan.data.plans.where import fulfilling
from longspan.data.store.lengths import LengthTable
from longspan.data.store.measures import Measures

KIND = "mixture-plan"
BLOCK = 2**20
"""Documents worked on at a time; it bounds memory and has no influence on the plan."""


class SourceReport(Config):
    """What was asked of one source and what was taken; documents and tokens count repeats."""

    available_documents: int
    available_tokens: int
    kept_short: int
    """Short documents that the coin kept."""
    kept_long: int
    requested: int | None
    """Token budget of the source; None where the mode has only a budget for all sources together."""
    documents: int
    tokens: int
    repeats: int
    """Taken documents that had been taken before."""
    overshoot: int
    """Tokens above the budget: less than the last document taken."""
    shortfall: int
    """Tokens missing below the budget when the source ran out."""
    share_before: float
    share_after: float


class MixtureReport(Config):
    """The whole mixture and each source; sources that were filtered out are absent."""

    requested: int | None
    documents: int
    tokens: int
    repeats: int
    overshoot: int
    shortfall: int
    sources: dict[str, SourceReport]
    excluded: int = 0
    """Documents that do not fulfil the condition `where`."""


@dataclass(frozen=True, eq=False)
class MixturePlan:
    """The chosen documents in training order."""

    documents: np.ndarray
    """uint32 indices into the length table; a repeated document appears again."""
    report: MixtureReport
    spec: MixtureConfig
    seed: int
    lengths_fingerprint: str
    stores: tuple[str, ...] = ()
    """Paths of the token stores behind the length table, in order; empty when unknown."""

    @cached_property
    def fingerprint(self) -> str:
        """Return 16 hex characters over settings, seed, length table and result."""
        head = f"{self.spec.fingerprint()} {self.seed} {self.lengths_fingerprint}\n".encode()
        digest = hashlib.sha256(head)
        digest.update(np.ascontiguousarray(self.documents).data)
        return digest.hexdigest()[:16]

    def save(self, path: str | Path, *, stores: Sequence[str | Path] = ()) -> None:
        """Write the plan as a folder, whole or not at all; `stores` are remembered for whoever packs it."""
        head: dict[str, Any] = {
            "spec": self.spec.to_dict(),
            "seed": self.seed,
            "lengths": self.lengths_fingerprint,
            "fingerprint": self.fingerprint,
            "stores": [str(store) for store in stores or self.stores],
            "report": self.report.to_dict(),
        }
        save_columns(path, kind=KIND, head=head, columns={"documents": self.documents})

    @classmethod
    def load(cls, path: str | Path, *, mmap: bool = True) -> Self:
        """Read a saved plan. Raises DataError when the folder is incomplete, changed or of another kind."""
        head, columns = load_columns(path, kind=KIND, dtypes={"documents": np.uint32}, mmap=mmap)
        try:
            plan = cls(
                documents=columns["documents"],
                report=MixtureReport.from_dict(head["report"], where="report"),
                spec=MixtureConfig.from_dict(head["spec"], where="spec"),
                seed=head["seed"],
                lengths_fingerprint=head["lengths"],
                stores=tuple(head["stores"]),
            )
        except (ConfigError, KeyError, TypeError) as error:
            raise DataError(f"the head of the plan {path} is damaged", found=str(error)) from None
        if plan.fingerprint != head.get("fingerprint"):
            raise DataError(f"the plan {path} was changed after it was written", fix="plan again")
        return plan


def load_audit(spec: MixtureConfig, root: Path = Path()) -> Measures | None:
    """Open the audit that a condition asks; a relative path is one under `root`."""
    return None if spec.audit is None else Measures.load(root / spec.audit)


def plan_mixture(
    spec: MixtureConfig, lengths: LengthTable, seed: int, *, audit: Measures | None = None
) -> MixturePlan:
    """Choose and order documents; 0.2 s for 1 million documents, about 40 bytes of memory for each of them.

    `audit`: from `load_audit`.

    Raises:
        ConfigError: a source in `sources` or `weights` does not exist, or `where` asks for what is not known.
        DataError: no document is left to choose from, or (without a budget) a wanted source has none left.
    """
    fingerprint = lengths.fingerprint
    fulfils = None if spec.where is None else fulfilling(spec.where, lengths, audit)
    if spec.group == "store":
        lengths = _by_store(lengths)
    candidates = _candidates(spec, lengths)
    excluded = 0
    if fulfils is not None:
        excluded = int(np.count_nonzero(candidates & ~fulfils))
        candidates &= fulfils
    counted = lengths
    ratio = spec.characters_per_token
    if ratio is not None:
        counted = _in_characters(lengths, candidates)
    short = np.asarray(counted.tokens) < spec.threshold * (ratio or 1)
    kept = candidates & (~short | keep_coin(lengths.key, spec.keep_probability, seed))
    if not kept.any():
        raise DataError(
            "no document is left to choose from",
            found=f"{int(candidates.sum())} documents before short ones were dropped",
            fix="raise keep_short, lower threshold, or choose other sources"
            + ("" if spec.where is None else f"; {excluded} documents do not fulfil the condition"),
        )
    asked = (
        spec
        if ratio is None or spec.tokens is None
        else spec.model_copy(update={"tokens": round(spec.tokens * ratio)})
    )
    taken, requested, budgets = _choose(asked, counted, candidates, kept, seed)
    if ratio is not None:
        requested = requested if requested is None else round(requested / ratio)
        budgets = {name: round(budget / ratio) for name, budget in budgets.items()}
    # Ties (equal keys) stay in store order: the sort is stable and groups are entered in that order.
    order = np.argsort(taken.place, kind="stable")
    counts = _Counts.of(lengths, candidates, kept, short, taken)
    documents = taken.documents[order]
    return MixturePlan(
        documents=documents,
        report=_report(lengths.source_names, counts, requested, budgets).model_copy(
            update={"excluded": excluded}
        ),
        spec=spec,
        seed=seed,
        lengths_fingerprint=fingerprint,
    )


def _in_characters(lengths: LengthTable, candidates: np.ndarray) -> LengthTable:
    """Return the table with its characters in place of its tokens. Raises DataError where some are not known."""
    characters = lengths.characters
    unknown = int(np.count_nonzero(candidates if characters is None else candidates & (characters == 0)))
    if characters is None or unknown:
        raise DataError(
            "characters_per_token needs the characters of each document",
            found=f"{unknown} documents without a count: made by an earlier version, of conversations, or of tokens",
            fix="tokenize the texts again, or leave it out",
        )
    return replace(lengths, tokens=characters)


def _by_store(lengths: LengthTable) -> LengthTable:
    """Return the table with its stores in place of its sources."""
    names = tuple(str(number) for number in range(lengths.num_stores))
    return replace(lengths, source=np.asarray(lengths.store), source_names=names)


def _candidates(spec: MixtureConfig, lengths: LengthTable) -> np.ndarray:
    named = set(spec.weights) | set(spec.sources or ())
    unknown = sorted(named - set(lengths.source_names))
    if unknown:
        raise ConfigError(
            "the mixture names a source that the data does not have",
            found=", ".join(unknown),
            allowed=lengths.source_names,
        )
    if spec.sources is not None and not set(spec.weights) <= set(spec.sources):
        outside = sorted(set(spec.weights) - set(spec.sources))
        raise ConfigError("weights name sources that `sources` leaves out", found=", ".join(outside))
    wanted = np.array(
        [spec.sources is None or name in spec.sources for name in lengths.source_names] or [True]
    )
    # An empty document has nothing to train on.
    candidates = wanted[lengths.source] & (np.asarray(lengths.tokens) > 0)
    if spec.part is not None:
        start, stop = spec.part
        for block in _blocks(len(lengths)):
            place = split_place(lengths.key[block])
            # The largest hashes round up to 1.
            candidates[block] &= (place >= start) & ((place < stop) | (stop == 1))
    return candidates


def split_place(keys: np.ndarray) -> np.ndarray:
    """Return where in 0..1 each document stands when a corpus is split, float64 [documents], from its key alone."""
    return hashed(keys, 0, "split") * 2.0**-64


def keep_coin(keys: np.ndarray, probability: float, seed: int) -> np.ndarray:
    """Return which short documents are kept [documents], from their keys alone."""
    if probability >= 1:
        return np.ones(len(keys), bool)
    limit, heads = np.uint64(int(probability * 2.0**64)), np.empty(len(keys), bool)
    for part in _blocks(len(keys)):
        heads[part] = hashed(keys[part], seed, "mixture", "keep-short") < limit
    return heads


def _blocks(count: int) -> Iterator[slice]:
    """Cut a column into blocks, so that what is computed on the way stays small."""
    for start in range(0, count, BLOCK):
        yield slice(start, min(start + BLOCK, count))


class _Taken(NamedTuple):
    """Chosen documents, not yet in order: index, pass (0 = first), place in [0, 1] of the run."""

    documents: np.ndarray
    passes: np.ndarray
    place: np.ndarray


def _choose(
    spec: MixtureConfig, lengths: LengthTable, candidates: np.ndarray, kept: np.ndarray, seed: int
) -> tuple[_Taken, int | None, dict[str, int]]:
    """Return the chosen documents, the budget of the whole and, if the mode has them, of each source."""
    kept_documents = _where(kept)
    if spec.mode in ("none", "global"):
        return _take(lengths, kept_documents, spec.tokens, spec.max_repeat, seed), spec.tokens, {}
    names = lengths.source_names
    kept_tokens = _by_source(lengths, kept_documents, weights=True)
    max_repeat = spec.max_repeat
    if spec.mode == "repeat":
        times = [spec.weights.get(name, 1.0) for name in names]
        max_repeat = max(1, math.ceil(max(times)))
        budgets = {name: round(t * int(n)) for name, t, n in zip(names, times, kept_tokens)}
    else:
        shares = source_shares(spec, names, _by_source(lengths, _where(candidates), weights=True))
        budgets = _budgets(spec, names, shares, kept_tokens * max_repeat)
    # By name, so that the numbering of sources has no influence.
    numbers = {name: number for number, name in enumerate(names)}
    parts = [
        _take(lengths, _of_source(lengths, kept_documents, numbers[name]), budgets[name], max_repeat, seed)
        for name in sorted(names)
    ]
    taken = _Taken(*(np.concatenate(columns) for columns in zip(*parts)))
    return taken, sum(budgets.values()), budgets


def _by_source(lengths: LengthTable, documents: np.ndarray, *, weights: bool) -> np.ndarray:
    """Return int64 documents, or tokens, per source."""
    total = np.zeros(len(lengths.source_names), np.int64)
    for part in _blocks(len(documents)):
        tokens = lengths.tokens[documents[part]] if weights else None  # float64 sums are exact below 2**53
        counts = np.bincount(lengths.source[documents[part]], weights=tokens, minlength=len(total))
        total += counts.astype(np.int64)
    return total


def _where(mask: np.ndarray) -> np.ndarray:
    """Return the numbers of the documents that a mask keeps, uint32."""
    parts = [(np.flatnonzero(mask[part]) + part.start).astype(np.uint32) for part in _blocks(len(mask))]
    return np.concatenate([np.zeros(0, np.uint32), *parts])


def _of_source(lengths: LengthTable, documents: np.ndarray, source: int) -> np.ndarray:
    parts = [documents[part] for part in _blocks(len(documents))]
    return np.concatenate([documents[:0], *(part[lengths.source[part] == source] for part in parts)])


def source_shares(spec: MixtureConfig, names: Sequence[str], tokens: np.ndarray) -> np.ndarray:
    """Return the wanted share of tokens of each source, given what there is of each; they sum to 1."""
    original = tokens / tokens.sum()
    if spec.mode == "per_source":
        return original
    rest = original if spec.mode == "upsample" else np.zeros(len(names))
    weights = np.array([spec.weights.get(name, rest[index]) for index, name in enumerate(names)])
    return weights / weights.sum()


def _budgets(
    spec: MixtureConfig, names: Sequence[str], shares: np.ndarray, capacity: np.ndarray
) -> dict[str, int]:
    """Divide the budget by the shares, largest remainder first, so that the parts sum to it."""
    wanted = shares > 0
    if spec.tokens is not None:
        total = spec.tokens
    else:
        empty = [name for name, use, most in zip(names, wanted, capacity) if use and not most]
        if empty:
            raise DataError(
                "without a token budget the shares cannot be kept: a source has no document left",
                found=", ".join(empty),
                fix="set tokens, raise keep_short, or choose sources without it",
            )
        total = int(np.min(capacity[wanted] / shares[wanted]))
    exact = total * shares
    parts = np.floor(exact).astype(np.int64)
    missing = total - int(parts.sum())
    if missing > 0:
        parts[np.lexsort((np.array(names), parts - exact))[:missing]] += 1
    if spec.tokens is None:
        parts = np.minimum(parts, capacity)
    return {name: int(part) for name, part in zip(names, parts)}


def _take(
    lengths: LengthTable, documents: np.ndarray, budget: int | None, max_repeat: int, seed: int
) -> _Taken:
    """Take whole passes over `documents`, then part of one more in hash order, until the budget is met.

    Places spread each pass evenly: with 2.5 passes a document of the second pass stands in [0.4, 0.8), and a
    group of which a tenth is taken is spread over the whole run.
    """
    per_pass = int(lengths.tokens[documents].sum(dtype=np.uint64))
    full, rest = (1, 0) if budget is None else divmod(budget, per_pass) if per_pass else (0, 0)
    if full >= max_repeat:
        full, rest = max_repeat, 0
    chosen = [documents] * full
    fractions = [1.0] * full
    if rest:
        order = np.argsort(hashed(lengths.key[documents], seed, "mixture", "take", full), kind="stable")
        last = _documents_until(lengths, documents, order, rest)
        members = order[: last + 1]
        members.sort()
        chosen.append(documents[members])
        fractions.append(len(members) / len(documents))
        del order, members
    places = []
    for index, (part, fraction) in enumerate(zip(chosen, fractions)):
        place = np.empty(len(part))
        for block in _blocks(len(part)):
            uniform = hashed(lengths.key[part[block]], seed, "mixture", "order", index) * 2.0**-64
            place[block] = (index + uniform * fraction) / sum(fractions)
        places.append(place)
    passes = [np.full(len(part), index, np.uint16) for index, part in enumerate(chosen)]
    return _Taken(
        np.concatenate([documents[:0], *chosen]),
        np.concatenate([np.zeros(0, np.uint16), *passes]),
        np.concatenate([np.zeros(0), *places]),
    )


def _documents_until(lengths: LengthTable, documents: np.ndarray, order: np.ndarray, budget: int) -> int:
    """Return the place in `order` of the document that reaches the budget.

    A document is taken while the tokens before it are fewer than the budget.
    """
    before = 0
    for part in _blocks(len(order)):
        ends = before + np.cumsum(lengths.tokens[documents[order[part]]], dtype=np.int64)
        if ends[-1] >= budget:
            return part.start + int(np.searchsorted(ends, budget))
        before = int(ends[-1])
    return len(order) - 1


class _Counts(NamedTuple):
    """Numbers per source, indexed by source id."""

    available_documents: np.ndarray
    available_tokens: np.ndarray
    kept_short: np.ndarray
    kept_long: np.ndarray
    documents: np.ndarray
    tokens: np.ndarray
    repeats: np.ndarray

    @classmethod
    def of(
        cls, lengths: LengthTable, candidates: np.ndarray, kept: np.ndarray, short: np.ndarray, taken: _Taken
    ) -> Self:
        available = _where(candidates)
        return cls(
            _by_source(lengths, available, weights=False),
            _by_source(lengths, available, weights=True),
            _by_source(lengths, _where(kept & short), weights=False),
            _by_source(lengths, _where(kept & ~short), weights=False),
            _by_source(lengths, taken.documents, weights=False),
            _by_source(lengths, taken.documents, weights=True),
            _by_source(lengths, taken.documents[taken.passes > 0], weights=False),
        )


def _report(
    names: Sequence[str], counts: _Counts, requested: int | None, budgets: dict[str, int]
) -> MixtureReport:
    before, after = int(counts.available_tokens.sum()), int(counts.tokens.sum())
    sources = {}
    for index, name in enumerate(names):
        row = {field: int(column[index]) for field, column in counts._asdict().items()}
        budget = budgets.get(name)
        if not row["available_documents"] and not budget:
            continue
        sources[name] = SourceReport(
            **row,
            requested=budget,
            overshoot=max(0, row["tokens"] - budget) if budget is not None else 0,
            shortfall=max(0, budget - row["tokens"]) if budget is not None else 0,
            share_before=row["available_tokens"] / before,
            share_after=row["tokens"] / after if after else 0.0,
        )
    by_source = list(sources.values())
    goal = after if requested is None else requested
    return MixtureReport(
        requested=requested,
        documents=int(counts.documents.sum()),
        tokens=after,
        repeats=int(counts.repeats.sum()),
        overshoot=sum(row.overshoot for row in by_source) if budgets else max(0, after - goal),
        shortfall=sum(row.shortfall for row in by_source) if budgets else max(0, goal - after),
        sources=sources,
    )
