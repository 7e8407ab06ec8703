from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ConfigError, DataError
from longspan.data.tokenizer import Tokenizer
from longspan.eval.fitting import fit_units
from longspan.eval.prompts import PromptForm
from longspan.eval.records import read_records
from longspan.eval.ruler import compose
from longspan.eval.ruler.cache import CachedSample, SampleCache
from longspan.eval.ruler.qa_documents import QaData, read_qa
from longspan.eval.ruler.subtasks import SUBTASKS
from longspan.eval.ruler.task import Ruler, RulerConfig
from tests.eval.conftest import make_text
from tests.eval.perfect import run_perfect, run_wrong
from tests.eval.ruler_solver import solve
from tests.eval.tokenizer_styles import STYLES, build_tokenizer

ESSAY = "\n".join(make_text(seed, 40) for seed in range(4))
GENERATED = [name for name in SUBTASKS if not name.startswith("qa")]
LENGTH = 3000


def make(tokenizer: Tokenizer, *, chat: str | None = None, **values: Any) -> Ruler:
    given = {key: values.pop(key) for key in ("qa", "cache", "essay") if key in values}
    ruler = RulerConfig.from_dict({"lengths": [LENGTH], "samples": 2, **values})
    return Ruler(ruler, PromptForm(tokenizer, chat_template=chat), **{"essay": ESSAY, **given})


@pytest.fixture(scope="module")
def qa_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """SQuAD and HotpotQA in small: 60 documents of made-up words each, two questions."""
    folder = tmp_path_factory.mktemp("qa")
    articles = []
    for article in range(6):
        paragraphs = []
        for place in range(10):
            text = f"Fact {article} {place}. {make_text(100 * article + place, 6)}"
            answers = [{"text": f"Fact {article} {place}", "answer_start": 0}, {"text": f"{article} {place}"}]
            asked = {"question": f"Which fact is {place}?", "is_impossible": place > 0, "answers": answers}
            paragraphs.append({"context": text, "qas": [asked]})
        articles.append({"title": f"article {article}", "paragraphs": paragraphs})
    (folder / "squad.json").write_text(json.dumps({"version": "v2.0", "data": articles}))
    items = [
        {
            "question": f"Who is {number}?",
            "answer": f"Person {number}",
            "context": [[f"Person {number} {k}", [make_text(1000 + 10 * number + k, 5)]] for k in range(10)],
        }
        for number in range(6)
    ]
    (folder / "hotpot.json").write_text(json.dumps(items))
    return [folder / "squad.json", folder / "hotpot.json"]


@pytest.fixture(scope="module")
def qa(qa_files: list[Path]) -> list[QaData]:
    return [read_qa(path) for path in qa_files]


def test_perfect_answers_score_one_and_wrong_ones_zero(
    tokenizer: Tokenizer, qa: list[QaData], tmp_path: Path
) -> None:
    """All thirteen tasks; a scorer or template that loses a part would show as a cell below 1."""
    task = make(tokenizer, qa=qa)
    summary = run_perfect(task, tokenizer, tmp_path / "perfect.jsonl")
    assert [cell["mean"] for cell in summary["cells"]] == [1.0] * 13
    assert summary["by_length"] == [{"length": LENGTH, "subtasks": 13, "mean": 1.0}]
    assert run_wrong(task, tokenizer, tmp_path / "wrong.jsonl")["mean"] == 0.0
    header, samples, _ = read_records(tmp_path / "perfect.jsonl")
    assert header["params"]["scorer"]["name"] == "by_metric"
    assert {(sample["subtask"], sample["sample"]) for sample in samples} == {
        (name, sample) for name in SUBTASKS for sample in range(2)
    }
    # 2 of 4 values are half of the score: parts are counted.
    assert {sample["metric"] for sample in samples} == {"string_match_all", "string_match_part"}


