"""HELMET's metrics, from what its published scoring says; 0..1 for one output.

An output is scored as it is and once more as what follows its label ("Answer: Paris\\n..." is "Paris"), and the
better counts. A prompt that ends with the label is continued by the answer, so the label is put before the
output first; otherwise a later "Answer:" of an output that goes on with questions of its own would count.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longspan.eval.metrics import f_measure

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CLOSED = ("yes", "no", "noanswer")

Metric = Callable[[str, str], float]


def exact_match(expected: str, output: str) -> float:
    """Return 1.0 when both texts are the same without case, punctuation, articles and extra spaces."""
    return float(normalised(expected) == normalised(output))


def substring_exact_match(expected: str, output: str) -> float:
    """Return 1.0 when the expected text stands in the output, both as in `exact_match`."""
    return float(normalised(expected) in normalised(output))


def f1(expected: str, output: str) -> float:
    """Return the F1 of the words that both texts hold; yes and no are right as a whole or not at all."""
    left, right = normalised(expected), normalised(output)
    if left != right and (left in _CLOSED or right in _CLOSED):
        return 0.0
    words = left.split(), right.split()
    return f_measure((Counter(words[0]) & Counter(words[1])).total(), len(words[0]), len(words[1]))


def after_label(output: str, label: str) -> str:
    """Return the rest of the first line that holds the label, else the first line of the output."""
    found = re.search(f"{re.escape(label)}(.*)", output, re.IGNORECASE) or re.search("(.*)", output)
    assert found is not None  # the empty text matches
    # A chat's answer may repeat the label.
    return re.sub(f"^{re.escape(label)}", "", found.group(1).strip(), flags=re.IGNORECASE).strip()


def whole_answer(output: str, fields: Mapping[str, Any]) -> str:
    """Return an output behind what its prompt ends with, `label_in_prompt` of the fields: as published it is a part."""
    return f"{fields.get('label_in_prompt') or ''}{output}"


def best_of_both(
    metric: Metric, expected: Sequence[str], output: str, fields: Mapping[str, Any], *, parsed_only: bool
) -> float:
    """Return the best score over the expected texts, of the output and of what follows its label.

    `fields` may hold `label` ("Answer:" where it does not).
    """
    whole = whole_answer(output, fields)
    texts = [after_label(whole, fields.get("label") or "Answer:")]
    if not parsed_only:
        texts.append(whole)
    return max(metric(each, text) for each in expected for text in texts)


def choice(expected: Sequence[str], output: str, fields: Mapping[str, Any]) -> float:
    """Return 1.0 when the letter is given, or the option ("B. Bath") stands in the output."""
    if expected[-1].lower() in output.lower():
        return 1.0
    return best_of_both(exact_match, expected, output, fields, parsed_only=False)


def normalised(text: str) -> str:
    """Return a text in lower case without punctuation, articles and extra spaces."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def ndcg_10(expected: Sequence[str], output: str, fields: Mapping[str, Any]) -> float:
    """Return NDCG at 10 of the ranking in an output, as trec_eval has it: gains as they are, log2 discounts.

    A ranking is the longest run of `3 > 1 > 2`; brackets, colons and "ID" are no part of it. `fields` holds `relevant`,
    the labels above 0 by ID.
    """
    labels: Mapping[str, int] = fields.get("relevant") or {}
    plain = re.sub(r"[\[\]:]", "", output).lower().replace("id", "")
    runs = [found.group(0) for found in re.finditer(r"(\d+)(?:\s*>\s*(\d+))*", plain)]
    ids = dict.fromkeys(number.strip() for number in max(runs, key=len, default="").split(">"))
    gained = _discounted([labels.get(id_, 0) for id_ in ids])
    best = _discounted(sorted(labels.values(), reverse=True))
    return gained / best if best else 0.0


def _discounted(gains: Sequence[int]) -> float:
    return sum(gain / math.log2(place + 2) for place, gain in enumerate(gains[:10]))
