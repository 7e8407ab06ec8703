"""One answer while it is being generated: when it ends, and its text as it comes."""

from __future__ import annotations

from collections.abc import Callable

from longspan.data.tokenizer import Tokenizer
from longspan.infer.requests import Finish, Request
from longspan.infer.thinking import LONGEST_MARK, answer_start, may_close, may_open

INCOMPLETE = "\ufffd"
"""What a decoder writes for the bytes of a character that is not complete."""
MOST_BYTES = 4
"""A character of UTF-8 has no more; replacement characters that stay longer are the model's own."""


class AnswerStream:
    """The tokens of one answer, in the order in which they come.

    Args:
        request: says when the answer ends.
        tokenizer: decodes it, for texts that end it and for `on_text`.
        on_text: is given the text piece by piece; what it was given is never taken back, so the beginning of a
            stop text and of a character are held until it is clear what becomes of them.
    """

    def __init__(
        self, request: Request, tokenizer: Tokenizer, *, on_text: Callable[[str], None] | None = None
    ) -> None:
        self.ids: list[int] = []
        self.finish: Finish | None = None
        self._request, self._tokenizer, self._on_text = request, tokenizer, on_text
        self._text = ""
        self._sent = self._searched = 0
        self._begin: int | None = None if request.thinking == "opened" else 0
        """Where the answer begins in the text; None while the model thinks."""
        # Text is that of ids[:read]; ids[window:read] are decoded again with what follows, because the text of a
        # token may depend on the one before it (the space in front of a SentencePiece).
        self._window = self._read = 0

    def push(self, token: int) -> Finish | None:
        """Take the next token; return why the answer ends with it, or None."""
        self.ids.append(token)
        stopped = token in self._request.stop_ids
        last = stopped or len(self.ids) >= self._request.max_new_tokens
        if self._request.stop or self._on_text is not None:
            stopped |= self._decode(self.ids[:-1] if stopped else self.ids, last=last)
        self.finish = "stop" if stopped else "length" if last else None
        if self._on_text is not None:
            settled = len(self._text) - (0 if self.finish else self._held())
            if settled > self._sent:
                self._on_text(self._text[self._sent : settled])
                self._sent = settled
        return self.finish

    def _decode(self, ids: list[int], *, last: bool) -> bool:
        """Add the text of what is new in `ids`; return whether a stop text is in it now, and cut it off."""
        new = self._tokenizer.decode(ids[self._window :])
        if new.endswith(INCOMPLETE) and not last and len(ids) - self._read < MOST_BYTES:
            return False
        known = self._tokenizer.decode(ids[self._window : self._read])
        length = len(self._text)
        self._text += new[len(known) :]
        self._window, self._read = self._read, len(ids)
        begin = self._answer_start(length)
        if begin is None:
            return False
        cuts = [
            place
            for stop in self._request.stop
            if stop and (place := self._text.find(stop, max(begin, self._searched - len(stop) + 1))) >= 0
        ]
        self._searched = len(self._text)
        if cuts:
            self._text = self._text[: min(cuts)]
        return bool(cuts)

    def _answer_start(self, length: int) -> int | None:
        """Return where the answer begins, white space after thoughts left out; None: not yet.

        `length` is that of the text before its last piece. The whole text is looked through only where that piece
        may have changed something.
        """
        new = self._text[max(0, length - LONGEST_MARK) :]
        if length < 2 * LONGEST_MARK or may_close(new):
            self._begin = answer_start(self._text, opened=self._request.thinking == "opened")
        if self._begin is None:
            return None
        if self._begin == 0:
            waits = self._request.thinking == "expected" and may_open(self._text)
            return None if waits else 0
        rest = self._text[self._begin :]
        self._begin += len(rest) - len(rest.lstrip())
        return None if may_open(self._text[self._begin :]) else self._begin

    def _held(self) -> int:
        """Return how many characters at the end may be the beginning of a stop text."""
        held = 0
        for stop in self._request.stop:
            for size in range(min(len(stop) - 1, len(self._text)), held, -1):
                if self._text.endswith(stop[:size]):
                    held = size
                    break
        return held
