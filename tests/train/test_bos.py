"""BOS as the tokenizer has it: in training, validation and packing as in evaluation, and never twice."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from longspan.core.errors import ConfigError
from longspan.data.chat import load_chat_format
from longspan.data.exchange.token_documents import StoreDocuments, open_documents
from longspan.data.exchange.whole_stores import merge_stores
from longspan.data.plans.framing import frame_settings, text_bos
from longspan.data.plans.packing import PAD_DOCUMENT
from longspan.data.store import TokenStore, TokenStoreWriter
from longspan.data.tokenize import tokenize_corpus
from longspan.data.tokenizer import load_tokenizer
from longspan.eval.ppl import PplConfig, plan_windows
from longspan.infer.perplexity import token_nll
from longspan.models.hf import build_model, load_model, save_model
from longspan.train.config import TrainConfig
from longspan.train.loop_config import ValidationConfig
from longspan.train.objectives import ModelWithLoss
from longspan.train.resolve import resolve
from longspan.train.spread import build_spread
from longspan.train.streams import plan_stage
from longspan.train.validation import plan_validation, validate
from tests.train.conftest import document, recipe

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
)


@pytest.fixture(scope="module")
def root(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The texts of the tests, and conversations, by a tokenizer that adds BOS as those of Llama and Gemma do."""
    root = tmp_path_factory.mktemp("bos")
    shutil.copytree(data_root / "tokenizer", root / "tokenizer")
    path = root / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "add_bos_token": True}))
    tokenizer = load_tokenizer(root / "tokenizer")
    assert tokenizer.adds_bos
    tokenize_corpus([str(data_root / "plain.jsonl")], tokenizer, root / "texts")
    with open(root / "chats.jsonl", "w") as file:
        for number in range(20):
            turns = [("user", "one two three"), ("assistant", document(number))]
            record = {"messages": [{"role": role, "content": content} for role, content in turns]}
            file.write(json.dumps(record) + "\n")
    (root / "template.jinja").write_text(TEMPLATE)
    chat = load_chat_format(tokenizer, str(root / "template.jinja"))
    tokenize_corpus(
        [str(root / "chats.jsonl")], tokenizer, root / "chats", messages_field="messages", chat=chat
    )
    return root


def stage(**stream: Any) -> Any:
    values = recipe()
    first = {**values["stages"][0], "streams": {"text": stream}, "max_epochs": 50}
    return TrainConfig.from_dict({**values, "stages": [first]}).stages[0]


def documents_of(root: Path, store: str | list[str], specials: str = "auto") -> list[list[int]]:
    pack = {"strategy": "best_fit", "specials": specials}
    source = plan_stage(stage(store=store, pack=pack), data_root=root, seed=0).sources["text"]
    rows = [source.row(index) for index in range(min(40, source.num_rows))]
    return [
        row.input_ids[low:high].tolist()
        for row in rows
        for low, high, on, number in zip(row.cu_seqlens, row.cu_seqlens[1:], row.continuation, row.documents)
        if not on and number != PAD_DOCUMENT
    ]


def test_documents_begin_as_the_tokenizer_has_them(root: Path, data_root: Path) -> None:
    """A Gemma or Llama trained without BOS learns to do without the token that it will be given."""
    bos = load_tokenizer(root / "tokenizer").bos_id
    found = documents_of(root, store="texts")
    assert len(found) > 10 and all(ids[0] == bos and bos not in ids[1:] for ids in found)
    assert not any(bos in ids for ids in documents_of(root, store="texts", specials="none"))
    # A tokenizer that adds none.
    assert not any(bos in ids for ids in documents_of(data_root, store="plain"))


@pytest.mark.parametrize("specials", ["auto", "bos", "both"])
def test_a_conversation_has_one_bos_and_one_eos(root: Path, specials: str) -> None:
    """The template has written it already: a second one is a sequence that no model has seen."""
    tokenizer = load_tokenizer(root / "tokenizer")
    store = TokenStore(root / "chats")
    settings = frame_settings(specials, [store], where="here")  # type: ignore[arg-type]
    assert settings["specials"] == "none", "the template ends with EOS too"
    assert int(store.tokens(0)[0]) == tokenizer.bos_id and text_bos(store) is None
    # Pairs, CEPE's files and annotations read documents so.
    framed = StoreDocuments([root / "chats"], specials="both").ids(0).tolist()
    assert framed == store.tokens(0).tolist() and framed[-1] == tokenizer.eos_id
    merged = merge_stores([root / "chats"], root / f"merged-{specials}")
    assert merged.manifest.config["chat"] == store.manifest.config["chat"], "a copy holds conversations too"
    assert frame_settings(specials, [merged], where="here") == settings  # type: ignore[arg-type]


