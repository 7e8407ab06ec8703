"""What is in a file of conversations: turns, calls, thoughts, lengths by role, what would be learnt, and faults."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from longspan.core.errors import DataError
from longspan.data.chat.continued import BRANCHES, branches_of, read_branches
from longspan.data.chat.encoder import Encoded
from longspan.data.chat.format import ChatFormat
from longspan.data.chat.given import FIELDS, SYSTEM
from longspan.data.chat.messages import (
    LEARNT,
    NOT_LEARNT,
    THOUGHTS,
    Message,
    MessagesError,
    as_messages,
    strings_of,
)
from longspan.data.chat.stored import Stored, rewritten
from longspan.data.readers import ReadReport, read_documents
from longspan.data.tokenizer import Tokenizer

QUANTILES = {"median": 0.5, "p90": 0.9, "longest": 1.0}
WHOLE = "conversations"
_NAMES = ("tool_calls", *THOUGHTS)
_MOST_PIECES = 60
_HEAD_TOKENS, _TAIL_TOKENS = 160, 64
"""Of a piece that is shown: the middle of a longer one is left out, and said."""


class ShownConversation(NamedTuple):
    """A conversation as it would be read, in pieces."""

    place: str
    tokens: int
    learnt: int
    pieces: list[tuple[str, str]]
    """Text and what it is: "read", "learnt", "end" (the token that ends what is learnt), or "note" of a cut or a
    branch."""


class ChatContents(NamedTuple):
    """What was found."""

    unit: str
    """Of lengths: "tokens", or "characters" without a tokenizer."""
    counts: dict[str, int]
    """Conversations, turns, calls ..., and those that cannot be used."""
    parts: dict[str, dict[str, int]]
    """By what is said (system, user, answers, thoughts, calls, results of tools, schemas of tools): how many, the sum
    of their lengths, and quantiles of these."""
    lengths: dict[str, int]
    """Quantiles of whole conversations, as the template writes them where there is one."""
    histograms: dict[str, dict[str, list[int]]]
    """Of whole conversations and of each part: `edges` in tokens or characters (powers of two), and `counts` between
    them."""
    learnt: dict[str, float] | None
    """Tokens and share of them that are learnt; None without a template."""
    notes: dict[str, int]
    """What was rewritten or is left out at a loss, with a number of turns."""
    faults: dict[str, int]
    """Why conversations cannot be used, most frequent first."""
    examples: dict[str, str]
    """Where the first of each stands."""
    shown: list[ShownConversation]
    """The first few as the template writes them, with what is learnt."""


def chat_contents(
    inputs: Sequence[str | os.PathLike[str]],
    *,
    messages_field: str = "messages",
    tokenizer: Tokenizer | None = None,
    chat: ChatFormat | None = None,
    show: int = 0,
) -> ChatContents:
    """Read conversations and count what is in them; one that cannot be used is counted by its reason.

    Args:
        tokenizer: counts tokens; None: characters are counted.
        chat: writes them out, and says what would be learnt.
        show: return so many of them in pieces, where there is a `chat`.

    Raises:
        DataError: a missing input, a field that nothing has, or no conversation at all.
    """
    report = ReadReport()
    found = _Counting(tokenizer, chat, show)
    fields = (*FIELDS, BRANCHES, *LEARNT, *NOT_LEARNT) if chat is None else chat.fields
    for document in read_documents(
        inputs, messages_field=messages_field, variable_fields=fields, report=report
    ):
        assert document.messages is not None, "asked for"
        try:
            found.add(document.messages, document.variables or {}, str(document.place))
        except MessagesError as error:
            # One reason, whichever turn it is.
            reason = re.sub(r"^turn \d+\b", "a turn", str(error).split("\n")[0])
            found.fault(reason, str(document.place))
    for example in report.examples:
        found.examples.setdefault(example.kind.replace("_", " "), str(example.place))
    unreadable = {
        name: count
        for name, count in report.to_dict().items()
        if name in ("broken_records", "missing_fields", "wrong_types", "invalid_text", "empty_documents")
        and count
    }
    for name, count in unreadable.items():
        found.faults[name.replace("_", " ")] += int(count)
    if not found.counts["conversations"] and not found.faults:
        raise DataError("there is no conversation", found=", ".join(map(str, inputs)))
    return found.contents()


class _Counting:
    """Sums over conversations."""

    def __init__(self, tokenizer: Tokenizer | None, chat: ChatFormat | None, show: int) -> None:
        self._chat, self._tokenizer, self._show = chat, tokenizer, show
        self._size: Callable[[str], int] = (
            len if tokenizer is None else lambda text: len(tokenizer.encode(text))
        )
        self._unit = "characters" if tokenizer is None else "tokens"
        self.counts: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self._shown: list[ShownConversation] = []
        self._sizes: dict[str, list[int]] = defaultdict(list)
        self._whole: list[int] = []
        self._tokens = self._learnt = 0

    def fault(self, reason: str, place: str) -> None:
        self.faults[reason] += 1
        self.examples.setdefault(reason, place)

    def add(self, messages: list[Any], values: dict[str, Any], place: str) -> None:
        """Count a conversation. Raises MessagesError where it cannot be used."""
        branches = branches_of(values)
        encoded = [] if self._chat is None else self._chat.encode_all(messages, values)
        values = {key: value for key, value in values.items() if key != BRANCHES}
        if branches:
            read = read_branches(self._read, self._rewritten, messages, branches, values)
            values, notes = read.conversations[0].values, read.all_notes
            # What all begin with counts once.
            turns, *ends = (self._part_of(each) for each in (messages, *branches))
        else:
            (turns, values, notes), ends = self._read(messages, values), []
        for each in encoded:
            self._whole.append(len(each.ids))
            self._tokens += len(each.ids)
            self._learnt += int((each.mask > 0).sum())
            if len(self._shown) < self._show and self._tokenizer is not None:
                self._shown.append(_shown(place, each, self._tokenizer))
        for more in [each.notes for each in encoded] or [notes]:
            self.notes.update(more)
        sizes = sum(self._turn(turn) for part in (turns, *ends) for turn in part)
        self.counts["conversations that begin as another"] += max(0, len(branches) - 1)
        tools = values.get("tools")
        if isinstance(tools, list) and tools:
            self.counts["conversations with tools"] += 1
            sizes += self._part("schemas of tools", "".join(strings_of(tools)))
        text = values.get(SYSTEM)
        if isinstance(text, str) and text.strip() and (turns or ends[0])[0]["role"] != "system":
            # Where no template was asked it is a turn of its own still.
            sizes += self._part("system", text)
        waiting = self._paired(turns, [])
        for end in ends:
            self._end(end, self._paired(end, waiting))
        if not ends:
            self._end(turns, waiting)
        self.counts["conversations"] += 1
        if self._chat is None:
            self._whole.append(sizes)

    def _read(self, messages: Any, values: Mapping[str, Any]) -> Stored:
        """Return a conversation in one form."""
        if self._chat is not None:
            return self._chat.read(messages, values)
        stored = self._rewritten(messages, values)
        return stored._replace(turns=as_messages(stored.turns))

    def _rewritten(self, turns: Any, values: Mapping[str, Any]) -> Stored:
        if self._chat is not None:
            return self._chat.rewritten(turns, values)
        return rewritten(turns, values, names=_NAMES, replace_images=True)

    def _part_of(self, turns: Any) -> list[Message]:
        """Return a part of a conversation, which may be empty, in one form."""
        found = self._rewritten(turns, {}).turns
        return as_messages(found) if found else []

    def _turn(self, turn: Message) -> int:
        """Count a turn; returns its length."""
        role = str(turn["role"])
        self.counts["turns"] += 1
        content = turn["content"]
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        name = {"assistant": "answers", "tool": "results of tools"}.get(role, role)
        size = self._part(name, text) if text or role != "assistant" else 0
        thoughts = next((turn[key] for key in THOUGHTS if isinstance(turn.get(key), str) and turn[key]), "")
        if thoughts:
            size += self._part("thoughts", thoughts)
        calls = _calls(turn)
        self.counts["answers with several calls"] += len(calls) > 1
        self.counts["answers that say nothing"] += role == "assistant" and not (text or thoughts or calls)
        for call in calls:
            size += self._part("calls", "".join(strings_of(call.get("function", call))))
        return size

    def _paired(self, turns: Sequence[Message], waiting: Sequence[Any]) -> list[Any]:
        """Count calls that nothing answers, and results that nobody called for; return the calls that wait still.

        Args:
            waiting: calls that wait for a result before these turns, by their ids.
        """
        waiting = list(waiting)
        for turn in turns:
            if turn["role"] == "assistant":
                self.counts["calls without a result"] += len(waiting)
                waiting = [call.get("id") for call in _calls(turn)]
            elif turn["role"] == "tool":
                own = turn.get("tool_call_id")
                # Where one of them has no id their order says which belong together.
                place = waiting.index(own) if own in waiting else 0
                named = own is not None and own not in waiting and None not in waiting
                if waiting and not named:
                    waiting.pop(place)
                else:
                    self.counts["results without a call"] += 1
        return waiting

    def _end(self, turns: Sequence[Message], waiting: Sequence[Any]) -> None:
        """Count what a conversation ends with; a call in its last turn may be what is to be learnt."""
        if turns and turns[-1]["role"] != "assistant":
            self.counts["conversations that end without an answer"] += 1
            self.counts["calls without a result"] += len(waiting)

    def _part(self, name: str, text: str) -> int:
        size = self._size(text)
        self._sizes[name].append(size)
        return size

    def contents(self) -> ChatContents:
        """Return what was found."""
        counts = {name: self.counts[name] for name in ("conversations", "turns")}
        counts |= {name: count for name, count in sorted(self.counts.items()) if count and name not in counts}
        if self.faults:
            counts["conversations that cannot be used"] = self.faults.total()
        parts = {
            name: {"number": len(sizes), "sum": sum(sizes), **_quantiles(sizes)}
            for name, sizes in sorted(self._sizes.items(), key=lambda item: -sum(item[1]))
        }
        learnt = None
        if self._chat is not None:
            learnt = {
                "tokens": self._tokens,
                "learnt": self._learnt,
                "share": self._learnt / max(self._tokens, 1),
            }
        return ChatContents(
            self._unit if self._chat is None else "tokens",
            counts,
            parts,
            _quantiles(self._whole),
            {WHOLE: _histogram(self._whole), **{name: _histogram(self._sizes[name]) for name in parts}},
            learnt,
            dict(self.notes.most_common()),
            dict(self.faults.most_common()),
            {name: self.examples[name] for name in self.faults if name in self.examples},
            self._shown,
        )


def _calls(turn: Message) -> list[Any]:
    return list(turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else []))


def _quantiles(sizes: Iterable[int]) -> dict[str, int]:
    values = np.array(list(sizes), np.int64)
    if not len(values):
        return dict.fromkeys(QUANTILES, 0)
    found = np.quantile(values, list(QUANTILES.values()), method="inverted_cdf")
    return {name: int(value) for name, value in zip(QUANTILES, found)}


def _histogram(sizes: Sequence[int]) -> dict[str, list[int]]:
    """Return counts between powers of two; what is empty counts as 1."""
    values = np.maximum(np.array(sizes, np.int64), 1)
    edges = [2**power for power in range(int(values.max(initial=1)).bit_length() + 1)]
    return {"edges": edges, "counts": np.histogram(values, edges)[0].tolist()}


def _shown(place: str, encoded: Encoded, tokenizer: Tokenizer) -> ShownConversation:
    """Return a conversation in pieces that are learnt or read."""
    ids, learnt = encoded.ids, encoded.mask > 0
    branches = {} if encoded.parts is None else {int(part[0]): int(part[2]) for part in encoded.parts[1:]}
    borders = {0, len(ids), *(np.flatnonzero(np.diff(learnt.astype(np.int8))) + 1).tolist(), *branches}
    pieces: list[tuple[str, str]] = []
    for start, end in pairwise(sorted(borders)):
        if len(pieces) >= _MOST_PIECES:
            pieces.append((f"{len(ids) - start:,} more tokens left out", "note"))
            break
        if start in branches:
            pieces.append((f"branches off at token {branches[start]:,}", "note"))
        pieces += _piece(ids[start:end], bool(learnt[start]), tokenizer)
    return ShownConversation(place, len(ids), int(learnt.sum()), pieces)


def _piece(ids: NDArray[np.uint32], learnt: bool, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    kind = "learnt" if learnt else "read"
    body = ids[: len(ids) - learnt]
    if len(body) > _HEAD_TOKENS + _TAIL_TOKENS:
        yield tokenizer.decode(body[:_HEAD_TOKENS]), kind
        yield f"{len(body) - _HEAD_TOKENS - _TAIL_TOKENS:,} tokens left out", "note"
        body = body[-_TAIL_TOKENS:]
    if len(body):
        yield tokenizer.decode(body), kind
    if learnt:
        yield tokenizer.decode(ids[-1:]), "end"
