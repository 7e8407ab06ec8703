"""Questions of one document become one conversation at a length, the evidence spread over its depth.

    user        Read the text ... [other documents] document [other documents] ... first question
    assistant   its answer
    user        second question ...

Or each question is asked on its own (`apart`): the first turn without a question, and a branch for each, which go on
in that turn. A model asked in a chat has no answers before it to learn the form from.

Tokens are counted as they are trained: by the student's tokenizer, through its chat template. A document that
does not fit is cut to a window, at line breaks; one that is shorter may be put among others (distractors). Where the
window or the document lies is chosen so that evidence is even over all depths of all samples.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from longspan.core.errors import DataError
from longspan.core.seeds import rng
from longspan.data.chat import BRANCHES, ChatFormat
from longspan.data.tokenizer import Tokenizer
from longspan.synth.config import ConversationConfig
from longspan.synth.depth import DepthBalance, stratified
from longspan.synth.items import Item
from longspan.synth.sections import Span, TokenRuler
from longspan.synth.selection import DocumentFile
from longspan.synth.templates import load_prompt

JOINT = "\n\n"
_PLACES = 16
"""Places of a window or document that are compared."""
_KEEP = 0.75
"""A window keeps at least this share of the questions that the best one keeps."""
_TRIES = 6
_SLACK = 8


Turn = dict[str, str]


class Conversation(NamedTuple):
    """One conversation."""

    turns: list[Turn]
    branches: list[list[Turn]]
    """How the turns go on, a branch for each question that is asked on its own; []: the turns are all."""
    items: list[Item]
    depths: list[list[float]]
    """Of the evidence of each item, in tokens of the context."""
    length: int
    """Tokens of the whole, as trained."""
    context_tokens: int
    distractors: list[str]
    """Hashes of the other documents."""


class _Context(NamedTuple):
    before: str
    window: Span
    """Characters of the document that are in it."""
    after: str
    distractors: list[str]


class Composer:
    """Puts samples together; `left_out` counts questions and samples that did not get in, by reason."""

    def __init__(
        self,
        spec: ConversationConfig,
        tokenizer: Tokenizer,
        chat: ChatFormat,
        documents: DocumentFile,
        *,
        seed: int,
    ) -> None:
        self.balance = DepthBalance()
        self.left_out: Counter[str] = Counter()
        self._spec, self._tokenizer, self._chat = spec, tokenizer, chat
        self._documents, self._seed = documents, seed
        self._templates = [load_prompt(name) for name in spec.first_turns]

    def compose(self, number: int, document: Mapping[str, Any], items: Sequence[Item]) -> Conversation | None:
        """Return the sample of document `number`, None (counted) where none of its questions fits.

        Encodes the document once or twice, and the sample on the Hugging Face engine once or more.
        """
        text = document["text"]
        draw = rng(self._seed, "synth", "first turn", document["id"])
        self._template = self._templates[int(draw.integers(len(self._templates)))]
        order = rng(self._seed, "synth", "turns", document["id"]).permutation(len(items))
        items = [items[place] for place in order]
        try:
            limit = self._room(items)
            if limit == 0:
                self.left_out["sample: questions too long for the length"] += 1
                return None
            ruler = TokenRuler(text, self._tokenizer)
            budget = self._spec.length - self._around(items, limit) - _SLACK
            for _ in range(_TRIES):
                context = self._place(number, ruler, items, budget, limit)
                sample = self._sample(text, context, items, limit)
                if sample is None or sample.length <= self._spec.length:
                    break
                budget -= sample.length - self._spec.length + _SLACK
        except DataError:
            # Characters that the chat format keeps for itself, or a turn that it would rewrite.
            self.left_out["sample: refused by the chat template"] += 1
            return None
        if sample is None:
            self.left_out["sample: no evidence that fits the length"] += 1
            return None
        if sample.length > self._spec.length:
            self.left_out["sample: does not fit the length"] += 1
            return None
        ambiguous = sum(_is_ambiguous(item, context) for item in items)
        self.left_out["question: asks about another document of the sample too"] += ambiguous
        self.left_out["question: no room, or outside the window"] += (
            len(items) - ambiguous - len(sample.items)
        )
        self.balance.add([depth for depths in sample.depths for depth in depths])
        return sample

    def _room(self, items: Sequence[Item]) -> int:
        """Return how many questions a sample has: as many as leave half of the length to the context."""
        limit = min(len(items), self._spec.max_questions or len(items))
        half = self._spec.length // 2
        while limit and (around := self._around(items, limit)) > half:
            limit = min(limit - 1, limit * half // around)
        return limit

    def _around(self, items: Sequence[Item], limit: int) -> int:
        """Return the most tokens that a sample with so many of these questions has without its context."""
        longest = sorted(items, key=lambda item: -len(item.question) - len(item.answer))[:limit]
        return self._tokens(*self._turns("", longest))

    def _tokens(self, turns: list[Turn], branches: list[list[Turn]]) -> int:
        """Return the tokens of a sample, as trained."""
        return len(self._chat.encode_record(turns, {BRANCHES: branches} if branches else None).ids)

    def _turns(self, context: str, items: Sequence[Item]) -> tuple[list[Turn], list[list[Turn]]]:
        """Return turns, and branches behind them."""
        if self._spec.apart:
            before = self._template.render(context=context, question="")
            return [{"role": "user", "content": before}], [_exchange(item.question, item) for item in items]
        turns = []
        for place, item in enumerate(items):
            asked = item.question
            if place == 0:
                asked = self._template.render(context=context, question=asked)
            turns += _exchange(asked, item)
        return turns, []

    def _place(
        self, number: int, ruler: TokenRuler, items: Sequence[Item], budget: int, limit: int
    ) -> _Context:
        """Return where the document, or which window of it, keeps the evidence even over depth."""
        whole = Span(0, len(ruler.text))
        spare = budget - ruler.tokens
        shift = rng(self._seed, "synth", "place").random()
        shares = stratified(_PLACES, number, shift)
        places = _evidence_tokens(ruler, items)
        if spare < 0:
            return _Context("", self._window(ruler, items, places, budget, shares, limit), "", [])
        count = min(self._spec.distractors, len(self._documents) - 1)
        if count < 1 or spare < 2 * _SLACK:
            return _Context("", whole, "", [])
        ends = (0.0, *map(float, shares), 1.0)
        options = [
            [[(spare * share + tokens) / max(1, budget) for tokens in item] for item in places]
            for share in ends
        ]
        before = spare * ends[self._most_even(options, limit)]
        return self._among_others(number, whole, before, spare, count)

    def _window(
        self,
        ruler: TokenRuler,
        items: Sequence[Item],
        places: Sequence[Sequence[float]],
        budget: int,
        shares: Sequence[float] | np.ndarray,
        limit: int,
    ) -> Span:
        windows: list[Span] = []
        options: list[list[list[float]]] = []
        for share in (0.0, *shares, 1.0):
            start = ruler.last_before(share * (ruler.tokens - budget))
            first = float(ruler.before([start])[0])
            end = ruler.last_before(first + budget)
            # A line longer than the budget has no mark inside: nothing is left of it.
            window = Span(start, end)
            windows.append(window)
            options.append(
                [
                    [(tokens - first) / max(1, budget) for tokens in its]
                    for item, its in zip(items, places)
                    if _inside(item, window)
                ]
            )
        most = max(map(len, options))
        usable = [place for place, its in enumerate(options) if len(its) >= max(1, _KEEP * most)]
        if not usable:
            return windows[0]
        return windows[usable[self._most_even([options[place] for place in usable], limit)]]

    def _most_even(self, options: Sequence[Sequence[Sequence[float]]], limit: int) -> int:
        """Return the option (depths of each question) that keeps all samples most even."""
        flat = [
            [depth for place in self.balance.pick(depths, limit) for depth in depths[place]]
            for depths in options
        ]
        return self.balance.best(flat)

    def _among_others(self, number: int, whole: Span, before: float, spare: int, count: int) -> _Context:
        """Return the document between others, which fill `before` tokens before it and the rest behind it."""
        draw = rng(self._seed, "synth", "distractors", number)
        others = [int(each) for each in draw.permutation(len(self._documents)) if each != number][:count]
        texts: dict[str, list[str]] = {"before": [], "after": []}
        left = {"before": before, "after": spare - before}
        used: list[str] = []
        for other in others:
            side = max(left, key=lambda each: left[each])
            if left[side] < 2 * _SLACK:
                break
            record = self._documents[other]
            ruler = TokenRuler(record["text"] + JOINT, self._tokenizer)
            end = ruler.last_before(left[side]) if ruler.tokens > left[side] else len(record["text"])
            if end == 0:
                continue
            piece = record["text"][:end].strip("\n")
            if not piece.strip():
                continue
            left[side] -= float(ruler.before([end])[0])
            texts[side].append(piece + JOINT if side == "before" else JOINT + piece)
            used.append(record["id"])
        return _Context("".join(texts["before"]), whole, "".join(texts["after"]), used)

    def _sample(self, text: str, context: _Context, items: Sequence[Item], limit: int) -> Conversation | None:
        inside = [
            item for item in items if _inside(item, context.window) and not _is_ambiguous(item, context)
        ]
        if not inside:
            return None
        whole = context.before + context.window.of(text) + context.after
        ruler = TokenRuler(whole, self._tokenizer)
        shift = len(context.before) - context.window.start
        depths = [
            [float(depth) for depth in ruler.before([span.middle + shift for span in item.evidence])]
            for item in inside
        ]
        total = max(1, ruler.tokens)
        depths = [[round(depth / total, 4) for depth in each] for each in depths]
        if limit < len(inside):
            kept = self.balance.pick(depths, limit)
            inside, depths = [inside[place] for place in kept], [depths[place] for place in kept]
        turns, branches = self._turns(whole, inside)
        length = self._tokens(turns, branches)
        return Conversation(turns, branches, inside, depths, length, ruler.tokens, context.distractors)


def _exchange(asked: str, item: Item) -> list[Turn]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": item.answer}]


def _inside(item: Item, window: Span) -> bool:
    return all(window.start <= span.start and span.end <= window.end for span in item.evidence)


def _is_ambiguous(item: Item, context: _Context) -> bool:
    """Say whether another document of the sample has what a question goes by: then its answer may be another one."""
    return bool(item.subject) and any(
        re.search(item.subject, others) for others in (context.before, context.after)
    )


def _evidence_tokens(ruler: TokenRuler, items: Sequence[Item]) -> list[list[float]]:
    """Return the tokens before the evidence of each item."""
    return [
        [float(tokens) for tokens in ruler.before([span.middle for span in item.evidence])] for item in items
    ]
