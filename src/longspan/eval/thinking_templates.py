"""Chat templates of models that think before they answer: told to, told not to, and asked whether they do.

on      the template's variables for thinking are set (`enable_thinking`, `thinking`)
off     they are unset; a block of thoughts that the template opens nevertheless is closed again, empty
auto    the template as it is: the model thinks where the prompt ends inside a block, where the variables would
        change the prompt, or where it writes in channels
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from longspan.core.log import log_once
from longspan.data.chat import ChatPrompt
from longspan.data.tokenizer import Tokenizer
from longspan.infer.thinking import CHANNEL, FINAL_CHANNEL, VARIABLES, closing_of

ThinkingPolicy = Literal["auto", "on", "off"]


def template_variables(thinking: ThinkingPolicy, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables of a chat template: those that are given, and those that turn thinking on or off."""
    told = {} if thinking == "auto" else dict.fromkeys(VARIABLES, thinking == "on")
    return {**given, **told}


class ThinkingChat:
    """A chat template in two forms: for answers that the model writes, and for answers that are given.

    Args:
        template: as for `ChatPrompt`.
        variables: of the template.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None,
        *,
        thinking: ThinkingPolicy,
        variables: Mapping[str, Any],
    ) -> None:
        def rendered(how: ThinkingPolicy, begins: str = "") -> ChatPrompt:
            told = template_variables(how, variables)
            return ChatPrompt(tokenizer, template, variables=told, answer_begins=begins)

        asked, off = rendered(thinking), rendered("off")
        closed = rendered("off", _closing(off)) if _closing(off) else off
        switched = (asked.before, asked.after) != (off.before, off.after)
        self.answering: ChatPrompt = closed
        """Ends where an answer begins, outside of any thoughts."""
        self.generating: ChatPrompt = closed if thinking == "off" else asked
        """Ends where the model goes on, with thoughts if it has them."""
        self.opened = closing_of(self.generating.after) is not None
        """Whether the prompt ends inside a block of thoughts."""
        self.thinks = thinking != "off" and (self.opened or switched or bool(_closing(off)))
        """Whether the model thinks first."""
        if not self.thinks:
            self.answering = self.generating
        if thinking == "on" and not self.thinks:
            log_once(
                "eval",
                "the chat template has no variable that turns thinking on: the model is taken to think by itself "
                "(--template-args sets variables of other names)",
            )


def _closing(chat: ChatPrompt) -> str:
    """Return what ends the thoughts that the prompt opens, or goes past them; empty where there are none."""
    closing = closing_of(chat.after)
    if closing is not None:
        line = "" if chat.after.endswith("\n") else "\n"
        return f"{line}\n{closing}\n\n"
    return FINAL_CHANNEL if chat.writes(CHANNEL) and not chat.after.endswith(FINAL_CHANNEL) else ""
