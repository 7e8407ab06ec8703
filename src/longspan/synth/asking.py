"""What is asked about documents, and the replies in the order of the documents, whatever order they come in.

Replies are recorded by the client, so a killed job asks again through the same calls and gets them from there; what is
written from them is made anew and is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from longspan.api import ChatRequest, ChatResult, Client
from longspan.core.errors import RunError
from longspan.data.tokenizer import Tokenizer
from longspan.synth.config import SetConfig
from longspan.synth.items import Item, Shown, spans_of
from longspan.synth.sections import Span, spread_groups
from longspan.synth.templates import PromptTemplate, load_prompt

_T = TypeVar("_T")
SHORT_SECTION = 8
"""The last section is not asked about if it has fewer characters than this part of the longest."""
CLOSED_BOOK_PROMPT = "closed_book_v1"
CLOSED_BOOK_TOKENS = 64
"""Of a closed-book answer, beyond those of the expected one."""
_CONTEXT_SHARE = 0.9
"""Of a sample, about what its questions leave to the document."""
_CHAT_TOKENS = 16
"""What a server's chat template may add around a prompt."""


class Group(NamedTuple, Generic[_T]):
    """Requests that belong together, about one document."""

    about: _T
    requests: Sequence[ChatRequest]


class Answered(NamedTuple, Generic[_T]):
    """A group with the result of each of its requests."""

    about: _T
    results: Sequence[ChatResult]


class _Open(Generic[_T]):
    def __init__(self, group: Group[_T]) -> None:
        self.about, self.left = group.about, len(group.requests)
        self.results: dict[int, ChatResult] = {}


def ask_groups(
    client: Client, groups: Iterable[Group[_T]], on_result: Callable[[], None]
) -> Iterator[Answered[_T]]:
    """Ask all requests and yield the groups in their order; `on_result` is called after every result.

    Held in memory are the groups under way and the answered ones that wait for one before them.

    Raises:
        UserError: as `Client.complete`.
        RunError: the same; also after the last whole group, if the budget has stopped the client.
    """
    under_way: dict[int, _Open[_T]] = {}
    next_out = 0

    def requests() -> Iterator[tuple[tuple[int, int], ChatRequest]]:
        for number, group in enumerate(groups):
            under_way[number] = _Open(group)
            for place, request in enumerate(group.requests):
                yield (number, place), request

    for (number, place), result in client.complete(requests()):
        group = under_way[number]
        group.results[place] = result
        group.left -= 1
        on_result()
        while next_out in under_way and under_way[next_out].left == 0:
            yield _finished(under_way.pop(next_out))
            next_out += 1
    stopped = client.report().stopped
    if stopped is not None:
        raise RunError(
            f"not all was asked: {stopped} is reached",
            found=client.report().describe(),
            fix="raise it and run the same command again: recorded answers are not asked for again",
        )
    # The last groups may have no requests at all.
    for number in sorted(under_way):
        yield _finished(under_way[number])


def _finished(group: _Open[_T]) -> Answered[_T]:
    return Answered(group.about, [group.results[place] for place in range(len(group.results))])


class Asker:
    """Writes the requests of one set.

    Args:
        length: tokens of a sample: of a longer document, sections are asked about that one sample can hold.
    """

    def __init__(self, spec: SetConfig, tokenizer: Tokenizer, *, length: int) -> None:
        self.spec, self._tokenizer, self._length = spec, tokenizer, length
        self.reach = max(1, round(_CONTEXT_SHARE * length / spec.section_tokens))
        """Sections that a sample can hold."""
        self.template = spec.template()
        self._closed_book = load_prompt(CLOSED_BOOK_PROMPT)

    def shown(self, document: Mapping[str, Any]) -> list[Shown]:
        """Return what each request about a document shows of it."""
        text, spans = document["text"], spans_of(document)
        if self.spec.kind in ("biography", "research_questions"):
            return [Shown(text, (Span(0, len(text)),), ())]
        longest = max(span.end - span.start for span in spans)
        usable = [
            number for number, span in enumerate(spans) if (span.end - span.start) * SHORT_SECTION >= longest
        ]
        usable = self._within_reach(document, usable)
        if self.spec.kind == "one_detail":
            return [Shown(text, (spans[number],), (number,)) for number in usable]
        size, groups = self.spec.sections_per_request, self.spec.requests_per_document or 1
        chosen = spread_groups(len(usable), size, groups) if len(usable) >= 2 else []
        members = [tuple(usable[place] for place in group) for group in chosen]
        return [Shown(text, tuple(spans[each] for each in group), group) for group in members]

    def _within_reach(self, document: Mapping[str, Any], usable: list[int]) -> list[int]:
        """Return neighbouring sections that fit a sample together, beginning anywhere in a longer document."""
        if document["tokens"] <= self._length or len(usable) <= self.reach:
            return usable
        start = int(document["id"], 16) % (len(usable) - self.reach + 1)
        return usable[start : start + self.reach]

    def request(self, shown: Shown) -> ChatRequest:
        """Return the request that shows these sections."""
        texts = [span.of(shown.text).strip("\n") for span in shown.spans]
        if self.spec.kind == "multi_detail":
            texts = [f"[Passage {number}]\n{text}" for number, text in enumerate(texts, 1)]
        values: dict[str, object] = {
            "about": self.spec.about,
            "text": "\n\n".join(texts),
            "count": len(self.spec.fixed_questions) or self.spec.questions,
            "sections": len(texts),
            "questions": "\n".join(
                f"{number}. {question}" for number, question in enumerate(self.spec.fixed_questions, 1)
            ),
        }
        return self._chat(self.template, values, self.spec.answer_tokens)

    def closed_book(self, item: Item) -> ChatRequest:
        """Return the request that asks a question without its document."""
        room = CLOSED_BOOK_TOKENS + len(self._tokenizer.encode(item.answer))
        return self._chat(self._closed_book, {"question": item.question}, room)

    def _chat(self, template: PromptTemplate, values: Mapping[str, object], max_tokens: int) -> ChatRequest:
        prompt = template.render(**values)
        return ChatRequest(
            messages=({"role": "user", "content": prompt},),
            max_tokens=max_tokens,
            # The student's tokenizer counts for the server's: near enough for limits and windows.
            prompt_tokens=len(self._tokenizer.encode(prompt)) + _CHAT_TOKENS,
        )
