"""One question on long texts, composed and measured: what `longspan ask` sends to a model.

context   the documents one after another, cut to the length that is asked for
needle    a sentence put on a line of its own at a sentence border of the context
prompt    a template around context and question, such as that of a published needle test
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from longspan.core.errors import ArgumentError, DataError
from longspan.eval.haystack import SEPARATOR, Window
from longspan.eval.held_out import HeldOutDocument
from longspan.eval.needle_presets import PRESETS
from longspan.eval.planting import Insertion, Planted, plant
from longspan.eval.prompts import PromptForm

_MAX_FITS = 6
_AROUND_CHARS = 200


class NeedlePlace(NamedTuple):
    """Where the needle lies."""

    before: str
    """The text right before it."""
    needle: str
    after: str
    depth: float
    """Context tokens before it / context tokens before and after it."""


class Composed(NamedTuple):
    """A prompt and what was measured of it."""

    prompt: str
    tokens: int
    """Of the prompt, BOS and chat template counted."""
    removed: int
    """Tokens of the context that were cut off its end."""
    place: NeedlePlace | None


def template_named(name: str) -> str:
    """Return the prompt of a published needle test, or the text itself where it is a template.

    Raises:
        ArgumentError: neither.
    """
    if name in PRESETS:
        return str(PRESETS[name]["prompt"])
    if "{question}" not in name and "{context}" not in name:
        raise ArgumentError(
            "there is no such prompt",
            found=repr(name),
            allowed=[*PRESETS, "a text with {context}, and {question} where one is asked"],
        )
    return name


def compose(
    documents: Sequence[HeldOutDocument],
    form: PromptForm,
    *,
    question: str | None,
    template: str,
    needle: str | None = None,
    depth: float = 0.5,
    length: int | None = None,
) -> Composed:
    """Put a prompt together.

    Args:
        documents: the context, in this order; none: the question is the whole prompt.
        question: None where the context asks it itself.
        template: with {context}, and with {question} where there is one.
        depth: where the needle is to lie: 0 = start of the context, 1 = its end.
        length: tokens of the prompt at most; None: as long as the documents are.

    Raises:
        ArgumentError: a depth outside 0..1, a needle without a context, a template without a place for what is
            given or with one for a question that is not, an empty question.
        DataError: the length leaves no room for a context.
    """
    if not 0.0 <= depth <= 1.0:
        raise ArgumentError("a depth lies between 0 (start) and 1 (end of the context)", found=depth)
    if question is not None and not question.strip():
        raise ArgumentError("the question is empty")
    if not documents:
        if question is None:
            raise ArgumentError(
                "nothing is asked", fix="give a --question, or texts that hold one with --data"
            )
        if needle is not None:
            raise ArgumentError("a needle is planted in a context", fix="give texts with --data")
        return Composed(question, form.count(question), 0, None)
    if "{context}" not in template:
        raise ArgumentError(
            "the prompt has no place for the context", found=repr(template), allowed="{context}"
        )
    if ("{question}" in template) != (question is not None):
        raise ArgumentError(
            "the prompt has no place for the question"
            if question
            else "the prompt has a place for a question",
            found=repr(template) if question else "no --question",
            fix="write {question} into --prompt"
            if question
            else "give one, or a --prompt without {question}",
        )
    text = SEPARATOR.join(document.text for document in documents)
    window = Window(text, form.tokenizer.encode_with_offsets(text).ends)
    insertions = []
    if needle is not None:
        needle = needle.strip()
        insertions.append(Insertion(needle, depth, len(form.tokenizer.encode(f"{needle}\n"))))

    def filled(context: str) -> str:
        # The context last: it may hold the other's name.
        return template.replace("{question}", question or "").replace("{context}", context)

    whole = len(window.ends)
    around = form.count(filled("")) + sum(insertion.tokens for insertion in insertions)
    kept = whole if length is None else min(whole, length - around)
    for _ in range(_MAX_FITS):
        if kept < 1:
            raise DataError(
                f"{length} tokens leave no room for a context", found=f"{around} tokens around it"
            )
        planted = plant(window, kept, insertions)
        prompt = filled(planted.text)
        tokens = form.count(prompt)
        if length is None or tokens <= length:
            place = _place(planted, form) if insertions else None
            return Composed(prompt, tokens, whole - kept, place)
        kept -= tokens - length
    raise DataError(f"the text could not be cut to {length} tokens", found=f"{tokens} tokens")


def _place(planted: Planted, form: PromptForm) -> NeedlePlace:
    (start, end), text = planted.spans[0], planted.text
    before = len(form.tokenizer.encode(text[:start]))
    after = len(form.tokenizer.encode(text[end:]))
    return NeedlePlace(
        text[max(0, start - _AROUND_CHARS) : start],
        text[start:end],
        text[end : end + _AROUND_CHARS],
        before / max(1, before + after),
    )
