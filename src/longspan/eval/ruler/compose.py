"""Composing RULER's samples: each is a function of a generator and of how many units its context has.

Units are sentences of essays, lines of noise or needles, words, documents. The wordings are the published ones:
other words would give scores that cannot be compared.
"""

from __future__ import annotations

import re
import string
import uuid
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from longspan.core.errors import DataError
from longspan.data.texts.sentences import has_own_stops, parted
from longspan.eval.ruler.qa_documents import QaData
from longspan.eval.ruler.subtasks import SUBTASKS, Release, Secret, Subtask
from longspan.eval.word_lists import draw_compounds, word_list

GENERATOR_VERSION = 3
"""Raised whenever the same settings would compose another sample."""
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NUM_DEPTHS = 40
HOPS = 4
COMMON_WORDS = 10
SHORT_LIST_LENGTH = 4096
CODED_WORD_LETTERS = 6
EXAMPLE_TOKENS = 500

_NIAH_SEVERAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the "
    "provided text?"
)
_NIAH_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the {kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the "
    "provided text?"
)
_NIAH_ANSWER = " The special magic {kind} for {query} mentioned in the provided text {verb}"
_VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
_VT_ANSWER = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are "
    "{assigned} the value {value}, they are:"
)
_VT_ASSIGNED: dict[Release, str] = {"2024": "assgined", "2025": "assigned"}  # each spelt as published
_CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
    "that appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
_CWE_ANSWER = " Answer: The top 10 words that appear most often in the list are:"
_FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
    "appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
_FWE_ANSWER = " Answer: According to the coded text above, the three most frequently appeared words are:"
_QA = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other "
    "words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question based on the given "
    "documents. Only give me the answer and do not output any other words.\n\nQuestion: {query}"
)
_QA_ANSWER = " Answer:"
_SENTENCE_END = re.compile(r"(?<=[.!?]) (?=[^a-z ])")
_LONGEST_SENTENCE = 2000
"""Characters; what is longer is text without full stops, and is parted."""


class Draft(NamedTuple):
    """A composed sample."""

    prompt: str
    answer_prefix: str
    """How the answer begins; the model goes on from there."""
    answers: list[str]
    question: str


