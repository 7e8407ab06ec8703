"""Metrics against what the packages that define them gave; goldens/metrics.json says which versions."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest

from longspan.eval.metrics import rouge_l, rouge_n
from longspan.eval.metrics_longbench import classification, rouge_l_summary
from longspan.eval.scorers import SCORERS

GOLDENS: dict[str, Any] = json.loads((Path(__file__).parent / "goldens" / "metrics.json").read_text())
TEXT_METRICS = sorted(GOLDENS["texts"][0].keys() - {"expected", "output"})
HAS_JIEBA = importlib.util.find_spec("jieba") is not None
HAS_ROUGE = importlib.util.find_spec("rouge_score") is not None


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_text_metrics_give_the_published_values(name: str) -> None:
    """Scores are compared with papers; a slightly different tokenisation would not be noticed otherwise."""
    if name.endswith("_zh") and not HAS_JIEBA:
        pytest.skip("jieba, which cuts Chinese text into words, is not installed")
    for golden in GOLDENS["texts"]:
        score = SCORERS[name].score(golden["expected"], golden["output"])
        # The package rouge adds 1e-8 to a denominator.
        assert score == pytest.approx(golden[name], abs=2e-8), golden


@pytest.mark.parametrize(
    "golden", GOLDENS["others"], ids=lambda golden: f"{golden['metric']}-{golden['output']}"
)
def test_number_and_class_metrics_give_the_published_values(golden: dict[str, Any]) -> None:
    score = SCORERS[golden["metric"]].score(golden["expected"], golden["output"], golden)
    assert score == pytest.approx(golden["score"], abs=1e-12)


def test_perfect_class_scores_one_where_the_published_code_skips_a_part() -> None:
    """Removing from the list that is walked leaves every second part of the right name: 0.5."""
    assert classification("sports event", "sports event", ["event", "sports", "sports event"]) == 1.0


@pytest.mark.parametrize(
    ("output", "score"),
    [
        ("\n\n# c\nreturn x", 1.0),
        ("```python\nreturn x\n```", 1.0),
        ("# c\n\nreturn x", 0.0),
        (" \nreturn x", 0.22),
        ("# c\n// d", 0.0),
        ("", 0.0),
    ],
)
def test_line_of_code_that_counts(output: str, score: float) -> None:
    """Empty lines are passed over at the start alone: one behind a comment is the answer, as published."""
    assert SCORERS["code_sim"].score("return x", output) == score


def test_a_class_that_is_not_named_may_be_guessed() -> None:
    """`long-llm` takes the class that is most like an answer that names none; the current LongBench gives 0."""
    fields = {"all_classes": ["Sports event", "City", "Food"]}
    scores = {
        output: [
            SCORERS[name].score("City", output, fields)
            for name in ("classification", "classification_closest")
        ]
        for output in ("Citys", "city", "cit", "foo", "", "City or Food")
    }
    # By hand with difflib: `cit` is 0.571 like City and 0.133 like Sports event, `foo` most like Food.
    assert scores == {
        "Citys": [1.0, 1.0],
        "city": [0.0, 1.0],
        "cit": [0.0, 1.0],
        "foo": [0.0, 0.0],
        "": [0.0, 0.0],
        "City or Food": [0.5, 0.5],
    }


def test_long_summary_is_scored() -> None:
    """The package rouge recurses once a word and gives 0 to a long answer."""
    sentence = " ".join(f"w{number}" for number in range(1500))
    assert rouge_l_summary(sentence, sentence) == 1.0


@pytest.mark.skipif(not HAS_ROUGE, reason="the package rouge-score is not installed")
def test_rouge_equals_the_live_package() -> None:
    """The goldens are few; random rows of words find what they leave out."""
    from rouge_score.rouge_scorer import RougeScorer

    words = [
        "The",
        "a",
        "Running",
        "runs",
        "cat",
        "cats.",
        "relational",
        "formalities",
        "x1",
        "3.14",
        "\u4f60\u597d",
    ]
    choose = random.Random(0)
    for stemmed in (False, True):
        package = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stemmed)
        for _ in range(300):
            expected, output = (" ".join(choose.choices(words, k=choose.randint(0, 12))) for _ in range(2))
            theirs = package.score(expected, output)
            assert rouge_n(expected, output, stemmed=stemmed) == pytest.approx(theirs["rouge1"].fmeasure)
            assert rouge_n(expected, output, n=2, stemmed=stemmed) == pytest.approx(theirs["rouge2"].fmeasure)
            assert rouge_l(expected, output, stemmed=stemmed) == pytest.approx(theirs["rougeL"].fmeasure)
