"""Whether a template writes all that a conversation says. What it leaves out is refused, or noted."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from longspan.data.chat.given import LISTS, Given, arguments_of
from longspan.data.chat.messages import CALLS, NO_SPEECH, THOUGHTS, Message, MessagesError, strings_of
from longspan.data.chat.points import THOUGHT, MarkedText, forms_of
from longspan.data.chat.template import Template

OTHER = "choose a template that writes it with --chat-template, or take it out of the record"


def check_written(
    given: Given, reading: MarkedText, template: Template, *, special: re.Pattern[str], first: int = 0
) -> list[Counter[str]]:
    """Return notes of what the template leaves out of each turn by its nature: thoughts of earlier turns, keys that it
    does not know.

    Args:
        special: matches special tokens that would be read as such.
        first: the turn to begin with.

    Raises:
        MessagesError: a turn, a tool call, the tools or documents, or thoughts are not in the text, or by half.
    """
    found: list[Counter[str]] = []
    # Such a template says itself what is learnt: it may write an answer twice, or otherwise.
    blocks = template.has_blocks
    counts: dict[tuple[int, str], list[int]] = defaultdict(list)
    for leaf, count in zip(reading.leaves, reading.counts()):
        counts[leaf.turn, leaf.field].append(count)
    for number, turn in list(enumerate(given.messages))[first:]:
        where = f"turn {number} ({turn['role']})"
        notes: Counter[str] = Counter()
        found.append(notes)
        _check_content(turn, counts.get((number, "content")), where, given.text, notes, blocks)
        _check_thoughts(turn, counts.get((number, THOUGHT)), where, given.text, template, notes, blocks)
        _check_calls(turn, counts.get((number, CALLS[0])), where, given.text)
        for key in turn:
            known = key in template.names or key in (*NO_SPEECH, *THOUGHTS, *CALLS)
            if not known and turn[key] not in ("", [], {}):
                notes[f"turns with a `{key}`, which the chat template does not read"] += 1
    _check_same(reading, special, blocks)
    for name in LISTS:
        for each in given.variables.get(name, ()):
            if not _contains(given.text, _title(each)):
                raise MessagesError(
                    f"the chat template does not write the {name} of the record",
                    found=str(each)[:80],
                    fix=OTHER,
                )
    return found


def _check_content(
    turn: Message, counts: list[int] | None, where: str, text: str, notes: Counter[str], blocks: bool
) -> None:
    content = turn["content"] or ""
    said = [content] if isinstance(content, str) else [part["text"] for part in content]
    if not any(part.strip() for part in said):
        return
    answers = turn["role"] == "assistant"
    if counts is None:
        # Without points it can only be looked for.
        if not all(_contains(text, part) for part in said):
            raise MessagesError(
                f"the chat template does not write the content of {where} as it is", fix=OTHER
            )
        return
    if not any(counts) or (answers and not blocks and max(counts) > 2):
        raise MessagesError(
            f"the chat template writes the content of {where} {max(counts) // 2} times",
            allowed="once",
            fix="choose another template with --chat-template",
        )
    if any(count % 2 for count in counts) or (not answers and not all(counts)):
        raise MessagesError(
            f"the chat template rewrites what {where} says: it leaves a part of it out", fix=OTHER
        )
    if not all(counts):
        notes["answers of which the chat template leaves out a part (thoughts, as templates do)"] += 1


def _check_thoughts(
    turn: Message,
    counts: list[int] | None,
    where: str,
    text: str,
    template: Template,
    notes: Counter[str],
    blocks: bool,
) -> None:
    thoughts = next((turn[key] for key in THOUGHTS if turn.get(key)), "")
    if not thoughts.strip():
        return
    written = _contains(text, thoughts) if counts is None else any(counts)
    if not written and not template.names & {*THOUGHTS}:
        raise MessagesError(f"the chat template does not write the thoughts of {where}", fix=OTHER)
    if counts is not None and (any(count % 2 for count in counts) or (max(counts) > 2 and not blocks)):
        raise MessagesError(f"the chat template writes the thoughts of {where} by half, or twice", fix=OTHER)
    if not written:
        notes["turns whose thoughts the chat template leaves out"] += 1


def _check_calls(turn: Message, counts: list[int] | None, where: str, text: str) -> None:
    calls = [*(turn.get("tool_calls") or ()), *([turn["function_call"]] if turn.get("function_call") else ())]
    if not calls:
        return
    functions = [call.get("function", call) for call in calls]
    written = all(counts) if counts else True
    written = written and all(
        _contains(text, str(each.get("name", ""))) for each in functions if isinstance(each, Mapping)
    )
    written = written and all(_contains(text, each) for each in strings_of(arguments_of(turn)))
    if not written:
        raise MessagesError(f"the chat template does not write the tool calls of {where}", fix=OTHER)


def _check_same(reading: MarkedText, special: re.Pattern[str], blocks: bool) -> None:
    """Raise MessagesError where between the points of a text stands another one; with `blocks` it may, so long as it
    makes no special token of what was said."""
    opened: dict[int, int] = {}
    for point in reading.points:
        leaf = reading.leaves[point.leaf]
        start = opened.pop(point.leaf, None)
        if start is None:
            opened[point.leaf] = point.place
            continue
        found = reading.text[start : point.place]
        forms = forms_of(leaf.text) if leaf.field == CALLS[0] else (leaf.text,)
        if leaf.text and found not in forms and (not blocks or special.search(found)):
            raise MessagesError(
                f"the chat template rewrites what turn {leaf.turn} says, so the assistant's words cannot be found",
                fix="choose another template with --chat-template, or one with {% generation %} blocks",
            )


def _contains(text: str, part: str) -> bool:
    part = part.strip()
    return not part or any(form in text for form in forms_of(part))


def _title(value: Any) -> str:
    """Return the text by which a tool or a document is looked for: its name, or the first that it holds."""
    if isinstance(value, Mapping):
        inner = value.get("function", value)
        named = inner.get("name", "") if isinstance(inner, Mapping) else ""
        if not isinstance(named, str):
            raise MessagesError(
                "a tool or document of the record has a name that is not text", found=str(named)[:80]
            )
        texts: Sequence[str] = [each for each in map(str, value.values())] if not named else [named]
        return texts[0] if texts else ""
    return str(value)
