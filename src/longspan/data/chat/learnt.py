"""Which characters of a rendered conversation are learnt: what generation blocks hold, or what the assistant says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from longspan.data.chat.messages import CALLS, Message, MessagesError, is_learnt, is_marked
from longspan.data.chat.points import THOUGHT, GenerationBlock, MarkedText, Point

_THOUGHTS = re.compile(r"<think>.*?</think>\s*|\[THINK\].*?\[/THINK\]\s*", re.DOTALL)
_CLOSING = re.compile(r"\s*(?:</[^<>\s]{1,38}>|\[/[^\[\]\s]{1,38}\])\s*")
_OPENING_CHARACTERS = 40


class Turn(NamedTuple):
    """What decides the learning of a turn."""

    answers: bool
    """It is the assistant's."""
    learnt: bool
    """It is the assistant's, and nothing says that it is only to be read."""


class Ends(NamedTuple):
    """What a template without blocks writes around an answer."""

    end: str
    """The special token that ends it."""
    opening: str
    """How it begins: the generation prompt; "" where that is not known."""


def learnt_turns(turns: Sequence[Message], which: str) -> list[Turn]:
    """Return what decides the learning of each turn: `which` is "all", "last" or "marked" answers.

    Raises:
        MessagesError: a key that marks a turn says neither yes nor no.
    """
    answers = [turn["role"] == "assistant" for turn in turns]
    last = max((number for number, answer in enumerate(answers) if answer), default=-1)
    return [
        Turn(
            answer,
            answer
            and is_learnt(turn, number)
            and (which == "all" or (number == last if which == "last" else is_marked(turn))),
        )
        for number, (turn, answer) in enumerate(zip(turns, answers))
    ]


def without_thoughts(
    spans: Sequence[tuple[int, int]], reading: MarkedText, special: re.Pattern[str]
) -> list[tuple[int, int]]:
    """Return the spans without thoughts: from where a thought is opened to behind what closes it.

    Thoughts are known by their points, and in a text by the tags that models write around them.
    """
    thoughts = [match.span() for match in _THOUGHTS.finditer(reading.text)]
    opened: dict[int, int] = {}
    for point in reading.points:
        if reading.leaves[point.leaf].field != THOUGHT:
            continue
        start = opened.pop(point.leaf, None)
        if start is None:
            opened[point.leaf] = point.place
            continue
        behind = _CLOSING.match(reading.text, point.place) or special.match(reading.text, point.place)
        thoughts.append((start, behind.end() if behind else point.place))
    cut: list[tuple[int, int]] = []
    for start, end in spans:
        for first, last in sorted(thoughts):
            if last <= start or first >= end:
                continue
            # What opens the thought, and stands before all else, goes with it.
            if first > start and len(reading.text[start:first].strip()) <= _OPENING_CHARACTERS:
                first = start
            if start < first:
                cut.append((start, first))
            start = max(start, min(last, end))
        if start < end:
            cut.append((start, end))
    return cut


def block_spans(reading: MarkedText, turns: Sequence[Turn]) -> list[tuple[int, int]]:
    """Return the blocks of learnt turns, as characters of the text.

    Raises:
        MessagesError: it is not known which turn a block belongs to, and some are learnt and others not.
    """
    spans = [(block.start, block.end) for block in reading.blocks]
    if all(turn.learnt for turn in turns if turn.answers):
        return spans
    seen = {reading.leaves[point.leaf].turn for point in reading.points}
    lost = [
        number for number, turn in enumerate(turns) if turn.answers and not turn.learnt and number not in seen
    ]
    if lost:
        raise MessagesError(
            f"turn {lost[0]} is not to be learnt, and where it stands in the text is not known"
        )
    kept = []
    for block, span in zip(reading.blocks, spans):
        says = {turns[number].learnt for number in _turns_of(block, reading, turns)}
        if len(says) != 1:
            raise MessagesError(
                "a {% generation %} block of the chat template belongs to turns of which some are not to be learnt"
            )
        if says.pop():
            kept.append(span)
    return kept


