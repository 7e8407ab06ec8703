"""Conversations to token ids and an exact mask of what the assistant wrote.

Where the assistant's words stand is found by rendering twice. Once as it is; once with every content replaced
by a mark that nothing else contains, which shows what the template itself writes between the contents:

    text       <|user|>Hi<|end|><|bot|>Hello!<|end|>
    skeleton   <|user|>(0)<|end|><|bot|>(1)<|end|>

The text must be the skeleton with the contents put in (some templates trim them), character by character;
otherwise the template rewrites contents and is refused. So every character is known to come from the template
or from a turn, and special tokens are read in the template's characters alone: "<|end|>" inside a content
stays ordinary text. Trained are a content of the assistant and what follows it up to its first special
token, the end of the turn; a template with `{% generation %}` blocks says itself what is trained.

Encoding runs on the Hugging Face engine, which knows the place of every token: about 0.4 million tokens/s.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray

from longspan.core.errors import DataError
from longspan.data.chat.messages import (
    CONTENT_END,
    CONTENT_START,
    GENERATION_END,
    GENERATION_START,
    SPECIAL_END,
    SPECIAL_START,
    Message,
    MessagesError,
    as_messages,
)
from longspan.data.chat.template import DATE, Template, find_template, special_tokens
from longspan.data.tokenizer import Tokenizer

_MARKED = re.compile(f"{CONTENT_START}([0-9]+){CONTENT_END}")
_GENERATION = re.compile(f"[{GENERATION_START}{GENERATION_END}]")

# Awkward content: a template that escapes, lowers, or splits it is found out before the corpus is read.
PROBE: tuple[Message, ...] = (
    {"role": "user", "content": 'Is <b>1 & 2</b> a "Set"?\n\n  Yes \\ no: \u00e9'},
    {"role": "assistant", "content": "It <i>isn't</i>,  said\nshe & {{ he }}."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because\n\n1. so"},
)


class ChatTokens(NamedTuple):
    """An encoded conversation."""

    ids: NDArray[np.uint32]
    """[tokens]; with the BOS and other special tokens that the template writes."""
    mask: NDArray[np.uint8]
    """[tokens]; 1 = the assistant's content and its end of turn, 0 = all else."""


class _Piece(NamedTuple):
    """A stretch of the rendered text: written by the template (`turn` None), or the content of a turn."""

    text: str
    turn: int | None


