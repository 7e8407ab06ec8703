"""Settings of a stream: which rows a stage reads, and how they are planned."""

from __future__ import annotations

from typing import Any, Literal, Self

import pydantic

from longspan.core.config import Config, Length
from longspan.data.plans.framing import Framing
from longspan.data.plans.mixture import MixtureConfig


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
    strategy: Literal["concat", "intact", "best_fit"] | None = None
    """How documents become rows of the stage's context length; those of longer `rows` too. None: concat; for
    conversations, and with `objective: sft`, best_fit, and a conversation longer than a row is left out and counted:
    no answer is learnt without its question."""
    overflow: Literal["split", "drop_tail", "drop"] | None = None
    """What becomes of a document longer than the stage's context length: it goes on in further rows (split), gives its
    first tokens (drop_tail), or is left out (drop), each counted. None: split, but drop for conversations without a
    `strategy`. Of `rows` each row is split, or gives its first tokens."""
    loss_mask: bool | None = None
    """Whether only what a conversation's mask marks is learnt. None: as the stage says."""
    begin_with_user: bool = False
    """Leave out the first turn of conversations in `records` that is not the user's, such as a system turn."""
    shuffle: bool = True
    """Rows are read in random order, another one in each epoch. false: in the order in which they stand, always."""
    document_mask: bool | None = None
    """Whether the documents of a row are kept apart. None: as the stage says."""
    specials: Framing = "auto"
    """Which special tokens of the store's tokenizer frame a document; a token store holds none. auto: BOS in front of
    texts where the tokenizer adds it itself; conversations begin as their template has it."""
    min_document_tokens: Length = pydantic.Field(0, ge=0)
    """Shorter documents are left out."""
    max_document_tokens: Length | None = pydantic.Field(None, ge=1)
    """Longer documents are left out, and counted, instead of cut. None: they are cut."""
    group_by_length: bool = False
    """Pack documents of like length together: in every stretch of the training order, long ones first."""
    weight: float = pydantic.Field(1.0, gt=0)
    """Share of the rows, relative to the stage's other streams."""

    @pydantic.field_validator("records", mode="before")
    @classmethod
    def _one_file(cls, records: Any) -> Any:
        return (records,) if isinstance(records, str) else records

    @pydantic.model_validator(mode="after")
    def _one_origin(self) -> Self:
        if sum(origin is not None for origin in (self.store, self.records, self.rows)) != 1:
            raise ValueError("a stream has either a store or rows, or records")
        if self.max_document_tokens is not None and self.max_document_tokens < self.min_document_tokens:
            raise ValueError("max_document_tokens is below min_document_tokens: no document is left")
        planning = (
            "mixture", "specials", "min_document_tokens", "max_document_tokens", "group_by_length"
        )  # fmt: skip
        # By value: the settings of a run are written with all defaults, and read again.
        changed = [name for name in planning if getattr(self, name) != type(self).model_fields[name].default]
        if self.rows is not None and changed:
            raise ValueError(f"{', '.join(changed)} has no effect on rows that are packed already")
        if self.rows is not None and self.overflow == "drop":
            raise ValueError("overflow: drop leaves out documents; `rows` have split or drop_tail")
        if self.rows is not None and self.overflow == "drop_tail" and self.strategy not in (None, "concat"):
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
        return self
