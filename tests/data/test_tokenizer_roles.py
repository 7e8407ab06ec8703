"""BOS, EOS and padding are special tokens; an ordinary word never has a role, however it is spelled."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from longspan.data.tokenizer import Tokenizer, load_tokenizer, sentencepiece
from longspan.data.tokenizer.roles import COMMON_NAMES


def made(
    tokenizer: Tokenizer, folder: Path, added: list[tuple[str, bool]], words: list[str], **config: Any
) -> Path:
    """Write a tokenizer whose vocabulary has these words, merged from their bytes, and these added tokens."""
    content = json.loads(tokenizer.path.read_text())
    vocab: dict[str, int] = dict(content["model"]["vocab"])
    merges: list[list[str]] = []
    for name in [token["content"] for token in content["added_tokens"]]:
        vocab[name.replace("|", "#")] = vocab.pop(name)
    for word in words:
        for size in range(2, len(word) + 1):
            if word[:size] not in vocab:
                vocab[word[:size]] = len(vocab)
                merges.append([word[: size - 1], word[size - 1]])
    fields = {name: False for name in ("single_word", "lstrip", "rstrip", "normalized")}
    content["added_tokens"] = [
        {"id": len(vocab) + number, "content": text, "special": special, **fields}
        for number, (text, special) in enumerate(added)
    ]
    content["model"] |= {"vocab": vocab, "merges": [*merges, *content["model"]["merges"]]}
    # One part a text, so that a word may hold letters and brackets.
    content["pre_tokenizer"] = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("role", ["bos", "eos", "pad"])
def test_ordinary_words_have_no_role(tokenizer: Tokenizer, tmp_path: Path, role: str) -> None:
    """Guards against a word learnt from web pages ending every document: all the names a role may have."""
    words = list(COMMON_NAMES[role])
    alone = load_tokenizer(made(tokenizer, tmp_path / "alone", [], words))
    assert (alone.bos_id, alone.eos_id, alone.pad_id) == (None, None, None)
    assert alone.encode(words[0]).tolist() == [alone.token_id(words[0])], "it is a word of the vocabulary"
    name = words.pop()
    beside = load_tokenizer(made(tokenizer, tmp_path / "beside", [(name, True)], words))
    assert getattr(beside, f"{role}_id") == beside.token_id(name)
    plain = load_tokenizer(made(tokenizer, tmp_path / "plain", [(name, False)], words))
    assert getattr(plain, f"{role}_id") is None, "added, but not special"


def test_a_config_that_names_a_word_is_told(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards against documents ending wherever they mention the word that a config calls EOS."""
    with caplog.at_level(logging.WARNING):
        folder = made(
            tokenizer, tmp_path, [("<|pad|>", True)], ["</s>"], eos_token="</s>", pad_token="<|pad|>"
        )
        loaded = load_tokenizer(folder)
    assert loaded.eos_id is None and loaded.pad_id == loaded.token_id("<|pad|>")
    assert "eos_token of the config is '</s>', which is an ordinary word" in caplog.text


def test_a_config_makes_an_added_token_special(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Guards against a text that mentions EOS ending there, where tokenizer.json forgot to call it special.

    The ids of roles are those of transformers.
    """
    from transformers import AutoTokenizer

    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    config |= {"additional_special_tokens": ["<|turn|>"]}
    added = [("<|end|>", False), ("<|turn|>", False), ("<tool>", False)]
    folder = made(tokenizer, tmp_path, added, [], **config)
    for backend in (None, "hf"):
        loaded = load_tokenizer(folder, backend=backend)  # type: ignore[arg-type]
        named = [loaded.token_id(text) for text, _ in added]
        assert loaded.eos_id == named[0] == AutoTokenizer.from_pretrained(folder).eos_token_id
        ids = loaded.encode("a <|end|> b <|turn|> c <tool>").tolist()
        assert not {named[0], named[1]} & set(ids) and named[2] in ids


def test_a_config_may_name_an_entry_that_no_text_makes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Guards against losing the EOS of vocabularies that hold it, unmerged, and list no added tokens."""
    folder = made(tokenizer, tmp_path, [], [], eos_token="<#eos#>")
    loaded = load_tokenizer(folder)
    assert loaded.eos_id == loaded.token_id("<#eos#>") == 1


def test_ids_that_stand_for_two_entries_are_told(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards against an EOS that is also a word: with gaps in the ids the library renumbers added tokens."""
    folder = made(tokenizer, tmp_path, [("<|end|>", True)], [])
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    word = max(vocab, key=vocab.__getitem__)
    del vocab["<#bos#>"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        load_tokenizer(folder)
    assert f"<|end|> and the ordinary word {word!r} have the same id" in caplog.text


def test_sentencepiece_roles_are_control_pieces(tmp_path: Path) -> None:
    """Guards against ids 1 and 2, the defaults of a model file, becoming BOS and EOS where they are words."""
    import struct

    def field(number: int, value: bytes | int) -> bytes:
        if isinstance(value, int):
            return bytes([number << 3, value])
        return bytes([number << 3 | 2, len(value)]) + value

    def piece(text: str, kind: int) -> bytes:
        return field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", 0.0) + field(3, kind))

    kinds = [("<unk>", 2), ("the", 1), ("</s>", 1), *((letter, 1) for letter in "abc</s>")]
    (tmp_path / "tokenizer.model").write_bytes(
        b"".join(piece(*each) for each in kinds) + field(2, field(3, 2))
    )
    assert (
        sentencepiece.read_model((tmp_path / "tokenizer.model").read_bytes(), where=tmp_path).roles["eos"]
        == 2
    )
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (None, None, None)
