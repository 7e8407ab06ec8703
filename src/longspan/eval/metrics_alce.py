"""ALCE's metrics as HELMET has them (Gao et al. 2023): answers in sentences (ASQA) or as a list (QAMPARI).

All but those of the citations themselves (`eval.citations`), which take a model that judges. Citations are taken out of
an output first. What an answer has to hold stands in the sample's `alternatives`: a list for each part of the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

from longspan.core.errors import DataError
from longspan.eval.metrics import rouge_l_sum
from longspan.eval.metrics_helmet import normalised

_TOP = 5
"""Right answers of a list that are as good as all of them."""
SHORTEST = 5
"""Characters of a sentence; what is shorter ("1.") is none."""


class ListScores(NamedTuple):
    """How right a list of answers is."""

    precision: float
    recall: float
    recall_top5: float
    """As if five answers were wanted where there are more."""

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall."""
        return _harmonic(self.precision, self.recall)

    @property
    def f1_top5(self) -> float:
        """The same with `recall_top5`."""
        return _harmonic(self.precision, self.recall_top5)


def one_line(output: str) -> str:
    """Return an output as it is scored: without line breaks and marks of a chat."""
    return re.sub(r"\n+", " ", output).replace("<|im_end|>", "")


def without_citations(text: str) -> str:
    """Return a text without marks such as [3] and [1][2]."""
    return re.sub(r" ?\[\d+", "", text).replace(" |", "").replace("]", "")


def parts_found(output: str, alternatives: Sequence[Sequence[str]]) -> float:
    """Return the share of an answer's parts of which the output holds one form (STR-EM)."""
    text = normalised(without_citations(one_line(output)))
    return sum(any(normalised(each) in text for each in part) for part in alternatives) / len(alternatives)


def all_parts_found(output: str, alternatives: Sequence[Sequence[str]]) -> float:
    """Return 1.0 where the output holds every part (STR-EM hit)."""
    return float(parts_found(output, alternatives) == 1.0)


def list_scores(output: str, alternatives: Sequence[Sequence[str]]) -> ListScores:
    """Return how right the output is as a list parted by commas."""
    given = [name for each in listed(without_citations(one_line(output))) if (name := normalised(each))]
    wanted = [{normalised(each) for each in part} for part in alternatives]
    known = set().union(*wanted)
    found = sum(not part.isdisjoint(given) for part in wanted)
    return ListScores(
        sum(each in known for each in given) / len(given) if given else 0.0,
        found / len(wanted),
        min(_TOP, found) / min(_TOP, len(wanted)),
    )


def listed(output: str) -> list[str]:
    """Return the members of a list as they stand between commas; the end of the text is no member."""
    return [each.strip() for each in output.rstrip().rstrip(".").rstrip(",").split(",")]


def rouge_l_sum_of(expected: str, output: str) -> float:
    """Return ROUGE-Lsum by sentences, stemmed. Raises DataError: what parts sentences is not there."""
    wanted, given = (
        "\n".join(sentences(each.lower())) for each in (expected, without_citations(one_line(output)))
    )
    return rouge_l_sum(wanted, given, stemmed=True)


def sentences(text: str) -> list[str]:
    """Return the sentences of an English text as NLTK's Punkt parts it. Raises DataError: its model is not there."""
    found: list[str] = splitter()(text)
    return found


@cache
def splitter() -> Callable[[str], list[str]]:
    """Return what parts sentences. Raises DataError: NLTK's data for it are not there."""
    from nltk.tokenize.punkt import PunktTokenizer  # a second to import

    try:
        found: Callable[[str], list[str]] = PunktTokenizer("english").tokenize
    except LookupError:
        raise DataError(
            "what parts sentences is not there",
            found="no tokenizers/punkt_tab/english in any of NLTK's folders",
            fix="python -m nltk.downloader punkt_tab, or name a folder that holds it in NLTK_DATA",
        ) from None
    return found


def _harmonic(one: float, two: float) -> float:
    return 2 * one * two / (one + two) if one + two else 0.0
