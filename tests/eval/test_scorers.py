from __future__ import annotations

import importlib.util

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ArgumentError, MissingDependencyError
from longspan.eval.scorers import SCORERS, scorer_named

FIELDS = {
    "random_string_to_prepend": "48",
    "options": ["48213", "a day"],
    "all_classes": ["48213", "a day"],
    "metric": "contains",
    "question": "Where?",
    "subtask": "qa1",
}
NEEDS_JIEBA = ("qa_f1_zh", "rouge_l_summary_zh", "lveval_f1_zh", "lveval_rouge_l_zh")
VALUES = {"retrieval", "count", "first_number", "last_number", "first_decimal", "word_found", "name_found"}
"""Rules for single values; sentences are not their answers."""
LISTS: dict[str, tuple[list[str], str]] = {
    "leading_numbers": (["48213", "7"], "48213, 7"),
    "function_chosen": (["get", "B"], "B"),
    "letter_chosen": (["Paris", "B"], "B"),
    "babilong": (["kitchen", "office"], "Mary is in the kitchen."),
    "boxed_name": (["Ada"], "It is \\boxed{Ada}"),
    "longbench_v2": (["B"], "The correct answer is (B)"),
    "graphwalks_f1": (["a1", "b2"], "Final Answer: [a1, b2]"),
}
"""Rules for a list of a certain form, and a perfect answer."""
CITING = ("str_em", "str_hit", "rouge_l_sum", "precision", "recall", "recall_top5", "list_f1", "list_f1_top5")
OF_PROBLEMS = (
    "longproc",
    "longproc_partial",
    "helmet_ndcg_10",
    "ruler_v2",
    "needlebench_needle",
    *(f"helmet_{name}" for name in CITING),
)
"""Rules that need a problem beside the texts: test_longproc.py, test_citations.py, test_binned.py,
test_needlebench.py."""
HERE = sorted(set(SCORERS) - {*NEEDS_JIEBA, *OF_PROBLEMS})


@pytest.mark.parametrize("name", HERE)
def test_perfect_output_scores_one(name: str) -> None:
    """A scorer whose maximum is below 1 makes perfect models look flawed."""
    expected, output = LISTS.get(name, (["48213", "48213"], "48213"))
    assert SCORERS[name].score(expected, output, FIELDS) == 1.0
    if name not in LISTS:
        assert SCORERS[name].score("48213", "48213", FIELDS) == 1.0


@pytest.mark.parametrize(
    "name",
    sorted(
        set(HERE)
        - VALUES
        - LISTS.keys()
        - {"classification", "classification_closest", "word_recall_repeated", "mrcr_ratio"}
    ),
)
@settings(max_examples=30, deadline=None)
@given(words=st.lists(st.text("abcdxyzABC", min_size=1), min_size=1, max_size=8))
def test_perfect_sentence_scores_one(name: str, words: list[str]) -> None:
    """Repeated words, capitals and single letters must not cost a perfect answer anything."""
    sentence = " ".join([*words, "end."])
    assert SCORERS[name].score(sentence, sentence, FIELDS) == 1.0


@pytest.mark.parametrize("name", HERE)
@settings(max_examples=60, deadline=None)
@given(expected=st.text(max_size=30), output=st.text(max_size=60))
def test_any_text_scores_between_zero_and_one(name: str, expected: str, output: str) -> None:
    """Empty outputs and other scripts come out of models; none may end an evaluation."""
    if name == "first_decimal":
        expected = "3.5"
    wanted = LISTS[name][0] if name in LISTS else expected
    assert 0.0 <= SCORERS[name].score(wanted, output, FIELDS) <= 1.0


@pytest.mark.parametrize("name", HERE)
def test_wrong_output_scores_zero(name: str) -> None:
    """A scorer that gives points for anything hides a model that finds nothing."""
    assert SCORERS[name].score(LISTS.get(name, (["48213"], ""))[0], "zzz", FIELDS) == 0.0


def test_answers_of_another_kind_are_named() -> None:
    """Scoring recorded sentences by a rule for numbers is a mistake, not a crash."""
    with pytest.raises(ArgumentError, match="first_decimal is not for answers like these"):
        scorer_named("first_decimal").score("in London", "3")


