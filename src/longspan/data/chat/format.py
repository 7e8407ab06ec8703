"""Conversations to token ids and an exact mask of what the assistant wrote.

The template is given all that a record holds (see `given`) and rendered twice: once as it is, once with private-use
marks in it (see `points`) which show where the words of each turn stand and where `{% generation %}` blocks begin
and end. A conversation whose marked text is another one, or of which a turn, a tool call or a part is missing in
the text, is refused: it is never learnt by half.

Special tokens are read in what the template writes alone: "<|end|>" in a message stays ordinary text.

    with {% generation %} blocks    learnt is what is in them, with the borders that transformers draws
    without                         learnt is what the model would have to write itself: from the generation prompt, or
                                    the first word, to the special token that ends the turn

A turn that says that it is not to be learnt (`weight: 0`, `train: false` ...) is read only, either way.

Encoding runs on the Hugging Face engine, which knows the place of every token: about 0.4 million tokens/s.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from operator import add
from pathlib import Path
from typing import Any

from longspan.core.errors import DataError
from longspan.data.chat.branches import SHARED, as_branches, one_document
from longspan.data.chat.chat_config import ChatConfig
from longspan.data.chat.continued import (
    BEGIN_ALIKE,
    BRANCHES,
    WITHOUT_FIRST,
    Branch,
    ReadBranches,
    branches_of,
    encode_branches,
    read_branches,
)
from longspan.data.chat.encoder import ChatTokens, Encoded, MarkedEncoder, Rendered
from longspan.data.chat.given import FIELDS, Given, give, variables_of, with_marks, with_system
from longspan.data.chat.learnt import Ends, Turn, answer_spans, block_spans, learnt_turns, without_thoughts
from longspan.data.chat.messages import (
    GUARD,
    LEARNT,
    NOT_LEARNT,
    Message,
    MessagesError,
    as_messages,
)
from longspan.data.chat.pointed import read_pointed
from longspan.data.chat.points import MarkedText, Pointer
from longspan.data.chat.stored import Stored, rewritten
from longspan.data.chat.template import DATE, Template, find_template
from longspan.data.chat.too_long import Short, fitted, shortened, shortener
from longspan.data.chat.true_prefixes import TRUE_PREFIXES, true_samples
from longspan.data.chat.written import check_written
from longspan.data.tokenizer import Tokenizer
from longspan.data.tokenizer.roles import named_tokens

RULES = 9
"""Raised whenever the same template and conversation would be encoded otherwise."""
TOKENISED_WHOLE = "conversations tokenised whole, though they begin as another: no place to cut them"
REMARKS = frozenset({as_branches(BEGIN_ALIKE), as_branches(TRUE_PREFIXES), SHARED, TOKENISED_WHOLE})
"""Notes by which nothing is lost."""

# Awkward content: a template that escapes, lowers, or splits it is found out before the corpus is read.
PROBE: tuple[Message, ...] = (
    {"role": "user", "content": 'Is <b>1 & 2</b> a "Set"?\n\n  Yes \\ no: \u00e9'},
    {"role": "assistant", "content": "It <i>isn't</i>,  said\nshe & {{ he }}."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because\n\n1. so"},
)
_SYSTEM: Message = {"role": "system", "content": "Be brief."}
PROBES = (PROBE, (_SYSTEM, *PROBE), PROBE[:2], (_SYSTEM, *PROBE[:2]))
"""The first that a template does not refuse shows what it is like."""


class ChatFormat:
    """A tokenizer with a chat template.

    Args:
        template: the Jinja text.
        special: texts of bos_token, eos_token and the like, for the template to write. None: those of the
            tokenizer.
        begin_with_user: leave out the first turn where it is not the user's, such as a system turn, and count it.
        config: what is learnt, and what becomes of what does not fit.

    Raises:
        DataError: the template is not valid or fails; or it has no `{% generation %}` blocks and rewrites contents,
            or writes no special token at the end of the assistant's turns.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        *,
        special: Mapping[str, str] | None = None,
        begin_with_user: bool = False,
        config: ChatConfig | None = None,
    ) -> None:
        self.begin_with_user = begin_with_user
        """Whether a first turn that is not the user's is left out."""
        self.config = ChatConfig() if config is None else config
        """What is learnt, and what becomes of what does not fit."""
        self._special = dict(special_texts(tokenizer) if special is None else special)
        self.template = template
        """The Jinja text."""
        self._template = Template(template, self._special)
        self._tokenizer = tokenizer
        self._encoder = MarkedEncoder(tokenizer)
        self._pointer = Pointer(
            self._encoder.guard, self._template.names, self._template.texts, self._encoder.special.search
        )
        self._ends: Ends | None = None
        probe = self._probe()
        if not self._template.has_blocks:
            self._ends = self._find_ends(probe)
        if probe:
            self.encode_turns(*self.read(probe)[:2])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides ids and masks beside the tokenizer."""
        parts = [self.template, self._special, DATE.isoformat(), RULES]
        if self.begin_with_user:
            parts.append("begin_with_user")
        if self.config != ChatConfig():
            parts.append(self.config.to_dict())
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of a record, beside the messages, that belong to a conversation: "tools", and all that the template
        reads."""
        return tuple(sorted({*FIELDS, BRANCHES, *LEARNT, *NOT_LEARNT, *self._template.variables}))

    def render(self, messages: Any, variables: Mapping[str, Any] | None = None) -> str:
        """Return the text of a conversation as the template writes it."""
        return self._given(*self.read(messages, variables)[:2])[0].text

    def encode(self, messages: Any, variables: Mapping[str, Any] | None = None) -> ChatTokens:
        """Return ids and mask of a conversation: {"role", "content"} or {"from", "value"} turns.

        Nothing is learnt in a conversation without an answer: its mask is all 0.

        Args:
            variables: of the template, such as `tools`.

        Raises:
            MessagesError: this conversation cannot be used, others may.
        """
        encoded = self.encode_record(messages, variables)
        if encoded.parts is not None:
            raise MessagesError("the conversation branches: `encode_record` has its parts")
        return ChatTokens(encoded.ids, encoded.mask)

    def encode_record(self, messages: Any, variables: Mapping[str, Any] | None = None) -> Encoded:
        """Return ids and mask of a conversation, and notes of what the template left out; see `encode`.

        Raises:
            MessagesError: `too_long: split` makes several of it.
        """
        encoded = self.encode_all(messages, variables)
        if len(encoded) > 1:
            raise MessagesError("the conversation is split: `encode_all` returns what it becomes")
        return encoded[0]

    def encode_all(self, messages: Any, variables: Mapping[str, Any] | None = None) -> list[Encoded]:
        """Return what a record becomes: one encoded conversation, or several where a long one is split.

        Raises:
            MessagesError: this conversation cannot be used, others may.
        """
        config, values = self.config, dict(variables or {})
        short = shortener(self._tokenizer, config.truncate_tool_results)
        if branches := branches_of(values):
            del values[BRANCHES]
            read = read_branches(self.read, self.rewritten, messages, branches, values)
            encoded = encode_branches(
                self._branches(read, short), max_tokens=config.max_tokens, too_long=config.too_long
            )
            values = read.conversations[0].values
            return [encoded[0]._replace(notes=self._of_record(values) + encoded[0].notes), *encoded[1:]]
        turns, values, notes = self.read(messages, values)
        turns, cut = shortened(turns, short)
        notes = sum(cut, notes + self._of_record(values))

        def encode(some: list[Message]) -> Encoded:
            return one_document(self._alone(self._samples(some, values)), TRUE_PREFIXES)

        encoded = [encode(turns)]
        if config.max_tokens is not None and len(encoded[0].ids) > config.max_tokens:
            encoded = fitted(
                turns, encode, max_tokens=config.max_tokens, too_long=config.too_long, whole=encoded[0]
            )
        encoded[0] = encoded[0]._replace(notes=notes + encoded[0].notes)
        return encoded

    def read(self, messages: Any, variables: Mapping[str, Any] | None = None) -> Stored:
        """Return a conversation in the one form that templates are given, whichever it is stored in.

        Raises:
            MessagesError: it is none.
        """
        stored = self.rewritten(messages, dict(variables or {}))
        values = dict(stored.values)
        turns = with_marks(as_messages(stored.turns), values, self._template)
        notes = stored.notes
        if self.begin_with_user and turns[0]["role"] != "user":
            turns = turns[1:]
            notes[WITHOUT_FIRST] += 1
            if not turns:
                raise MessagesError("nothing is left behind the first turn, which is not the user's")
        return Stored(turns, values, notes)

    def rewritten(self, turns: Any, values: Mapping[str, Any]) -> Stored:
        """Return turns, of a conversation or of a part of one, in that form as far as they can be read."""
        return rewritten(
            turns, values, names=self._template.names, replace_images=self.config.images == "replace"
        )

    def _of_record(self, values: Mapping[str, Any]) -> Counter[str]:
        """Return notes of what `read` left of the fields of a record."""
        found = {*LEARNT, *NOT_LEARNT} & variables_of(
            values, self._template
        ).keys() - self._template.variables
        return Counter({f"records with a `{name}` that says nothing of turns": 1 for name in found})

    def _samples(self, turns: list[Message], values: Mapping[str, Any]) -> list[Rendered]:
        """Return what a conversation is learnt as: one sample, or with true prefixes several, the longest first."""
        if not self.config.true_prefixes:
            return [self.rendered(turns, values)]
        answers = learnt_turns(turns, self.config.train_turns)
        return true_samples(self, turns, values, [n for n, turn in enumerate(answers) if turn.learnt])

    def _encoded(self, conversations: Sequence[Sequence[Rendered]]) -> list[list[Encoded]]:
        """Return ids and masks of the samples of conversations; what they begin with alike is tokenised once.

        Of notes they have what is said of a conversation as a whole.
        """
        flat = [sample for samples in conversations for sample in samples]
        tokens, again = self._encoder.encode_alike(flat, blocks=self._template.has_blocks)
        encoded = iter([Encoded(*each, Counter(sample.notes)) for each, sample in zip(tokens, flat)])
        made = [[next(encoded) for _ in samples] for samples in conversations]
        for samples in made:
            if not any(each.mask.any() for each in samples):
                samples[0].notes["conversations in which nothing is learnt"] += 1
        if again:
            made[0][0].notes[TOKENISED_WHOLE] += again
        return made

    def _alone(self, samples: Sequence[Rendered]) -> list[Encoded]:
        """Return ids, masks and all notes of the samples of one conversation."""
        (encoded,) = self._encoded([samples])
        return [
            each._replace(notes=sum(sample.of_turns, each.notes))
            for each, sample in zip(encoded, samples, strict=True)
        ]

    def _branches(self, read: ReadBranches, short: Short) -> list[Branch]:
        """Return branches as samples, with notes of what they share and of what is their own."""
        cut = [shortened(each.turns, short) for each in read.conversations]
        rendered = [
            self._samples(turns, each.values)
            for (turns, _), each in zip(cut, read.conversations, strict=True)
        ]
        made = []
        for number, samples in enumerate(self._encoded(rendered)):
            of_turns = [*map(add, cut[number][1], rendered[number][0].of_turns)]
            made.append(read.branch(number, samples, of_turns))
        return made

    def text(self, turns: list[Message], values: Mapping[str, Any], *, asked: bool = False) -> str:
        """Return the text of what `read` returned; `asked`: with what the template writes before the next answer."""
        given = self._given(turns, values)[0]
        return self._asked(given) if asked else given.text

    def ends_with_special(self, text: str) -> bool:
        """Return whether a text ends with a special token."""
        return any(
            match.end() == len(text) for match in self._encoder.special.finditer(text, max(0, len(text) - 64))
        )

    def apart(self, turns: list[Message], values: Mapping[str, Any]) -> str:
        """Return the text of turns whose last, an answer, stands behind what the template writes when the model is
        asked for it, where it writes something else once the answer is there.

        Raises:
            MessagesError: it is not known where the answer begins.
        """
        given, learnt = self._given(turns, values)
        return self._apart(given, self._read(given), learnt, turns[:-1], values)[0].replace(GUARD, "")

    def encode_turns(
        self, turns: list[Message], values: Mapping[str, Any], *, learn: Collection[int] | None = None
    ) -> Encoded:
        """Return ids and mask of what `read` returned; `learn`: see `rendered`."""
        return self._alone([self.rendered(turns, values, learn=learn)])[0]

    def rendered(
        self,
        turns: list[Message],
        values: Mapping[str, Any],
        *,
        learn: Collection[int] | None = None,
        apart: bool = False,
    ) -> Rendered:
        """Return the text of what `read` returned, and what is learnt of it.

        Args:
            learn: the turns to learn, of those that are to be learnt anyway. None: all of them.
            apart: of the text that `apart` returns.
        """
        given, learnt = self._given(turns, values)
        if learn is not None:
            before = len(given.messages) - len(turns)
            learnt = [
                turn._replace(learnt=turn.learnt and number - before in learn)
                for number, turn in enumerate(learnt)
            ]
        reading = self._read(given)
        if apart:
            text, spans, notes = self._apart(given, reading, learnt, turns[:-1], values)
        else:
            notes = check_written(given, reading, self._template, special=self._encoder.special)
            text, spans = reading.text, self._spans(reading, learnt)
        text, places = self._encoder.marked(text, [place for span in spans for place in span])
        # A system's turn that the record keeps beside its turns has no notes.
        of_turns = notes[len(given.messages) - len(turns) :]
        return Rendered(text, list(zip(places[0::2], places[1::2])), Counter(), of_turns)

    def _spans(self, reading: MarkedText, learnt: Sequence[Turn]) -> list[tuple[int, int]]:
        """Return what is learnt, as characters of the text."""
        if self._template.has_blocks:
            spans = block_spans(reading, learnt)
        else:
            assert self._ends is not None, "found on the probe"
            spans = answer_spans(reading, learnt, self._ends, self._encoder.special, self._pointer.tags)
        return (
            spans if self.config.train_thoughts else without_thoughts(spans, reading, self._encoder.special)
        )

    def _apart(
        self,
        given: Given,
        reading: MarkedText,
        learnt: Sequence[Turn],
        before: list[Message],
        values: Mapping[str, Any],
    ) -> tuple[str, list[tuple[int, int]], list[Counter[str]]]:
        """Return what `apart` does, with its guards, what is learnt of it, and what it leaves out; `given`, `reading`
        and `learnt` are those of all turns."""
        earlier = self._given(before, values)[0]
        prompt = earlier._replace(text=self._asked(earlier))
        asked = self._read(prompt, asked=True)
        # How an answer begins is written by the template, so no guard is in it.
        opening = prompt.text.removeprefix(earlier.text) if prompt.text.startswith(earlier.text) else ""
        last = [turn._replace(learnt=number == len(learnt) - 1) for number, turn in enumerate(learnt)]
        start = block_spans(reading, last)[0][0] if self._template.has_blocks else 0
        if not opening or not reading.text[:start].endswith(opening):
            raise MessagesError(
                f"the chat template does not begin turn {len(before)} (assistant) as when the model is asked for it",
                found=repr(prompt.text[-60:]),
            )
        special = self._encoder.special
        notes = check_written(prompt, asked, self._template, special=special)
        notes += check_written(given, reading, self._template, special=special, first=len(learnt) - 1)
        shift = len(asked.text) - start
        own = self._spans(reading, last) if learnt[-1].learnt else []
        spans = [*self._spans(asked, learnt[:-1]), *((first + shift, end + shift) for first, end in own)]
        return asked.text + reading.text[start:], spans, notes

    def _asked(self, given: Given) -> str:
        return self._template.render(given.messages, given.variables, add_generation_prompt=True)

    def _given(self, messages: list[Message], values: Mapping[str, Any]) -> tuple[Given, list[Turn]]:
        found = variables_of(values, self._template)
        turns = with_system(messages, found, self._template)
        return give(self._template, turns, found), learnt_turns(turns, self.config.train_turns)

    def _read(self, given: Given, *, asked: bool = False) -> MarkedText:
        return read_pointed(self._template, self._pointer, given, asked=asked)

    def _probe(self) -> tuple[Message, ...]:
        """Return the first probe that the template does not refuse; none where it has blocks and refuses all."""
        problem: MessagesError | None = None
        for probe in PROBES:
            try:
                self._template.render(probe)
            except MessagesError as error:
                problem = problem or error
            else:
                return probe
        assert problem is not None, "there are probes"
        # It may want tools or documents in every conversation.
        if self._template.has_blocks and "refuses" in str(problem):
            return ()
        raise problem

    def _find_ends(self, probe: Sequence[Message]) -> Ends:
        """Return what the template writes around answers, found on a conversation that every template can render."""
        given = Given(list(probe), {}, self._template.render(probe))
        reading = self._read(given)
        check_written(given, reading, self._template, special=self._encoder.special)
        found: set[str | None] = set()
        before = ""
        for number, turn in enumerate(probe):
            if turn["role"] != "assistant":
                continue
            own = [
                place
                for place, point in enumerate(reading.points)
                if reading.leaves[point.leaf].turn == number
            ]
            last, after = reading.points[own[-1]].place, own[-1] + 1
            limit = reading.points[after].place if after < len(reading.points) else len(reading.text)
            before = reading.text[reading.points[own[0] - 1].place : reading.points[own[0]].place]
            match = self._encoder.special.search(reading.text, last, limit)
            found.add(match.group() if match and not reading.text[last : match.start()].strip() else None)
        end = next(iter(found))
        # After an answer without an end of its own stands the BOS of the next turn.
        is_bos = end == self._special.get("bos_token") and end != self._special.get("eos_token")
        if len(found) > 1 or end is None or is_bos:
            raise DataError(
                "the chat template does not end every answer with the same special token of this tokenizer",
                found=", ".join(sorted("none" if each is None else repr(each) for each in found)),
                fix="choose the template made for this tokenizer, or one with {% generation %} blocks",
            )
        return Ends(end, self._opening(probe) or before.rpartition(end)[2].lstrip())

    def _opening(self, probe: Sequence[Message]) -> str:
        """Return the generation prompt of the template; "" where it writes none."""
        try:
            without = self._template.render(probe[:-1])
            prompted = self._template.render(probe[:-1], add_generation_prompt=True)
        except MessagesError:
            return ""
        return prompted.removeprefix(without).lstrip() if prompted.startswith(without) else ""


def load_chat_format(
    tokenizer: Tokenizer,
    template: str | Path | None = None,
    *,
    begin_with_user: bool = False,
    config: ChatConfig | None = None,
) -> ChatFormat:
    """Return a tokenizer's chat format.

    Args:
        template: None takes the tokenizer's own: `chat_template` in its tokenizer_config.json (one text, or
            named ones) or chat_template.jinja beside it. Else the name of one of these, a shipped name
            (`shipped_templates()`), or a Jinja file.
        begin_with_user, config: see `ChatFormat`.

    Raises:
        DataError: there is no such template, or it cannot be used; see `ChatFormat`.
    """
    name = None if template is None else str(template)
    text = find_template(tokenizer.path.parent, name)
    return ChatFormat(tokenizer, text, begin_with_user=begin_with_user, config=config)


def special_texts(tokenizer: Tokenizer) -> dict[str, str]:
    """Return bos_token, eos_token ... as the configs name them, else as the tokenizer knows them."""
    known = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    found = {name: tokenizer.decode([number]) for name, number in known.items() if number is not None}
    return found | (named_tokens(tokenizer.path.parent) or {})
