"""How documents of token stores become rows, as users ask for it: what is not said follows from the stores.

Texts are joined and cut where a row ends. Conversations stay whole, and those longer than a row are left out: no answer
is learnt without its question.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Self

import numpy as np
import pydantic

from longspan.core.config import Config, Length
from longspan.core.errors import ArgumentError
from longspan.data.plans.framing import Framing, frame_settings
from longspan.data.plans.pack_config import STRATEGIES, PackConfig, Strategy
from longspan.data.store import TokenStore
from longspan.data.store.lengths import LengthTable

__all__ = ["Settled", "StorePackConfig"]

NO_LIMIT = int(np.iinfo(np.int64).max)


class Settled(NamedTuple):
    """What a `StorePackConfig` means for some stores."""

    pack: PackConfig
    longest: np.ndarray
    """int64 [stores] tokens of the longest document that is kept."""
    room: int
    """Tokens of a document that fit a row."""

    def too_long(self, lengths: LengthTable, documents: np.ndarray) -> np.ndarray:
        """Return which documents are left out because of their length, bool [documents]."""
        return lengths.tokens[documents] > self.longest[lengths.store[documents]]


class StorePackConfig(Config):
    """How documents of token stores become rows."""

    strategy: str | None = None
    """concat: documents follow one another and are cut at row ends. intact: a row holds one document. best_fit:
    documents that fit a row are not cut, rows are padded. split: documents are cut into pieces of `split_lengths`, one
    plan for each length. None: concat; for conversations best_fit."""
    split_lengths: tuple[Length, ...] = ()
    """For split: lengths of pieces, longest first, such as 64k,8k."""
    by_source: bool = False
    """A row holds documents of one source only."""
    min_length: Length = pydantic.Field(1, ge=1)
    """Documents of fewer tokens are left out."""
    max_length: Length | None = pydantic.Field(None, ge=1)
    """Documents of more tokens are left out, and counted. None: see `overflow`."""
    min_tail: Length = pydantic.Field(1, ge=1)
    """Last pieces of cut documents that have fewer tokens are left out."""
    overflow: Literal["split", "drop_tail", "drop"] | None = None
    """A document longer than a row goes on in another one (split), keeps its first tokens (drop_tail) or is left out
    (drop), each counted. None: split; for conversations without a `strategy` drop."""
    overlap: Length = pydantic.Field(0, ge=0)
    """Tokens that the next piece of the same document repeats, without loss."""
    overlap_across: bool = False
    """Every row begins with the `overlap` last tokens of the row before, whatever documents they are of, and they are
    trained on again."""
    remainder: Literal["drop", "pad", "drop_last"] | None = None
    """What becomes of a row that is not full: left out or padded; drop_last leaves out a last row too that is just
    full. None: what the strategy needs, else drop."""
    specials: Framing = "auto"
    """What frames a document; a token store holds text only. auto: BOS before texts, where the tokenizer adds it
    itself; conversations begin as their template has it."""
    mos: str = pydantic.Field("none", coerce_numbers_to_str=True)
    """none, bos, eos or an id: the token before a piece that continues a document."""
    shuffle: bool = True
    """Put rows in random order."""

    @pydantic.model_validator(mode="after")
    def _limits_agree(self) -> Self:
        if self.max_length is not None and self.max_length < self.min_length:
            raise ValueError("max_length is below min_length: no document is left")
        return self

    def settle(
        self,
        stores: Sequence[TokenStore],
        *,
        length: int,
        where: str,
        ids: Mapping[str, int | None],
        answers: bool = False,
        pads: Callable[[Strategy], bool] = lambda strategy: "drop" not in strategy.remainders,
    ) -> Settled:
        """Return the settings of a plan of rows of `length` tokens.

        Args:
            stores: that the documents are from.
            where: the plan's name in messages.
            ids: `pad_id`, and others that the plan shall remember.
            answers: documents stay whole as conversations do, whatever they are.
            pads: whether rows that are not full are padded where `remainder` is not said.

        Raises:
            ConfigError: settings that contradict one another, or a token that the tokenizer has not.
        """
        chats = np.array([bool(store.manifest.config.get("chat")) for store in stores])
        name = self.strategy or ("best_fit" if answers or chats.any() else "concat")
        padded = name in STRATEGIES and pads(STRATEGIES[name])
        frame = frame_settings(self.specials, stores, where=where)
        pack = PackConfig.from_dict(
            {
                **{name: getattr(self, name) for name in PACKED_ALIKE},
                "length": length,
                "strategy": name,
                "overflow": "drop_tail" if self.overflow == "drop_tail" else "split",
                "remainder": self.remainder or ("pad" if padded else "drop"),
                **ids,
                **frame,
                "mos_id": _token(self.mos, stores[0]),
            },
            where=where,
        )
        room = length - pack.num_bos - pack.num_eos
        longest = np.full(len(stores), NO_LIMIT if self.max_length is None else self.max_length)
        if self.overflow == "drop":
            longest = np.minimum(longest, room)
        elif self.overflow is None and self.strategy is None:
            longest[chats] = np.minimum(longest[chats], room)
        return Settled(pack, longest, room)


def _token(named: str, store: TokenStore) -> int | None:
    if named == "none" or named.isdecimal():
        return None if named == "none" else int(named)
    known = store.manifest.tokenizer.get(f"{named}_id")
    if known is None:
        raise ArgumentError(
            "mos is not a token of the tokenizer", found=named, allowed="none, bos, eos or an id"
        )
    return int(known)


PACKED_ALIKE = StorePackConfig.model_fields.keys() & PackConfig.model_fields.keys()
