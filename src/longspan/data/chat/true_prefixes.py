"""Each answer behind the text that a template writes before it when the model is asked for it.

    what was said      user  [thought] answer  user  [thought] answer
    sample 1           user  [thought] answer
    sample 2           user            answer  user  [thought] answer

Answers whose text goes on in that of a later one are learnt there; the others become branches of one document.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from longspan.data.chat.encoder import Rendered
from longspan.data.chat.messages import Message

LEFT_OUT = "turns whose thoughts the chat template leaves out"
"""The note of `written` that says what branches are for."""
TRUE_PREFIXES = "answers behind their true prefix"


class _Sample(NamedTuple):
    """A conversation up to an answer."""

    turns: int
    """It ends with the answer before this turn."""
    text: str
    learn: list[int]
    """Answers that are learnt in it."""
    apart: bool
    """The template writes something else before the last of them once it is there."""


class TurnWriter(Protocol):
    """What is needed of a `ChatFormat`."""

    def text(self, turns: list[Message], values: Mapping[str, Any], *, asked: bool = False) -> str:
        """Return the text of turns."""

    def apart(self, turns: list[Message], values: Mapping[str, Any]) -> str:
        """Return the text of turns whose last stands behind what the template writes when the model is asked for it."""

    def ends_with_special(self, text: str) -> bool:
        """Return whether a text ends with a special token."""

    def rendered(
        self,
        turns: list[Message],
        values: Mapping[str, Any],
        *,
        learn: Collection[int] | None = None,
        apart: bool = False,
    ) -> Rendered:
        """Return the text of turns and what is learnt of it."""


def true_samples(
    chat: TurnWriter, turns: list[Message], values: Mapping[str, Any], answers: Sequence[int]
) -> list[Rendered]:
    """Return the samples in which each answer stands behind its true prefix, the longest first.

    Args:
        answers: the turns to learn, in order.

    Raises:
        MessagesError: the template does not begin an answer as it does when the model is asked for it.
    """
    samples: list[_Sample] = []
    for number in reversed(answers):
        text = chat.text(turns[: number + 1], values)
        asked = chat.text(turns[:number], values, asked=True) if number else ""
        # A template that leaves thoughts out before the last answer does so where the model has them before it.
        apart = not text.startswith(asked)
        if apart:
            text = chat.apart(turns[: number + 1], values)
        # Whitespace behind the end of an answer may grow together with what follows.
        ended = text.rstrip()
        within = (each for each in samples if each.text.startswith(ended))
        sample = next(within, None) if chat.ends_with_special(ended) else None
        if sample is None:
            samples.append(_Sample(number + 1, text, [number], apart))
        else:
            sample.learn.append(number)
    if not samples:
        return [chat.rendered(turns, values)]
    rendered = [
        chat.rendered(turns[: each.turns], values, learn=each.learn, apart=each.apart) for each in samples
    ]
    # The longest has all turns: the others say the same of them again.
    first = [
        Counter({name: count for name, count in notes.items() if name != LEFT_OUT})
        for notes in rendered[0].of_turns
    ]
    others = (each._replace(notes=Counter(), of_turns=()) for each in rendered[1:])
    return [rendered[0]._replace(of_turns=first), *others]
