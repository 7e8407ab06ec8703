"""What a recipe at tiny scale reads: a model, a tokenizer, and data under the very names that the recipe uses.

Texts are stretches of CPython's own sources, so nothing is fetched. Conversations ask for the first line of a stretch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from longspan.core.files import atomic_dir, read_json, write_json
from longspan.core.log import get_logger
from longspan.core.seeds import rng
from longspan.data.chat import load_chat_format
from longspan.data.packed.materialize import materialize
from longspan.data.plans.pack_config import PackConfig
from longspan.data.plans.packing import plan_packing
from longspan.data.store import TokenStore
from longspan.data.texts.python_corpus import python_documents
from longspan.data.tokenize import tokenize_corpus
from longspan.data.tokenizer import Tokenizer, train_bpe
from longspan.models.hf import save_model
from longspan.train.config import StageConfig, TrainConfig
from longspan.train.known_models import known_model
from longspan.train.recipes import TINY_MODEL, TINY_TEMPLATE, TINY_TOKENIZER
from longspan.train.record_files import DATA_ROOT_PREFIX, parse_records
from longspan.train.stream_config import StreamConfig
from longspan.train.tiny_model import VOCABULARY, tiny_model

__all__ = ["tiny_inputs"]

DOCUMENTS = 24
"""Texts of each source of a store or packed folder."""
RECORDS = 12
"""Records of each file."""
POOL_DOCUMENTS = 30
SPECIAL_TOKENS = ("<|begin_of_text|>", "<|eot_id|>", "<|pad|>", "<|start_header_id|>", "<|end_header_id|>")
MARK = "inputs.json"


def tiny_inputs(original: TrainConfig, tiny: TrainConfig, folder: Path, *, root: Path = Path()) -> None:
    """Make the inputs of `tiny` in `folder`, whole or not at all; those of the same recipe are kept.

    `original` is the recipe at full scale, below `root`; its model's kind of heads and own context are imitated.
    """
    made = {"recipe": tiny.fingerprint()}
    if (folder / MARK).is_file() and read_json(folder / MARK) == made:
        return
    get_logger("train").info("tiny scale: making a model, a tokenizer and data in %s", folder)
    with atomic_dir(folder, replace=True) as work:
        pool = "".join(document.text for document in islice(python_documents(), POOL_DOCUMENTS))
        texts = _Texts(pool, tiny.seed)
        tokenizer = train_bpe(
            texts.draw("vocabulary", 200, 2000),
            work / TINY_TOKENIZER,
            vocab_size=VOCABULARY,
            special_tokens=SPECIAL_TOKENS,
        )
        known = known_model(original.model, root / original.data_root)
        save_model(tiny_model(known, tokenizer, seed=original.seed), work / TINY_MODEL)
        for path, (names, longest, masked) in _stores(tiny).items():
            records = [
                {**(_conversation(text) if masked else {"text": text}), "source": name}
                for name in names
                for text in texts.draw(f"{path} {name}", DOCUMENTS, longest if masked else 4 * longest)
            ]
            _store(
                records, tokenizer, work / path, source_field="source", **(_chat(tokenizer) if masked else {})
            )
        for stage in tiny.stages:
            for name, stream in stage.streams.items():
                if stream.rows is not None and not (work / stream.rows).exists():
                    # Rows may be longer than a stage, never shorter: as long as the longest that reads them.
                    longest_stage = max(
                        (
                            each
                            for each in tiny.stages
                            if stream.rows in {s.rows for s in each.streams.values()}
                        ),
                        key=lambda each: each.context_length,
                    )
                    _packed(stream.rows, name, longest_stage, texts, tokenizer, work)
                for entry in stream.records or ():
                    _records(entry, stream, stage, texts, work)
        write_json(work / MARK, made)


class _Texts:
    """Stretches of one long text."""

    def __init__(self, pool: str, seed: int) -> None:
        self._pool, self._seed = pool, seed

    def draw(self, purpose: str, count: int, longest: int) -> Iterator[str]:
        """Yield `count` texts of 30 to `longest` characters, short ones oftener."""
        generator = rng(self._seed, "tiny", purpose)
        for _ in range(count):
            length = round(math.exp(generator.uniform(math.log(30), math.log(max(31, longest)))))
            start = int(generator.integers(0, len(self._pool) - length))
            yield self._pool[start : start + length]


def _stores(config: TrainConfig) -> dict[str, tuple[list[str], int, bool]]:
    """Return the sources of every store, the longest row that is cut from it, and whether it holds conversations."""
    found: dict[str, tuple[list[str], int, bool]] = {}
    for stage in config.stages:
        for name, stream in stage.streams.items():
            paths = (stream.store,) if isinstance(stream.store, str) else stream.store or ()
            sources = list(stream.mixture.weights) or list(stream.mixture.sources or ()) or [name]
            for path in paths:
                names, longest, masked = found.get(path, ([], 0, False))
                found[path] = (
                    list(dict.fromkeys([*names, *sources])),
                    max(longest, stage.context_length),
                    masked or stage.needs_mask(name),
                )
    return found


def _chat(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"messages_field": "conversations", "chat": load_chat_format(tokenizer, TINY_TEMPLATE)}


def _store(records: Iterable[dict[str, Any]], tokenizer: Tokenizer, out: Path, **settings: Any) -> TokenStore:
    file = out.with_name(f"{out.name}.jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    store = tokenize_corpus([str(file)], tokenizer, out, **settings)
    file.unlink()
    return store


def _conversation(text: str) -> dict[str, Any]:
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["nothing"]
    return {
        "conversations": [
            {"role": "user", "content": f"{text.strip() or 'nothing'}\n\nFirst line?"},
            {"role": "assistant", "content": lines[0]},
        ]
    }


def _trace(text: str) -> dict[str, Any]:
    """Return two questions, a call with its result, and a thought before each answer."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["nothing"]
    function = {"name": "first_line", "arguments": {"of": lines[-1]}}
    call = {"id": "call00000", "type": "function", "function": function}
    parameters = {"type": "object", "properties": {"of": {"type": "string"}}}
    tool = {"name": "first_line", "description": "The first line.", "parameters": parameters}
    thought = {"reasoning_content": "It begins the text."}
    return {
        "messages": [
            {"role": "user", "content": text.strip() or "nothing"},
            {"role": "assistant", "content": "", "tool_calls": [call], **thought},
            {"role": "tool", "tool_call_id": "call00000", "content": lines[0]},
            {"role": "assistant", "content": lines[0], **thought},
            {"role": "user", "content": "And the last?"},
            {"role": "assistant", "content": lines[-1], **thought},
        ],
        "tools": [{"type": "function", "function": tool}],
    }


