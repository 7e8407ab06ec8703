"""Tokenizer: two engines, the same ids; special strings are text; training is reproducible."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ArgumentError, DataError
from longspan.data.tokenizer import Tokenizer, load_tokenizer, loading, train_bpe
from longspan.data.tokenizer import fast as fast_engine


@pytest.fixture(scope="module")
def reference(tokenizer: Tokenizer) -> Tokenizer:
    return load_tokenizer(tokenizer.path, backend="hf")


def edited(tokenizer: Tokenizer, folder: Path, **changes: Any) -> Path:
    content = json.loads(tokenizer.path.read_text()) | changes
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=200) | st.text(st.sampled_from("a 1\n\t<|>bos'sZ\u0967\u00e9"), max_size=60))
def test_engines_agree(tokenizer: Tokenizer, reference: Tokenizer, text: str) -> None:
    """Guards against the fast engine changing the data."""
    assert tokenizer.backend == "gigatoken", tokenizer.backend_reason
    assert reference.backend == "hf"
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint32
    assert ids.tolist() == reference.encode(text).tolist() == tokenizer.encode_with_offsets(text).ids.tolist()
    assert tokenizer.decode(ids) == text
    assert [each.tolist() for each in tokenizer.encode_batch([text, "a"])] == [
        ids.tolist(),
        tokenizer.encode("a").tolist(),
    ]


@pytest.mark.parametrize("backend", ["gigatoken", "hf"])
def test_special_strings_in_text_stay_text(tokenizer: Tokenizer, backend: Any) -> None:
    """Guards against a document that mentions <|eos|> ending there."""
    engine = load_tokenizer(tokenizer.path, backend=backend)
    specials = {engine.bos_id, engine.eos_id, engine.pad_id}
    assert specials == {0, 1, 2}
    for text in ("<|eos|>", "a <|bos|>b<|eos|><|pad|>"):
        ids = engine.encode(text)
        assert not specials & set(ids.tolist())
        assert engine.decode(ids) == text
    assert engine.decode([1, *engine.encode("x").tolist()]) == "<|eos|>x"
    assert engine.token_id("<|eos|>") == 1


def test_added_tokens_that_are_not_special_stay_whole(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Guards against stripping vocabulary such as <tool_call> together with the special tokens."""
    content = json.loads(tokenizer.path.read_text())
    plain = {**content["added_tokens"][0], "id": 300, "content": "<tool>", "special": False}
    folder = edited(tokenizer, tmp_path, added_tokens=[*content["added_tokens"], plain])
    for backend in ("gigatoken", "hf"):
        engine = load_tokenizer(folder, backend=backend)  # type: ignore[arg-type]
        assert engine.vocab_size == 301
        assert engine.encode("a<tool>b").tolist()[1] == 300


def test_saved_truncation_and_padding_do_not_apply(
    tokenizer: Tokenizer, texts: list[str], tmp_path: Path
) -> None:
    """Guards against a tokenizer saved after a training run cutting every document to 4 tokens."""
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    folder = edited(tokenizer, tmp_path, truncation=cut)
    for backend in ("gigatoken", "hf"):
        engine = load_tokenizer(folder, backend=backend)  # type: ignore[arg-type]
        assert engine.encode(texts[1]).tolist() == tokenizer.encode(texts[1]).tolist()
    assert engine.fingerprint == tokenizer.fingerprint, "truncation does not decide ids"


