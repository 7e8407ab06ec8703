"""A question put as a chat: what the template writes around one message of the user, up to the answer.

chat = ChatPrompt(load_tokenizer("tokenizer"), "llama-3")
ids = chat.encode("Who wrote it?")      # <|begin_of_text|><|start_header_id|>user<|end_header_id|> ... assistant

Special tokens are read in what the template writes alone; in the message they are ordinary text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longspan.core.errors import DataError
from longspan.data.chat.encoder import MarkedEncoder
from longspan.data.chat.format import special_texts
from longspan.data.chat.messages import MARKS, Message
from longspan.data.chat.template import DATE, Template, find_template
from longspan.data.tokenizer import Tokenizer

_USER, _ANSWER = "\U000f0011", "\U000f0012"
_SPACED = f"  {_USER}  "
_PIECE_CHARACTERS = 1 << 14


class ChatPrompt:
    """A tokenizer's chat template around one message of the user.

    Args:
        template: None takes the tokenizer's own. Else the name of one of its own, a shipped one, or
            a Jinja file.
        variables: of the template, by name (`enable_thinking`).
        answer_begins: what is put behind the template's text, as its own: how each answer begins.

    Raises:
        DataError: there is no such template, or it does not write the message once and as it is.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None = None,
        *,
        variables: Mapping[str, Any] | None = None,
        answer_begins: str = "",
    ) -> None:
        text = find_template(tokenizer.path.parent, template)
        special = special_texts(tokenizer)
        self._source, self._variables = text, dict(variables or {})
        self._template = Template(text, special)
        self._tokenizer = tokenizer
        self._encoder = MarkedEncoder(tokenizer)
        # Two spaces: one at each side may be the template's own, around a message that it trims.
        rendered = self._render(_SPACED)
        self._trims = _SPACED not in rendered
        self.before, self.after = self._around(rendered if not self._trims else self._render(_USER))
        """What the template writes before the message and after it, up to the assistant's answer."""
        self.after += answer_begins
        self._answer_begins = answer_begins
        further: list[Any] = [self._variables, answer_begins] if self._variables or answer_begins else []
        if self._trims and f" {_USER} " in rendered:
            further.append("with its own spaces")  # which earlier releases lost
        identity = [text, special, DATE.isoformat(), *further]
        self.fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def writes(self, text: str) -> bool:
        """Return whether the template may write a text: whether it stands in it."""
        return text in self._source

    def text(self, message: str) -> str:
        """Return the text of the prompt."""
        return f"{self.before}{self._content(message)}{self.after}"

    def encode(self, message: str, *, answer: str = "") -> NDArray[np.uint32]:
        """Return the ids of the prompt, and of an answer after it, tokenised together `[tokens]`."""
        content = self._content(message)
        cuts = self._tokenizer._cuts
        pieces = [content]
        if cuts is not None and len(content) > 4 * _PIECE_CHARACTERS:
            pieces = [piece for _, piece in cuts.pieces(content, _PIECE_CHARACTERS)]
        if len(pieces) == 1:
            return self._marked(self.before, content, self.after, answer)
        return np.concatenate(
            [
                self._marked(self.before, pieces[0], "", ""),
                *(self._tokenizer.encode(piece) for piece in pieces[1:-1]),
                self._marked("", pieces[-1], self.after, answer),
            ]
        )

    def conversation(self, turns: Sequence[Mapping[str, str]]) -> tuple[str, NDArray[np.uint32]]:
        """Return text and ids of several turns (role, content), up to the assistant's next answer.

        Raises:
            DataError: the template refuses them, or does not write each once and in order.
        """
        places = [{"role": turn["role"], "content": f"{_USER}{n}{_ANSWER}"} for n, turn in enumerate(turns)]
        rendered = self._template.render(places, add_generation_prompt=True, variables=self._variables)
        pieces = re.split(f"{_USER}([0-9]+){_ANSWER}", rendered + self._answer_begins)
        if pieces[1::2] != [str(n) for n in range(len(turns))]:
            raise DataError(
                "the chat template does not write each turn once", fix="choose another with --chat-template"
            )
        contents = [*(self._content(turn["content"]) for turn in turns), ""]
        around = pieces[::2]
        marked = [self._encoder.marked(each)[0] for each in around]
        text, to_encode = ("".join(map("".join, zip(each, contents))) for each in (around, marked))
        return text, self._encoder.encode(to_encode)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids of the special token that ends an answer by this template; none where it writes none."""
        turns: list[Message] = [
            {"role": "user", "content": _USER},
            {"role": "assistant", "content": _ANSWER},
        ]
        after = self._template.render(turns, variables=self._variables).partition(_ANSWER)[2]
        match = self._encoder.special.search(after)
        found = None if match is None else self._tokenizer.token_id(match.group())
        return () if found is None else (found,)

    def _content(self, message: str) -> str:
        if any(mark in message for mark in MARKS):
            raise DataError("a message holds a character that marks places in chat templates")
        return message.strip() if self._trims else message

    def _render(self, content: str) -> str:
        return self._template.render(
            [{"role": "user", "content": content}], add_generation_prompt=True, variables=self._variables
        )

    def _around(self, rendered: str) -> tuple[str, str]:
        content = _USER if self._trims else _SPACED
        if rendered.count(content) != 1:
            raise DataError(
                f"the chat template writes the user's message {rendered.count(content)} times",
                allowed="once, as it is",
                fix="choose another template with --chat-template",
            )
        before, _, after = rendered.partition(content)
        return before, after

    def _marked(self, before: str, content: str, after: str, answer: str) -> NDArray[np.uint32]:
        text = "".join(
            [
                self._encoder.marked(before)[0],
                content,
                self._encoder.marked(after)[0],
                answer,
            ]
        )
        return self._encoder.encode(text)