def _turns_of(block: GenerationBlock, reading: MarkedText, turns: Sequence[Turn]) -> set[int]:
    """Return the answers that a block belongs to: those with words in it, else the one that it stands beside."""

    def turn_of(point: Point | None) -> int | None:
        number = None if point is None else reading.leaves[point.leaf].turn
        return number if number is not None and turns[number].answers else None

    inside = {turn_of(point) for point in reading.points if block.first < point.order < block.last} - {None}
    if inside:
        return {number for number in inside if number is not None}
    before = turn_of(next((p for p in reversed(reading.points) if p.order < block.first), None))
    after = turn_of(next((p for p in reading.points if p.order > block.last), None))
    return {number for number in (before, after) if number is not None}


def answer_spans(
    reading: MarkedText, turns: Sequence[Turn], ends: Ends, special: re.Pattern[str], tags: re.Pattern[str]
) -> list[tuple[int, int]]:
    """Return where the learnt answers stand, each with the token that ends it, as characters of the text.

    Raises:
        MessagesError: an answer is mixed with another turn, has no end, or begins where it cannot be known.
    """
    spans = []
    leaves = reading.leaves
    for number, turn in enumerate(turns):
        if not turn.learnt:
            continue
        own = [place for place, point in enumerate(reading.points) if leaves[point.leaf].turn == number]
        if not own:
            raise MessagesError(f"the chat template writes nothing of turn {number} (assistant)")
        first, last = own[0], own[-1]
        if last - first + 1 != len(own):
            raise MessagesError(f"the chat template mixes turn {number} (assistant) with another")
        before = reading.points[first - 1].place if first else 0
        after = reading.points[last + 1].place if last + 1 < len(reading.points) else len(reading.text)
        fields = {leaves[point.leaf].field for point in reading.points[first : last + 1]}
        start = _start(reading, before, first, ends, tags, sees_all=_sees_all(reading, turns))
        end = _end(reading.text, reading.points[last].place, after, ends, special, tags, CALLS[0] in fields)
        if end is None:
            raise MessagesError(f"the chat template does not end turn {number} (assistant) with {ends.end!r}")
        spans.append((start, end))
    return spans


def _sees_all(reading: MarkedText, turns: Sequence[Turn]) -> bool:
    """Say whether the other turns have points too, so that between two points stands the template's text alone."""
    return any(not turns[leaf.turn].answers for leaf in reading.leaves)


def _start(
    reading: MarkedText, before: int, first: int, ends: Ends, tags: re.Pattern[str], *, sees_all: bool
) -> int:
    """Return where the model would have to begin to write: behind the generation prompt, where that can be found."""
    point = reading.points[first]
    leaf = reading.leaves[point.leaf]
    around = reading.text[before : point.place]
    opening = ends.opening.rstrip()
    if opening and sees_all:
        at = around.rfind(opening)
        if at >= 0:
            rest = around[at + len(opening) :]
            space = ends.opening[len(opening) :]
            rest = rest.removeprefix(space) if rest.startswith(space) else rest.lstrip()
            return point.place - len(rest) if rest.strip() else point.place
    opened = re.search(rf"(?:{tags.pattern}\s*)+\Z", around)
    if opened:
        return before + opened.start()
    if leaf.field not in ("content", THOUGHT):
        raise MessagesError(
            f"the chat template does not show where turn {leaf.turn} (assistant) begins",
            fix="choose a template with a generation prompt, or one with {% generation %} blocks",
        )
    return point.place


def _end(
    text: str,
    place: int,
    limit: int,
    ends: Ends,
    special: re.Pattern[str],
    tags: re.Pattern[str],
    calls: bool,
) -> int | None:
    """Return the place behind the token that ends an answer; None where the template writes none."""
    for match in special.finditer(text, place, limit):
        between = tags.sub("", text[place : match.start()])
        if between.strip() and not calls:
            return None
        if match.group() == ends.end:
            return match.end()
        if not calls:
            return None
    return None
