"""SentencePiece models and tiktoken ranks give the ids that their own libraries give."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ArgumentError, DataError
from longspan.data.tokenizer import Tokenizer, load_tokenizer, loading
from longspan.data.tokenizer.tiktoken import ENCODINGS

TEXT = st.text(max_size=60) | st.text(
    st.sampled_from("the model abc 12\n\t<s>/_.,'\u00e9\u4f60\u597d"), max_size=60
)


def train_sentencepiece(folder: Path, texts: list[str], kind: str, **options: Any) -> Path:
    trainer = pytest.importorskip("sentencepiece", reason="the sentencepiece package is not installed")
    (folder / "texts.txt").write_text("\n".join(texts))
    trainer.SentencePieceTrainer.train(
        input=str(folder / "texts.txt"),
        model_prefix=str(folder / "sp"),
        model_type=kind,
        vocab_size=400,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return folder / "sp.model"


LLAMA = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}


@pytest.fixture(scope="module")
def llama(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("llama"), texts, "bpe", **LLAMA)


@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_sentencepiece_bpe(llama: Path, text: str) -> None:
    """Guards against merges in another order, a lost leading space, and bytes of unknown characters."""
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(llama))
    ours = _loaded(llama)
    assert ours.encode(text).tolist() == theirs.encode(text)
    # SentencePiece gives NUL and other control characters back as they came; so do we.
    assert ours.decode(ours.encode(text)) == text


_cache: dict[Path, Tokenizer] = {}


def _loaded(path: Path) -> Tokenizer:
    if path not in _cache:
        _cache[path] = load_tokenizer(path)
    return _cache[path]


def test_sentencepiece_special_ids_and_engine(llama: Path) -> None:
    """Guards against a control piece matched in a text, and against the ids of BOS and EOS being guessed."""
    tokenizer = _loaded(llama)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    assert tokenizer.backend == "gigatoken", tokenizer.backend_reason
    assert not {1, 2} & set(tokenizer.encode("<s> the model </s>").tolist())
    assert tokenizer._cuts is not None


@pytest.mark.parametrize(
    "kind,options",
    [
        ("unigram", {"byte_fallback": True, "remove_extra_whitespaces": False}),
        ("unigram", {"normalization_rule_name": "nmt_nfkc"}),
        ("bpe", {"add_dummy_prefix": False, "normalization_rule_name": "identity"}),
        ("bpe", {**LLAMA, "user_defined_symbols": ["<tool>"], "pad_id": 3}),
    ],
)
def test_other_sentencepiece_models(
    texts: list[str], tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    """Guards against settings of the model that are read and not followed."""
    import sentencepiece

    path = train_sentencepiece(tmp_path, texts, kind, **options)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = load_tokenizer(path)
    chance = random.Random(3)
    samples = [*texts[:20], "a<tool>b 7", "the  model", "caf\u00e9 42", "\u4f60 model", "model "]
    samples += ["".join(chance.choices("the model abc", k=40)).lstrip() for _ in range(20)]
    for text in samples:
        assert ours.encode(text).tolist() == theirs.encode(text), text
    assert ours.pad_id == (3 if "pad_id" in options else None)


def test_broken_models(llama: Path, tmp_path: Path) -> None:
    """Guards against wild reads and library tracebacks for a damaged or another file."""
    data = llama.read_bytes()
    for content in (b"", b"\x0a", data[:1000], b"\xff" * 50, data[: len(data) // 2 + 1]):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(DataError, match=r"tokenizer\.model"):
            load_tokenizer(tmp_path)


def write_ranks(path: Path, tokens: list[bytes]) -> Path:
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    path.write_bytes(b"".join(lines))
    return path


@pytest.fixture(scope="module")
def ranks(tokenizer: Tokenizer) -> list[bytes]:
    """256 bytes and the merges of the room's small tokenizer, in order."""
    content = json.loads(tokenizer.path.read_text())
    from longspan.data.tokenizer.tiktoken import byte_letters

    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    merged = ["".join(pair) for pair in content["model"]["merges"]]
    return [bytes([byte]) for byte in range(256)] + [bytes(map(byte_of.__getitem__, m)) for m in merged]


