"""A folder in which the examples of every command's help can be run as they are written."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longspan.cli.main import run
from longspan.data.tokenizer import load_tokenizer, train_bpe

RECIPE = """\
model:
  hf_config:
    model_type: llama
    vocab_size: 512
    hidden_size: 16
    intermediate_size: 32
    num_hidden_layers: 1
    num_attention_heads: 2
    num_key_value_heads: 2
    max_position_embeddings: 256
stages:
  - name: short
    context_length: 128
    tokens: 1024
    batch_tokens: 256
    lr: 1e-2
    rope: {rope_type: default, rope_theta: 10000}
    streams:
      text: {store: store}
"""


QUESTIONS = """\
{"context": "Ada built the bridge. It opened in 1843.", "input": "Who built the bridge?", "answers": ["Ada"]}
{"context": "Ada built the bridge. It opened in 1843.", "input": "When did it open?", "answers": ["1843"]}
"""


class Outcome(NamedTuple):
    """What a command line printed and how it ended."""

    code: int
    out: str
    err: str


Command = Callable[[str | Sequence[str]], Outcome]


@pytest.fixture(autouse=True)
def fresh_logger() -> Iterator[None]:
    """Undo what a command does to the logger of this process."""
    logger = logging.getLogger("longspan")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


@pytest.fixture
def longspan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command line in this process."""

    def call(arguments: str | Sequence[str]) -> Outcome:
        arguments = shlex.split(arguments) if isinstance(arguments, str) else arguments
        monkeypatch.setattr(sys, "argv", ["longspan", *arguments])
        code = 0
        try:
            run()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """texts/ with real sentences (Python's own modules, 200,000 characters), tokenizer/,
    recipe.yaml and questions.jsonl."""
    root = tmp_path_factory.mktemp("cli")
    (root / "texts").mkdir()
    texts = []
    for path in sorted(Path(os.__file__).parent.glob("[a-d]*.py")):
        text = path.read_text(encoding="utf-8")
        if 5_000 < len(text) < 60_000:
            texts.append(text)
            (root / "texts" / f"{path.stem}.txt").write_text(text)
        if sum(map(len, texts)) > 200_000:
            break
    train_bpe(texts, root / "tokenizer", vocab_size=512)
    (root / "recipe.yaml").write_text(RECIPE)
    (root / "questions.jsonl").write_text(QUESTIONS)
    return root


@pytest.fixture
def store(
    corpus: Path,
    longspan: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Path:
    """A token store of the corpus, in the current directory as `store`; written once, and copied for later tests."""
    for name in ("texts", "tokenizer"):
        (tmp_path / name).symlink_to(corpus / name)
    shutil.copy(corpus / "recipe.yaml", tmp_path)  # written over by some tests
    monkeypatch.chdir(tmp_path)
    if not (corpus / "store").exists():
        outcome = longspan("data tokenize texts --tokenizer tokenizer --out store")
        assert outcome.code == 0, outcome.err
        shutil.copytree("store", corpus / "store")
    else:
        shutil.copytree(corpus / "store", "store")
    return tmp_path / "store"


@pytest.fixture
def model(store: Path) -> Path:
    """A random Llama in `model`, with the tokenizer of the store."""
    folder = store.parent / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=load_tokenizer(store.parent / "tokenizer").vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((store.parent / "tokenizer" / "tokenizer.json").read_bytes())
    return folder
