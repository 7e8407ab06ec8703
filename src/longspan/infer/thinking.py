r"""What a model writes before its answer: thoughts between marks, which are never taken for the answer.

    split_thoughts("<think>\nIs it 7?\n</think>\n\n8")      -> Spoken("8", "Is it 7?", answered=True)
    split_thoughts("Is it 7? No.\n</think>\n\n8")           the prompt had opened the block: the same
    split_thoughts("<think>\nIs it 7? Or per")              -> Spoken("", "Is it 7? Or per", answered=False)

The answer begins behind the last closing mark, whichever of the marks below it is.
"""

from __future__ import annotations

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
"""The channels where a server leaves out special tokens: known by both, because each may be a word."""
LONGEST_MARK = max(len(mark) for marks in (*MARKS, _BARE) for mark in marks)

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
    if start == 0:
        return Spoken(text, "", True)
    thoughts = text if start is None else text[:start]
    for marks in (*MARKS, _BARE) if thoughts.endswith(_BARE.closing) else MARKS:
        thoughts = thoughts.lstrip().removeprefix(marks.opening).removesuffix(marks.closing)
    thoughts = thoughts.removeprefix("<|message|>").removesuffix("<|end|><|start|>assistant")
    return Spoken("" if start is None else text[start:].lstrip(), thoughts.strip(), start is not None)


def answer_start(text: str, *, opened: bool = False) -> int | None:
    """Return where the answer begins; 0: there are no thoughts; None: they have not ended."""
    known = (*MARKS, _BARE) if text.lstrip().startswith(_BARE.opening) else MARKS
    # What the bare channel begins with may be an ordinary word, so that alone opens nothing.
    start = max((place + len(m.closing) for m in known if (place := text.rfind(m.closing)) >= 0), default=0)
    if start == 0 and opened:
        return None
    return None if opens_thoughts(text[start:]) else start


def opens_thoughts(text: str) -> bool:
    """Return whether a text begins with thoughts."""
    return text.lstrip().startswith(tuple(marks.opening for marks in MARKS))


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
