"""A tokenizer with a chat template, documents, and jobs that ask a scripted server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longspan.api import Client, Endpoint, Limits
from longspan.data.chat import load_chat_format
from longspan.data.tokenizer import load_tokenizer, train_bpe
from longspan.synth import ConversationConfig, Student, SynthConfig, SynthJob, UsedDocuments, load_set
from tests.api.fake_server import FakeServer
from tests.synth.writer import document

SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
SMALL: dict[str, Any] = {
    "min_tokens": 100,
    "max_tokens": 5000,
    "documents": None,
    "section_tokens": 260,
}
"""What a shipped set has to be like for the documents here."""


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch):
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    folder = tmp_path_factory.mktemp("student") / "tokenizer"
    train_bpe((document(number) for number in range(20)), folder, vocab_size=600, special_tokens=SPECIALS)
    tokenizer = load_tokenizer(folder)
    return Student(tokenizer, load_chat_format(tokenizer, "qwen"))


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six documents of 24 sentences, about 700 tokens each."""
    path = tmp_path_factory.mktemp("texts") / "books.jsonl"
    write_documents(path, [document(number) for number in range(1, 7)])
    return path


def write_documents(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


Make = Callable[..., SynthConfig]


@pytest.fixture
def settings_of(student: Student, texts: Path) -> Make:
    def make(
        name: str, *, inputs: list[Path] | None = None, sample: Any = None, **changes: Any
    ) -> SynthConfig:
        own = {key: changes.pop(key) for key in list(changes) if key in SynthConfig.model_fields}
        spec = load_set(name)
        values = {**spec.to_dict(), **({} if name.startswith("offline") else SMALL), **changes}
        return SynthConfig(
            set=type(spec).from_dict(values),
            inputs=tuple(map(str, inputs or [texts])),
            tokenizer=student.tokenizer.fingerprint,
            chat_template=student.chat.fingerprint,
            sample=ConversationConfig.from_dict(sample or {"length": 2048}),
            **own,
        )

    return make


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(student: Student, tmp_path: Path) -> Run:
    """Run a job in `out` against a server."""

    def run(settings: SynthConfig, server: FakeServer | None, out: Path | None = None, **client: Any) -> Any:
        out = out or tmp_path / "out"
        used = UsedDocuments(tmp_path / "used.sqlite")
        if server is None:
            return SynthJob(settings, out, student, client=None, used=used).run()
        endpoint = Endpoint(model="m", base_url=server.url, **client.pop("endpoint", {}))
        options = {
            "limits": Limits(concurrency=4, backoff_seconds=0.01),
            "cache": tmp_path / "answers.sqlite",
        }
        with Client(endpoint, **{**options, **client}) as asked:
            return SynthJob(settings, out, student, client=asked, used=used).run()

    return run
