"""Scorers: pure functions of the expected and the given text, named and versioned.

The name and version stand in every records file, so a changed rule never mixes with older scores, and
records can be scored again from their texts without running a model.

    scorer_named("rouge_1").score("a sunny day", "It was sunny.")        one expected text
    scorer_named("qa_f1").score(["Paris", "the capital"], output)        the best over several
    scorer_named("string_match_all").score(["48213", "77102"], output)   the share of the parts that are found
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from longspan.core.errors import ArgumentError
from longspan.eval import metrics
from longspan.eval import metrics_helmet as helmet
from longspan.eval import metrics_infinitebench as infinitebench
from longspan.eval import metrics_longbench as longbench

Rule = Callable[[Sequence[str], str, Mapping[str, Any]], float]
"""Expected texts (at least one), output, fields of the sample -> 0..1."""
_NO_FIELDS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Scorer:
    """A scoring rule; a perfect output scores 1."""

    name: str
    version: int
    rule: Rule

    def score(
        self, expected: str | Sequence[str], output: str, fields: Mapping[str, Any] = _NO_FIELDS
    ) -> float:
        """Return 0..1 for an output.

        `fields` is what else is recorded of the sample; some rules need it (`classification...`: `all_classes`,
        `by_metric`: `metric` and, if given, `postprocess`).

        Raises:
            ArgumentError: nothing is expected, what is expected is not of the rule's kind (no number, say), or
                a field that the rule needs is missing.
            MissingDependencyError: the rule needs a package that is not installed.
        """
        several = [expected] if isinstance(expected, str) else list(expected)
        if not several:
            raise ArgumentError(f"scorer {self.name}: no expected answer is given")
        try:
            return self.rule(several, output, fields)
        except ValueError as error:
            raise ArgumentError(
                f"scorer {self.name} is not for answers like these", found=f"{several[:4]} ({error})"
            ) from None


def _best(metric: Callable[[str, str], float]) -> Rule:
    return lambda expected, output, fields: max(metric(each, output) for each in expected)


def _share(metric: Callable[[str, str], float]) -> Rule:
    return lambda expected, output, fields: sum(metric(each, output) for each in expected) / len(expected)


def _all(metric: Callable[[Sequence[str], str], float]) -> Rule:
    return lambda expected, output, fields: metric(expected, output)


def _labelled(metric: Callable[[str, str], float], *, parsed_only: bool = False) -> Rule:
    return partial(helmet.best_of_both, metric, parsed_only=parsed_only)


def _of_classes(name: str, metric: Callable[[str, str, Sequence[str]], float]) -> Scorer:
    def rule(expected: Sequence[str], output: str, fields: Mapping[str, Any]) -> float:
        classes = _field(fields, "all_classes", scorer=name)
        return max(metric(each, output.strip(), classes) for each in expected)

    return Scorer(name, 1, rule)


def _similar(metric: Callable[[str, str], float]) -> Rule:
    return _best(lambda expected, output: metric(expected, output.strip()))


def _by_metric(expected: Sequence[str], output: str, fields: Mapping[str, Any]) -> float:
    if fields.get("postprocess") == "first_line":
        output = longbench.first_line(output)
    return scorer_named(_field(fields, "metric", scorer="by_metric")).score(expected, output, fields)


def _word_recall_choice(expected: Sequence[str], output: str, fields: Mapping[str, Any]) -> float:
    options = _field(fields, "options", scorer="word_recall_choice")
    letter = "ABCD".find(output[:1].upper()) if output else -1
    if 0 <= letter < len(options):
        output = f"{output} {options[letter]}"
    return max(metrics.word_recall_spaced(each, output) for each in expected)


def _field(fields: Mapping[str, Any], name: str, *, scorer: str) -> Any:
    if not fields.get(name):
        raise ArgumentError(f"scorer {scorer} needs the field {name!r} of a sample, which has none")
    return fields[name]


SCORERS: dict[str, Scorer] = {
    scorer.name: scorer
    for scorer in (
        Scorer("exact_match", 1, _best(metrics.exact_match)),
        # The text of the most likely tokens, one after each token of the answer, is the answer.
        Scorer("teacher_forced", 1, _best(metrics.exact_match)),
        Scorer("contains", 1, _best(metrics.contains)),
        Scorer("first_number", 1, _best(metrics.first_number)),
        Scorer("word_recall", 1, _best(metrics.word_recall)),
        Scorer("word_recall_spaced", 1, _best(metrics.word_recall_spaced)),
        Scorer("word_recall_repeated", 1, _best(partial(metrics.word_recall_spaced, repeated=True))),
        # An output that begins with the letter of an option says the option.
        Scorer("word_recall_choice", 1, _word_recall_choice),
        Scorer("rouge_1", 1, _best(metrics.rouge_n)),
        Scorer("rouge_1_stemmed", 1, _best(partial(metrics.rouge_n, stemmed=True))),
        Scorer("rouge_l", 1, _best(metrics.rouge_l)),
        Scorer("rouge_l_stemmed", 1, _best(partial(metrics.rouge_l, stemmed=True))),
        Scorer("similarity", 2, _similar(longbench.similarity)),
        Scorer("similarity_difflib", 1, _similar(longbench.similarity_difflib)),
        # RULER: all parts are wanted, or any of several answers.
        Scorer("string_match_all", 1, _share(metrics.ruler_part)),
        Scorer("string_match_part", 1, _best(metrics.ruler_part)),
        # LongBench.
        Scorer("qa_f1", 1, _best(longbench.qa_f1)),
        Scorer("qa_f1_zh", 1, _best(longbench.qa_f1_zh)),
        Scorer("rouge_l_summary", 1, _best(longbench.rouge_l_summary)),
        Scorer("rouge_l_summary_zh", 1, _best(longbench.rouge_l_summary_zh)),
        _of_classes("classification", longbench.classification),
        _of_classes("classification_closest", longbench.classification_closest),
        Scorer("retrieval", 1, _best(longbench.retrieval)),
        Scorer("count", 1, _best(longbench.count)),
        Scorer("code_sim", 3, _best(longbench.code_similarity)),
        Scorer(
            "code_sim_difflib",
            1,
            _best(partial(longbench.code_similarity, alike=longbench.similarity_difflib)),
        ),
        # InfiniteBench, beside qa_f1, rouge_l_summary and first_number.
        Scorer("word_found", 2, _best(infinitebench.word_found)),
        Scorer("name_found", 2, _best(infinitebench.name_found)),
        Scorer("last_number", 1, _best(infinitebench.last_number)),
        Scorer("first_decimal", 2, _best(infinitebench.first_decimal)),
        Scorer("leading_numbers", 1, _all(infinitebench.leading_numbers)),
        Scorer("function_chosen", 2, _all(infinitebench.function_chosen)),
        Scorer("letter_chosen", 2, _all(infinitebench.letter_chosen)),
        Scorer("character_f1", 1, _best(infinitebench.character_f1)),
        # HELMET.
        Scorer("helmet_exact_match", 1, _labelled(helmet.exact_match)),
        Scorer("helmet_label_match", 1, _labelled(helmet.exact_match, parsed_only=True)),
        Scorer("helmet_substring_exact_match", 1, _labelled(helmet.substring_exact_match)),
        Scorer("helmet_f1", 1, _labelled(helmet.f1)),
        Scorer("helmet_rouge_l", 1, _labelled(helmet.rouge_l_f1)),
        Scorer("helmet_choice", 1, helmet.choice),
        # The right one of several choices has the highest likelihood.
        Scorer("accuracy", 1, _best(metrics.exact_match)),
        # Each sample names its own.
        Scorer("by_metric", 3, _by_metric),
    )
}
"""Every scoring rule by name."""


def scorer_named(name: str) -> Scorer:
    """Return a scorer. Raises ArgumentError listing the names that exist."""
    if name not in SCORERS:
        raise ArgumentError("there is no such scorer", found=repr(name), allowed=sorted(SCORERS))
    return SCORERS[name]