def _records(entry: str, stream: StreamConfig, stage: StageConfig, texts: _Texts, work: Path) -> None:
    path = work / parse_records(entry).path.removeprefix(DATA_ROOT_PREFIX)
    answers = _trace if stream.conversations.true_prefixes else _conversation
    make: Callable[[str], dict[str, Any]] = (
        answers
        if stream.chat_template is not None or stage.objective == "sft"
        else lambda text: {"text": text}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = texts.draw(entry, RECORDS, stage.context_length)
    path.write_text("".join(json.dumps(make(text)) + "\n" for text in drawn), encoding="utf-8")


def _packed(
    rows: str, source: str, stage: StageConfig, texts: _Texts, tokenizer: Tokenizer, work: Path
) -> None:
    """Make rows that another tool could have packed, with a mask if the stage learns from one."""
    drawn = texts.draw(f"{rows} {source}", DOCUMENTS, 4 * stage.context_length)
    aside = work / "packing" / rows
    if stage.objective == "sft":
        store = _store(map(_conversation, drawn), tokenizer, aside, **_chat(tokenizer))
    else:
        records = ({"text": text, "source": source} for text in drawn)
        store = _store(records, tokenizer, aside, source_field="source")
    documents = np.arange(len(store.lengths), dtype=np.uint32)
    plan = plan_packing(PackConfig(length=stage.context_length), store.lengths, documents, 0)
    plan.save(aside.with_name(f"{aside.name}-plan"), stores=[aside])
    materialize(aside.with_name(f"{aside.name}-plan"), work / rows, format="mds")