@pytest.mark.parametrize("name", GENERATED)
def test_answer_is_in_the_text_and_nowhere_else(name: str, tokenizer: Tokenizer) -> None:
    """Read from the prompt alone: a second needle with the same key, or a tie of words, has two answers."""
    task = make(tokenizer, subtasks=[name], samples=4)
    prompts = set()
    for planned in task.plan():
        built = task.build(planned)
        assert sorted(solve(name, built.request.prompt)) == sorted(built.expected)
        prompts.add(built.request.prompt)
    assert len(prompts) == 4


@pytest.mark.parametrize("name", GENERATED)
@settings(max_examples=6, deadline=None)
@given(length=st.integers(1900, 6000), seed=st.integers(0, 1000))
def test_lengths_are_kept(name: str, tokenizer: Tokenizer, length: int, seed: int) -> None:
    """One token over the length is refused by servers; much less is another length."""
    if name == "cwe":
        length = min(length, 4000)  # longer ones begin with 490 words, some 5,000 tokens of this tokenizer
    task = make(tokenizer, subtasks=[name], lengths=[length], samples=1, seed=seed)
    built = task.build(task.plan()[0])
    assert built.request.prompt_ids is not None
    achieved = len(built.request.prompt_ids) + SUBTASKS[name].answer_tokens
    assert achieved == built.fields["achieved_length"]
    assert length - max(length // 100, 170) <= achieved <= length


@pytest.mark.parametrize("style", STYLES)
def test_other_tokenizers_and_chats(style: str, tmp_path: Path) -> None:
    """The beginning of the answer is the assistant's in a chat, and the text's end elsewhere."""
    tokenizer = build_tokenizer(style, tmp_path)
    plain = make(tokenizer, subtasks=["vt"], lengths=[4000], samples=1)
    built = plain.build(plain.plan()[0])
    assert built.request.prompt.endswith("they are:") and built.request.messages is None
    asked = make(tokenizer, chat=style, subtasks=["vt"], lengths=[4000], samples=1)
    built = asked.build(asked.plan()[0])
    assert built.request.messages is not None and built.request.prompt_ids is not None
    user, assistant = built.request.messages
    assert user["content"].endswith("in the text above.")
    assert assistant["content"].startswith("Answer: According") and built.request.prompt.endswith("they are:")
    assert 3900 <= built.fields["achieved_length"] <= 4000


@pytest.mark.parametrize(
    ("release", "ending", "between", "lines", "first"),
    [
        (
            "2024",
            "5 variables are assgined the value",
            "\n\n\n\nMemorize",
            "again.\n The grass",
            "in the list are:1. ",
        ),
        (
            "2025",
            "5 variables are assigned the value",
            " [A-Z]{3}\n\nMemorize",
            "again.\nThe grass",
            "list are: 1. ",
        ),
    ],
)
def test_each_release_has_its_own_words(
    release: str, ending: str, between: str, lines: str, first: str, tokenizer: Tokenizer
) -> None:
    """Numbers of one release stood beside those of another: spelling, borders and the example differ."""
    task = make(tokenizer, subtasks=["vt", "cwe"], lengths=[6000], samples=1, release=release)
    chain, words = (task.build(planned).request.prompt for planned in task.plan())
    assert ending in chain[-100:] and lines in chain and re.search(between, chain)
    assert sorted(solve("vt", chain)) == sorted(task.build(task.plan()[0]).expected)
    assert first in words and words.count("most common words") == 2
    assert task.params()["release"] == release


def test_questions_keep_their_documents(tokenizer: Tokenizer, qa: list[QaData]) -> None:
    """Without the document that it needs a question has no answer; lengths are filled with others."""
    task = make(tokenizer, qa=qa, subtasks=["qa_1", "qa_2"], lengths=[2500, 5000], samples=3)
    for planned in task.plan():
        built = task.build(planned)
        data = qa[0] if planned.key[0] == "qa_1" else qa[1]
        question = data.questions[int(planned.key[2])]
        assert all(data.documents[index] in built.request.prompt for index in question.needed)
        assert f"Question: {question.text}" in built.request.prompt
        assert built.expected == question.answers
        assert planned.tokens - 400 <= built.fields["achieved_length"] <= planned.tokens


def test_documents_come_again_where_there_are_too_few(tokenizer: Tokenizer, qa: list[QaData]) -> None:
    """A context that is shorter than its column would flatter the model."""
    task = make(tokenizer, qa=qa, subtasks=["qa_1"], lengths=[40_000], samples=7)
    built = task.build(task.plan()[0])
    assert 39_500 <= built.fields["achieved_length"] <= 40_000
    counts = [built.request.prompt.count(document) for document in qa[0].documents]
    assert max(counts) - min(counts) <= 1 < min(counts)
    with pytest.raises(DataError, match="no question 6"):
        task.build(task.plan()[6])


def test_tasks_without_material_are_left_out(tokenizer: Tokenizer) -> None:
    """No question is invented; asking for such a task by name is a mistake."""
    task = make(tokenizer)
    assert set(task.left_out) == {"qa_1", "qa_2"} and len(task.subtasks) == 11
    with pytest.raises(ConfigError, match="--qa-data"):
        make(tokenizer, subtasks=["qa_2"])


def test_cached_samples_are_the_composed_ones(
    tokenizer: Tokenizer, qa: list[QaData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run composes nothing and asks the same; more samples compose only those."""
    cache = SampleCache(tmp_path)
    bare = make(tokenizer, qa=qa)
    built = [bare.build(planned) for planned in bare.plan()]
    first = make(tokenizer, qa=qa, cache=cache)
    for planned, wanted in zip(first.plan(), built):
        assert_same(first.build(planned), wanted)
    second = make(tokenizer, qa=qa, cache=cache)
    monkeypatch.setattr(second, "_composed", None)
    for planned, wanted in zip(second.plan(), built):
        assert_same(second.build(planned), wanted)
    assert len(list(tmp_path.rglob("*.sample"))) == 26


def assert_same(built: Any, wanted: Any) -> None:
    assert built.expected == wanted.expected and built.fields == wanted.fields
    assert np.array_equal(built.request.prompt_ids, wanted.request.prompt_ids)
    assert built.request.prompt_ids.dtype == np.int64
    rest = [request._replace(prompt_ids=None) for request in (built.request, wanted.request)]
    assert rest[0] == rest[1]


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer, tmp_path: make(tokenizer, seed=1),
        lambda tokenizer, tmp_path: make(tokenizer, lengths=[LENGTH + 64]),
        lambda tokenizer, tmp_path: make(tokenizer, essay=ESSAY + " More."),
        lambda tokenizer, tmp_path: make(build_tokenizer("qwen", tmp_path / "other")),
        lambda tokenizer, tmp_path: make(build_tokenizer("llama-3", tmp_path / "chat"), chat="llama-3"),
    ],
)
def test_whatever_determines_a_sample_is_in_its_key(
    change: Callable[[Tokenizer, Path], Ruler], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """A key that is too small gives one evaluation the samples of another."""

    def keys(task: Ruler) -> set[str]:
        task._cache = SampleCache(tmp_path / "cache")
        found: set[str] = set()
        monkey = pytest.MonkeyPatch()
        monkey.setattr(SampleCache, "load", lambda self, key: found.add(key) or EMPTY)
        for planned in task.plan():
            if planned.key[0] == "niah_single_2":
                task.build(planned)
        monkey.undo()
        return found

    before = keys(make(tokenizer))
    assert len(before) == 2 and before == keys(make(tokenizer))
    assert not before & keys(change(tokenizer, tmp_path))


EMPTY = CachedSample(
    "", np.zeros(0, np.int64), {"answers": ["1"], "question": "", "messages": None, "thinking": "unknown"}
)


@settings(max_examples=30, deadline=None)
@given(prompt=st.text(max_size=40), ids=st.lists(st.integers(0, 200_000), max_size=20))
def test_cache_keeps_any_sample(tmp_path_factory: Any, prompt: str, ids: list[int]) -> None:
    cache = SampleCache(tmp_path_factory.mktemp("cache"))
    sample = CachedSample(prompt, np.array(ids, np.int64), {"answers": ["\u00e9\n"], "messages": None})
    assert cache.load("0" * 32) is None
    cache.save("0" * 32, sample)
    found = cache.load("0" * 32)
    assert found is not None and (found.prompt, found.details) == (sample.prompt, sample.details)
    assert found.prompt_ids.tolist() == ids


@pytest.mark.parametrize("content", [b"", b"{}", b"{}\n", b"no json\n", b"\n" * 300])
def test_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    """A file that another program cut is said, not taken for a sample."""
    cache = SampleCache(tmp_path)
    cache.save("0" * 32, EMPTY)
    (path,) = tmp_path.rglob("*.sample")
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a cached sample"):
        cache.load("0" * 32)


def test_unfit_lengths_are_reasons(tokenizer: Tokenizer) -> None:
    task = make(tokenizer, lengths=[300], samples=1)
    for planned in task.plan():
        with pytest.raises(DataError, match="does not fit 300 tokens"):
            task.build(planned)


@pytest.mark.parametrize(
    "values", [{"subtasks": ["niah"]}, {"subtasks": ["vt", "vt"]}, {"lengths": []}, {"samples": 0}]
)
def test_malformed_settings_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RulerConfig.from_dict({"lengths": [4096], **values})


@pytest.mark.parametrize("content", ["[]", "{}", '{"data": [{}]}', '[{"question": "a"}]', "3"])
def test_other_qa_files_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "qa.json").write_text(content)
    with pytest.raises(DataError, match=r"neither SQuAD nor HotpotQA|no question"):
        read_qa(tmp_path / "qa.json")


@settings(max_examples=60, deadline=None)
@given(
    fixed=st.integers(0, 50),
    unit=st.integers(1, 30),
    budget=st.integers(100, 5000),
    start=st.integers(-50, 5000),
    guess=st.floats(0.5, 60),
)
def test_fit_is_found_from_any_guess(fixed: int, unit: int, budget: int, start: int, guess: float) -> None:
    """A bad guess of the size of a unit costs tries, never the length."""
    found = fit_units(
        lambda units: (units, fixed + unit * units),
        budget=budget,
        slack=max(budget // 100, 2 * unit),
        start=start,
        tokens_per_unit=guess,
    )
    assert found.tokens == fixed + unit * found.made <= budget
    assert budget - found.tokens <= max(budget // 100, 2 * unit)


@pytest.mark.parametrize(
    "essay",
    [
        "".join(f"\u7b2c{n}\u6761\u6cb3\u5f88\u957f\u3002" for n in range(300)),
        " ".join(f"\u092f\u0939 {n} \u0939\u0948\u0964" for n in range(300)),
        "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22" * 2000,
        "x=" + "+".join(f"f({n})" for n in range(2000)),
    ],
)
def test_essays_of_any_script_have_many_depths(essay: str) -> None:
    """Guards against a text without `. ` as one sentence: every needle stood at one of its ends."""
    sentences = compose.sentences_of(essay)
    assert len(sentences) > 20 and max(map(len, sentences)) <= 600
    assert "".join(sentences).rstrip() == essay  # nothing is put between characters
    subtask = SUBTASKS["niah_single_2"]
    places = set()
    for seed in range(12):
        draft = compose.niah(subtask, sentences, np.random.default_rng(seed), len(sentences))
        hay = draft.prompt.partition("\n")[2].rpartition("\n")[0]
        places.add(hay.index("One of the special") * 10 // len(hay))
    assert len(places) > 3


def test_english_sentences_are_parted_at_marks_and_capitals_alone() -> None:
    """Guards against other essays than RULER's: neither line ends nor abbreviations of lists count."""
    essay = 'He came.\nShe left at 3 p.m. today! "So?" he\nasked. It rained.'
    assert compose.sentences_of(essay) == [
        "He came. ",
        "She left at 3 p.m. today! ",
        '"So?" he asked. ',
        "It rained. ",
    ]
