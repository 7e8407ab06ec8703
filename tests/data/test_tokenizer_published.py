"""Published tokenizers, rebuilt small: the fast engine gives the ids of the Hugging Face library, or steps aside.

The vocabularies here stretch over where the steps split, so that a split in another place has other ids.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.data_tokenizers import PUBLISHED, SMOLLM_LACKS, build
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.data.tokenizer import Tokenizer, load_tokenizer, loading
from longspan.data.tokenizer.fast import numerics, overlap
from longspan.data.tokenizer.young import Watch

SLOW = {
    "cl100k (GPT-4), as written": "splits texts with",
    "Falcon": "splits texts with Punctuation",
}

FRAGMENTS = (
    *("a", "Z", " the", " The", "THE", "self", "camelCase", " ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "'\u017f"),
    *("\u2019s", "'", ".", "!?", "/", "//", "\\", "_", "1", "12", "1234", "\u0663\u0664", "\u00bd", "\u00b2", "\u2167"),
    *("\u00e9", "e\u0301", "\u00c5", "A\u030a", ">", ">\u0338", "\u0301", "\u093f", "\u0939\u093f", "\u0e01", "\u05d0"),
    *("\u4f60", "\u3002", "\u3072", "\u30ab", "\ud55c", "\u1112\u1161\u11ab", "\U0001f642"),
    "\U0001f468\u200d\U0001f469",
    *("\u00a0", "\u2003", "\u3000", "\u2028", "\x85", "\x0b", "\x1c", "\x1d", "\x04", "\x00", "\x7f", "\u200b"),
    "\ufeff",
    *("\u01c5", "\u02b0", "\u0130", "\u00df", "\ufb01", "\U00040000", "\U000f1234", "\U0010ffff", "\u2581", "\u0120"),
    *("<s>", "</s>", "</s>  ", "<unk>", "<|endoftext|>", "<|im_start|>", "<tool_call>", "<think>", "<table>", "\n\n\n"),
    # Younger than one of the engines: letters, a digit, marks in and out of order, letters that are joined.
    *("\u088f", "\ua7ce", "\U000323b0", "\U00011de3", "\u0898", "\u0899\u0898", "\u1ac3\u1ac2", "\U00016d67\U00016d67"),
)  # fmt: skip
TEXT = st.lists(st.sampled_from(FRAGMENTS) | st.characters(exclude_categories=["Cs"]), max_size=20).map(
    "".join
)


def engines(folder: Path, content: dict[str, Any]) -> tuple[Tokenizer, Tokenizer]:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return load_tokenizer(folder), load_tokenizer(folder, backend="hf")


def training_texts() -> list[str]:
    chance = random.Random(5)
    return ["".join(chance.choices(FRAGMENTS, k=12)) for _ in range(600)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Tokenizer]]:
    folder, texts = tmp_path_factory.mktemp("published"), training_texts()
    return {
        name: engines(folder / str(number), build(each, texts, vocab_size=1500, across=True))
        for number, (name, each) in enumerate(PUBLISHED.items())
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tokenizers(loaded: dict[str, tuple[Tokenizer, Tokenizer]], name: str) -> None:
    """Guards against other ids than those the model was trained with, and against a slow engine without need."""
    ours, reference = loaded[name]
    if name in SLOW:
        assert ours.backend == "hf" and SLOW[name] in ours.backend_reason
        return
    assert ours.backend == "gigatoken", ours.backend_reason

    @settings(max_examples=120, deadline=None)
    @given(text=TEXT)
    def check(text: str) -> None:
        assert ours.encode(text, utf8=text.encode()).tolist() == reference.encode(text).tolist()

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", set(PUBLISHED) - set(SLOW))
def test_every_character(loaded: dict[str, tuple[Tokenizer, Tokenizer]], name: str) -> None:
    """Guards against a character that one engine takes for a letter and the other for a sign."""
    ours, reference = loaded[name]
    # No character is assigned in the planes between.
    codes = (*range(0xD800), *range(0xE000, 0x34000), *range(0xE0000, 0xE0200), 0x10FFFF)
    characters = list(map(chr, codes))
    for start in range(0, len(characters), 1024):
        for between in ("", "a", "!"):
            text = between.join(characters[start : start + 1024])
            assert np.array_equal(ours.encode(text), reference.encode(text)), f"from U+{start:04X}"


def test_missing_bytes(
    loaded: dict[str, tuple[Tokenizer, Tokenizer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against the whole of a long text on the slow engine for one byte that the vocabulary lacks.

    The Hugging Face library drops such a byte without a word, and what stood around it may join.
    """
    from longspan.data.tokenizer import engine

    ours, reference = loaded["SmolLM2, StarCoder 2"]
    assert ours._fast is not None
    for byte in filter(lambda each: each < 0x80, SMOLLM_LACKS):
        text = f"the{chr(byte)}the {chr(byte)} 1{chr(byte)}2"
        assert ours._fast(text.encode()) is None
        assert ours.encode(text).tolist() == reference.encode(text).tolist()
    monkeypatch.setattr(engine, "PIECE_CHARACTERS", {"gigatoken": 1 << 20, "hf": 50})
    slow: list[str] = []
    encode = engine.encode_reference
    monkeypatch.setattr(
        engine, "encode_reference", lambda model, text: (slow.append(text), encode(model, text))[1]
    )
    text = "the self " * 100 + "a\x04b" + " the self" * 100
    ids = ours.encode(text).tolist()
    assert len(slow) == 1 and len(slow[0]) < 120
    assert ids == reference.encode(text).tolist()


