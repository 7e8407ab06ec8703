"""Scorers: pure functions of the expected and the given text, named and versioned.

The name and version stand in every records file, so a changed rule never mixes with older scores, and
records can be scored again from their texts without running a model. A metric is one function and one `Scorer` in
`SCORERS`, which `eval list` and docs/evaluation.md show; a package of one's own adds its with `register_scorer`.

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
from longspan.eval import metrics_alce as alce
from longspan.eval import metrics_helmet as helmet
from longspan.eval import metrics_infinitebench as infinite
from longspan.eval import metrics_longbench as longbench
from longspan.eval import metrics_longproc as longproc
from longspan.eval import metrics_lveval as lveval
from longspan.eval import metrics_ruler_v2 as ruler_v2
from longspan.eval.metrics_babilong import label_named
from longspan.eval.metrics_needlebench import boxed_name, needle_said, words_said

Rule = Callable[[Sequence[str], str, Mapping[str, Any]], float]
"""Expected texts (at least one), output, fields of the sample -> 0..1."""
_NO_FIELDS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Scorer:
    """A scoring rule; a perfect output scores 1."""

    name: str
    version: int
    rule: Rule
    says: str = ""
    """The rule in words."""
    higher_is_better: bool = True

    def named(self) -> dict[str, Any]:
        """Return name and version, for the header of the records."""
        return {"name": self.name, "version": self.version}

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


def _best(metric: Callable[..., float], **given: Any) -> Rule:
    return lambda expected, output, fields: max(metric(each, output, **given) for each in expected)


def _share(metric: Callable[[str, str], float]) -> Rule:
    return lambda expected, output, fields: sum(metric(each, output) for each in expected) / len(expected)


def _all(metric: Callable[[Sequence[str], str], float]) -> Rule:
    return lambda expected, output, fields: metric(expected, output)


def _labelled(metric: Callable[[str, str], float], *, parsed_only: bool = False) -> Rule:
    return partial(helmet.best_of_both, metric, parsed_only=parsed_only)


def _of_parts(name: str, metric: Callable[[str, Sequence[Sequence[str]]], float], says: str) -> Scorer:
    def rule(expected: Sequence[str], output: str, fields: Mapping[str, Any]) -> float:
        return metric(helmet.whole_answer(output, fields), _field(fields, "alternatives", scorer=name))

    return Scorer(name, 1, rule, says)


def _of_list(name: str, field: str, says: str) -> Scorer:
    return _of_parts(name, lambda output, parts: float(getattr(alce.list_scores(output, parts), field)), says)


def _alce_rouge(expected: Sequence[str], output: str, fields: Mapping[str, Any]) -> float:
    return max(alce.rouge_l_sum_of(each, helmet.whole_answer(output, fields)) for each in expected)


def _of_classes(name: str, metric: Callable[[str, str, Sequence[str]], float], says: str) -> Scorer:
    def rule(expected: Sequence[str], output: str, fields: Mapping[str, Any]) -> float:
        classes = _field(fields, "all_classes", scorer=name)
        return max(metric(each, output.strip(), classes) for each in expected)

    return Scorer(name, 1, rule, says)


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


def _mrcr_ratio(expected: Sequence[str], output: str, fields: Mapping[str, Any]) -> float:
    prefix = _field(fields, "random_string_to_prepend", scorer="mrcr_ratio")
    return max(metrics.mrcr_ratio(each, output, prefix) for each in expected)


def _babilong(expected: Sequence[str], output: str, fields: Mapping[str, Any]) -> float:
    question, subtask = (_field(fields, name, scorer="babilong") for name in ("question", "subtask"))
    return max(label_named(each, output, question=question, subtask=subtask) for each in expected)


def _with_keywords(metric: Callable[[str, str, str | None], float]) -> Rule:
    return lambda expected, output, fields: max(
        metric(each, output, fields.get("answer_keywords")) for each in expected
    )


def _ruler_v2(expected: Sequence[str], output: str, fields: Mapping[str, Any]) -> float:
    subtask = _field(fields, "subtask", scorer="ruler_v2")
    if subtask not in ruler_v2.SUBTASKS:
        raise ArgumentError("this is no task of RULERv2", found=subtask, allowed=ruler_v2.SUBTASKS)
    return ruler_v2.score(expected, output, subtask)


def _needlebench_needle(expected: Sequence[str], output: str, fields: Mapping[str, Any]) -> float:
    needle = _field(fields, "needle", scorer="needlebench_needle")
    return max(needle_said(each, output, needle) for each in expected)


def _longproc(expected: Sequence[str], output: str, fields: Mapping[str, Any], *, partial: bool) -> float:
    if _field(fields, "subtask", scorer="longproc") not in longproc.SUBTASKS:
        raise ArgumentError(
            "this is no subtask of LongProc", found=fields["subtask"], allowed=longproc.SUBTASKS
        )
    return max(longproc.score(each, output, fields, partial=partial) for each in expected)


def _field(fields: Mapping[str, Any], name: str, *, scorer: str) -> Any:
    if not fields.get(name):
        raise ArgumentError(f"scorer {scorer} needs the field {name!r} of a sample, which has none")
    return fields[name]


# fmt: off
_RULES = (
    Scorer("exact_match", 1, _best(metrics.exact_match), "the whole value, white space around it aside"),
    Scorer("teacher_forced", 1, _best(metrics.exact_match), "the most likely tokens along the value spell it"),
    Scorer("contains", 1, _best(metrics.contains), "the value stands in the answer, in any case"),
    Scorer("first_number", 1, _best(metrics.first_number), "the first number of the answer is the value"),
    Scorer("call_match", 1, _best(metrics.call_match), "the first JSON object of the answer is the call, as a value"),
    Scorer("word_recall", 1, _best(metrics.word_recall), "share of the value's words that the answer holds"),
    Scorer("word_recall_spaced", 1, _best(metrics.word_recall_spaced), "the same of what white space parts"),
    Scorer("word_recall_repeated", 1, _best(metrics.word_recall_spaced, repeated=True), "the same, over all words"),
    Scorer("word_recall_choice", 1, _word_recall_choice, "the same; an answer's first letter says an option"),
    Scorer("rouge_1", 1, _best(metrics.rouge_n), "F-measure of words, as rouge-score's"),
    Scorer("rouge_1_stemmed", 1, _best(metrics.rouge_n, stemmed=True), "the same of stems"),
    Scorer("rouge_l", 1, _best(metrics.rouge_l), "F-measure of the longest common words, as rouge-score's"),
    Scorer("rouge_l_stemmed", 1, _best(metrics.rouge_l, stemmed=True), "the same of stems"),
    Scorer("similarity", 2, _similar(longbench.similarity), "how alike the texts are: 1 - edits / characters"),
    Scorer("similarity_difflib", 1, _similar(longbench.similarity_difflib), "the same by difflib"),
    Scorer("string_match_all", 1, _share(metrics.ruler_part), "RULER: share of the values in the answer"),
    Scorer("string_match_part", 1, _best(metrics.ruler_part), "RULER: one of the values is in the answer"),
    Scorer("qa_f1", 1, _best(longbench.qa_f1), "LongBench: F-measure of words"),
    Scorer("qa_f1_zh", 1, _best(longbench.qa_f1_zh), "LongBench: the same of Chinese words"),
    Scorer("rouge_l_summary", 1, _best(longbench.rouge_l_summary), "LongBench: rouge-l F as rouge's"),
    Scorer("rouge_l_summary_zh", 1, _best(longbench.rouge_l_summary_zh), "LongBench: the same of Chinese words"),
    _of_classes("classification", longbench.classification, "LongBench: 1 / classes named if the right one is"),
    _of_classes("classification_closest", longbench.classification_closest, "LongBench: or what is most like it"),
    Scorer("retrieval", 1, _best(longbench.retrieval), "LongBench: share of its numbers that are the paragraph's"),
    Scorer("count", 1, _best(longbench.count), "LongBench: share of its numbers that are the count"),
    Scorer("code_sim", 3, _best(longbench.code_similarity), "LongBench: how alike the first line of code is"),
    Scorer("code_sim_difflib", 1, _best(longbench.code_similarity, alike=longbench.similarity_difflib),
           "LongBench: the same by difflib"),
    Scorer("word_found", 2, _best(infinite.word_found), "InfiniteBench: the value is a word of the answer"),
    Scorer("name_found", 2, _best(infinite.name_found), "InfiniteBench: the name stands in the answer"),
    Scorer("last_number", 1, _best(infinite.last_number), "InfiniteBench: the last word is the number"),
    Scorer("first_decimal", 2, _best(infinite.first_decimal), "InfiniteBench: the first number is the value"),
    Scorer("leading_numbers", 1, _all(infinite.leading_numbers), "InfiniteBench: share right from the start"),
    Scorer("function_chosen", 2, _all(infinite.function_chosen), "InfiniteBench: the function is chosen"),
    Scorer("letter_chosen", 2, _all(infinite.letter_chosen), "InfiniteBench: the letter is chosen"),
    Scorer("character_f1", 1, _best(infinite.character_f1), "InfiniteBench: F-measure of characters"),
    Scorer("helmet_exact_match", 1, _labelled(helmet.exact_match), "HELMET: the whole value, or behind its label"),
    Scorer("helmet_label_match", 1, _labelled(helmet.exact_match, parsed_only=True), "HELMET: behind its label"),
    Scorer("helmet_substring_exact_match", 1, _labelled(helmet.substring_exact_match), "HELMET: it holds the value"),
    Scorer("helmet_f1", 1, _labelled(helmet.f1), "HELMET: F-measure of words"),
    Scorer("helmet_rouge_l", 1, _labelled(partial(metrics.rouge_l, stemmed=True)), "HELMET: rouge-l F"),
    Scorer("helmet_choice", 1, helmet.choice, "HELMET: the option is chosen, by letter or text"),
    Scorer("helmet_ndcg_10", 1, helmet.ndcg_10, "HELMET: NDCG at 10 of the ranking"),
    _of_parts("helmet_str_em", alce.parts_found, "HELMET: share of an answer's parts that it holds"),
    _of_parts("helmet_str_hit", alce.all_parts_found, "HELMET: it holds all of them"),
    Scorer("helmet_rouge_l_sum", 1, _alce_rouge, "HELMET: rouge-l F by sentences"),
    _of_list("helmet_precision", "precision", "HELMET: share of the listed names that are right"),
    _of_list("helmet_recall", "recall", "HELMET: share of the names that are listed"),
    _of_list("helmet_recall_top5", "recall_top5", "HELMET: the same of at most five names"),
    _of_list("helmet_list_f1", "f1", "HELMET: F-measure of both"),
    _of_list("helmet_list_f1_top5", "f1_top5", "HELMET: the same with at most five names"),
    Scorer("mrcr_ratio", 1, _mrcr_ratio, "MRCR: difflib's ratio behind the drawn string, else 0"),
    Scorer("graphwalks_f1", 1, _all(metrics.graphwalks_f1), "GraphWalks: F-measure of nodes in the last line"),
    Scorer("contains_exactly", 1, _best(metrics.contains_exactly), "NoLiMa: the value stands in it as it is written"),
    Scorer("last_line_contains", 1, _best(metrics.last_line_contains), "NoLiMa: it stands in the last line"),
    Scorer("babilong", 1, _babilong, "BABILong: its label and no other, in the first sentence"),
    Scorer("longbench_v2", 1, _best(longbench.choice_stated), "LongBench v2: the letter that it says is correct"),
    Scorer("lveval_f1", 1, _with_keywords(lveval.f1), "LV-Eval: F-measure of words, 0 without the key words"),
    Scorer("lveval_f1_zh", 1, _with_keywords(lveval.f1_zh), "LV-Eval: the same of Chinese words"),
    Scorer("lveval_rouge_l_zh", 1, _best(lveval.rouge_l_zh), "LV-Eval: rouge-l F without common Chinese words"),
    Scorer("longproc", 1, partial(_longproc, partial=False), "LongProc: it ends right; F1 of a table's rows"),
    Scorer("longproc_partial", 1, partial(_longproc, partial=True), "LongProc: share that is right from the start"),
    Scorer("ruler_v2", 1, _ruler_v2, "RULERv2: share held, or close in words; a letter; by its task"),
    Scorer("boxed_name", 1, _best(boxed_name), "NeedleBench: what the last box holds is the value"),
    Scorer("needlebench_keywords", 1, _share(metrics.contains_exactly), "NeedleBench: share of the values in it"),
    Scorer("needlebench_needle", 1, _needlebench_needle, "NeedleBench v1: the value, or a fifth of how alike it is"),
    Scorer("needlebench_words", 1, _best(words_said), "NeedleBench v1: share of the value's words in the answer"),
    Scorer("accuracy", 1, _best(metrics.exact_match), "the right one of several choices is the likeliest"),
    Scorer("by_metric", 3, _by_metric, "each sample's own `metric`"),
)
# fmt: on
SCORERS: dict[str, Scorer] = {scorer.name: scorer for scorer in _RULES}
"""Every scoring rule by name."""


def register_scorer(scorer: Scorer) -> None:
    """Add a rule. Raises ArgumentError: there is another one of its name."""
    if SCORERS.setdefault(scorer.name, scorer) is not scorer:
        raise ArgumentError("there is a scorer of this name already", found=repr(scorer.name))


def scorer_named(name: str) -> Scorer:
    """Return a scorer. Raises ArgumentError listing the names that exist."""
    if name not in SCORERS:
        raise ArgumentError("there is no such scorer", found=repr(name), allowed=sorted(SCORERS))
    return SCORERS[name]