class ChatFormat:
    """A tokenizer with a chat template.

    Args:
        template: the Jinja text.
        special: texts of bos_token, eos_token and the like, for the template to write. None: those of the
            tokenizer.

    Raises:
        DataError: the template is not valid, rewrites contents, or writes no special token at the end of the
            assistant's turns; or it writes tokens that the tokenizer does not have.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: str, *, special: Mapping[str, str] | None = None
    ) -> None:
        self._special = dict(_special_of(tokenizer) if special is None else special)
        self.template = template
        """The Jinja text."""
        self._template = Template(template, self._special)
        self._encoder = _MarkedEncoder(tokenizer)
        self._end_of_turn = self._find_end()
        self._has_blocks = self._end_of_turn is None
        self.encode(PROBE)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides ids and masks beside the tokenizer."""
        parts = [self.template, self._special, DATE.isoformat()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def render(self, messages: Any) -> str:
        """Return the text of a conversation as the template writes it."""
        return _GENERATION.sub("", self._template.render(as_messages(messages)))

    def encode(self, messages: Any) -> ChatTokens:
        """Return ids and mask of a conversation: {"role", "content"} or {"from", "value"} turns.

        Nothing is trained in a conversation without an answer: its mask is all 0.

        Raises:
            MessagesError: this conversation cannot be used, others may.
            DataError: the template does not let the assistant's words be found in this conversation.
        """
        turns = as_messages(messages)
        return self._encoder.encode(*self._marked(turns, self._pieces(turns)))

    def _find_end(self) -> str | None:
        """Return the token that ends an answer, found on a conversation that every template can render.

        None: the template has blocks that say what is trained.
        """
        pieces = self._pieces(PROBE)
        if any(_GENERATION.search(piece.text) for piece in pieces):
            return None
        ends: set[str | None] = set()
        for piece, after in itertools.pairwise(pieces):
            if piece.turn is not None and PROBE[piece.turn]["role"] == "assistant":
                match = self._encoder.special.search(after.text)
                ends.add(match.group() if match and not after.text[: match.start()].strip() else None)
        end = next(iter(ends))
        # After an answer without an end of its own stands the BOS of the next turn.
        is_bos = end == self._special.get("bos_token") and end != self._special.get("eos_token")
        if len(ends) > 1 or end is None or is_bos:
            raise DataError(
                "the chat template does not end every answer with the same special token of this tokenizer",
                found=", ".join(sorted("none" if each is None else repr(each) for each in ends)),
                fix="choose the template made for this tokenizer, or one with {% generation %} blocks",
            )
        return end

    def _pieces(self, turns: Sequence[Message]) -> list[_Piece]:
        """Return the rendered text in pieces, each known to be the template's or a turn's."""
        text = self._template.render(turns)
        marked: list[Message] = [
            {"role": turn["role"], "content": f"{CONTENT_START}{number}{CONTENT_END}"}
            for number, turn in enumerate(turns)
        ]
        parts = _MARKED.split(self._template.render(marked))
        fixed, order = parts[0::2], [int(number) for number in parts[1::2]]
        for number, turn in enumerate(turns):
            count = order.count(number)
            if count == 0 or (count > 1 and turn["role"] == "assistant"):
                raise DataError(
                    f"the chat template writes the content of a turn ({turn['role']}) {count} times",
                    allowed="once",
                    fix="choose another template with --chat-template",
                )
        contents = _match(text, fixed, [_trimmed(turns[number]["content"]) for number in order])
        if contents is None:
            # An empty content may take another branch of a template than the mark does.
            empty = any(not turn["content"].strip() for turn in turns)
            raise (MessagesError if empty else DataError)(
                "the chat template rewrites what a turn says, so the assistant's words cannot be found in it",
                fix="choose another template with --chat-template, or one with {% generation %} blocks "
                "that leaves contents as they are",
            )
        pieces = [_Piece(fixed[0], None)]
        for number, content, after in zip(order, contents, fixed[1:]):
            pieces += [_Piece(content, number), _Piece(after, None)]
        return pieces

    def _marked(
        self, turns: Sequence[Message], pieces: Sequence[_Piece]
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text with its special tokens marked, and the spans of it that are trained."""
        parts: list[str] = []
        spans: list[tuple[int, int]] = []
        size = 0
        start: int | None = None
        """Where the answer, or the block, that is open began."""
        for piece in pieces:
            if piece.turn is not None:
                answer = turns[piece.turn]["role"] == "assistant"
                if answer and self._has_blocks and start is None:
                    raise DataError("the chat template writes an answer outside its {% generation %} blocks")
                if answer and not self._has_blocks:
                    start = size
                parts.append(piece.text)
                size += len(piece.text)
                continue
            for part, special in self._encoder.split(piece.text):
                if special == GENERATION_START:
                    start = size
                    continue
                if special != GENERATION_END:
                    parts.append(part)
                    size += len(part)
                if start is not None and special in (GENERATION_END, self._end_of_turn):
                    spans.append((start, size))
                    start = None
                elif not self._has_blocks and start is not None and (special or part.strip()):
                    break
            if not self._has_blocks and start is not None:
                raise DataError(f"the chat template does not end an answer with {self._end_of_turn!r} here")
        return "".join(parts), spans


class _MarkedEncoder:
    """Encodes a text in which the special tokens to be read as such are marked; all others are text.

    The tokenizer gets one added token more for each special token, and takes no other special token for one.
    So a text is cut, trimmed and merged exactly as if the special tokens stood there.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        model = tokenizers.Tokenizer.from_str(tokenizer._reference.to_str())
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True
        known = model.get_added_tokens_decoder()
        special = {id_: token for id_, token in known.items() if token.special}
        names = sorted((token.content for token in special.values()), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, names)) or "(?!)")
        """Matches a special token; the longest, where one begins another."""
        self._parts = re.compile(f"({self.special.pattern}|{_GENERATION.pattern})")
        largest = max(model.get_vocab(with_added_tokens=True).values())
        self._marked = {token.content: f"{SPECIAL_START}{id_}{SPECIAL_END}" for id_, token in special.items()}
        model.add_tokens([
            tokenizers.AddedToken(
                self._marked[token.content],
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=False,
                special=False,
            )
            for token in special.values()
        ])  # fmt: skip
        self._model = model
        added = {token.content: id_ for id_, token in model.get_added_tokens_decoder().items()}
        self._id_of_mark = {added[self._marked[token.content]]: id_ for id_, token in special.items()}
        self._first_mark = largest + 1
        if self._id_of_mark and min(self._id_of_mark) < self._first_mark:
            raise DataError(f"the ids of {tokenizer.path} have gaps that added tokens fall into")

    def split(self, text: str) -> list[tuple[str, str | None]]:
        """Cut what the template wrote at special tokens and block marks: (text to encode, what it was)."""
        return [
            (self._marked.get(part, part), part if number % 2 else None)
            for number, part in enumerate(self._parts.split(text))
            if part
        ]

    def encode(self, text: str, spans: Sequence[tuple[int, int]]) -> ChatTokens:
        """Encode a marked text; a token is trained if any of its characters is inside a span."""
        encoding = self._model.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, np.uint32)
        starts, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        trained = np.zeros(len(text) + 2, np.int64)
        for start, end in spans:
            trained[start + 1 : end + 1] = 1
        before = np.cumsum(trained)
        mask = before[np.maximum(ends, starts + 1)] > before[starts]
        marks = np.flatnonzero(ids >= self._first_mark)
        places = [match.start() for match in re.finditer(SPECIAL_START, text)]
        if len(marks) != len(places):
            raise DataError("the tokenizer does not read the special tokens of the chat template")
        # Some special tokens swallow white space around them, be it trained or not: their own place decides.
        mask[marks] = trained[np.array(places, np.int64) + 1] > 0
        ids[marks] = [self._id_of_mark[int(mark)] for mark in ids[marks]]
        return ChatTokens(ids, mask.astype(np.uint8))