@pytest.mark.parametrize(
    ("output", "score"),
    [(" 48213", 1.0), ("48213\n", 1.0), ("4821", 0.0), ("482130", 0.0), ("48 213", 0.0), ("", 0.0)],
)
def test_exact_match_wants_the_whole_value(output: str, score: float) -> None:
    """A part of the value, or more than the value, is not the value."""
    assert SCORERS["exact_match"].score("48213", output) == score


def test_word_recall_counts_different_words() -> None:
    """The published rule divides by all words, "a" twice, so that a perfect answer has 0.92."""
    expected = "eat a sandwich and sit in Dolores Park on a sunny day."
    assert scorer_named("word_recall").score(expected, f"You should {expected.upper()}") == 1.0
    assert scorer_named("word_recall").score("a b a c", "a c") == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("output", "plotted", "book"),
    [
        ("eat a sandwich and sit in Dolores Park on a sunny day.", 11 / 12, 1.0),
        (
            "The best thing is to EAT a sandwich, and sit in dolores park on a sunny day",
            0.75,
            9 / 11,
        ),
        ("Eat a sandwich on a day.\nQuestion: why a sunny one.", 0.5, 6 / 11),
        ("", 0.0, 0.0),
        ("It is Dolores Park.", 1 / 12, 1 / 11),
    ],
)
def test_word_recall_as_published(output: str, plotted: float, book: float) -> None:
    """A published heat map cannot be compared with one whose perfect cell is 1 instead of .917.

    The values are those that visualize.py of Fu et al. printed for these answers, and those of eval_book.py's formula.
    """
    expected = "eat a sandwich and sit in Dolores Park on a sunny day."
    assert scorer_named("word_recall_repeated").score(expected, output) == pytest.approx(plotted)
    assert scorer_named("word_recall_spaced").score(expected, output) == pytest.approx(book)


def test_best_over_answers_and_share_of_parts() -> None:
    """Several right answers and several wanted parts are told apart by the scorer."""
    parts = ["48213", "77102", "Blue-Moon"]
    assert scorer_named("string_match_all").score(parts, "48213 and BLUE-MOON") == pytest.approx(2 / 3)
    assert scorer_named("string_match_part").score(parts, "it is 77102") == 1.0
    assert scorer_named("qa_f1").score(["Rome", "the city of Paris"], "Paris city") == 0.8


def test_first_number_is_the_answer() -> None:
    """A later number that happens to be right is not what the model answered."""
    assert scorer_named("first_number").score("48213", "It is 48213, not 1") == 1.0
    assert scorer_named("first_number").score("48213", "1. 48213") == 0.0


def test_metric_of_the_sample() -> None:
    """One file holds data sets with different metrics; few-shot answers end at the first line."""
    score = scorer_named("by_metric").score
    fields = {"metric": "classification", "all_classes": ["city", "food"]}
    assert score("city", "\ncity\nType: food", fields) == 0.5
    assert score("city", "\ncity\nType: food", {**fields, "postprocess": "first_line"}) == 1.0
    with pytest.raises(ArgumentError, match="'metric'"):
        score("city", "city")
    with pytest.raises(ArgumentError, match="'all_classes'"):
        score("city", "city", {"metric": "classification"})


def test_nothing_expected_is_refused() -> None:
    """A record without an answer has no score; dividing by no parts must not be the message."""
    with pytest.raises(ArgumentError, match="no expected answer"):
        scorer_named("string_match_all").score([], "anything")


def test_unknown_scorer_lists_the_known_ones() -> None:
    """A typing mistake must not select another rule."""
    with pytest.raises(ArgumentError, match="exact_match"):
        scorer_named("exact")


@pytest.mark.skipif(importlib.util.find_spec("jieba") is not None, reason="jieba is installed")
@pytest.mark.parametrize("name", NEEDS_JIEBA)
def test_missing_package_is_named(name: str) -> None:
    """A score without word borders would be another metric under the same name."""
    with pytest.raises(MissingDependencyError, match="longspan\\[chinese\\]"):
        SCORERS[name].score("a", "a")
