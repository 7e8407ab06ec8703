"""Conversations longer than there is room for: cut from the middle or split, at borders of turns.

    exchange    a question and all that follows it, up to the next one
    step        an answer and what the tools that it called return

An exchange is taken out as a whole, so that no answer stands without its question. Where two are left, or there was
one, steps are taken out of the middle of the longer one; its question and its last step stay. Results of tools are
shortened before, where that is asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from longspan.data.chat.encoder import Encoded
from longspan.data.chat.messages import Message, MessagesError
from longspan.data.tokenizer import Tokenizer

Encode = Callable[[list[Message]], Encoded]
Short = Callable[[str], tuple[str, int]]
"""Returns a text as short as it is to be, and how many tokens were left out of it."""
GAP = "\n[... {} tokens left out ...]\n"


def fitted(
    turns: list[Message], encode: Encode, *, max_tokens: int, too_long: str, whole: Encoded
) -> list[Encoded]:
    """Return a conversation that is too long as one (`too_long` "cut") or several ("split") that are not.

    Args:
        whole: what `encode` makes of all turns.

    Raises:
        MessagesError: "drop", or nothing is left to take out.
    """
    if too_long == "drop":
        raise MessagesError(
            "the conversation is longer than max_tokens", found=f"{len(whole.ids)} tokens", allowed=max_tokens
        )
    head, exchanges = _exchanges(turns)
    if too_long == "cut":
        return [_cut(head, exchanges, encode, max_tokens, whole)]
    made = list(_split(head, exchanges, encode, max_tokens))
    made[0].notes["conversations split, longer than max_tokens"] += 1
    made[0].notes["conversations that these became"] += len(made)
    return made


def shortener(tokenizer: Tokenizer, limit: int | None) -> Short:
    """Return what shortens the results of tools in a record: a text of more than `limit` tokens becomes one without
    its middle, and how many tokens that had. The same text is tokenised once."""

    @cache
    def short(text: str) -> tuple[str, int]:
        # A token has a character at least.
        if limit is None or len(text) <= limit:
            return text, 0
        _, starts, ends = tokenizer.encode_with_offsets(text)
        if len(starts) <= limit:
            return text, 0
        left_out = len(starts) - limit
        tail = limit // 2
        begin, end = text[: int(ends[limit - tail - 1])], text[int(starts[-tail]) :] if tail else ""
        return f"{begin}{GAP.format(left_out)}{end}", left_out

    return short


def shortened(turns: list[Message], short: Short) -> tuple[list[Message], list[Counter[str]]]:
    """Return turns whose results of tools are short, and what was counted in each."""
    made, notes = [], []
    for turn in turns:
        counts: Counter[str] = Counter()

        def text_of(text: str, counts: Counter[str] = counts) -> str:
            text, left_out = short(text)
            if left_out:
                counts["results of tools that were shortened"] += 1
                counts["tokens left out of them"] += left_out
            return text

        if turn["role"] == "tool" and isinstance(turn["content"], str):
            turn = {**turn, "content": text_of(turn["content"])}
        elif turn["role"] == "tool":
            turn = {**turn, "content": [{**part, "text": text_of(part["text"])} for part in turn["content"]]}
        made.append(turn)
        notes.append(counts)
    return made, notes


def _exchanges(turns: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Return the system's turn, if there is one, and the exchanges."""
    head = [turn for turn in turns[:1] if turn["role"] == "system"]
    exchanges: list[list[Message]] = []
    asking = False
    for turn in turns[len(head) :]:
        asks = turn["role"] == "user"
        if not exchanges or (asks and not asking):
            exchanges.append([])
        exchanges[-1].append(turn)
        asking = asks
    return head, exchanges


def _steps(exchange: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Return the question of an exchange and its steps."""
    question: list[Message] = []
    steps: list[list[Message]] = []
    for turn in exchange:
        if turn["role"] == "assistant":
            steps.append([turn])
        else:
            (steps[-1] if steps else question).append(turn)
    return question, steps


def _cut(
    head: list[Message], exchanges: list[list[Message]], encode: Encode, max_tokens: int, whole: Encoded
) -> Encoded:
    turns = sum(map(len, exchanges))
    found, kept = _without_middle(exchanges, lambda kept: encode([*head, *_flat(kept)]), max_tokens)
    if found is None:
        place = max(range(len(kept)), key=lambda number: len(encode([*head, *kept[number]]).ids))
        question, steps = _steps(kept[place])

        def around(some: Sequence[list[Message]]) -> list[list[Message]]:
            return [*kept[:place], [*question, *_flat(some)], *kept[place + 1 :]]

        # The first step may go as well: a question stands before what is left.
        found, some = _without_middle(
            [[], *steps], lambda some: encode([*head, *_flat(around(some))]), max_tokens
        )
        kept = around(some)
    if found is None:
        raise MessagesError(
            "the conversation is longer than max_tokens, also without its middle",
            found=f"{len(whole.ids)} tokens",
            allowed=max_tokens,
        )
    found.notes["conversations cut in their middle, longer than max_tokens"] += 1
    found.notes["turns cut out of them"] += turns - sum(map(len, kept))
    found.notes["tokens cut out of them"] += len(whole.ids) - len(found.ids)
    return found


def _without_middle(
    units: list[list[Message]], encode: Callable[[Sequence[list[Message]]], Encoded], max_tokens: int
) -> tuple[Encoded | None, list[list[Message]]]:
    """Return what fits when the fewest units are taken out of the middle, and the units that stay; the first and the
    last always do. None: nothing fits."""
    inner = max(len(units) - 2, 0)

    def without(count: int) -> list[list[Message]]:
        start = 1 + (inner - count + 1) // 2
        return [*units[:start], *units[start + count :]]

    low, high, best = 0, inner, None
    while low <= high:
        middle = (low + high) // 2
        encoded = encode(without(middle))
        if len(encoded.ids) <= max_tokens:
            best, high = (encoded, middle), middle - 1
        else:
            low = middle + 1
    return (None, without(inner)) if best is None else (best[0], without(best[1]))


def _split(
    head: list[Message], exchanges: list[list[Message]], encode: Encode, max_tokens: int
) -> Iterator[Encoded]:
    """Yield as many exchanges at a time as fit, each with the system's turn."""
    first = 0
    while first < len(exchanges):
        low, high = 1, len(exchanges) - first
        best: tuple[int, Encoded] | None = None
        while low <= high:
            count = (low + high) // 2
            encoded = encode([*head, *_flat(exchanges[first : first + count])])
            if len(encoded.ids) <= max_tokens:
                best, low = (count, encoded), count + 1
            else:
                high = count - 1
        if best is None:
            whole = encode([*head, *exchanges[first]])
            best = 1, _cut(head, exchanges[first : first + 1], encode, max_tokens, whole)
        yield best[1]
        first += best[0]


def _flat(units: Sequence[list[Message]]) -> list[Message]:
    return [turn for unit in units for turn in unit]
