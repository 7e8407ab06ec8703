"""From a prompt's text to what a model is asked: token ids, BOS, chat template, and the answer's tokens.

    form = PromptForm(tokenizer)
    form.request("2, 4, 6,", answer="8")      -> Request(prompt_ids=[...], answer_ids=[" 8"])

The tokens of a given answer are those that it has behind the prompt, tokenised together: "is" + " 8" may be
other tokens than "is " + "8", and what a model would write is the former.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pydantic

from longspan.core.config import Config, Length
from longspan.core.errors import ConfigError, DataError
from longspan.core.files import read_json
from longspan.core.log import log_once
from longspan.data.chat import ChatPrompt
from longspan.data.tokenizer import Tokenizer
from longspan.eval.thinking_templates import ThinkingChat, ThinkingPolicy
from longspan.infer.requests import Request, Thinking

BosPolicy = Literal["auto", "always", "never"]
OWN_TEMPLATE = "own"
"""Name for the chat template that comes with the tokenizer."""
THOUGHT_TOKENS = 4096
"""Further room for the answers of a model that thinks, where nothing is said; RULER's own runs give as much."""
_TAIL_CHARS = 256


class PromptConfig(Config):
    """How prompts are put, and answers to them got."""

    bos: BosPolicy = "auto"
    """Whether prompts begin with BOS. auto: as the tokenizer itself would have it. What a chat template writes
    stays."""
    thinking: ThinkingPolicy = "auto"
    """Whether a chat's model thinks before it answers. auto: as its template has it. Thoughts are never scored."""
    template_args: dict[str, Any] = pydantic.Field(default_factory=dict)
    """Variables of the chat template, such as {enable_thinking: false}; a chat server is sent them as
    chat_template_kwargs."""
    max_new_tokens: Length | None = pydantic.Field(None, ge=1)
    """Tokens of a generated answer, thoughts included. None: what the task says, and 4,096 more for a model that
    thinks."""

    @pydantic.field_validator("template_args", mode="before")
    @classmethod
    def _are_variables(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        if not all(isinstance(name, str) and name.isidentifier() for name in given):
            raise ValueError("this holds no variables: names and values, such as {enable_thinking: false}")
        if taken := sorted({"messages", "add_generation_prompt"} & set(given)):
            raise ValueError(f"longspan itself tells the template its {' and '.join(taken)}")
        return given


class PromptForm:
    """How the prompts of an evaluation become token ids.

    Args:
        bos: whether ids begin with the tokenizer's BOS: `auto` as the tokenizer itself would have it,
            `always`, `never`. Never twice: what a chat template writes counts, and stays.
        chat_template: the prompt becomes the message of a user. `own` = the tokenizer's template; else one
            that is shipped, or a Jinja file. None: plain text.
        template_args: variables of the chat template.
        thinking: whether a chat's model thinks before it answers: `on`, `off`, or `auto`, as its template has it.
        max_new_tokens: of every generated answer, thoughts included; None: what the task says, and `THOUGHT_TOKENS`
            more where the model is known to think. A stated length holds the task's own room; more comes on top.
        chat_server: the model is behind a server that puts prompts into a chat by a template of its own.
        continues: that server goes on with an answer that was begun.

    Raises:
        ConfigError: `always` with a tokenizer that has no BOS; settings of a chat for plain text.
        DataError: the chat template cannot be used.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        bos: BosPolicy = "auto",
        chat_template: str | None = None,
        template_args: Mapping[str, Any] | None = None,
        thinking: ThinkingPolicy = "auto",
        max_new_tokens: int | None = None,
        chat_server: bool = False,
        continues: bool = False,
    ) -> None:
        if bos == "always" and tokenizer.bos_id is None:
            raise ConfigError(
                "this tokenizer has no BOS token", found="--bos always", allowed="--bos auto, --bos never"
            )
        self.tokenizer, self.bos = tokenizer, bos
        self._template_args, self._thinking = dict(template_args or {}), thinking
        self._max_new_tokens = max_new_tokens
        self._chat_server, self._continues = chat_server, continues
        self._chat: ThinkingChat | None = None
        if chat_template is not None:
            name = None if chat_template == OWN_TEMPLATE else chat_template
            self._chat = ThinkingChat(tokenizer, name, thinking=thinking, variables=self._template_args)
        elif not chat_server and (self._template_args or thinking != "auto"):
            raise ConfigError(
                "a plain text has no chat template that variables or thinking could be told",
                found=f"--thinking {thinking}" if thinking != "auto" else "--template-args",
                fix="name the template with --chat-template (`own` for the tokenizer's)",
            )
        self.thinks = thinking == "on" or (self._chat is not None and self._chat.thinks)
        """Whether the model is known to think before it answers."""
        self.stop_ids = _stop_ids(tokenizer, None if self._chat is None else self._chat.generating)
        """Ids that end a generated answer: EOS, the end of a turn, those of generation_config.json."""
        plain = tokenizer.adds_bos and self._chat is None
        self._wants_bos = bos == "always" or (bos == "auto" and plain)

    def plain(self) -> PromptForm:
        """Return the form of prompts that are put as plain text even to chat models: examples, code."""
        return PromptForm(
            self.tokenizer,
            bos=self.bos,
            thinking=self._thinking if self._chat_server else "auto",
            max_new_tokens=self._max_new_tokens,
            chat_server=self._chat_server,
        )

    @property
    def separator(self) -> str:
        """What stands between the end of a prompt and an answer; a chat's answer begins a turn of its own."""
        return " " if self._chat is None else ""

    @property
    def begins_answers(self) -> bool:
        """Whether the beginning of an answer can stand in the assistant's turn."""
        return self._continues if self._chat_server else self._chat is not None

    @property
    def takes_turns(self) -> bool:
        """Whether a prompt is put as a chat: by a template here, or by a server's."""
        return self._chat is not None or self._chat_server

    def room(self, own: int) -> int:
        """Return how many tokens a generated answer may have where the task itself gives it `own`."""
        return self._max_new_tokens or own + (THOUGHT_TOKENS if self.thinks else 0)

    def within(self, own: int) -> int:
        """Return how many tokens of the room for an answer a stated length holds: less where less is asked for."""
        return min(self.room(own), own)

    def beyond(self, own: int) -> int:
        """Return how many tokens of the room for an answer are not part of a stated length."""
        return max(0, self.room(own) - own)

    def params(self) -> dict[str, Any]:
        """Return what determines the ids beside tokenizer and text, for the header of records."""
        begins = self.encode("a")[:1].tolist() == [self.tokenizer.bos_id]
        given = {"template_args": self._template_args or None, "max_new_tokens": self._max_new_tokens}
        return {
            "bos": "one BOS" if begins else "no BOS",
            "chat_template": None if self._chat is None else self._chat.generating.fingerprint[:16],
            "thinking": self._thinking,
            "thinks": self.thinks,
            "answer_prefix": self.prefix_place,
            "stop_ids": list(self.stop_ids),
            **{name: value for name, value in given.items() if value is not None},
        }

    @property
    def prefix_place(self) -> str:
        """Where the beginning of an answer goes that a task gives: into the assistant's turn, the prompt, nowhere."""
        if self.thinks:
            return "none"
        return "assistant" if self.begins_answers else "end of prompt"

    def count(self, prompt: str, *, answer: str | None = None, answer_prefix: str = "") -> int:
        """Return how many tokens a prompt has, BOS, chat template and answer (or its beginning) counted."""
        if answer is None:
            return len(self.encode(*self._begin(prompt, answer_prefix)))
        return sum(map(len, self._pair(prompt, self._lead(prompt) + answer)))

    def request(
        self,
        prompt: str,
        *,
        answer: str | None = None,
        answer_prefix: str = "",
        max_new_tokens: int = 64,
        stop: tuple[str, ...] = (),
    ) -> Request:
        """Return the request for a prompt; with an answer, one to be scored.

        A space is put between prompt and answer, save in a chat and after white space.

        Args:
            answer_prefix: how a generated answer begins; left out for a model that thinks first.
            max_new_tokens: the task's own room for an answer; see `room`.

        Raises:
            DataError: the tokenizer joins the end of the prompt and the answer into one token.
            ConfigError: a given answer for a model that is to think first.
        """
        prompt, begun = self._begin(prompt, answer_prefix)
        messages = [{"role": "user", "content": prompt}]
        if begun:
            messages.append({"role": "assistant", "content": begun})
        chat = None if self._chat is None else self._chat.generating
        answer_ids = None
        if answer is None:
            ids = self.encode(prompt, begun).astype(np.int64)
        else:
            chat = self.before_given_answers()
            ids, answer_ids = self._pair(prompt, self._lead(prompt) + answer)
        return Request(
            prompt=(prompt if chat is None else chat.text(prompt)) + begun,
            prompt_ids=ids,
            messages=messages if chat is not None or begun else None,
            max_new_tokens=self.room(max_new_tokens),
            stop=stop,
            stop_ids=self.stop_ids,
            answer_ids=answer_ids,
            thinking=self._request_thinking,
        )

    def conversation(self, turns: Sequence[Mapping[str, str]], *, max_new_tokens: int = 64) -> Request:
        """Return the request for the assistant's next turn (role, content); in plain text turns have names.

        Raises:
            DataError: the chat template refuses such turns.
        """
        if self._chat is None:
            text = (
                "".join(f"{turn['role'].capitalize()}: {turn['content']}\n" for turn in turns) + "Assistant:"
            )
            ids = self.encode(text)
        else:
            text, written = self._chat.generating.conversation(turns)
            ids = self._begun(written)
        return Request(
            prompt=text,
            prompt_ids=ids.astype(np.int64),
            messages=turns if self.takes_turns else None,
            max_new_tokens=self.room(max_new_tokens),
            stop_ids=self.stop_ids,
            thinking=self._request_thinking,
        )

    @property
    def _request_thinking(self) -> Thinking:
        if self._chat is not None and self._chat.opened:
            return "opened"
        if self.thinks:
            return "expected"
        return "none" if self._thinking == "off" else "unknown"

    def _begin(self, prompt: str, answer_prefix: str) -> tuple[str, str]:
        """Return the prompt, and what the assistant's turn begins with."""
        if self.thinks or not answer_prefix:
            return prompt, ""
        if self.begins_answers:
            return prompt, answer_prefix.strip()
        return prompt + answer_prefix, ""

    def refuse_room(self, mode: str) -> None:
        """Refuse a room for answers where all are given. Raises ConfigError."""
        if self._max_new_tokens is not None:
            raise ConfigError(
                f"--max-new-tokens has no effect with {mode}, which measures given answers",
                found=self._max_new_tokens,
                fix="leave it out, or let the model write (--mode generate)",
            )

    def before_given_answers(self) -> ChatPrompt | None:
        """Return the chat that a given answer follows, with no thoughts open; None: plain text. Raises ConfigError."""
        if self._chat is None:
            return None
        if self._thinking == "on":
            raise ConfigError(
                "a given answer cannot be measured where the model is to think before it",
                found="--thinking on",
                allowed="--thinking off or auto, or a task that lets the model write (--mode generate)",
            )
        if self._chat.thinks:
            log_once(
                "eval",
                "the chat template has the model think first: a given answer stands after an empty block of thoughts",
            )
        return self._chat.answering

    def _lead(self, prompt: str) -> str:
        return "" if prompt[-1:].isspace() else self.separator

    def _pair(self, prompt: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a prompt, and those of an answer behind it, int64.

        They are tokenised together. Where that would join them, an answer that begins a turn stands apart: a model that
        writes it is given the ids of the prompt alone.
        """
        chat = self.before_given_answers()
        tail = prompt[-_TAIL_CHARS:]  # which decides it
        without, together = self.encode(tail, chat=chat), self.encode(tail, answer, chat=chat)
        count = len(together) - len(without)
        if count > 0 and np.array_equal(together[: len(without)], without):
            whole = self.encode(prompt, answer, chat=chat).astype(np.int64)
            return whole[: len(whole) - count], whole[len(whole) - count :]
        if chat is None:
            raise DataError("this tokenizer joins the end of the question and the answer into one token")
        ids = self.encode(prompt, chat=chat).astype(np.int64)
        return ids, self.tokenizer.encode(answer).astype(np.int64)

    def encode(self, prompt: str, answer: str = "", *, chat: ChatPrompt | None = None) -> np.ndarray:
        """Return the ids of a prompt, and of an answer tokenised together with it `[tokens]`."""
        if chat is None and self._chat is not None:
            chat = self._chat.generating
        ids = self.tokenizer.encode(prompt + answer) if chat is None else chat.encode(prompt, answer=answer)
        return self._begun(ids)

    def _begun(self, ids: np.ndarray) -> np.ndarray:
        """Return ids with a BOS before them where one is wanted."""
        bos = self.tokenizer.bos_id
        # One that stands there is the template's own, which may be the mark that begins every turn.
        if self._wants_bos and not (len(ids) > 0 and int(ids[0]) == bos):
            return np.concatenate([np.array([bos], ids.dtype), ids])
        return ids


def _stop_ids(tokenizer: Tokenizer, chat: ChatPrompt | None) -> tuple[int, ...]:
    ids = {tokenizer.eos_id} if tokenizer.eos_id is not None else set()
    if chat is not None:
        ids.update(chat.stop_ids)
    config = tokenizer.path.parent / "generation_config.json"
    if config.is_file():
        content = read_json(config)
        stated = content.get("eos_token_id") if isinstance(content, dict) else None
        ids.update(token for token in (stated if isinstance(stated, list) else [stated]) if token is not None)
    return tuple(sorted(ids))
