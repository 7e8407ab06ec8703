"""What was found out about a tokenizer is remembered, for the same file, libraries and code only."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from longspan.data.tokenizer import Tokenizer, load_tokenizer, loading, remembered

Load = Callable[..., tuple[Tokenizer, bool]]


@pytest.fixture
def load(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Return a function that loads a copy of the room's tokenizer and says whether the engines were compared."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tokenizer.path.parent.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    find_out = loading._find_out
    compared: list[str] = []

    def counted(*args: object, **options: object) -> object:
        compared.append("")
        return find_out(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(loading, "_find_out", counted)

    def run(**options: object) -> tuple[Tokenizer, bool]:
        compared.clear()
        return load_tokenizer(folder, **options), bool(compared)  # type: ignore[arg-type]

    return run


def test_compared_once(load: Load, tokenizer: Tokenizer, texts: list[str]) -> None:
    """Guards against paying for the comparison at every start, and against other findings the second time."""
    first, compared = load()
    again, compared_again = load()
    assert compared and not compared_again
    assert "_reference" not in vars(again), "made when it is asked for"
    assert again._findings == first._findings
    assert again.encode(texts[0]).tolist() == tokenizer.encode(texts[0]).tolist()
    assert again.decode(again.encode(texts[0])) == texts[0]
    assert load(backend="gigatoken")[1] is False
    slow, compared = load(backend="hf")
    assert compared and slow.backend == "hf", "asked for, not found out: not remembered"
    assert load()[0].backend == "gigatoken"


def test_another_file_or_version_is_compared(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against trust in what was found out about other libraries, other code, another file or config."""
    load()
    monkeypatch.setattr(remembered, "versions", lambda: "another library")
    assert load()[1] and not load()[1]
    config = tmp_path / "model" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token": "<|pad|>"}))
    changed, compared = load()
    assert compared and changed.eos_id == 2
    path = tmp_path / "model" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    assert load()[1]


def test_versions_follow_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a memory that outlives an upgrade."""
    import importlib.metadata

    before = remembered.versions()
    installed = importlib.metadata.version
    for library in ("tokenizers", "gigatoken"):
        monkeypatch.setattr(
            importlib.metadata,
            "version",
            lambda name, other=library: "9" if name == other else installed(name),
        )
        assert remembered.versions.__wrapped__() != before
    monkeypatch.setattr(importlib.metadata, "version", installed)
    assert remembered.versions.__wrapped__() == before


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"versions": 3}',
        b"text",
        b"mixed up",
        b"a folder",
        b"out of range",
    ],
)
def test_a_damaged_memory_is_none(load: Load, tmp_path: Path, damage: bytes) -> None:
    """Guards against a run that fails, or encodes wrongly, for a file that it only wrote to be faster."""
    wanted = load()[0]._findings
    [file] = (tmp_path / "cache").rglob("*.json")
    stored = json.loads(file.read_text())
    found = stored["found_out"]
    if damage == b"a folder":
        file.unlink()
        file.mkdir()
    else:
        if damage == b"text":
            found["vocab_size"] = "300"
        elif damage == b"mixed up":
            found["special_ids"] = {"bos": 1}
        elif damage == b"out of range":
            found["special_ids"] = [0, 1]
        odd = damage in (b"text", b"mixed up", b"out of range")
        file.write_bytes(json.dumps(stored).encode() if odd else damage)
    loaded, compared = load()
    assert compared and loaded._findings == wanted
    assert load()[1] is (damage == b"a folder"), "and mended, where it can be"


def test_a_cache_that_cannot_be_written(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a read-only home, or none, ending a run."""
    (tmp_path / "cache").write_text("a file")
    assert load()[0].backend == "gigatoken"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: (_ for _ in ()).throw(RuntimeError("no home"))))
    assert load()[0].backend == "gigatoken"


def test_what_is_known_is_said_again(load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against a warning, or the reason of the slow engine, that is heard at the first start only."""
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"normalizer": {"type": "Lowercase"}}))
    config = tmp_path / "model" / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": "model"}))
    vocab = content["model"]["vocab"]
    if "model" not in vocab:
        config.write_text(json.dumps({"eos_token": max(vocab, key=vocab.__getitem__)}))
    for again in (False, True):
        caplog.clear()
        loading.log_once.cache_clear()
        with caplog.at_level(logging.INFO):
            slow, compared = load()
        assert compared is not again and slow.eos_id is None
        assert "normalized with Lowercase" in caplog.text and "ordinary word" in caplog.text
        assert ("as found out before" in caplog.text) is again
