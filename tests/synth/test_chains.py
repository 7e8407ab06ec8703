"""Numbers handed on from name to name: what is asked has the answer that following the text gives."""

from __future__ import annotations

import re

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from longspan.core.errors import ConfigError
from longspan.synth import load_set
from longspan.synth.chains import NAMES, WORDINGS, NameChain, draw_chains
from longspan.synth.config import SetConfig
from longspan.synth.offline import make_questions
from tests.synth.writer import document

STATEMENT = re.compile(r"^(?:The code (\w+) stands for|Let (\w+) be|(\w+) is set to) (\w+)\.$", re.MULTILINE)


def follow(text: str, number: str) -> list[str]:
    """Return all names that come to have a number, by reading the text from its start."""
    holders = {number}
    found = []
    for match in STATEMENT.finditer(text):
        name = next(part for part in match.groups()[:3] if part)
        if match[4] in holders:
            holders.add(name)
            found.append(name)
    return found


def test_a_chain_in_words():
    chain = NameChain(("QXW", "ZBNK", "RTUV"), "48213", WORDINGS[0])
    assert chain.statements == [
        "The code QXW stands for 48213.",
        "The code ZBNK stands for QXW.",
        "The code RTUV stands for ZBNK.",
    ]
    assert chain.question == "Which codes stand for 48213?"
    assert chain.answer(in_sentences=True) == "QXW, ZBNK and RTUV stand for 48213."
    assert chain.answer(in_sentences=False) == "QXW, ZBNK and RTUV"


@pytest.mark.parametrize("number", range(6))
def test_every_chain_is_answered_by_all_its_names_in_the_order_of_the_text(number: int):
    """Several stand in one text in the same words: a list of all names in sight is wrong."""
    made = make_questions(
        number, {"text": document(number, 60), "id": str(number)}, 16, seed=3, in_sentences=True, chains=True
    )
    asked = [
        item
        for item in made.items
        if item.question.startswith("Which codes") or "Which names" in item.question
    ]
    assert len(asked) == made.kinds["chains"] == 4
    assert sum(made.kinds.values()) == len(made.items) == 16
    for item in asked:
        (value,) = re.findall(r"\d{5}", item.question)
        names = re.findall(r"\b[A-Z]{3,6}\b", item.answer)
        assert names == follow(made.text, value) and NAMES[0] <= len(names) <= NAMES[1]
        assert [STATEMENT.search(span.of(made.text))[0] for span in item.evidence] == [
            span.of(made.text) for span in item.evidence
        ], "the evidence is whole sentences"
        assert len(item.evidence) == len(names)
    middles = [span.middle / len(made.text) for item in asked for span in item.evidence]
    assert max(middles) - min(middles) > 0.5, "they stand all over the text"


def test_chains_leave_other_questions_as_they_are():
    """The recipes of before draw what they drew."""
    given = {"text": document(5, 60), "id": "x"}
    plain, with_chains = (make_questions(0, given, 12, seed=1, chains=chains) for chains in (False, True))
    assert plain.kinds.get("chains") is None and with_chains.kinds["chains"] == 3
    unchanged = ("section titles", "repeated names")
    assert all(plain.kinds.get(kind) == with_chains.kinds.get(kind) for kind in unchanged)


@hypothesis.given(
    text=strategies.text(alphabet="ab .\n!QX1", max_size=300),
    count=strategies.integers(1, 12),
    seed=strategies.integers(0, 9),
)
def test_what_is_planted_takes_nothing_away_and_says_its_place(text: str, count: int, seed: int):
    """Lines at nearly the same place could have copied what lies between them."""
    made = make_questions(0, {"text": text, "id": "t"}, count, seed=seed, in_sentences=True, chains=True)
    spans = sorted(
        span
        for item in made.items
        if re.search("magic number|codes|names", item.question)
        for span in item.evidence
    )
    rest, at = "", 0
    for span in spans:
        assert made.text[span.end] == "\n" and (span.start == 0 or made.text[span.start - 1] == "\n")
        rest += made.text[at : span.start]
        at = span.end
    rest += made.text[at:]
    assert rest.replace("\n", "") == text.replace("\n", "")


def test_names_and_numbers_are_new_to_the_text():
    text = " ".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ") + " 12345 ABC"
    chains = draw_chains(np.random.default_rng(0), text, 40)
    names = [name for chain in chains for name in chain.names]
    values = [chain.value for chain in chains]
    assert len(set(names)) == len(names) and len(set(values)) == 40
    assert not any(each in text for each in (*names, *values))


def test_a_table_of_all_numbers_does_not_hold_it_up():
    (chain,) = draw_chains(np.random.default_rng(0), " ".join(map(str, range(10_000, 100_000))), 1)
    assert len(chain.value) > 5


def test_the_shipped_set_has_them_and_sets_that_ask_a_model_refuse_them():
    assert load_set("offline_chains").chains and not load_set("offline_sentences").chains
    with pytest.raises(ConfigError, match="chains has no effect on a set of kind biography"):
        SetConfig(name="x", kind="biography", prompt="biography_v1", chains=True)