def load_chat_format(tokenizer: Tokenizer, template: str | Path | None = None) -> ChatFormat:
    """Return a tokenizer's chat format.

    Args:
        template: None takes the tokenizer's own: `chat_template` in its tokenizer_config.json (one text, or
            named ones) or chat_template.jinja beside it. Else the name of one of these, a shipped name
            (llama-2, llama-3, mistral, qwen), or a Jinja file.

    Raises:
        DataError: there is no such template, or it cannot be used; see `ChatFormat`.
    """
    name = None if template is None else str(template)
    return ChatFormat(tokenizer, find_template(tokenizer.path.parent, name))


def _special_of(tokenizer: Tokenizer) -> dict[str, str]:
    """Return bos_token, eos_token ... as the configs name them, else as the tokenizer knows them."""
    known = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    found = {name: tokenizer.decode([number]) for name, number in known.items() if number is not None}
    return found | special_tokens(tokenizer.path.parent)


def _trimmed(content: str) -> list[str]:
    """Return the forms in which templates write a content: as it is, or without white space at its ends."""
    forms = [content, content.rstrip(), content.lstrip(), content.strip()]
    forms += [content.rstrip("\n"), content.lstrip("\n"), content.strip("\n")]
    return sorted(set(forms), key=len, reverse=True)


def _match(text: str, fixed: Sequence[str], forms: Sequence[Sequence[str]]) -> list[str] | None:
    """Return the form of each content with which `text` is fixed[0] + content + fixed[1] + ..., or None."""
    if not text.startswith(fixed[0]):
        return None
    failed: set[tuple[int, int]] = set()
    # Depth first without recursion: (number of contents placed, place in the text, forms not tried yet).
    path: list[tuple[int, list[str]]] = [(len(fixed[0]), list(forms[0]) if forms else [])]
    chosen: list[str] = []
    while path:
        place, untried = path[-1]
        if len(chosen) == len(forms):
            if place == len(text):
                return chosen
        elif untried:
            form = untried.pop(0)
            number = len(chosen)
            after = place + len(form)
            end = after + len(fixed[number + 1])
            fits = text.startswith(form, place) and text.startswith(fixed[number + 1], after)
            if fits and (number + 1, end) not in failed:
                chosen.append(form)
                path.append((end, list(forms[number + 1]) if number + 1 < len(forms) else []))
            continue
        failed.add((len(chosen), place))
        path.pop()
        if chosen:
            chosen.pop()
    return None
