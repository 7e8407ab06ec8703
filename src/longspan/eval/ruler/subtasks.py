"""The thirteen tasks of RULER as its paper and its published configuration define them.

niah_*  needles `One of the special magic numbers for brisk-lantern is: 4821377.` in a haystack
vt      variable tracking: a value handed on from variable to variable, in noise
cwe     common words: ten words stand 30 times in a list, others 3 times
fwe     frequent words: coded words whose counts fall as rank**-2; which three are most frequent
qa_*    a question on one of many documents
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Haystack = Literal["noise", "essay", "needle"]
Secret = Literal["words", "numbers", "uuids"]
Release = Literal["2024", "2025"]
"""Which of RULER's published generators: that of the paper and of most published numbers (2024, to January 2025), or
that of June 2025. They differ in variable tracking, common and frequent words; see docs/evaluation.md."""


class Subtask(NamedTuple):
    """One task."""

    name: str
    kind: Literal["niah", "vt", "cwe", "fwe", "qa"]
    answer_tokens: int
    """Room for the answer, part of the stated length."""
    metric: str = "string_match_all"
    haystack: Haystack = "noise"
    key: Secret = "words"
    value: Secret = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    @property
    def shares_start(self) -> bool:
        """Whether samples of one length begin alike."""
        return self.kind == "niah" and self.haystack != "needle"


SUBTASKS: dict[str, Subtask] = {
    subtask.name: subtask
    for subtask in (
        Subtask("niah_single_1", "niah", 128, haystack="noise"),
        Subtask("niah_single_2", "niah", 128, haystack="essay"),
        Subtask("niah_single_3", "niah", 128, haystack="essay", value="uuids"),
        Subtask("niah_multikey_1", "niah", 128, haystack="essay", num_keys=4),
        Subtask("niah_multikey_2", "niah", 128, haystack="needle"),
        Subtask("niah_multikey_3", "niah", 128, haystack="needle", key="uuids", value="uuids"),
        Subtask("niah_multivalue", "niah", 128, haystack="essay", num_values=4),
        Subtask("niah_multiquery", "niah", 128, haystack="essay", num_keys=4, num_queries=4),
        Subtask("vt", "vt", 30),
        Subtask("cwe", "cwe", 120),
        Subtask("fwe", "fwe", 50),
        Subtask("qa_1", "qa", 32, metric="string_match_part"),
        Subtask("qa_2", "qa", 32, metric="string_match_part"),
    )
}
"""By name, in the order of the paper's tables."""
