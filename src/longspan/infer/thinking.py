r"""What a model writes before its answer: thoughts between marks, which are never taken for the answer.

    split_thoughts("<think>\nIs it 7?\n</think>\n\n8")      -> Spoken("8", "Is it 7?", answered=True)
    split_thoughts("Is it 7? No.\n</think>\n\n8")           the prompt had opened the block: the same
    split_thoughts("<think>\nIs it 7? Or per")              -> Spoken("", "Is it 7? Or per", answered=False)

The answer begins behind the last closing mark, whichever of the marks below it is, and ends where thoughts begin that
have no end. Marks around the answer itself, such as <answer>, are no part of it.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Marks(NamedTuple):
    """What stands around thoughts."""

    opening: str
    closing: str


FINAL_CHANNEL = "<|channel|>final<|message|>"
"""Begins the answer of models that write in channels (gpt-oss); all other channels are thoughts."""
CHANNEL = "<|channel|>"
MARKS = (
    Marks("<think>", "</think>"),
    Marks("[THINK]", "[/THINK]"),
    Marks("<thinking>", "</thinking>"),
    Marks("<thought>", "</thought>"),
    Marks("<reasoning>", "</reasoning>"),
    Marks("<seed:think>", "</seed:think>"),
    Marks("<|START_THINKING|>", "<|END_THINKING|>"),
    Marks("<|begin_of_thought|>", "<|end_of_thought|>"),
    Marks("<|inner_prefix|>", "<|inner_suffix|>"),
    Marks("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    Marks("<|channel>thought", "<channel|>"),
    Marks(f"{CHANNEL}analysis", FINAL_CHANNEL),
    Marks(f"{CHANNEL}commentary", FINAL_CHANNEL),
)
_BARE = Marks("analysis", "assistantfinal")
"""The channels where a server leaves out special tokens."""
_WORDS = (
    _BARE,
    Marks("Here is my thought process:", "Here is my response:"),
    Marks("Here's my thought process:", "Here's my response:"),
    Marks("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
)
"""Marks in plain words: known where a text begins with the first, because each may be said in an answer."""
_CUT_BARE = re.compile(r"\s*analysis[A-Z][a-z']*,? [a-z\"'(]")
"""The bare channel of thoughts without an end: a sentence glued to its name."""
LONGEST_MARK = max(len(mark) for marks in (*MARKS, *_WORDS) for mark in marks)
_AROUND_ANSWERS = (
    Marks("<answer>", "</answer>"),
    Marks("<response>", "</response>"),
    Marks("<output>", "</output>"),
    Marks("<|begin_of_solution|>", "<|end_of_solution|>"),
    Marks("<|begin_of_box|>", "<|end_of_box|>"),
    Marks("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    Marks("[BEGIN FINAL RESPONSE]", "[END FINAL RESPONSE]"),
    Marks("", "<|return|>"),
)
"""What models that think write around the answer behind their thoughts."""

VARIABLES = ("enable_thinking", "thinking")
"""Variables by which chat templates turn thinking on and off: Qwen, GLM, SmolLM, ...; DeepSeek, Granite."""


class Spoken(NamedTuple):
    """What a model wrote, in its parts."""

    answer: str
    thoughts: str
    """Without their marks; empty: there are none."""
    answered: bool
    """Whether an answer was begun, be it empty; False: the thoughts have no end."""


def split_thoughts(text: str, *, opened: bool = False) -> Spoken:
    """Split a text into thoughts and answer; `opened`: the prompt ends inside a block of thoughts."""
    start = answer_start(text, opened=opened)
    if start is None:
        return Spoken("", _unmarked(text), False)
    again = min((at for marks in MARKS if (at := text.find(marks.opening, start)) >= 0), default=len(text))
    further = _unmarked(text[again:])
    if not further:  # a mark alone is a word of the answer
        again = len(text)
    thoughts = "\n".join(filter(None, (_unmarked(text[:start]), further)))
    answer = text[start:again].lstrip() if start else text[:again]
    return Spoken(_without_frame(answer) if start else answer, thoughts, True)


def answer_start(text: str, *, opened: bool = False) -> int | None:
    """Return where the answer begins; 0: there are no thoughts; None: they have not ended."""
    words = [marks for marks in _WORDS if text.lstrip().startswith(marks.opening)]
    # What such marks are made of may be ordinary words, so that one alone opens nothing.
    closings = [marks.closing for marks in (*MARKS, *words)]
    start = max((place + len(each) for each in closings if (place := text.rfind(each)) >= 0), default=0)
    if start == 0 and (opened or _CUT_BARE.match(text)):
        return None
    return None if opens_thoughts(text[start:]) else start


def _unmarked(thoughts: str) -> str:
    words = [marks for marks in _WORDS if thoughts.endswith(marks.closing)]
    for marks in (*MARKS, *words):
        thoughts = thoughts.lstrip().removeprefix(marks.opening).removesuffix(marks.closing)
    return thoughts.removeprefix("<|message|>").removesuffix("<|end|><|start|>assistant").strip()


def _without_frame(answer: str) -> str:
    """Return an answer without the marks that a model put around all of it; either may be missing."""
    for marks in _AROUND_ANSWERS:
        opens = bool(marks.opening) and answer.startswith(marks.opening)
        if opens or answer.rstrip().endswith(marks.closing):
            answer = answer.removeprefix(marks.opening).rstrip().removesuffix(marks.closing).strip()
    return answer


def opens_thoughts(text: str) -> bool:
    """Return whether a text begins with thoughts."""
    return text.lstrip().startswith(tuple(marks.opening for marks in MARKS))


def may_close(text: str) -> bool:
    """Return whether a text holds a mark that can end thoughts."""
    return any(marks.closing in text for marks in (*MARKS, *_WORDS))


def may_open(text: str) -> bool:
    """Return whether a text may yet turn out to begin with thoughts: white space, or a part of a mark."""
    begin = text.lstrip()
    return len(begin) < LONGEST_MARK and any(marks.opening.startswith(begin) for marks in MARKS)


def closing_of(prompt: str) -> str | None:
    """Return the mark that would end the thoughts that a prompt ends in; None: it ends outside of any."""
    best: tuple[int, str] | None = None
    for marks in MARKS:
        opening, closing = prompt.rfind(marks.opening), prompt.rfind(marks.closing)
        if opening > closing and (best is None or opening > best[0]):
            best = opening, marks.closing
    return None if best is None else best[1]
