"""Evidence is even over depth, whatever questions a document has."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ConfigError
from longspan.synth import ConversationConfig
from longspan.synth.conversation import Composer
from longspan.synth.depth import DepthBalance, bin_of, stratified
from longspan.synth.items import Item
from longspan.synth.sections import Span
from longspan.synth.selection import DocumentFile
from longspan.synth.templates import load_prompt
from tests.synth.writer import answer, document, question, sentence


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 20), st.integers(0, 10**6), st.floats(0, 1, exclude_max=True))
def test_one_depth_in_each_stratum(count, number, start):
    depths = stratified(count, number, start)
    assert [int(depth * count + 1e-9) for depth in depths] == list(range(count))
    assert depths[0] >= 0 and depths[-1] < 1


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.floats(0, 1, exclude_max=True), st.integers(0, 1000))
def test_many_samples_are_even_too(count, start, first):
    """One question a sample at random depths would leave holes that a golden-ratio sequence does not."""
    depths = np.concatenate([stratified(count, first + number, start) for number in range(100)])
    counts = np.histogram(depths, bins=10, range=(0, 1))[0]
    assert abs(counts - 10 * count).max() <= 3 * count


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=2), max_size=30), st.integers(0, 40))
def test_picking_takes_so_many_and_fills_empty_bins_first(depths, limit):
    balance = DepthBalance(5)
    picked = balance.pick(depths, limit)
    assert picked == sorted(set(picked)) and len(picked) == min(limit, len(depths))
    single = [index for index, each in enumerate(depths) if len(each) == 1]
    if len(single) == len(depths) and picked:
        bins = {bin_of(each[0], 5) for each in depths}
        taken = {bin_of(depths[index][0], 5) for index in picked}
        assert len(taken) == min(len(bins), len(picked))


def test_free_choice_among_places_is_perfectly_even():
    balance = DepthBalance(10)
    for number in range(100):
        places = [[float(depth)] for depth in stratified(16, number, 0.3)]
        balance.add(places[balance.best(places)])
    assert balance.counts.tolist() == [10] * 10


def write(path, numbers, sentences):
    lines = [
        {"id": str(number), "text": document(number, sentences), "source": "s", "path": "p"}
        for number in numbers
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return DocumentFile(path), lines


def items_of(record, places, sentences):
    found = []
    for place in places:
        day = 1000 * int(record["id"]) + 1 + place % sentences
        start = record["text"].index(sentence(day))
        found.append(Item(question(day), answer(day), (Span(start, start + len(sentence(day))),)))
    return found


@pytest.mark.parametrize(
    ("sentences", "spec"),
    [
        (120, {"length": 1200}),
        (20, {"length": 1800, "distractors": 8}),
    ],
)
def test_samples_are_even_though_all_evidence_stands_at_the_same_place(student, tmp_path, sentences, spec):
    """Windows of long documents and places of short ones move the evidence to where it lacks."""
    documents, records = write(tmp_path / "documents.jsonl", range(1, 41), sentences)
    composer = Composer(
        ConversationConfig.from_dict(spec), student.tokenizer, student.chat, documents, seed=5
    )
    middle = sentences // 2
    samples = []
    for number, record in enumerate(records):
        sample = composer.compose(number, record, items_of(record, [middle], sentences))
        assert sample is not None
        samples.append(sample)
        assert sample.length <= spec["length"]
        context = sample.turns[0]["content"]
        assert sentence(1000 * int(record["id"]) + 1 + middle) in context
        measured = len(
            student.tokenizer.encode(context.partition(sentence(1000 * int(record["id"]) + 1 + middle))[0])
        )
        assert abs(measured / len(student.tokenizer.encode(context)) - sample.depths[0][0]) < 0.06
    counts = composer.balance.counts
    assert counts.sum() == 40
    if "distractors" not in spec:
        assert counts.min() >= 2
    # A document of a third of the context has its middle at a sixth from either end at least.
    inner = counts if "distractors" not in spec else counts[2:8]
    assert inner.max() - inner.min() <= 5
    assert np.mean([sample.length for sample in samples]) > 0.75 * spec["length"]


def test_documents_come_first_and_distractors_are_other_documents(student, tmp_path):
    documents, records = write(tmp_path / "documents.jsonl", range(1, 6), 12)
    spec = ConversationConfig(length=1500, distractors=2)
    sample = Composer(spec, student.tokenizer, student.chat, documents, seed=0).compose(
        1, records[1], items_of(records[1], range(12), 12)
    )
    assert sample is not None and len(sample.items) == 12
    assert 1 <= len(sample.distractors) <= 2 and "2" not in sample.distractors
    alone = Composer(ConversationConfig(length=1500), student.tokenizer, student.chat, documents, seed=0)
    whole = alone.compose(1, records[1], items_of(records[1], range(12), 12))
    assert whole is not None and records[1]["text"] in whole.turns[0]["content"] and not whole.distractors


def test_first_turns_are_drawn_by_document_and_fit(student, tmp_path):
    """Trained on one wording alone, a model answered where it stood and went on writing the text where it did not."""
    names = ("conversation_v1", "conversation_bare_v1", "conversation_below_v1")
    documents, records = write(tmp_path / "documents.jsonl", range(1, 25), 12)
    spec = ConversationConfig(length=900, first_turns=names)

    def firsts() -> list[str]:
        composer = Composer(spec, student.tokenizer, student.chat, documents, seed=1)
        samples = [composer.compose(n, record, items_of(record, [6], 12)) for n, record in enumerate(records)]
        assert all(sample is not None and sample.length <= 900 for sample in samples)
        return [sample.turns[0]["content"] for sample in samples]

    turns = firsts()
    asked = [text.rsplit("\n", 1)[1] for text in turns]
    kinds = Counter(
        "above" if text.startswith(question) else "told" if text.startswith("Read the text") else "bare"
        for text, question in zip(turns, asked)
    )
    assert len(kinds) == 3 and min(kinds.values()) >= 3
    assert turns == firsts()
    with pytest.raises(ConfigError, match="conversation_v9"):
        Composer(
            ConversationConfig(first_turns=("conversation_v9",)),
            student.tokenizer,
            student.chat,
            documents,
            seed=1,
        )


def test_questions_asked_apart_are_branches_of_one_text(student, tmp_path):
    """All questions but the first of a text were asked with answers before them, and only answers in such a place were
    learnt. Asked apart, each is what a model sees that is asked it alone."""
    documents, records = write(tmp_path / "documents.jsonl", [1], 40)
    spec = ConversationConfig(length=700, first_turns=("conversation_bare_v1",), apart=True)
    composer = Composer(spec, student.tokenizer, student.chat, documents, seed=1)
    sample = composer.compose(0, records[0], items_of(records[0], range(0, 40, 4), 40))
    assert sample is not None and len(sample.branches) == len(sample.items) == len(sample.depths) > 3
    found = student.chat.encode_record(sample.turns, {"branches": sample.branches})
    assert len(found.ids) == sample.length <= 700 and len(found.parts) == len(sample.branches)
    text = sample.turns[0]["content"]
    alone = load_prompt("conversation_bare_v1").render(context=text[:-1], question=sample.items[1].question)
    ask, reply = sample.branches[1]
    assert text.endswith("\n") and text + ask["content"] == alone
    assert reply == {"role": "assistant", "content": sample.items[1].answer}
    with pytest.raises(ConfigError, match="the first turn conversation_below_v1"):
        ConversationConfig(first_turns=("conversation_v1", "conversation_below_v1"), apart=True)


def test_what_does_not_fit_is_counted(student, tmp_path):
    documents, records = write(tmp_path / "documents.jsonl", [1], 100)
    composer = Composer(ConversationConfig(length=700), student.tokenizer, student.chat, documents, seed=0)
    sample = composer.compose(0, records[0], items_of(records[0], range(100), 100))
    assert sample is not None and sample.length <= 700
    assert composer.left_out["question: no room, or outside the window"] == 100 - len(sample.items) > 50
    tiny = Composer(ConversationConfig(length=30), student.tokenizer, student.chat, documents, seed=0)
    assert tiny.compose(0, records[0], items_of(records[0], [5], 100)) is None
    assert tiny.left_out["sample: questions too long for the length"] == 1
    marked = {**records[0], "text": records[0]["text"] + "\U000f0001"}
    assert (
        Composer(ConversationConfig(length=9000), student.tokenizer, student.chat, documents, seed=0).compose(
            0, marked, items_of(records[0], [5], 100)
        )
        is None
    )
