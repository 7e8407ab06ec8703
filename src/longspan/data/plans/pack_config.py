"""How documents are placed in rows: the settings of a pack plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Self

import numpy as np
import pydantic

from longspan.core.config import Config, Length


class Pieces(NamedTuple):
    """Pieces of the documents of a block, int64 columns; `document` counts within the block."""

    document: np.ndarray
    start: np.ndarray
    """First framed token, behind the MOS."""
    tokens: np.ndarray
    """Framed tokens, the MOS and repeated ones included."""
    repeated: np.ndarray


class Strategy(NamedTuple):
    """How documents become rows: an entry of STRATEGIES."""

    cut: Callable[[PackConfig, np.ndarray, int, dict[str, int]], Pieces]
    """Cuts documents into pieces of at most a row: settings, own tokens int64 [documents] (none 0), tokens in the row
    that is being filled. What it leaves out it adds to the counts "tail", "remainder" ... of the last argument."""
    flows: bool = False
    """Pieces fill rows one after another. False: each begins a row."""
    join: Callable[[np.ndarray, int], np.ndarray] | None = None
    """Puts pieces of some rows together: their tokens int64 and the length of a row to the row of each. None: they stay
    as they were cut."""
    remainders: tuple[str, ...] = ("drop", "pad")
    """What may become of rows that are not full."""
    by_lengths: bool = False
    """A plan holds pieces of one of `split_lengths`."""
    overlaps_across: bool = False
    """`overlap_across` may be asked for."""
    check: Callable[[PackConfig], None] = lambda spec: None
    """Raises ValueError for settings that contradict one another."""


STRATEGIES: dict[str, Strategy] = {}
"""By name. `strategies` enters ours, which importing this package does; others may be added."""


class PackConfig(Config):
    """How documents are placed in rows."""

    ADDED_LATER = frozenset({"overflow", "overlap_across"})

    length: Length = pydantic.Field(ge=1, lt=2**32)
    """Tokens in a row, such as 128k."""
    strategy: str = "concat"
    """How documents become rows: concat, intact, best_fit or split; see `packing`."""
    min_length: Length = pydantic.Field(1, ge=1)
    """Documents with fewer tokens than this, specials not counted, are left out. 1: only empty ones."""
    min_tail: Length = pydantic.Field(1, ge=1)
    """The last piece of a cut document is dropped if it has fewer tokens than this. 1: never."""
    overflow: Literal["split", "drop_tail"] = "split"
    """What becomes of a document that, framed, is longer than a row: it goes on in another one, or only its first
    `length` tokens are placed; with strategy split only its first piece."""
    remainder: Literal["drop", "pad", "drop_last"] = "drop"
    """What becomes of a row that is not full: dropped (and counted) or filled with padding of weight 0. `drop_last`,
    for concat: dropped, and so is a last row that is just full, which no token follows."""
    specials: Literal["none", "bos", "eos", "both"] = "none"
    """Which special tokens frame a document; a token store holds none."""
    bos_id: int | None = pydantic.Field(None, ge=0)
    """Token that begins a document if `specials` asks for it."""
    eos_id: int | None = pydantic.Field(None, ge=0)
    """Token that ends a document if `specials` asks for it."""
    pad_id: int | None = pydantic.Field(None, ge=0)
    """Token of padding; any valid id serves, because padding has weight 0."""
    shuffle: bool = True
    """Put the rows in random order, so that the rows of one long document do not follow one another."""
    by_source: bool = False
    """A row holds documents of one source only; every source leaves its own remainder."""
    overlap: Length = pydantic.Field(0, ge=0)
    """Tokens repeated, with weight 0, at the start of the next piece of the same document; a piece that is no
    longer than this (the little that a row had room for) is not repeated."""
    overlap_across: bool = False
    """For concat: every row begins with the last `overlap` tokens of the row before, whatever documents they are of,
    and they are trained on again, as datatools' `pack --overlap` has it."""
    mos_id: int | None = pydantic.Field(None, ge=0)
    """Token in front of every piece that continues a document. None: nothing."""
    split_lengths: tuple[Length, ...] = ()
    """For split: lengths of pieces; a rest shorter than the last is dropped and counted as tail."""
    piece_length: Length | None = pydantic.Field(None, ge=1)
    """For split: which of `split_lengths` this plan holds; `plan_split` makes one plan for each."""

    @pydantic.model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if self.min_tail > self.length:
            raise ValueError(f"min_tail {self.min_tail} is longer than a row of {self.length}")
        if self.num_bos and self.bos_id is None:
            raise ValueError(f"specials {self.specials} needs bos_id")
        if self.num_eos and self.eos_id is None:
            raise ValueError(f"specials {self.specials} needs eos_id")
        if self.strategy not in STRATEGIES:
            raise ValueError(f"there is no strategy {self.strategy!r}, but {', '.join(STRATEGIES)}")
        strategy = STRATEGIES[self.strategy]
        if self.remainder not in strategy.remainders:
            allowed = " or ".join(strategy.remainders)
            raise ValueError(f"strategy {self.strategy} goes with remainder {allowed}, not {self.remainder}")
        if self.remainder == "pad" and self.pad_id is None:
            raise ValueError("remainder pad needs pad_id")
        if self.overlap + self.num_mos >= self.length:
            raise ValueError(f"overlap {self.overlap} leaves a row of {self.length} no room for new tokens")
        if self.overlap_across and (
            not strategy.overlaps_across or not self.overlap or self.mos_id is not None or self.min_tail > 1
            or self.overflow != "split" or self.remainder == "drop_last"
        ):  # fmt: skip
            raise ValueError(
                "overlap_across needs strategy concat and overlap, without mos_id, min_tail, overflow drop_tail and "
                "remainder drop_last"
            )
        if not strategy.by_lengths and (self.split_lengths or self.piece_length is not None):
            raise ValueError("split_lengths and piece_length have an effect with strategy split only")
        strategy.check(self)
        return self

    @property
    def num_bos(self) -> int:
        """Return the number of tokens in front of a document: 0 or 1."""
        return int(self.specials in ("bos", "both"))

    @property
    def num_eos(self) -> int:
        """Return the number of tokens behind a document: 0 or 1."""
        return int(self.specials in ("eos", "both"))

    @property
    def num_mos(self) -> int:
        """Return the number of tokens in front of a piece that continues a document: 0 or 1."""
        return int(self.mos_id is not None)
