"""Questions out of replies: objects become items with an answer and the places in the document that it rests on.

Every object that is not one is rejected with a reason. What is checked by kind:

one_detail            `evidence` is quoted from the section, or the section has a sentence that supports the answer
multi_detail          `sections` names at least two of the sections shown; in each, the sentence that supports most
research_questions    `number` is one of the list's, and `evidence` is quoted from the document
biography             the document names the `character`; the evidence are mentions from the first to the last
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from longspan.data.chat.messages import MARKS
from longspan.synth.config import SetConfig
from longspan.synth.filters import content_words, find_quote, find_support, recall, words_of
from longspan.synth.parsing import parse_reply
from longspan.synth.sections import Span

MAX_QUESTION_WORDS = 80
_MENTIONS = 5
BIOGRAPHY_QUESTION = "Write a short biography of {character}, from what the text tells."


class Item(NamedTuple):
    """One question with its answer."""

    question: str
    answer: str
    evidence: tuple[Span, ...]
    """Characters of the document, at least one place."""
    sections: tuple[int, ...] = ()
    """Sections of the document that it was asked about."""
    subject: str = ""
    """Pattern of what the question goes by where other documents of a sample may have it too, such as a heading."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {**self._asdict(), "evidence": [list(span) for span in self.evidence]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Item:
        """Return what `to_dict` wrote."""
        evidence = tuple(Span(*span) for span in values["evidence"])
        sections = tuple(values["sections"])
        return cls(values["question"], values["answer"], evidence, sections, values["subject"])


class Rejected(NamedTuple):
    """What did not become an item."""

    reason: str
    text: str
    """The question, or the beginning of the reply."""


class _RejectedError(Exception):
    """This object is not an item; the message is the reason."""


class Shown(NamedTuple):
    """What one request showed of a document."""

    text: str
    """The whole document."""
    spans: tuple[Span, ...]
    """Its sections that were shown, in order; the whole of it as one."""
    sections: tuple[int, ...]
    """Their numbers in the document."""


def read_reply(reply: str, shown: Shown, spec: SetConfig, repairs: Counter[str]) -> list[Item | Rejected]:
    """Return what became of every object of a reply; the faults that were mended are counted in `repairs`."""
    parsed = parse_reply(reply)
    repairs.update(parsed.repairs)
    if parsed.error is not None:
        return [Rejected(f"reply: {parsed.error}", reply[:200])]
    found: list[Item | Rejected] = []
    for values in parsed.objects:
        try:
            found.append(_item(values, shown, spec))
        except _RejectedError as error:
            named = values.get("question", values.get("character", ""))
            found.append(Rejected(str(error), str(named)[:200]))
    return found


def _item(values: Mapping[str, Any], shown: Shown, spec: SetConfig) -> Item:
    if spec.kind == "biography":
        return _biography(values, shown, spec)
    if spec.kind == "research_questions":
        return _research(values, shown, spec)
    question, answer = _text(values, "question"), _text(values, "answer")
    if len(words_of(question)) > MAX_QUESTION_WORDS:
        raise _RejectedError("question too long")
    _check_answer(answer, spec)
    if spec.kind == "multi_detail":
        return _multi_detail(question, answer, values, shown, spec)
    (section,) = shown.spans
    _check_support(answer, section.of(shown.text), spec)
    quote = values.get("evidence")
    place = find_quote(quote, shown.text, section) if isinstance(quote, str) else None
    place = place or find_quote(answer, shown.text, section)
    place = place or find_support(content_words(f"{answer} {question}", spec.language), shown.text, section)
    return Item(question, answer, (place,), shown.sections)


def _multi_detail(
    question: str, answer: str, values: Mapping[str, Any], shown: Shown, spec: SetConfig
) -> Item:
    numbers = values.get("sections")
    numbers = numbers if isinstance(numbers, list) else []
    chosen = sorted({number for number in map(_whole_number, numbers) if number is not None})
    if len(chosen) < 2:
        raise _RejectedError("needs fewer than two sections")
    if chosen[0] < 1 or chosen[-1] > len(shown.spans):
        raise _RejectedError("names a section that was not shown")
    spans = [shown.spans[number - 1] for number in chosen]
    _check_support(answer, "\n".join(span.of(shown.text) for span in spans), spec)
    wanted = content_words(f"{answer} {question}", spec.language)
    places = tuple(find_support(wanted, shown.text, span) for span in spans)
    return Item(question, answer, places, tuple(shown.sections[number - 1] for number in chosen))


def _research(values: Mapping[str, Any], shown: Shown, spec: SetConfig) -> Item:
    number = _whole_number(values.get("number"))
    if number is None or not 1 <= number <= len(spec.fixed_questions):
        raise _RejectedError("no question of the list")
    answer = _text(values, "answer")
    _check_answer(answer, spec)
    (whole,) = shown.spans
    place = find_quote(_text(values, "evidence"), shown.text, whole)
    if place is None:
        raise _RejectedError("evidence not in the document")
    _check_support(answer, shown.text, spec)
    return Item(spec.fixed_questions[number - 1], answer, (place,), shown.sections)


def _biography(values: Mapping[str, Any], shown: Shown, spec: SetConfig) -> Item:
    character, summary = _text(values, "character"), _text(values, "summary")
    if len(words_of(character)) > 8:
        raise _RejectedError("no name")
    _check_answer(summary, spec)
    mentions = list(re.finditer(rf"(?<!\w){re.escape(character)}(?!\w)", shown.text))
    if not mentions:
        raise _RejectedError("character not in the document")
    _check_support(summary, shown.text, spec)
    # A biography rests on the whole text: some mentions, evenly chosen from the first to the last.
    last, parts = len(mentions) - 1, min(_MENTIONS, len(mentions)) - 1
    places = [mentions[round(number * last / max(1, parts))] for number in range(parts + 1)]
    evidence = tuple(Span(*match.span()) for match in places)
    return Item(BIOGRAPHY_QUESTION.format(character=character), summary, evidence, shown.sections)


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    if value is None:
        raise _RejectedError(f"no {name}")
    if not isinstance(value, str):
        raise _RejectedError(f"{name} is not text")
    value = value.strip()
    if not words_of(value):
        raise _RejectedError(f"empty {name}")
    if any(0xD800 <= ord(each) < 0xE000 or each == "\0" or each in MARKS for each in value):
        raise _RejectedError(f"{name} has invalid characters")
    return value


def _check_answer(answer: str, spec: SetConfig) -> None:
    count = len(words_of(answer))
    if count > spec.max_answer_words:
        raise _RejectedError("answer too long")
    if count < spec.min_answer_words:
        raise _RejectedError("answer too short")


def _check_support(answer: str, evidence: str, spec: SetConfig) -> None:
    if recall(answer, evidence, spec.language) < spec.evidence_recall:
        raise _RejectedError("answer not in its evidence")


def _whole_number(value: object) -> int | None:
    """Return a number that a model wrote as 3, 3.0 or "3"."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    match = re.fullmatch(r"\s*(?:Passage |Section )?\[?(-?[0-9]{1,6})(?:\.0*)?\]?\s*", str(value))
    return int(match.group(1)) if match else None


def spans_of(document: Mapping[str, Any]) -> Sequence[Span]:
    """Return the sections of a document as the file of chosen documents has them."""
    return [Span(*span) for span in document["sections"]]
