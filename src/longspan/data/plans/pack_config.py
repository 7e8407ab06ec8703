"""How documents are placed in rows: the settings of a pack plan."""

from __future__ import annotations

import hashlib
import json
from typing import Literal, Self

import pydantic

from longspan.core.config import Config, Length


class PackConfig(Config):
    """How documents are placed in rows."""

    length: Length = pydantic.Field(ge=1, lt=2**32)
    """Tokens in a row, such as 128k."""
    strategy: Literal["concat", "intact", "best_fit", "split"] = "concat"
    """See the module's table."""
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
        if self.strategy == "best_fit" and self.remainder != "pad":
            raise ValueError("best_fit leaves most rows a little short of full: it needs remainder pad")
        if self.strategy != "concat" and self.remainder == "drop_last":
            raise ValueError("remainder drop_last has an effect with strategy concat only")
        if self.remainder == "pad" and self.pad_id is None:
            raise ValueError("remainder pad needs pad_id")
        if self.overlap + self.num_mos >= self.length:
            raise ValueError(f"overlap {self.overlap} leaves a row of {self.length} no room for new tokens")
        if self.overlap_across and (
            self.strategy != "concat" or not self.overlap or self.mos_id is not None or self.min_tail > 1
            or self.overflow != "split" or self.remainder == "drop_last"
        ):  # fmt: skip
            raise ValueError(
                "overlap_across needs strategy concat and overlap, without mos_id, min_tail, overflow drop_tail and "
                "remainder drop_last"
            )
        self._check_split()
        return self

    def fingerprint(self) -> str:
        """Return 16 hex characters that change exactly when a setting changes.

        Plans that were made before there was `overflow` or `overlap_across` keep theirs.
        """
        later = {"overflow": "split", "overlap_across": False}
        values = {
            name: value for name, value in self.to_dict().items() if name not in later or value != later[name]
        }
        text = json.dumps(values, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]

    def _check_split(self) -> None:
        if self.strategy != "split":
            if self.split_lengths or self.piece_length is not None:
                raise ValueError("split_lengths and piece_length have an effect with strategy split only")
            return
        lengths = self.split_lengths
        if not lengths or list(lengths) != sorted(set(lengths), reverse=True):
            raise ValueError("split needs split_lengths, longest first, such as [64k, 8k]")
        if any(self.length % length for length in lengths):
            raise ValueError(f"split_lengths {list(lengths)} do not all divide a row of {self.length}")
        if self.overlap or self.min_tail > 1:
            raise ValueError("split has no overlap and no min_tail: its shortest piece is the smallest tail")
        if lengths[-1] <= self.num_mos:
            raise ValueError("the shortest of split_lengths has no room for a token behind mos_id")
        if self.piece_length is not None and self.piece_length not in lengths:
            raise ValueError(f"piece_length {self.piece_length} is not one of split_lengths {list(lengths)}")

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