def test_digits_of_every_script(loaded: dict[str, tuple[Tokenizer, Tokenizer]]) -> None:
    """Guards against digits that the list lacks: a run of them would become one part of the text."""
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    codes = (*range(0x20000, 0x34000), *range(0xE0000, 0xE0200))
    assert all(len(part) > 1 or part == "a" for part, _ in digits.pre_tokenize_str("a".join(map(chr, codes))))
    ours, reference = loaded["SmolLM2, StarCoder 2"]
    text = "x".join(numerics()) + numerics() + " ".join(numerics())
    assert np.array_equal(ours.encode(text), reference.encode(text))
    assert len(digits.pre_tokenize_str(numerics())) == len(numerics())


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"normalizer": {"type": "NFKC"}}, "normalized with NFKC"),
        ({"model": {"dropout": 0.1}}, "a dropout"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "a end_of_word_suffix"),
        ({"pre_tokenizer": None}, "not split into bytes"),
        ({"step": {"behavior": "Removed"}}, "is Removed"),
        ({"step": {"behavior": "MergedWithNext"}}, "is MergedWithNext"),
        ({"step": {"pattern": {"String": " "}}}, "splits texts at ' '"),
        ({"step": {"type": "Digits", "individual_digits": False}}, "runs of digits"),
        ({"step": {"type": "WhitespaceSplit"}}, "with WhitespaceSplit"),
        ({"level": {"add_prefix_space": True}}, "a space before every part"),
        ({"level": {"use_regex": True}}, "splits texts twice"),
        ({"token": {"content": "<tool>", "single_word": True}}, "as a whole word"),
        ({"token": {"content": "|eos|"}}, "'<|eos|>' and '|eos|' may overlap"),
        ({"token": {"content": ">x"}}, "may overlap"),
        (
            {"token": {"content": "<t>", "normalized": True}, "normalizer": {"type": "NFC"}},
            "in normalized text",
        ),
    ],
)
def test_what_is_not_known_is_slow(
    tokenizer: Tokenizer, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    """Guards against settings that gigatoken passes over in silence: a sample need not show them."""
    content = json.loads(tokenizer.path.read_text())
    split, level = content["pre_tokenizer"]["pretokenizers"]
    split.update(change.pop("step", {}))
    level.update(change.pop("level", {}))
    content["model"].update(change.pop("model", {}))
    if "token" in change:
        plain = {**content["added_tokens"][0], "special": False, "id": 300, **change.pop("token")}
        content["added_tokens"].append(plain)
    ours, _ = engines(tmp_path, content | change)
    assert ours.backend == "hf" and reason in ours.backend_reason


def test_text_that_spells_a_byte(tmp_path: Path) -> None:
    """Guards against `<0x0A>` in a text, where words are made of it, being taken for a line end."""
    content = build(PUBLISHED["Llama 2, Mistral v1"], ["x<0x0A>y"] * 9, vocab_size=400, across=True)
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    vocab["\u2581<0x0A>"] = max(vocab.values()) + 1
    vocab.setdefault("\u2581", len(vocab))
    merges.append(["\u2581", "<0x0A>"])
    ours, _ = engines(tmp_path, content)
    assert ours.backend == "hf" and "merges" in ours.backend_reason


@settings(max_examples=200, deadline=None)
@given(some=st.text("ab<", min_size=1, max_size=4), other=st.text("ab<", min_size=1, max_size=4))
def test_overlap(some: str, other: str) -> None:
    """Against trying every distance between the two."""
    joined = any(
        all(some[i] == other[i - shift] for i in range(len(some)) if 0 <= i - shift < len(other))
        for shift in range(1 - len(other), len(some))
    )
    assert (overlap([some], ["zz", other]) is not None) == joined


def test_watch_finds_what_it_lists() -> None:
    """Guards against a character that is looked for and not found, and against old ones found."""
    plain, both = Watch(normalizes=False), Watch(normalizes=True)
    for young in ("\u088f", "\ua7f1", "\U00010940", "\U000323b0", "\U00033479", "\U0001fbfa"):
        assert plain(f"x{young}".encode()) and both(f"{young}".encode())
    for mark in ("\u07fd", "\u0898", "\u1df6", "\U00011f42", "\U0001e5ef"):
        assert both(f"a{mark}".encode()) and not plain(f"a{mark}".encode())
    for old in (
        "",
        "abc",
        "\u07ff\u0890\u4f60\U0001f642\U000323af\U0003347a\U0010ffff",
        "\u07dc",
        "\u0905" * 40,
    ):
        assert not both(old.encode())


def test_marks_are_no_ids(loaded: dict[str, tuple[Tokenizer, Tokenizer]]) -> None:
    """Guards against an id behind the vocabulary in a store."""
    ours, _ = loaded["SmolLM2, StarCoder 2"]
    for text in loading.SAMPLE:
        assert ours.encode(text).max(initial=0) < ours.vocab_size
