r"""What a model writes before its answer: thoughts between marks, which are never taken for the answer.

    split_thoughts("<think>\nIs it 7?\n</think>\n\n8")      -> Spoken("8", "Is it 7?", answered=True)
    split_thoughts("Is it 7? No.\n</think>\n\n8")           the prompt had opened the block: the same
    split_thoughts("<think>\nIs it 7? Or per")              -> Spoken("", "Is it 7? Or per", answered=False)

The answer begins behind the last closing mark, whichever of the marks below it is, and ends where thoughts begin that
have no end. Marks around the answer itself, such as <answer>, are no part of it, nor is
the end of a turn behind it, such as <|im_end|>. Marks are known in capitals and in small letters.
"""

from __future__ import annotations

import re
import string
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
    Marks("<reason>", "</reason>"),
    Marks("<scratchpad>", "</scratchpad>"),
    Marks("<longcat_think>", "</longcat_think>"),
    Marks("<seed:think>", "</seed:think>"),
    Marks("<|START_THINKING|>", "<|END_THINKING|>"),
    Marks("<|think|>", "<|/think|>"),
    Marks("<|thinking|>", "<|/thinking|>"),
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
)
"""What models that think write around the answer behind their thoughts."""

_TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|end|>",
    "<|return|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<end_of_turn>",
    "<turn|>",
    "<eos>",
    "</s>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
"""What ends turns and texts, left at the end of an answer where it is not a stop token or a server shows it."""
_SMALL = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
_FOLDED = tuple(Marks(*(mark.translate(_SMALL) for mark in marks)) for marks in MARKS)
"""The marks as they stand in a text whose ASCII letters are small; the length of a text stays."""

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
    folded = text.translate(_SMALL)
    again = min(
        (at for marks in _FOLDED if (at := folded.find(marks.opening, start)) >= 0), default=len(text)
    )
    further = _unmarked(text[again:])
    if not further:  # a mark alone is a word of the answer
        again = len(text)
    thoughts = "\n".join(filter(None, (_unmarked(text[:start]), further)))
    answer = _without_turn_end(text[start:again].lstrip() if start else text[:again])
    return Spoken(_without_frame(answer) if start else answer, thoughts, True)


def answer_start(text: str, *, opened: bool = False) -> int | None:
    """Return where the answer begins; 0: there are no thoughts; None: they have not ended."""
    words = [marks for marks in _WORDS if text.lstrip().startswith(marks.opening)]
    folded = text.translate(_SMALL)
    # What such marks are made of may be ordinary words, so that one alone opens nothing.
    places = [(folded.rfind(marks.closing), marks.closing) for marks in _FOLDED]
    places += [(text.rfind(marks.closing), marks.closing) for marks in words]
    start = max((place + len(each) for place, each in places if place >= 0), default=0)
    if start == 0 and (opened or _CUT_BARE.match(text)):
        return None
    return None if opens_thoughts(text[start:]) else start


def _unmarked(thoughts: str) -> str:
    words = [marks for marks in _WORDS if thoughts.endswith(marks.closing)]
    for marks in (*_FOLDED, *words):
        thoughts = thoughts.lstrip()
        known = thoughts if marks in words else thoughts.translate(_SMALL)
        if known.startswith(marks.opening):
            thoughts, known = thoughts[len(marks.opening) :], known[len(marks.opening) :]
        if known.endswith(marks.closing):
            thoughts = thoughts[: len(thoughts) - len(marks.closing)]
    return thoughts.removeprefix("<|message|>").removesuffix("<|end|><|start|>assistant").strip()


def _without_frame(answer: str) -> str:
    """Return an answer without the marks that a model put around all of it; either may be missing."""
    for marks in _AROUND_ANSWERS:
        opens = bool(marks.opening) and answer.startswith(marks.opening)
        if opens or answer.rstrip().endswith(marks.closing):
            answer = answer.removeprefix(marks.opening).rstrip().removesuffix(marks.closing).strip()
    return answer


def _without_turn_end(answer: str) -> str:
    """Return an answer without what ends a turn behind it; `</s>` behind `<s>` strikes words out."""
    while (end := next((each for each in _TURN_ENDS if answer.rstrip().endswith(each)), None)) is not None:
        if end == "</s>" and "<s>" in answer.lstrip():
            break
        answer = answer.rstrip().removesuffix(end).rstrip()
    return answer


def opens_thoughts(text: str) -> bool:
    """Return whether a text begins with thoughts."""
    begin = text.lstrip()[:LONGEST_MARK].translate(_SMALL)
    return begin.startswith(tuple(marks.opening for marks in _FOLDED))


def may_close(text: str) -> bool:
    """Return whether a text holds a mark that can end thoughts."""
    folded = text.translate(_SMALL)
    return any(marks.closing in folded for marks in _FOLDED) or any(marks.closing in text for marks in _WORDS)


def may_open(text: str) -> bool:
    """Return whether a text may yet turn out to begin with thoughts: white space, or a part of a mark."""
    begin = text.lstrip()
    if len(begin) >= LONGEST_MARK:
        return False
    return any(marks.opening.startswith(begin.translate(_SMALL)) for marks in _FOLDED)


def closing_of(prompt: str) -> str | None:
    """Return the mark that would end the thoughts that a prompt ends in; None: it ends outside of any."""
    best: tuple[int, str] | None = None
    folded = prompt.translate(_SMALL)
    for marks, known in zip(MARKS, _FOLDED):
        opening, closing = folded.rfind(known.opening), folded.rfind(known.closing)
        if opening > closing and (best is None or opening > best[0]):
            written = prompt[opening : opening + len(known.opening)]
            as_it_is = written == marks.opening or not written.isupper()
            best = opening, marks.closing if as_it_is else marks.closing.upper()
    return None if best is None else best[1]
