"""How a corpus is read and encoded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import pydantic

from longspan.core.config import Config
from longspan.data.chat.chat_config import ChatConfig
from longspan.data.plans.mixture_config import MixtureConfig
from longspan.data.readers import Grouping
from longspan.data.store.token_store import SHARD_BYTES
from longspan.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from longspan.data.chat import ChatFormat


class TokenizeConfig(Config):
    """How a corpus is read and encoded."""

    text_field: str = "text"
    """Field of a record that holds the text; dots reach into objects."""
    source_field: str | None = None
    """Field that names the source. None: the place of the file does."""
    group_by: str | None = None
    """Field whose value joins records into one document, such as the name of a repository. The texts then stand on the
    disk of the store once more until it is made."""
    order_by: str | None = None
    """Field that orders the records of a group, by number also where numbers are written as text. None: as they
    stand."""
    header_field: str | None = None
    """Field with a file name, put as a comment above each record of a group."""
    messages_field: str | None = None
    """Field that holds a conversation, instead of a text. None: texts; with a `chat_template` "messages"."""
    chat_template: str | None = None
    """Template of conversations: a shipped name or a Jinja file. None: the tokenizer's."""
    begin_with_user: bool = False
    """Leave out a first turn of conversations that is not the user's, such as a system turn; counted."""
    conversations: ChatConfig = ChatConfig()
    """What is learnt of conversations, and what becomes of what does not fit."""
    mix: MixtureConfig | None = None
    """Sample while reading: settings of a mixture such as mode=per_source,tokens=5B,keep_short=0.1, or a YAML file of
    them; `data mix` then makes the exact mixture. None: every document."""
    seed: int = 0
    """Seed of what `mix` draws."""
    strict: bool = False
    """Stop at the first record that cannot be used (broken, without a wanted field, of another type), or file without
    such records. Else they are left out and counted."""
    shard_bytes: int = pydantic.Field(SHARD_BYTES, ge=1, lt=1 << 32)
    """Size of the store's files."""

    @pydantic.field_validator("mix")
    @classmethod
    def _can_be_sampled(cls, mix: MixtureConfig | None) -> MixtureConfig | None:
        """Refuse a mixture that cannot be sampled while documents are read."""
        if mix is None:
            return mix
        if mix.tokens is None:
            raise ValueError("sampling while reading needs a number of tokens, such as tokens=5B")
        if mix.where is not None:
            raise ValueError("a condition (where) is for `data mix`: what is read first has not been audited")
        if mix.mode == "repeat" or mix.group != "source":
            raise ValueError(
                f"mode {mix.mode} by {mix.group} cannot be sampled while reading; modes none, global, per_source, "
                "upsample and proportions can, by source"
            )
        return mix

    @pydantic.model_validator(mode="after")
    def _groups_have_a_field(self) -> Self:
        if self.group_by is None and (self.order_by is not None or self.header_field is not None):
            raise ValueError("only groups have an order and headers: give group_by")
        return self

    @property
    def grouping(self) -> Grouping | None:
        """Return how records are joined, if they are."""
        return None if self.group_by is None else Grouping(self.group_by, self.order_by, self.header_field)

    def chat_format(self, tokenizer: Tokenizer) -> ChatFormat | None:
        """Return the format of conversations, None where texts are read. Raises DataError as `load_chat_format`."""
        plain = not self.begin_with_user and self.conversations == ChatConfig()
        if self.messages_field is None and self.chat_template is None and plain:
            return None
        from longspan.data.chat import load_chat_format

        return load_chat_format(
            tokenizer,
            self.chat_template,
            begin_with_user=self.begin_with_user,
            config=self.conversations,
        )
