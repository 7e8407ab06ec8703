"""What is learnt of conversations, and what becomes of what does not fit."""

from __future__ import annotations

from typing import Literal

import pydantic

from longspan.core.config import Config, Length


class ChatConfig(Config):
    """What is learnt of conversations, and what becomes of what does not fit."""

    train_turns: Literal["all", "last", "marked"] = "all"
    """Which answers are learnt: all, the last one, or those that a key of the turn marks (`weight: 1`, `train: true`).
    A turn that is marked not to be learnt never is; what tools return never is."""
    train_thoughts: bool = True
    """Learn the assistant's thoughts. false: they are only read, and the answer behind them is learnt."""
    true_prefixes: bool = False
    """Learn each answer behind what the template writes before it when the model is asked for it. Templates that drop
    thoughts of earlier turns write another text then: such answers become branches of one document, which holds what
    they share once. Rows of such documents train by attention: layers with a state are refused."""
    images: Literal["refuse", "replace"] = "refuse"
    """What becomes of images and other parts that are no text: the record is left out, or `[image]` stands for it."""
    max_tokens: Length | None = pydantic.Field(None, ge=1)
    """Most tokens of a conversation, such as 128k; `too_long` says what becomes of longer ones. None: any."""
    too_long: Literal["cut", "split", "drop"] = "cut"
    """cut: exchanges (a question and all that follows it), in the last resort steps of an agent, are taken out of the
    middle; split: several conversations of whole exchanges, each with the system's turn; drop: left out. All are
    counted."""
    truncate_tool_results: Length | None = pydantic.Field(None, ge=1)
    """Most tokens of what a tool returns: the middle of longer results is left out, marked and counted. None: any."""
