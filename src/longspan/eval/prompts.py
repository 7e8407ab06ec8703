"""From a prompt's text to what a model is asked: token ids, BOS, chat template, and the answer's tokens.

    form = PromptForm(tokenizer)
    form.request("2, 4, 6,", answer="8")      -> Request(prompt_ids=[...], answer_ids=[" 8"])

The tokens of a given answer are those that it has behind the prompt, tokenised together: "is" + " 8" may be
other tokens than "is " + "8", and what a model would write is the former.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from longspan.core.errors import ConfigError, DataError
from longspan.core.files import read_json
from longspan.data.chat import ChatPrompt
from longspan.data.tokenizer import Tokenizer
from longspan.infer.requests import Request

BosPolicy = Literal["auto", "always", "never"]
OWN_TEMPLATE = "own"
"""Name for the chat template that comes with the tokenizer."""
_TAIL_CHARS = 256


class PromptForm:
    """How the prompts of an evaluation become token ids.

    Args:
        bos: whether ids begin with the tokenizer's BOS: `auto` as the tokenizer itself would have it,
            `always`, `never`. Never twice: one that a chat template writes counts.
        chat_template: the prompt becomes the message of a user. `own` = the tokenizer's template; else one
            that is shipped, or a Jinja file. None: plain text.

    Raises:
        ConfigError: `always` with a tokenizer that has no BOS.
        DataError: the chat template cannot be used.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, bos: BosPolicy = "auto", chat_template: str | None = None
    ) -> None:
        if bos == "always" and tokenizer.bos_id is None:
            raise ConfigError(
                "this tokenizer has no BOS token", found="--bos always", allowed="--bos auto, --bos never"
            )
        self.tokenizer = tokenizer
        self.bos = bos
        self._chat: ChatPrompt | None = None
        if chat_template is not None:
            self._chat = ChatPrompt(tokenizer, None if chat_template == OWN_TEMPLATE else chat_template)
        self.stop_ids = _stop_ids(tokenizer, self._chat)
        """Ids that end a generated answer: EOS, the end of a turn, those of generation_config.json."""
        plain = tokenizer.adds_bos and self._chat is None
        self._wants_bos = bos == "always" or (bos == "auto" and plain)

    @property
    def separator(self) -> str:
        """What stands between the end of a prompt and an answer; a chat's answer begins a turn of its own."""
        return " " if self._chat is None else ""

    def params(self) -> dict[str, Any]:
        """Return what determines the ids beside tokenizer and text, for the header of records."""
        begins = self.encode("a")[:1].tolist() == [self.tokenizer.bos_id]
        return {
            "bos": "one BOS" if begins else "no BOS",
            "chat_template": None if self._chat is None else self._chat.fingerprint[:16],
            "stop_ids": list(self.stop_ids),
        }

    def count(self, prompt: str, *, answer: str | None = None) -> int:
        """Return how many tokens a prompt has, BOS, chat template and answer counted."""
        return len(self.encode(prompt, "" if answer is None else self._lead(prompt) + answer))

    def request(
        self,
        prompt: str,
        *,
        answer: str | None = None,
        max_new_tokens: int = 64,
        stop: tuple[str, ...] = (),
    ) -> Request:
        """Return the request for a prompt; with an answer, one to be scored.

        A space is put between prompt and answer, save in a chat and after white space.

        Raises:
            DataError: the tokenizer joins the end of the prompt and the answer into one token.
        """
        text = prompt if self._chat is None else self._chat.text(prompt)
        if answer is None:
            ids, answer_ids = self.encode(prompt).astype(np.int64), None
        else:
            lead = self._lead(prompt)
            whole = self.encode(prompt, lead + answer).astype(np.int64)
            count = self._answer_tokens(prompt, lead + answer)
            ids, answer_ids = whole[: len(whole) - count], whole[len(whole) - count :]
        return Request(
            prompt=text,
            prompt_ids=ids,
            messages=None if self._chat is None else [{"role": "user", "content": prompt}],
            max_new_tokens=max_new_tokens,
            stop=stop,
            stop_ids=self.stop_ids,
            answer_ids=answer_ids,
        )

    def _lead(self, prompt: str) -> str:
        return "" if prompt[-1:].isspace() else self.separator

    def _answer_tokens(self, prompt: str, answer: str) -> int:
        """Return how many tokens the answer has; looked at on the end of the prompt, which decides it."""
        tail = prompt[-_TAIL_CHARS:]
        without, together = self.encode(tail), self.encode(tail, answer)
        count = len(together) - len(without)
        if count <= 0 or not np.array_equal(together[: len(without)], without):
            raise DataError("this tokenizer joins the end of the question and the answer into one token")
        return count

    def encode(self, prompt: str, answer: str = "") -> np.ndarray:
        """Return the ids of a prompt, and of an answer tokenised together with it `[tokens]`."""
        if self._chat is None:
            ids = self.tokenizer.encode(prompt + answer)
        else:
            ids = self._chat.encode(prompt, answer=answer)
        bos = self.tokenizer.bos_id
        begins = bos is not None and len(ids) > 0 and int(ids[0]) == bos
        if self._wants_bos and not begins:
            return np.concatenate([np.array([bos], ids.dtype), ids])
        if self.bos == "never" and begins:
            return ids[1:]
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
