"""Training text with planted facts: the supervision from which a small model learns retrieval.

Real text in which facts are stated once and restated later. The digits of a first statement cannot be
predicted and carry no loss; the digits of a restatement can be read off the context and carry more loss than
ordinary tokens. The weights stand in the record as character spans and become the store's mask column.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from longspan.core.errors import DataError
from longspan.core.files import atomic_write
from longspan.core.seeds import rng as seeded_rng
from longspan.data.texts.facts import Fact, draw_facts, nearest_border

NO_LOSS = 0
MAX_DRAWS = 50
"""A long key may not fit a short document; another one is drawn, this often."""


class RecallTexts(NamedTuple):
    """What a training document with planted facts looks like.

    `min_facts`..`max_facts` facts are each restated `restated` times; with probability `far_bias` a
    restatement stands in the last and its fact in the first part of the text, so that far look-ups are
    not rare. `answer_weight` (0..255) is the loss weight of a restated digit beside 1 for ordinary text.
    """

    min_facts: int
    max_facts: int
    restated: int = 2
    far_bias: float = 0.0
    answer_weight: int = 4
    digits: int = 5


def recall_document(
    rng: np.random.Generator,
    filler: str,
    keys: Sequence[str],
    spec: RecallTexts,
    *,
    num_tokens: int,
    count_tokens: Callable[[str], int],
) -> dict[str, object]:
    """Build one document of at most `num_tokens` tokens from real text with planted, restated facts.

    `filler` has to be long enough; what is not needed is left out. Returns a record for jsonl: `text`,
    `loss_weights` = [[start, end, weight], ...] (characters) and `facts`.

    Raises:
        DataError: the facts alone do not fit, or the filler is too short.
    """
    for _ in range(MAX_DRAWS):
        facts = draw_facts(
            rng, keys, int(rng.integers(spec.min_facts, spec.max_facts + 1)), digits=spec.digits
        )
        places = _places(rng, len(facts), spec)
        budget = num_tokens - sum(count_tokens(f"\n{facts[index].sentence}\n") for index in places.order)
        if budget >= 0:
            break
    else:
        raise DataError(
            f"{spec.min_facts} facts, each restated {spec.restated} times, do not fit {num_tokens} tokens"
        )
    filler_chars = _cut(filler, budget, count_tokens)
    while True:
        text, weights = _compose(filler[:filler_chars], facts, places, spec)
        excess = count_tokens(text) - num_tokens
        if excess <= 0:
            break
        if filler_chars == 0:
            raise DataError(f"{len(facts)} facts do not fit into {num_tokens} tokens")
        filler_chars = max(0, filler_chars - 2 * excess - 1)
    return {"text": text, "loss_weights": weights, "facts": [list(fact) for fact in facts]}


class _Statements(NamedTuple):
    """Statements in text order: which fact, where in the filler (0..1), and whether it is the first one."""

    order: list[int]
    depths: list[float]
    first: list[bool]


def _places(rng: np.random.Generator, num_facts: int, spec: RecallTexts) -> _Statements:
    marks: list[tuple[float, int]] = []
    for fact in range(num_facts):
        depths = np.sort(rng.random(spec.restated + 1))
        if rng.random() < spec.far_bias:
            # The fact in the first 40 %, its restatements in the last 25 %.
            depths[0] *= 0.4
            depths[1:] = np.sort(0.75 + 0.25 * rng.random(spec.restated))
        marks += [(float(depth), fact) for depth in depths]
    marks.sort()
    seen: set[int] = set()
    first = []
    for _, fact in marks:
        first.append(fact not in seen)
        seen.add(fact)
    return _Statements([fact for _, fact in marks], [depth for depth, _ in marks], first)


def _cut(text: str, num_tokens: int, count_tokens: Callable[[str], int]) -> int:
    """Return how many characters of `text` make about `num_tokens` tokens (never more).

    Raises:
        DataError: the text holds fewer tokens than that.
    """
    low, high = 0, min(len(text), 12 * num_tokens + 16)
    if count_tokens(text[:high]) < num_tokens:
        raise DataError(
            f"the filler text is too short for {num_tokens} tokens", found=f"{len(text)} characters"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count_tokens(text[:middle]) <= num_tokens else (low, middle)
    return low


def _compose(
    filler: str, facts: list[Fact], places: _Statements, spec: RecallTexts
) -> tuple[str, list[list[int]]]:
    pieces: list[str] = []
    weights: list[list[int]] = []
    length = used = 0
    for index, depth, is_first in zip(places.order, places.depths, places.first):
        at = max(used, nearest_border(filler, round(depth * len(filler)), within=24))
        before = filler[used:at]
        # The text before a statement is filler, or the statement before it, which ends its own line.
        lead = "" if (before or "\n").endswith("\n") else "\n"
        fact = facts[index]
        start = length + len(before) + len(lead) + fact.value_span[0]
        weights.append([start, start + spec.digits, NO_LOSS if is_first else spec.answer_weight])
        piece = f"{before}{lead}{fact.sentence}\n"
        pieces.append(piece)
        length += len(piece)
        used = at
    pieces.append(filler[used:])
    return "".join(pieces), weights


class RecallSet(NamedTuple):
    """`num_documents` documents of `num_tokens` tokens, or of a length drawn from (low, high)."""

    source: str
    num_documents: int
    num_tokens: int | tuple[int, int]
    spec: RecallTexts


def write_recall_corpus(
    out: Path,
    texts: Sequence[str],
    keys: Sequence[str],
    sets: Sequence[RecallSet],
    *,
    count_tokens: Callable[[str], int],
    seed: int,
) -> None:
    """Write the documents of all sets to the jsonl file `out`, atomically.

    The filler of a document starts at a line border of a text drawn by length, so every character of `texts`
    is equally likely to be used.
    """
    sizes = np.array([len(text) for text in texts], dtype=np.float64)
    with atomic_write(out, "w") as file:
        for recall_set in sets:
            for number in range(recall_set.num_documents):
                rng = seeded_rng(seed, "recall", recall_set.source, number)
                wanted = recall_set.num_tokens
                num_tokens = (
                    wanted if isinstance(wanted, int) else int(rng.integers(wanted[0], wanted[1] + 1))
                )
                filler = _filler(rng, texts, sizes, num_tokens)
                record = recall_document(
                    rng, filler, keys, recall_set.spec, num_tokens=num_tokens, count_tokens=count_tokens
                )
                record["source"] = recall_set.source
                file.write(json.dumps(record) + "\n")


def _filler(rng: np.random.Generator, texts: Sequence[str], sizes: np.ndarray, num_tokens: int) -> str:
    """Return a window of one text, long enough for any tokenizer with under 12 characters a token."""
    need = 12 * num_tokens + 16
    enough = np.where(sizes >= need, sizes, 0.0)
    if not enough.any():
        raise DataError(
            f"no text is long enough to fill {num_tokens} tokens", found=f"longest: {int(sizes.max())}"
        )
    text = texts[int(rng.choice(len(texts), p=enough / enough.sum()))]
    start = nearest_border(text, int(rng.integers(0, len(text) - need + 1)))
    return text[min(start, len(text) - need) :][:need]
