"""What every trainer of benchmarks/train.py is given: a model folder, packed rows, the same documents step by step."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DOCUMENTS_PER_ROW = 16
LR = 1e-3


class Sizes(NamedTuple):
    """How much one run trains on."""

    row_tokens: int
    rows_per_step: int
    scout_steps: int
    """Optimizer steps of the run that finds a tool's fastest configuration."""
    steps: int
    """Optimizer steps of the runs that take turns."""
    memory_steps: int


FULL = Sizes(row_tokens=4096, rows_per_step=2, scout_steps=3, steps=6, memory_steps=2)
DRY = Sizes(row_tokens=128, rows_per_step=2, scout_steps=2, steps=3, memory_steps=2)

# The 15M Llama of llama2.c with the vocabulary of Llama 2 or of Llama 3, and the model of our quickstart.
MODELS: dict[str, dict[str, Any]] = {
    "15M, 32K words": {
        "vocab_size": 32000,
        "hidden_size": 288,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
    },
    "0.5M, 1K words": {
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}
MODELS["15M, 128K words"] = MODELS["15M, 32K words"] | {"vocab_size": 128256}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


class Inputs(NamedTuple):
    """Where the files of one model and kind of documents lie."""

    model: Path
    rows: Path
    documents: Path


def prepare(work: Path, model: str, lengths: str, sizes: Sizes, *, dry_run: bool) -> Inputs:
    """Write model folder, rows and documents below `work`.

    `lengths`: "mixed", log-normal, or "equal". Documents are never cut, and every row holds as many, because a
    trainer that counts documents would otherwise make other steps.
    """
    config = MODELS[model]
    if dry_run:
        config = TINY | {"vocab_size": min(512, config["vocab_size"])}
    folder = work / (model + ", " + lengths).replace(", ", "-").replace(" ", "-")
    inputs = Inputs(folder / "model", folder / "rows.parquet", folder / "documents.json")
    if inputs.documents.exists():
        return inputs
    folder.mkdir(parents=True)
    _write_model(inputs.model, config, sizes)
    rows = [
        _row(number, lengths, config["vocab_size"], sizes)
        for number in range(sizes.steps * sizes.rows_per_step)
    ]
    _write_rows(inputs.rows, rows)
    steps = []
    for first in range(0, len(rows), sizes.rows_per_step):
        step = rows[first : first + sizes.rows_per_step]
        steps.append([part.tolist() for ids, cuts in step for part in np.split(ids, cuts)])
    inputs.documents.write_text(json.dumps(steps))
    return inputs


def _row(number: int, lengths: str, vocabulary: int, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of a row and where its documents but the first begin."""
    from longspan.core.seeds import rng

    generator = rng(0, "train benchmark", lengths, number)
    shares = np.ones(DOCUMENTS_PER_ROW)
    if lengths == "mixed":
        shares = generator.lognormal(0.0, 1.0, DOCUMENTS_PER_ROW)
    shortest = sizes.row_tokens // DOCUMENTS_PER_ROW // 4
    rest = sizes.row_tokens - shortest * DOCUMENTS_PER_ROW
    ends = shortest * np.arange(1, DOCUMENTS_PER_ROW + 1) + np.floor(rest * np.cumsum(shares) / shares.sum())
    # Words as rare as words are; what follows a word depends on it, so that there is something to learn.
    ranks = generator.zipf(1.2, sizes.row_tokens) - 1
    ids = (np.minimum(ranks, vocabulary - 1) + np.roll(ranks, 1) % 7) % vocabulary
    return ids.astype(np.int64), ends[:-1].astype(np.int64)


def _write_model(path: Path, config: dict[str, Any], sizes: Sizes) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from longspan.models.hf import build_model, save_model

    settings = {
        "model_type": "llama",
        "num_key_value_heads": config["num_attention_heads"],
        "max_position_embeddings": sizes.row_tokens,
        "tie_word_embeddings": True,
        **config,
    }
    save_model(build_model(settings, seed=0), path)
    # Nothing is tokenized; trainers ask a tokenizer how to pad.
    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        path
    )


def _write_rows(path: Path, rows: list[tuple[np.ndarray, np.ndarray]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = []
    for ids, cuts in rows:
        borders = [0, *cuts.tolist(), len(ids)]
        spans = [{"source": "text", "start": a, "end": b} for a, b in pairwise(borders)]
        records.append({"input_ids": ids, "source": spans})
    pq.write_table(pa.Table.from_pylist(records), path)


def recipe(
    inputs: Inputs,
    sizes: Sizes,
    *,
    steps: int,
    rows_per_micro_batch: int,
    compile_blocks: bool = False,
    checkpointing: bool = False,
) -> dict[str, Any]:
    """Return the recipe of our side."""
    return {
        "model": {"path": str(inputs.model)},
        "runtime": {"compile_blocks": compile_blocks},
        "memory": {"activation_checkpointing": "full" if checkpointing else "none"},
        "optimizer": {"name": "adamw", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0},
        "stages": [
            {
                "name": "packed",
                "context_length": sizes.row_tokens,
                "tokens": steps * sizes.rows_per_step * sizes.row_tokens,
                "batch_tokens": sizes.rows_per_step * sizes.row_tokens,
                "micro_batch_tokens": rows_per_micro_batch * sizes.row_tokens,
                "lr": LR,
                "lr_schedule": {"kind": "constant"},
                "streams": {"text": {"rows": str(inputs.rows)}},
            }
        ],
    }
