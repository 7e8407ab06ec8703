"""The perplexity evaluation as a whole: against brute force, and going on after a kill."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longspan.data.tokenizer import Tokenizer
from longspan.eval import ppl_run
from longspan.eval.held_out import HeldOutDocument
from longspan.eval.ppl import PplConfig
from longspan.eval.records import read_records
from longspan.infer.perplexity import token_nll


def lines_of(path: Path) -> list[bytes]:
    """Return the lines of a records file without its header, which holds the date."""
    return path.read_bytes().split(b"\n")[1:]


def test_perplexity_equals_brute_force(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    documents: list[HeldOutDocument],
    model_info: dict[str, Any],
    records: Path,
) -> None:
    """Tokens times log-likelihood, from whole logits, one window at a time."""
    task = PplConfig(lengths=(64, 192), num_spans=2, num_buckets=6)
    settings: dict[str, Any] = {
        "documents": documents,
        "label": "before",
        "model_info": model_info,
        "out": records,
    }
    summary = ppl_run.run_ppl(
        partial(token_nll, model, batch_tokens=500), tokenizer, task, batch_tokens=500, **settings
    )
    tokens = {document.id: tokenizer.encode(document.text) for document in documents}
    total: dict[tuple[str, int], list[float]] = {}
    found = read_records(records)
    assert found.complete
    assert summary["samples"] == len(found.samples) == 2 * (2 + 6)
    for record in found.samples:
        ids = tokens[record["document"]][record["start"] : record["start"] + record["length"]]
        ids_1T = torch.from_numpy(ids.astype(np.int64))[None]
        hidden_TD = model.model(input_ids=ids_1T, **alone(len(ids))).last_hidden_state[0]
        log_probs_TV = torch.log_softmax(model.lm_head(hidden_TD).double(), dim=-1)
        nll = -log_probs_TV[:-1].gather(1, ids_1T[0, 1:, None])[:, 0].detach().numpy()
        assert [(bucket["start"], bucket["end"]) for bucket in record["buckets"]] == [
            (start, start + 32) for start in range(0, record["length"], 32)
        ]
        for bucket in record["buckets"]:
            part = nll[max(0, bucket["start"] - 1) : bucket["end"] - 1]
            assert bucket["tokens"] == len(part)
            assert bucket["nll"] == pytest.approx(part.sum(), rel=1e-6)
        total.setdefault((record["source"], record["length"]), []).extend(nll)
    for row in summary["by_length"]:
        nll_of_row = total[row["source"], row["length"]]
        assert row["tokens"] == len(nll_of_row)
        assert row["perplexity"] == pytest.approx(math.exp(np.mean(nll_of_row)), rel=1e-6)


def test_bytes_are_those_of_the_text_that_is_measured(
    tokenizer: Tokenizer, model_info: dict[str, Any], records: Path
) -> None:
    """Perplexities of two tokenizers are compared by bytes: characters that a bucket cuts count once."""
    text = "\u4ed6\u6765\u4e86\u3002 The ship \u00e9t\u00e9 came in. " * 40
    task = PplConfig(lengths=(64,), num_spans=4, num_buckets=8)
    ppl_run.run_ppl(
        lambda windows: [np.zeros(len(ids) - 1, np.float32) for ids in windows],
        tokenizer,
        task,
        documents=[HeldOutDocument("a", text)],
        label="before",
        model_info=model_info,
        out=records,
    )
    ids = tokenizer.encode(text)
    samples = read_records(records).samples
    assert len(samples) == 4
    for sample in samples:
        # A character that the window itself cuts is a mark of 3 bytes.
        ends = (sample["start"] + 1, sample["start"] + 64)
        sizes = [len(tokenizer.decode(ids[:end]).encode()) for end in ends]
        found = sum(bucket["bytes"] for bucket in sample["buckets"])
        assert abs(found - (sizes[1] - sizes[0])) <= 4


def alone(length: int) -> dict[str, Any]:
    """Arguments that run one sequence by itself."""
    from longspan.models.hf import Documents

    return {
        "position_ids": torch.arange(length)[None],
        "documents": Documents.from_cu_seqlens([0, length]),
        "use_cache": False,
    }


def test_ppl_goes_on_after_a_kill_and_names_what_it_lacks(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    documents: list[HeldOutDocument],
    model_info: dict[str, Any],
    records: Path,
) -> None:
    """The same as for needles; a source without long documents stays in the counts."""
    short = HeldOutDocument("short", "A line.\n", "chat")
    settings: dict[str, Any] = {"documents": [*documents, short], "label": "after", "model_info": model_info}
    task = PplConfig(lengths=(64, 128), num_spans=1)
    measure = partial(token_nll, model, batch_tokens=500)
    summary = ppl_run.run_ppl(measure, tokenizer, task, out=records, **settings)
    assert (summary["samples"], summary["scored"]) == (8, 6)
    assert list(summary["unscored"].values()) == [2]
    expected = sorted(lines_of(records))
    whole = records.read_bytes()
    for cut in (len(whole) // 3, len(whole) // 2, len(whole) - 5):
        records.write_bytes(whole[:cut])
        ppl_run.run_ppl(measure, tokenizer, task, out=records, **settings)
        assert sorted(lines_of(records)) == expected
