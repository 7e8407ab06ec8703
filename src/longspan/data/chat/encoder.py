"""Special tokens of a rendered conversation: those that the template wrote are read, those in a message stay text.

Texts that begin alike are tokenised once as far as they do, up to a place that every cut of a text may have (see
`tokenizer.safe_cuts`), or where a special token begins.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray

from longspan.core.errors import DataError
from longspan.data.chat.messages import GUARD, SPECIAL_END, SPECIAL_START
from longspan.data.tokenizer import Tokenizer


class ChatTokens(NamedTuple):
    """An encoded conversation."""

    ids: NDArray[np.uint32]
    """[tokens]; with the BOS and other special tokens that the template writes."""
    mask: NDArray[np.uint8]
    """[tokens]; 1 = learnt, 0 = all else."""


class Encoded(NamedTuple):
    """An encoded conversation of a record."""

    ids: NDArray[np.uint32]
    mask: NDArray[np.uint8]
    notes: Counter[str]
    """What the template left out of it, with a number of turns."""
    parts: NDArray[np.uint32] | None = None
    """[parts, 3] of a conversation that branches, see `branches.TokenTree`; None: it is one text."""


class Rendered(NamedTuple):
    """The text of a conversation, to be encoded."""

    text: str
    """With its special tokens marked."""
    spans: Sequence[tuple[int, int]]
    """What is learnt of it, as characters."""
    notes: Counter[str]
    """What the template left out of it."""
    of_turns: Sequence[Counter[str]] = ()
    """The same of each turn."""


class _Read(NamedTuple):
    """What the tokenizer made of a text, marks being tokens of their own."""

    ids: NDArray[np.uint32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    def until(self, stop: int, other: _Read, first: int) -> _Read:
        """Return the tokens before `stop`, and behind them those of another from `first` on."""
        return _Read(
            np.concatenate([self.ids[:stop], other.ids[first:]]),
            np.concatenate([self.starts[:stop], other.starts[first:]]),
            np.concatenate([self.ends[:stop], other.ends[first:]]),
        )


_OVERLAP = 64
"""Characters before a cut that are tokenised with either part, to see that both agree."""
READ_AGAIN = 1 << 12
"""Characters that several texts begin with and that are tokenised for each are counted where there are more."""


class MarkedEncoder:
    """Encodes a text in which the special tokens to be read as such are marked; all others are text.

    The tokenizer gets one added token more for each special token, and takes no other special token for one.
    So a text is cut, trimmed and merged exactly as if the special tokens stood there.

    Raises:
        DataError: the tokenizer leaves no room for the marks.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        model = tokenizers.Tokenizer.from_str(tokenizer._reference.to_str())
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True
        known = model.get_added_tokens_decoder()
        special = {id_: token for id_, token in known.items() if token.special}
        names = sorted((token.content for token in special.values()), key=len, reverse=True)
        # A guard before it keeps a token of one character apart, one inside it any other.
        patterns = [re.escape(name) if len(name) > 1 else f"(?<!{GUARD}){re.escape(name)}" for name in names]
        self.special = re.compile("|".join(patterns) or "(?!)")
        """Matches a special token that no guard keeps apart; the longest, where one begins another."""
        self._parts = re.compile(f"({self.special.pattern})")
        self._tails = {name[:size] for name in names for size in range(2, len(name))}
        self._heads = {name[-size:] for name in names for size in range(2, len(name))}
        self._longest = max(map(len, names), default=0)
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
        # Where a special token begins a tokenizer begins anew, unless the token looks at what stands before it.
        before = r"(?<!\s)" if any(token.lstrip for token in special.values()) else ""
        alone = any(token.single_word for token in special.values())
        cuts = tokenizer._cuts
        places = [] if alone else [f"{before}(?={SPECIAL_START})"]
        places += [] if cuts is None else [cuts.places.pattern]
        self._places = re.compile("|".join(places) or "(?!)")
        self._drop_space = cuts is not None and cuts.drop_space
        added = {token.content: id_ for id_, token in model.get_added_tokens_decoder().items()}
        self._id_of_mark = {added[self._marked[token.content]]: id_ for id_, token in special.items()}
        self._first_mark = largest + 1
        if self._id_of_mark and min(self._id_of_mark) < self._first_mark:
            raise DataError(f"the ids of {tokenizer.path} have gaps that added tokens fall into")

    def guard(self, text: str) -> str:
        """Return the text of a message with a guard in every special token, and in every end that could be half of
        one, so that none is read as such."""
        text = self.special.sub(lambda match: _with_guard(match.group()), text)
        for size in range(min(self._longest, len(text)), 1, -1):
            if text[-size:] in self._tails:
                text = f"{text[:-size]}{_with_guard(text[-size:])}"
                break
        for size in range(min(self._longest, len(text)), 1, -1):
            if text[:size] in self._heads:
                return f"{_with_guard(text[:size])}{text[size:]}"
        return text

    def marked(self, text: str, places: Sequence[int] = ()) -> tuple[str, list[int]]:
        """Return a text with its special tokens marked and its guards gone, and where `places` of it stand then."""
        parts = self._parts.split(text)
        written = [self._marked[part] if n % 2 else part.replace(GUARD, "") for n, part in enumerate(parts)]
        before = [0, *accumulate(map(len, parts))]
        after = [0, *accumulate(map(len, written))]
        found = []
        for place in places:
            number = min(bisect_right(before, place), len(parts)) - 1
            inside = place - before[number]
            if number % 2:
                found.append(after[number] if inside == 0 else after[number + 1])
            else:
                found.append(after[number] + inside - parts[number].count(GUARD, 0, inside))
        return "".join(written), found

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Return the ids of a marked text.

        Raises:
            DataError: the tokenizer does not find the special tokens again.
        """
        return self.encode_alike([Rendered(text, (), Counter())])[0][0].ids

    def encode_alike(
        self, texts: Sequence[Rendered], *, blocks: bool = False
    ) -> tuple[list[ChatTokens], int]:
        """Return ids and mask of marked texts, and how many of them were tokenised whole though they begin as another.

        A token is learnt if any of its characters is inside a span, save white space that begins before the span: it
        is the prompt's, and a model that is asked cannot write it. With `blocks` the spans are those of
        `{% generation %}` and borders are drawn as transformers draws them.

        Raises:
            DataError: the tokenizer does not find the special tokens again.
        """
        made: dict[int, ChatTokens] = {}
        again = 0
        before, read = "", None
        # In this order no earlier text has more in common with one than the text right before it.
        for number in sorted(range(len(texts)), key=lambda number: texts[number].text):
            text = texts[number].text
            if read is None:
                read = self._tokens(text)
            else:
                read, whole = self._behind(before, read, text)
                again += whole
            made[number] = self._masked(text, read, texts[number].spans, blocks)
            before = text
        return [made[number] for number in range(len(texts))], again

    def _behind(self, before: str, read: _Read, text: str) -> tuple[_Read, bool]:
        """Return the tokens of a text, as far as it begins as the text `before` from those that were `read` there, and
        whether most of that had to be tokenised again."""
        shared = _num_shared(before, text)
        border = self._place(text, shared)
        first = self._place(text, border - _OVERLAP) or self._place(text, border - 1)
        if first:
            own = self._tokens(text, first)
            known = slice(*np.searchsorted(read.starts, (first, border)))
            overlap = int(np.searchsorted(own.starts, border))
            if np.array_equal(read.ids[known], own.ids[:overlap]):
                return read.until(known.stop, own, overlap), shared - first > READ_AGAIN
        return self._tokens(text), shared > READ_AGAIN

    def _place(self, text: str, limit: int) -> int:
        """Return the last place before `limit` where a text may be cut, whatever stands behind; 0: there is none."""
        reach = _OVERLAP
        while limit > 0:
            start = max(0, limit - reach)
            found = [match.start() for match in self._places.finditer(text, start, limit)]
            if found or not start:
                return found[-1] if found else 0
            reach *= 4
        return 0

    def _tokens(self, text: str, start: int = 0) -> _Read:
        """Return the tokens of a text from a place on where it may be cut, or of all of it."""
        if start and self._drop_space and text[start] == " ":
            start += 1
        encoding = self._model.encode(text[start:], add_special_tokens=False)
        spans = np.array(encoding.offsets, np.int64).reshape(-1, 2) + start
        return _Read(np.array(encoding.ids, np.uint32), spans[:, 0], spans[:, 1])

    def _masked(self, text: str, read: _Read, spans: Sequence[tuple[int, int]], blocks: bool) -> ChatTokens:
        ids, starts, ends = read.ids.copy(), read.starts, read.ends
        marks = np.flatnonzero(ids >= self._first_mark)
        places = [match.start() for match in re.finditer(SPECIAL_START, text)]
        if len(marks) != len(places):
            raise DataError("the tokenizer does not read the special tokens of the chat template")
        if blocks:
            mask = _in_blocks(starts, ends, spans)
        else:
            learnt = np.zeros(len(text) + 2, np.int64)
            for start, end in spans:
                learnt[start + 1 : end + 1] = 1
            before = np.cumsum(learnt)
            mask = before[np.maximum(ends, starts + 1)] > before[starts]
            for start, _ in spans:
                for token in np.flatnonzero((starts < start) & (start < ends)):
                    mask[token] &= not text[starts[token] : ends[token]].isspace()
            # Some special tokens swallow white space around them, be it learnt or not: their own place decides.
            mask[marks] = learnt[np.array(places, np.int64) + 1] > 0
        ids[marks] = [self._id_of_mark[int(mark)] for mark in ids[marks]]
        return ChatTokens(ids, mask.astype(np.uint8))


def _num_shared(first: str, second: str) -> int:
    """Return how many characters two texts have in common at their beginning."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if second.startswith(first[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low


def _in_blocks(
    starts: NDArray[np.int64], ends: NDArray[np.int64], spans: Sequence[tuple[int, int]]
) -> NDArray[np.bool_]:
    """Return which tokens are inside `{% generation %}` blocks: from the one that holds the first character of a
    block to the first one that holds its last, as transformers marks them.

    Where no token holds that character (a tokenizer may drop white space), the nearest one inside the block is
    taken; transformers then marks nothing, or all that follows.
    """
    mask = np.zeros(len(starts), bool)
    for start, end in spans:
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, end - 1, side="right"))
        if last == len(starts) or starts[last] > end - 1:
            last -= 1
        mask[first : last + 1] = True
    return mask


def _with_guard(part: str) -> str:
    return f"{part[0]}{GUARD}{part[1:]}" if len(part) > 1 else f"{GUARD}{part}"