@settings(max_examples=100, deadline=None)
@given(text=TEXT, name=st.sampled_from(sorted(ENCODINGS)))
def test_tiktoken(ranks: list[bytes], tmp_path_factory: pytest.TempPathFactory, text: str, name: str) -> None:
    """Guards against other merges, another split, and special strings taken for special tokens."""
    tiktoken = pytest.importorskip("tiktoken", reason="the tiktoken package is not installed")
    path = tmp_path_factory.getbasetemp() / f"{name}.tiktoken"
    if path not in _cache:
        write_ranks(path, ranks)
    numbers = {token: rank for rank, token in enumerate(ranks)}
    theirs = tiktoken.Encoding(
        name, pat_str=ENCODINGS[name].pattern, mergeable_ranks=numbers, special_tokens={"<s>": 999}
    )
    ours = _loaded(path)
    assert ours.encode(text).tolist() == theirs.encode_ordinary(text)
    assert ours.decode(ours.encode(text)) == text


def test_tiktoken_names(ranks: list[bytes], tmp_path: Path) -> None:
    """Guards against a guessed split, and special tokens at other ids than published ones."""
    path = write_ranks(tmp_path / "tokenizer.model", ranks)
    with pytest.raises(ArgumentError, match=r"tokenizer\.model#llama-3"):
        load_tokenizer(tmp_path)
    tokenizer = load_tokenizer(f"{path}#llama-3")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (len(ranks), len(ranks) + 1)
    assert tokenizer.token_id("<|eot_id|>") == len(ranks) + 9
    assert tokenizer.vocab_size == len(ranks) + 256
    assert tokenizer.backend == "gigatoken", tokenizer.backend_reason
    assert tokenizer.bos_id not in tokenizer.encode("<|begin_of_text|>").tolist()
    words = load_tokenizer(f"{path}#\\s+|\\S+")
    assert words.decode(words.encode("12 ab")) == "12 ab"
    assert words.fingerprint != tokenizer.fingerprint
    published = write_ranks(tmp_path / "cl100k_base.tiktoken", ranks)
    assert load_tokenizer(published).eos_id == len(ranks) + 1


