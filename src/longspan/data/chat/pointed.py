"""The text of a conversation with points in it, which show where the words of each turn stand."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from longspan.data.chat.given import Given
from longspan.data.chat.messages import GUARD, Message, MessagesError
from longspan.data.chat.points import MarkedText, Pointer, read
from longspan.data.chat.template import Template


def read_pointed(template: Template, pointer: Pointer, given: Given, *, asked: bool = False) -> MarkedText:
    """Return the text of a conversation with the places of what each turn says, as many of them as can be shown.

    Args:
        asked: with what the template writes before the next answer.

    Raises:
        MessagesError: the marks change what the template writes.
    """
    messages = [{key: pointer.guarded(value) for key, value in message.items()} for message in given.messages]
    variables = {key: pointer.guarded(value) for key, value in given.variables.items()}

    def attempt(others: bool, calls: bool, outside: Collection[int]) -> MarkedText | None:
        """Return the text with points; None where they change it."""
        pointed, leaves = pointer.point(messages, others=others, calls=calls, outside=outside)
        try:
            rendered = template.render(pointed, variables, marks=True, add_generation_prompt=asked)
            found = read(rendered, leaves)
        except MessagesError:
            return None
        return found if found.text.replace(GUARD, "") == given.text else None

    spaced = list(_begin_with_space(messages))
    for others, calls in ((True, True), (False, True), (False, False)):
        found = attempt(others, calls, spaced)
        if found is None and spaced:
            # The template trims some of them: those that it does not trim are learnt with their white space.
            kept: list[int] = []
            found = attempt(others, calls, kept)
            for number in spaced if found is not None else ():
                answers = messages[number]["role"] == "assistant"
                if answers and (more := attempt(others, calls, [*kept, number])) is not None:
                    kept, found = [*kept, number], more
        if found is not None:
            return found
    if not template.has_blocks:
        raise MessagesError(
            "the chat template rewrites what a turn says, so the assistant's words cannot be found in it",
            fix="choose another template with --chat-template, or one with {% generation %} blocks",
        )
    bare = read(template.render(messages, variables, marks=True, add_generation_prompt=asked), [])
    if bare.text.replace(GUARD, "") != given.text:
        raise MessagesError(
            "the chat template writes something else when its {% generation %} blocks and the special tokens in "
            "messages are marked, so what is learnt cannot be found",
            fix="choose another template with --chat-template",
        )
    return bare


def _begin_with_space(messages: Sequence[Message]) -> Iterator[int]:
    for number, message in enumerate(messages):
        content = message["content"] or ""
        parts = [content] if isinstance(content, str) else [part["text"] for part in content[:1]]
        if any(part[:1].isspace() and part.strip() for part in parts):
            yield number
