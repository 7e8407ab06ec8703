"""Settings of a stream: which rows a stage reads, and how they are planned."""

from __future__ import annotations

from typing import Any, Self

import pydantic

from longspan.core.config import Config
from longspan.core.log import log_once
from longspan.data.chat.chat_config import ChatConfig
from longspan.data.plans.mixture_config import MixtureConfig
from longspan.data.plans.pack_config import STRATEGIES
from longspan.data.plans.store_packing import StorePackConfig


class StreamPackConfig(StorePackConfig):
    """How the documents of a stream become rows of the stage's context length."""

    group_by_length: bool = False
    """Pack documents of like length together: in every stretch of the training order, long ones first."""

    @pydantic.field_validator("strategy")
    @classmethod
    def _one_plan(cls, strategy: str | None) -> str | None:
        if strategy in STRATEGIES and STRATEGIES[strategy].by_lengths:
            raise ValueError(
                f"{strategy} makes a plan for each length: make them with `longspan data pack`, as rows"
            )
        return strategy


OLDER_KEYS = {
    "strategy": "strategy",
    "overflow": "overflow",
    "specials": "specials",
    "min_document_tokens": "min_length",
    "max_document_tokens": "max_length",
    "group_by_length": "group_by_length",
}
"""Keys of a stream in earlier releases, and where they are in its `pack`."""


class StreamConfig(Config):
    """Rows to train on: planned here from token stores or records, or packed before by `longspan data pack` or
    another tool."""

    store: str | tuple[str, ...] | None = None
    """Token store folders, relative to `data_root`; mixture and packing are planned by the settings below."""
    records: tuple[str, ...] | None = None
    """Instead of `store`: JSON lines of `text`, or of conversations in `messages` or `conversations`, which are
    tokenized into stores beside the first time. `F[5000]` draws so many records, `F[:5000]` takes the first;
    `long-llm:` is `data_root`."""
    rows: str | None = None
    """Instead of `store`: a pack plan, or packed rows (ours, ProLong's MDS, JSON lines or parquet with `source` spans,
    a data set that Hugging Face `datasets` saved), or `hf://org/name`: parquet of a data set of the hub, read there
    while it trains. Rows longer than the stage become rows of the stage."""
    teacher: str | tuple[str, ...] | None = None
    """For `objective: distill`: annotations by `longspan annotate topk` of `rows`, or of each `store`, relative to
    `data_root`."""
    chat_template: str | None = None
    """Template of the conversations in `records`: a shipped name or a Jinja file. None: the tokenizer's own."""
    mixture: MixtureConfig = MixtureConfig(mode="none")
    """Data mixture: which documents are read, how often; lengths may be upsampled."""
    pack: StreamPackConfig = StreamPackConfig()
    """Sequence packing: how documents become rows of the stage's context length. `strategy` and `overflow` (split or
    drop_tail) also say what becomes of longer `rows`. Without a `strategy`, `objective: sft` packs as for
    conversations."""
    loss_mask: bool | None = None
    """Loss mask: whether only what a conversation's mask marks is learnt. None: as the stage says."""
    begin_with_user: bool = False
    """Leave out the first turn of conversations in `records` that is not the user's, such as a system turn."""
    conversations: ChatConfig = ChatConfig()
    """What is learnt of the conversations in `records`, and what becomes of what does not fit."""
    shuffle: bool = True
    """Rows are read in random order, another one in each epoch. false: in the order in which they stand, always."""
    document_mask: bool | None = None
    """Intra-document masking: whether the documents of a row are kept apart. None: as the stage says."""
    weight: float = pydantic.Field(1.0, gt=0)
    """Share of the rows, relative to the stage's other streams."""

    @pydantic.field_validator("records", mode="before")
    @classmethod
    def _one_file(cls, records: Any) -> Any:
        return (records,) if isinstance(records, str) else records

    @pydantic.model_validator(mode="before")
    @classmethod
    def _older_keys(cls, values: Any) -> Any:
        """Put the keys of earlier releases where they belong now, and say so where they say something."""
        if not isinstance(values, dict) or not OLDER_KEYS.keys() & values.keys():
            return values
        pack = values.get("pack", {})
        if not isinstance(pack, dict):
            pack = pack.model_dump(exclude_unset=True)
        moved = {new: values[old] for old, new in OLDER_KEYS.items() if values.get(old) is not None}
        if moved.get("min_length") == 0:
            moved["min_length"] = 1
        defaults = StreamPackConfig.model_fields
        if said := [name for name, value in moved.items() if value != defaults[name].default]:
            words = ", ".join(f"{name}: {moved[name]}" for name in said)
            log_once("train", f"a stream says how it is packed in its `pack` now: write `pack: {{{words}}}`")
        rest = {name: value for name, value in values.items() if name not in OLDER_KEYS}
        return {**rest, "pack": {**pack, **moved}}

    @pydantic.model_validator(mode="after")
    def _one_origin(self) -> Self:
        if sum(origin is not None for origin in (self.store, self.records, self.rows)) != 1:
            raise ValueError("a stream has either a store or rows, or records")
        # By value: the settings of a run are written with all defaults, and read again.
        pack = {
            name: value for name, value in self.pack if value != type(self.pack).model_fields[name].default
        }
        changed = ["mixture"] if self.mixture != MixtureConfig(mode="none") else []
        changed += [name for name in pack if name not in ("strategy", "overflow")]
        if self.rows is not None and changed:
            raise ValueError(f"{', '.join(changed)} has no effect on rows that are packed already")
        if self.rows is not None and self.pack.overflow == "drop":
            raise ValueError("overflow: drop leaves out documents; `rows` have split or drop_tail")
        if (
            self.rows is not None
            and self.pack.overflow == "drop_tail"
            and self.pack.strategy not in (None, "concat")
        ):
            raise ValueError(
                "overflow: drop_tail takes the first tokens of each of `rows`, with strategy concat"
            )
        if self.records is None and self.begin_with_user:
            raise ValueError("begin_with_user has an effect on records only: a store is tokenized already")
        if self.records is not None and self.teacher is not None:
            raise ValueError(
                "a teacher annotates rows or a store: make a store of the records with `longspan data tokenize`"
            )
        if self.records is None and self.chat_template is not None:
            raise ValueError("chat_template has an effect on records only: a store is tokenized already")
        if self.records is None and self.conversations != ChatConfig():
            raise ValueError("conversations has an effect on records only: a store is tokenized already")
        return self