@pytest.mark.parametrize("specials", ["auto", "both"])
def test_texts_and_conversations_in_one_stream_are_refused(root: Path, specials: str) -> None:
    """One setting for both gives the ones two, or the others none."""
    with pytest.raises(ConfigError, match=r"stream 'text' mixes documents(.|\n)*a stream for each"):
        documents_of(root, store=["texts", "chats"], specials=specials)


def test_a_store_that_does_not_say_is_read_as_it_stands(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Stores of older versions: their manifest does not know whether the tokenizer adds BOS, and that was not said."""
    shutil.copytree(root / "texts", tmp_path / "texts")
    path = tmp_path / "texts" / "longspan.json"
    manifest = json.loads(path.read_text())
    assert manifest["tokenizer"].pop("adds_bos") is True
    path.write_text(json.dumps(manifest))
    with caplog.at_level(logging.INFO):
        assert text_bos(TokenStore(tmp_path / "texts")) is None
        assert frame_settings("auto", [TokenStore(tmp_path / "texts")], where="here")["specials"] == "none"
    assert caplog.text.count("does not say whether its tokenizer begins texts with BOS") == 1
    both = merge_stores([root / "texts", tmp_path / "texts"], tmp_path / "both")
    assert both.manifest.tokenizer["adds_bos"] is True


def test_validation_reads_what_perplexity_reads(root: Path, tmp_path: Path) -> None:
    """Perplexity 57.5 in training and 20.9 in evaluation: the same model, the same text, without and with BOS."""
    tokenizer = load_tokenizer(root / "tokenizer")
    length = 24
    texts = TokenStore(root / "texts")
    # Documents that are one window, so that both have the same ones.
    with TokenStoreWriter(tmp_path / "windows", config={}, tokenizer=tokenizer) as writer:
        for number in range(5):
            ids = np.asarray(texts.tokens(6 + 7 * number))[: length - 1]
            assert len(ids) == length - 1
            writer.add(ids, source="text", key=number)
    fields = {**recipe()["model"]["hf_config"], "max_position_embeddings": 64}
    save_model(build_model(fields, seed=0), tmp_path / "model")
    model = load_model(tmp_path / "model").eval()
    task = PplConfig(lengths=[length], num_spans=5)
    windows = plan_windows(task, open_documents([tmp_path / "windows"], specials="none"), tokenizer).windows
    config = ValidationConfig(stores={"text": "windows"}, lengths=[length], windows=5)
    plan = plan_validation(config, data_root=tmp_path, seed=0)
    mine, theirs = ({tuple(ids.tolist()) for ids in each} for each in (
        [row.input_ids for row in plan.windows[0].rows], [window.ids for window in windows],
    ))  # fmt: skip
    assert mine == theirs and len(mine) == 5 and all(ids[0] == tokenizer.bos_id for ids in mine)
    spread = build_spread(TrainConfig.from_dict(recipe()).parallel, torch.device("cpu"))
    (record,) = validate(ModelWithLoss(model), plan, spread)
    evaluated = np.concatenate(token_nll(model, [window.ids for window in windows], batch_tokens=64))
    assert record["labels"] == len(evaluated) == 5 * (length - 1)
    assert record["loss"] == pytest.approx(float(evaluated.mean()), abs=1e-5)
    # And transformers alone.
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        ids = torch.tensor(sorted(mine))
        assert record["loss"] == pytest.approx(float(plain(ids, labels=ids).loss), abs=1e-5)


def test_the_dry_run_says_what_stands_where_documents_begin(root: Path) -> None:
    """What a model is trained on first in each document cannot be seen in a table of counts."""
    bos = load_tokenizer(root / "tokenizer").bos_id
    values = recipe()
    streams = {"text": {"store": "texts"}, "chats": {"store": "chats"}}
    first = {
        **values["stages"][0],
        "streams": streams,
        "context_length": 96,
        "batch_tokens": 192,
        "tokens": 192,
    }
    config = TrainConfig.from_dict({**values, "stages": [{**first, "micro_batch_tokens": None}]})
    found = resolve(config, "r", data_root=root).stages[0].streams
    assert found["text"]["documents_begin"] == f"BOS {bos}, text; continued: text"
    assert found["chats"]["documents_begin"] == "text; continued: text"
