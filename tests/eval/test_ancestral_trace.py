"""NeedleBench's chain of relations on a stand-in of its release: questions, answers, scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longspan.core.errors import ConfigError, DataError
from longspan.data.tokenizer import Tokenizer
from longspan.eval.held_out import TaskDataConfig
from longspan.eval.prompts import PromptForm
from longspan.eval.released.ancestral_trace import AncestralTrace, AncestralTraceConfig
from longspan.eval.scorers import scorer_named
from tests.eval.perfect import run_wrong

RELEASED = """
import nothing_that_is_there

relationship_generation_map_en = {"mother": 1, "grandfather": 2}
relationship_templates_en = ["{A} is {B}'s {relationship}.", ("{B} has a "
    "{relationship}, {A}.")]
relationship_terms_en = ["mother", "grandfather"]
shuffled_story_with_prompt_en = "{shuffled_story}\\nWho is eldest of {last_person}'s? \\\\boxed{{}}"
nth_ancestor_prompt_en = "{shuffled_story}\\nWho is {person}'s ancestor {n}?"
nth_descendant_prompt_en = "{shuffled_story}\\nWho is {person}'s descendant {n}?"
relationship_distance_prompt_en = "{shuffled_story}\\nHow far is {person_a} from {person_b}?"
"""
NAMES = ["Ada", "Bo", "Cy", "Di", "Ed"]

EXPECTED = {
    "eldest_ancestor": (
        "Bo is Ada's grandfather.Ed has a grandfather, Ada.\nWho is eldest of Ed's? \\boxed{}",
        "Bo",
    ),
    "nth_ancestor": ("Ada is Di's grandfather.Ada has a grandfather, Cy.\nWho is Di's ancestor 4?", "Cy"),
    "nth_descendant": ("Ed has a mother, Cy.Bo has a grandfather, Ed.\nWho is Cy's descendant 3?", "Bo"),
    "relationship_distance": (
        "Bo has a grandfather, Cy.Ed is Cy's grandfather.\nHow far is Ed from Bo?",
        "4",
    ),
}


@pytest.fixture
def released(tmp_path: Path) -> Path:
    (tmp_path / "atc.py").write_text(RELEASED)
    (tmp_path / "names.json").write_text(json.dumps({"English": ",".join(NAMES)}))
    return tmp_path


def task(released: Path, tokenizer: Tokenizer, **values: Any) -> AncestralTrace:
    settings = AncestralTraceConfig.from_dict({"prompts": str(released / "atc.py"), **values})
    return AncestralTrace.from_config(settings, TaskDataConfig(paths=(str(released),)), PromptForm(tokenizer))


def test_chains_of_relations(released: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Names, words and order are drawn by the published seeds; a grandfather counts for two generations.

    What is expected here is what OpenCompass's own code makes of these names and texts.
    """
    whole = task(released, tokenizer, num_needles=[2], samples=1)
    built = {str(each.key[0]): whole.build(each) for each in whole.plan()}
    assert {kind: (each.request.prompt, each.expected) for kind, each in built.items()} == EXPECTED
    assert built["nth_ancestor"].fields["question"].startswith("Who is ")
    assert run_wrong(whole, tokenizer, tmp_path / "wrong.jsonl")["mean"] == 0.0
    assert len(task(released, tokenizer, num_needles=[2, 4], kinds=["nth_ancestor"]).plan()) == 20


@pytest.mark.parametrize(
    ("output", "score"),
    [
        ("\\boxed{Bo}, no: \\boxed{\\text{Ada Hill}}", 1.0),
        ("so \\boxed{{Ada~Hill}}.", 1.0),
        ("\\boxed{'Ada  Hill'} it is", 1.0),
        ("Ada Hill", 0.0),
        ("\\boxed{Ada Hill", 0.0),
        ("\\boxed{ada hill}", 0.0),
        ("\\boxed{}", 0.0),
    ],
)
def test_boxed_names(output: str, score: float) -> None:
    """Each score is what OpenCompass's own code gives for this output."""
    assert scorer_named("boxed_name").score("Ada Hill", output) == score


def test_releases_that_are_none(released: Path, tokenizer: Tokenizer) -> None:
    """What is missing of the release is said before a model is asked; the released file is never run."""
    with pytest.raises(DataError, match=r"5 relations takes one person more\n  found: 5 names"):
        task(released, tokenizer, num_needles=[5])
    with pytest.raises(DataError, match="holds no Chinese names"):
        task(released, tokenizer, num_needles=[2], language="Chinese")
    with pytest.raises(ConfigError, match="one relation or more"):
        task(released, tokenizer, num_needles=[0])
    (released / "atc.py").write_text(RELEASED.replace("nth_ancestor_prompt_en", "other"))
    with pytest.raises(DataError, match="assigns nothing to nth_ancestor_prompt_en"):
        task(released, tokenizer, num_needles=[2])