def test_broken_ranks(ranks: list[bytes], tmp_path: Path) -> None:
    """Guards against a cut or damaged file being taken for a smaller vocabulary."""
    path = write_ranks(tmp_path / "gpt2.tiktoken", ranks[:-1])
    whole = path.read_bytes()
    for content, message in (
        (whole + b"!!!! 7\n", f"gpt2.tiktoken:{len(ranks)} is not"),
        (whole + b"YWI= 5\n", "a rank twice"),
        (b"".join(whole.splitlines(keepends=True)[:100]), "156 bytes without a rank"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            load_tokenizer(path)


def test_a_tokenizer_travels_as_its_name(ranks: list[bytes], tmp_path: Path) -> None:
    """Guards against other processes encoding with another split or engine."""
    import pickle  # noqa: TID251  what multiprocessing does to arguments

    path = write_ranks(tmp_path / "tokenizer.model", ranks)
    tokenizer = load_tokenizer(f"{path}#o200k", backend="hf")
    there = pickle.loads(pickle.dumps(tokenizer))
    assert (there.backend, there.fingerprint) == ("hf", tokenizer.fingerprint)
    assert pickle.loads(pickle.dumps(tokenizer)) is there, "loaded once in a process"


def test_only_another_machine_or_file_is_checked_again(
    tokenizer: Tokenizer, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against trust in what was found out elsewhere, or about a file that has changed since."""
    findings = tokenizer._findings
    there = loading.reload_tokenizer(findings)
    assert "_reference" not in vars(there), "made when it is asked for"
    assert [there.encode(text).tolist() for text in texts] == [
        tokenizer.encode(text).tolist() for text in texts
    ]
    assert there.decode(there.encode(texts[0])) == texts[0]
    checked: list[str] = []

    def load(name: str, **_: object) -> Tokenizer:
        checked.append(name)
        return tokenizer

    monkeypatch.setattr(loading, "load_tokenizer", load)
    loading.reload_tokenizer(findings)
    assert not checked
    loading.reload_tokenizer(findings._replace(machine="another"))
    loading.reload_tokenizer(findings._replace(digest="another"))
    assert checked == [findings.name] * 2


EDGES = st.sampled_from(
    [
        "a",
        "Z",
        " ",
        "  ",
        "\n",
        "\t",
        "'s",
        "'",
        ".",
        "12",
        "\u00e9",
        "e\u0301",
        "\u4f60",
        "\u3002",
        "\uff0c",
        "<|eos|>",
    ]
)


@pytest.mark.parametrize("name", ["split-digits", "cl100k", "o200k", "gpt2", "llama", "qwen2"])
def test_cut_texts_have_the_same_ids(
    name: str, tokenizer: Tokenizer, ranks: list[bytes], llama: Path, tmp_path: Path, cut_everywhere: Cut
) -> None:
    """Guards against ids that depend on where a long text was cut: every sound place is a cut here."""
    if name == "split-digits":
        path: Any = tokenizer.path
    elif name == "llama":
        path = llama
    elif name == "qwen2":
        content = json.loads(tokenizer.path.read_text())
        content["normalizer"] = {"type": "NFC"}
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(content))
    else:
        path = write_ranks(tmp_path / f"{name}.tiktoken", ranks)
    whole = load_tokenizer(path, backend="hf")
    assert whole._cuts is not None
    pieces = load_tokenizer(path)
    cut_everywhere(pieces)

    @settings(max_examples=150, deadline=None)
    @given(parts=st.lists(EDGES | st.text(max_size=3), max_size=40))
    def check(parts: list[str]) -> None:
        text = "".join(parts)
        wanted = whole._encode(text).tolist()
        assert pieces.encode(text).tolist() == wanted
        offsets = whole._encode_with_offsets(text, 0)
        found = pieces.encode_with_offsets(text)
        assert found.ids.tolist() == wanted
        if name != "llama":  # a space that starts a piece belongs to no token of it
            assert (found.starts.tolist(), found.ends.tolist()) == (
                offsets.starts.tolist(),
                offsets.ends.tolist(),
            )

    check()


Cut = Callable[[Tokenizer], None]


@pytest.fixture
def cut_everywhere(monkeypatch: pytest.MonkeyPatch) -> Cut:
    """Return a function that makes a tokenizer cut every text at every sound place."""
    from longspan.data.tokenizer import engine

    def apply(tokenizer: Tokenizer) -> None:
        monkeypatch.setattr(engine, "PIECE_CHARACTERS", {"gigatoken": 1, "hf": 1})

    return apply


def test_unknown_splits_are_encoded_whole(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Guards against cuts where an expression may look across them."""
    content = json.loads(tokenizer.path.read_text())
    path = tmp_path / "tokenizer.json"

    def pieces(**changes: Any) -> bool:
        path.write_text(json.dumps(content | changes))
        return load_tokenizer(path, backend="hf")._cuts is not None

    split, level = content["pre_tokenizer"]["pretokenizers"]
    assert pieces()
    for regex in (r"\p{L}+ \p{L}+|.", r"(?<= )\S+|\s+", split["pattern"]["Regex"] + r"|\bx"):
        other = {**split, "pattern": {"Regex": regex}}
        assert not pieces(pre_tokenizer={"type": "Sequence", "pretokenizers": [other, level]})
    assert not pieces(normalizer={"type": "NFKC"})
    token = {**content["added_tokens"][0], "id": 300, "content": "a b", "special": False}
    assert not pieces(added_tokens=[*content["added_tokens"], token])