def test_digits_are_split(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Guards against numbers becoming single tokens where one token a digit is asked."""
    assert len(tokenizer.encode("123456")) == 6
    texts = [f"{number} 123456" for number in range(100)] * 3
    joined = train_bpe(texts, tmp_path / "joined", vocab_size=300, split_digits=False)
    assert len(joined.encode("123456")) == 2
    assert joined.backend == "gigatoken", joined.backend_reason


def test_training_is_reproducible(texts: list[str], tmp_path: Path) -> None:
    """Guards against two machines training two tokenizers from the same text."""
    one = train_bpe(iter(texts), tmp_path / "1", vocab_size=310)
    two = train_bpe(iter(texts), tmp_path / "2", vocab_size=310)
    assert one.path.read_bytes() == two.path.read_bytes()
    assert one.fingerprint == two.fingerprint
    assert one.vocab_size == 310


def test_transformers_reads_the_folder(tokenizer: Tokenizer, texts: list[str]) -> None:
    """Guards against exported models without usable BOS, EOS and padding."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer.path.parent)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    assert len(theirs) == tokenizer.vocab_size
    text = texts[3] + " caf\u00e9 123 <|eos|>"
    assert theirs(text, split_special_tokens=True)["input_ids"] == tokenizer.encode(text).tolist()
    assert theirs.decode(tokenizer.encode(text)) == text


def test_saving_anew_keeps_the_fingerprint(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Guards against a store being refused because the tokenizer was saved by transformers in between."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tokenizer.path.parent).save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.bos_id, again.eos_id, again.pad_id) == (0, 1, 2)


def test_fingerprint_sees_what_decides_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Guards against two tokenizers that encode differently sharing a store."""
    content = json.loads(tokenizer.path.read_text())
    model = {**content["model"], "merges": content["model"]["merges"][:-1]}
    changed = load_tokenizer(edited(tokenizer, tmp_path, model=model))
    assert changed.fingerprint != tokenizer.fingerprint


def test_offsets_are_characters(tokenizer: Tokenizer) -> None:
    """Guards against byte offsets, which drift after the first accent."""
    text = "caf\u00e9 \U0001f642 book"
    ids, starts, ends = tokenizer.encode_with_offsets(text)
    assert len(ids) == len(starts) == len(ends)
    assert (starts[0], ends[-1]) == (0, len(text))
    smile = [tokenizer.decode([i]) for i, s, e in zip(ids, starts, ends) if s <= 5 < e]
    assert len(smile) > 1, "the bytes of one character are several tokens that share its offsets"


def test_steps_aside_on_any_difference(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a fast engine being trusted without a check."""
    import gigatoken

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    class Wrong:
        @staticmethod
        def from_json(data: str) -> Any:
            real = original(data)

            class Engine:
                def encode(self, text: bytes) -> Any:
                    return real.encode(text) if "\u0939" not in text.decode() else real.encode(text)[:-1]

            return Engine()

    original = gigatoken.Tokenizer.from_json
    monkeypatch.setattr(gigatoken, "Tokenizer", Wrong)
    aside = load_tokenizer(tokenizer.path)
    assert aside.backend == "hf"
    assert "other ids for '\u0939" in aside.backend_reason
    with pytest.raises(ArgumentError, match="other ids"):
        load_tokenizer(tokenizer.path, backend="gigatoken")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "gigatoken", None)
        assert "cannot be imported" in load_tokenizer(tokenizer.path).backend_reason
    assert "other ids" in load_tokenizer(tokenizer.path).backend_reason, "a failed import is not remembered"


def test_fast_engine_is_made_anew(
    tokenizer: Tokenizer, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against memory that grows with every new word of a corpus: the engine never forgets one."""
    monkeypatch.setattr(fast_engine, "FAST_ENGINE_BYTES", 500)
    fast = fast_engine.FastEngine(fast_engine.Recipe(tokenizer.path.read_bytes(), 300, (), None))
    starts = []
    monkeypatch.setattr(fast, "_start", lambda: (starts.append(1), fast_engine.FastEngine._start(fast)))
    assert [fast(text.encode()).tolist() for text in texts] == [
        tokenizer.encode(text).tolist() for text in texts
    ]
    assert len(starts) > 5


def test_special_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Guards against guessed ids where a config says there are none."""
    folder = edited(tokenizer, tmp_path)
    bare = load_tokenizer(folder)
    assert (bare.bos_id, bare.eos_id, bare.pad_id) == (0, 1, 2), "common names, without any config"
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": None, "eos_token": {"content": "<|pad|>"}, "pad_token": "<absent>"})
    )
    named = load_tokenizer(folder)
    assert (named.bos_id, named.eos_id, named.pad_id) == (None, 2, None)


def test_errors_name_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against library tracebacks for a wrong path, a broken file or a missing connection."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    with pytest.raises(DataError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "missing" / "tokenizer.json")
    for content in ("{", "{}", "[]", '{"model": {"type": "BPE"}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(DataError, match=r"tokenizer\.json"):
            load_tokenizer(tmp_path)

    def offline(name: str, file: str) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(DataError, match=r"org/model(.|\n)*no connection"):
        load_tokenizer("org/model")


def test_hub_name_fetches_the_tokenizer_files(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against special ids being lost for tokenizers from the hub."""
    import huggingface_hub

    asked = []

    def download(name: str, file: str) -> str:
        asked.append((name, file))
        if file == "special_tokens_map.json":
            raise huggingface_hub.errors.EntryNotFoundError("no such file")
        return str(tokenizer.path.parent / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load_tokenizer("org/model").eos_id == 1
    assert ("org/model", "tokenizer_config.json") in asked
    load_tokenizer("llama3")  # datatools' name for it
    assert ("meta-llama/Meta-Llama-3-8B", "tokenizer.json") in asked


def test_bad_training_settings(tmp_path: Path) -> None:
    """Guards against a vocabulary that cannot spell every byte."""
    with pytest.raises(ArgumentError, match="at least 259"):
        train_bpe(["a"], tmp_path, vocab_size=258)
    with pytest.raises(ArgumentError, match="BOS, EOS and padding"):
        train_bpe(["a"], tmp_path, vocab_size=300, special_tokens=("<a>", "<b>"))


def test_no_heavy_imports() -> None:
    """Guards against tokenizing paying for torch or transformers."""
    import subprocess

    code = "import sys, longspan.data.tokenize; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert loading.SAMPLE[0] == "", "the empty text is part of the sample"