def sentences_of(text: str) -> list[str]:
    """Return the sentences of a text, each with the space behind it, white space between words as one space.

    Ordinary English is parted behind `.`, `!` and `?`, in the place of RULER's splitter. Where full stops are others,
    need no space behind them or are far apart (tables, lists) a text would be one sentence, and all depths its ends:
    there the rules of `data.sentences` part it further.
    """
    found = []
    for sentence in _SENTENCE_END.split(" ".join(text.split())):
        if len(sentence) > _LONGEST_SENTENCE or has_own_stops(sentence):
            found += parted(f"{sentence} ", most=_LONGEST_SENTENCE // 4)
        else:
            found.append(f"{sentence} ")
    return found


def niah(subtask: Subtask, sentences: Sequence[str], generator: np.random.Generator, units: int) -> Draft:
    """Compose needles in a haystack of so many sentences (essay) or lines (noise, other needles)."""
    keys = _secrets(subtask.key, subtask.num_keys, generator)
    values = _secrets(subtask.value, subtask.num_keys * subtask.num_values, generator)
    owners = np.repeat(np.arange(subtask.num_keys), subtask.num_values)
    needles = [NEEDLE.format(kind=subtask.value, key=keys[k], value=v) for k, v in zip(owners, values)]
    needles = [needles[index] for index in generator.permutation(len(needles))]
    if subtask.haystack == "essay":
        context = _in_essay(needles, sentences, generator, units)
    else:
        lines = [NOISE] * units
        if subtask.haystack == "needle":
            lines = _other_needles(subtask, generator, units, taken={*keys, *values})
        places = generator.choice(units + 1, size=len(needles), replace=units < len(needles))
        for place, needle in sorted(zip(places.tolist(), needles), reverse=True):
            lines.insert(place, needle)
        context = "\n".join(lines)
    asked = generator.choice(subtask.num_keys, size=subtask.num_queries, replace=False).tolist()
    answers = [value for key in asked for owner, value in zip(owners, values) if owner == key]
    queries = [keys[key] for key in asked]
    query = ", ".join(queries[:-1]) + ", and " + queries[-1] if len(queries) > 1 else queries[0]
    one = len(answers) == 1
    kind = subtask.value[:-1] if one else subtask.value
    prompt = (_NIAH_ONE if one else _NIAH_SEVERAL).format(kind=kind, context=context, query=query)
    prefix = _NIAH_ANSWER.format(kind=kind, query=query, verb="is" if one else "are")
    return Draft(prompt, prefix, answers, prompt.rpartition("\n")[2])


def variable_tracking(
    generator: np.random.Generator, units: int, example: int, release: Release = "2024"
) -> Draft:
    """Compose a chain of assignments in so many lines of noise, after an example with `example` lines."""
    solved = variable_example(generator, example, release)
    asked = _chain(generator, units, letters=5, release=release)
    return asked._replace(prompt=solved + asked.prompt)


def variable_example(generator: np.random.Generator, units: int, release: Release = "2024") -> str:
    """Return the solved example of `variable_tracking`."""
    shown = _chain(generator, units, letters=3, release=release)
    lines = "\n" * (4 if release == "2024" else 2)
    return f"{shown.prompt}{shown.answer_prefix} {' '.join(shown.answers)}{lines}"


def common_words(generator: np.random.Generator, units: int, length: int, release: Release = "2024") -> Draft:
    """Compose a list with so many different words, ten of them common, after an example."""
    short = length < SHORT_LIST_LENGTH
    shown = _word_list(generator, *((20, 3, 1) if short else (40, 10, 3)))
    asked = _word_list(generator, units, *((6, 1) if short else (30, 3)))
    numbered = " ".join(f"{number}. {word}" for number, word in enumerate(shown.answers, 1))
    space = "" if release == "2024" else " "
    return asked._replace(prompt=f"{shown.prompt}{shown.answer_prefix}{space}{numbered}\n{asked.prompt}")


def frequent_words(
    generator: np.random.Generator, units: int, length: int, release: Release = "2024"
) -> Draft:
    """Compose a coded text of about so many words: rank k stands units * k**-2 / zeta(2) times.

    The most frequent one is written as dots and does not count; the three after it are the answer.
    """
    room = length if release == "2024" else length - SUBTASKS["fwe"].answer_tokens
    vocabulary = _distinct(
        lambda size: _letters(generator, size, CODED_WORD_LETTERS, string.ascii_lowercase), max(5, room // 50)
    )
    ranks = np.arange(1, len(vocabulary) + 1)
    counts = (units * ranks**-2.0 / (np.pi**2 / 6)).astype(int)
    # With few words rounding can make ranks equal, and then no three are the most frequent.
    if not counts[3] > counts[4] or counts[3] < 1:
        counts[1:4] += 1
    words = np.repeat(np.array(["...", *vocabulary[1:]], dtype=object), counts)
    generator.shuffle(words)
    prompt = _FWE.format(context=" ".join(words.tolist()))
    return Draft(prompt, _FWE_ANSWER, vocabulary[1:4], prompt.rpartition("\n")[2])


def question_answering(data: QaData, sample: int, generator: np.random.Generator, units: int) -> Draft:
    """Compose question number `sample` with so many documents: those it needs, and others.

    Others of the same article come first, then any; where there are too few they come again.
    """
    if sample >= len(data.questions):
        raise DataError(f"the QA data has no question {sample}", found=f"{len(data.questions)} questions")
    question = data.questions[sample]
    order = distractors(data, sample, generator)
    chosen = [order[place % len(order)] for place in range(max(units, len(question.needed)))]
    parts = [
        f"Document {number}:\n{data.documents[chosen[index]]}"
        for number, index in enumerate(generator.permutation(len(chosen)).tolist(), 1)
    ]
    prompt = _QA.format(context="\n\n".join(parts), query=question.text)
    return Draft(prompt, _QA_ANSWER, list(question.answers), question.text)


def empty_question(data: QaData, sample: int) -> str:
    """Return the prompt of a question without documents."""
    return _QA.format(context="", query=data.questions[sample].text) + _QA_ANSWER


def distractors(data: QaData, sample: int, generator: np.random.Generator) -> list[int]:
    """Return all documents in the order in which a sample takes them up: needed, related, others."""
    question = data.questions[sample]
    related = [question.related[index] for index in generator.permutation(len(question.related)).tolist()]
    known = {*question.needed, *related}
    others = [index for index in generator.permutation(len(data.documents)).tolist() if index not in known]
    return [*question.needed, *related, *others]


def _in_essay(
    needles: Sequence[str], sentences: Sequence[str], generator: np.random.Generator, units: int
) -> str:
    """Put needles at different ones of 40 even depths into the first sentences, repeated if there are fewer."""
    depths = generator.choice(NUM_DEPTHS, size=len(needles), replace=False)
    places = sorted((units * depths // (NUM_DEPTHS - 1)).tolist())
    whole, rest = divmod(units, len(sentences))
    hay = [*sentences] * whole + [*sentences[:rest]]
    parts: list[str] = []
    for start, end, needle in zip([0, *places], places, needles):
        parts += ["".join(hay[start:end]).rstrip(), needle]
    parts.append("".join(hay[places[-1] :]).rstrip())
    return " ".join(filter(None, parts))


def _other_needles(
    subtask: Subtask, generator: np.random.Generator, count: int, *, taken: set[str]
) -> list[str]:
    """Return needles with other keys and values than those asked for."""
    keys = [key for key in _secrets(subtask.key, count + len(taken), generator) if key not in taken]
    values = [value for value in _secrets(subtask.value, count + len(taken), generator) if value not in taken]
    return [
        NEEDLE.format(kind=subtask.value, key=key, value=value)
        for key, value in zip(keys[:count], values[:count])
    ]


def _secrets(kind: Secret, count: int, generator: np.random.Generator) -> list[str]:
    """Draw different words, numbers of seven digits, or UUIDs."""
    if kind == "words":
        return draw_compounds(generator, count)
    if kind == "numbers":
        numbers = generator.choice(9_000_000, size=count, replace=False, shuffle=False) + 1_000_000
        return [str(number) for number in numbers.tolist()]
    random = generator.bytes(16 * count)
    return [str(uuid.UUID(bytes=random[16 * i : 16 * i + 16], version=4)) for i in range(count)]


def _chain(generator: np.random.Generator, units: int, *, letters: int, release: Release) -> Draft:
    names = _distinct(lambda count: _letters(generator, count, letters, string.ascii_uppercase), HOPS + 1)
    value = str(generator.integers(10_000, 100_000))
    steps = [f"VAR {names[0]} = {value}"]
    steps += [f"VAR {new} = VAR {old} " for old, new in pairwise(names)]
    sentences = [f"{NOISE}\n"] * units
    if units <= len(steps):
        sentences = [f"{part.strip()}." for part in NOISE.rstrip(".").split(".")] * units
    places = np.sort(generator.choice(len(sentences), size=len(steps), replace=False)).tolist()
    for moved, (place, step) in enumerate(zip(places, steps)):
        sentences.insert(place + moved, step)
    if release == "2024":
        context = " ".join(sentences).replace(". \n", ".\n")
    else:
        context = "\n".join(sentence.removesuffix("\n") for sentence in sentences)
    prompt = _VT.format(context=context, value=value)
    prefix = _VT_ANSWER.format(count=len(names), value=value, assigned=_VT_ASSIGNED[release])
    return Draft(prompt, prefix, names, prompt.rpartition("\n")[2])


def _word_list(generator: np.random.Generator, different: int, common: int, uncommon: int) -> Draft:
    singles = [*word_list("nouns"), *word_list("adjectives"), *word_list("verbs")]
    if different <= len(singles):
        words = [singles[index] for index in generator.choice(len(singles), size=different, replace=False)]
    else:
        # The ten are of the same kind as most others, or their form would give them away.
        words = draw_compounds(generator, different)
        words = [words[index] for index in generator.permutation(different).tolist()]
    times = np.full(different, uncommon)
    times[:COMMON_WORDS] = common
    order = generator.permutation(np.repeat(np.arange(different), times)).tolist()
    context = " ".join(f"{number}. {words[index]}" for number, index in enumerate(order, 1))
    prompt = _CWE.format(context=context)
    return Draft(prompt, _CWE_ANSWER, words[:COMMON_WORDS], prompt.rpartition("\n")[2])


def _letters(generator: np.random.Generator, count: int, length: int, alphabet: str) -> list[str]:
    codes = np.frombuffer(alphabet.encode(), np.uint8)[
        generator.integers(len(alphabet), size=(count, length))
    ]
    return codes.view(f"S{length}").ravel().astype(str).tolist()


def _distinct(draw: Callable[[int], list[str]], count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found.update(dict.fromkeys(draw(count - len(found))))
    return list(found)
