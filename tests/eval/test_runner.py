from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longspan.core.errors import ConfigError, DataError
from longspan.core.intervals import wilson_interval
from longspan.data.tokenizer import Tokenizer
from longspan.eval import needle_run, ppl_run, runner
from longspan.eval.documents import HeldOutDocument
from longspan.eval.needle import NeedleBuilder, NeedleTask
from longspan.eval.ppl import PplTask
from longspan.eval.records import read_records
from longspan.infer.perplexity import token_nll
from longspan.infer.score import ScoreRequest, ScoreResult

TASK = NeedleTask(lengths=(160, 320), depths=(0.0, 0.5, 1.0), samples=2, seed=5)

Run = Callable[..., dict[str, Any]]


@pytest.fixture()
def run_needle(model: Any, tokenizer: Tokenizer, documents: list[HeldOutDocument], model_info: dict) -> Run:
    def run(task: NeedleTask, out: Path, **changes: Any) -> dict[str, Any]:
        settings = {"documents": documents, "label": "before", "model_info": model_info, "batch_tokens": 700}
        return needle_run.run_needle(model, tokenizer, task, out=out, **{**settings, **changes})

    return run


@pytest.fixture()
def scored(monkeypatch: pytest.MonkeyPatch) -> list[ScoreRequest]:
    """Replace the model by one that copies the answer; return the requests it has seen."""
    seen: list[ScoreRequest] = []

    def copy(model: object, requests: Sequence[ScoreRequest], *, batch_tokens: int) -> list[ScoreResult]:
        seen.extend(requests)
        return [
            ScoreResult(np.zeros(len(answer), np.float32), answer.astype(np.int64), True)
            for _, answer in requests
        ]

    monkeypatch.setattr(needle_run, "score", copy)
    return seen


def lines_of(path: Path) -> list[bytes]:
    """Return the lines of a records file without its header, which holds the date."""
    return path.read_bytes().split(b"\n")[1:]


def test_perfect_answers_score_one_everywhere(
    run_needle: Run, records: Path, scored: list[ScoreRequest]
) -> None:
    """The whole way from prompt to summary must let a perfect model reach the maximum."""
    summary = run_needle(TASK, records)
    assert summary["mean"] == 1.0
    assert summary["samples"] == summary["scored"] == len(scored) == 12
    assert summary["unscored"] == {}
    assert [(cell["length"], cell["depth"]) for cell in summary["cells"]] == [
        (length, depth) for length in (160, 320) for depth in (0.0, 0.5, 1.0)
    ]
    assert all(cell["mean"] == 1.0 and cell["samples"] == 2 for cell in summary["cells"])


def test_records_hold_what_the_report_reads(
    run_needle: Run, records: Path, scored: list[ScoreRequest]
) -> None:
    """Records are the product: header, every field of every sample, footer."""
    run_needle(TASK, records, label="ntk")
    found = read_records(records)
    assert found.complete
    assert found.header["label"] == "ntk"
    assert found.header["model"]["trained_length"] == 256
    assert found.header["params"]["scorer"] == {"name": "exact_match", "version": 1}
    assert found.header["params"]["documents"]["count"] == 12
    for record in found.samples:
        assert record["unscored"] is None
        assert record["output"].strip() == record["expected"]
        assert record["length"] - 8 < record["achieved_length"] <= record["length"]
        assert record["expected"] in record["needle_window"]
        assert len(record["prompt_sha256"]) == 64
        assert record["num_distractors"] == 0
    assert len({record["id"] for record in found.samples}) == 12
    assert len({record["prompt_sha256"] for record in found.samples}) == 12


def test_run_that_was_cut_at_any_byte_goes_on(
    run_needle: Run, records: Path, scored: list[ScoreRequest]
) -> None:
    """A kill can stop a write anywhere; nothing may be lost, doubled or scored again."""
    task = TASK.model_copy(update={"depths": (0.5,), "samples": 2})
    run_needle(task, records)
    whole = records.read_bytes()
    borders = [index for index, byte in enumerate(whole) if byte == ord("\n")]
    cuts = {0, *range(1, len(whole), 173), *borders, *(border + 1 for border in borders), len(whole) - 1}
    expected = lines_of(records)
    for cut in sorted(cuts):
        records.write_bytes(whole[:cut])
        kept = max(0, whole[:cut].count(b'{"kind": "sample"'))
        scored.clear()
        run_needle(task, records)
        assert lines_of(records) == expected, cut
        assert len(scored) in (4 - kept, 4 - kept + 1), cut


def test_finished_run_scores_nothing_again(
    run_needle: Run, records: Path, scored: list[ScoreRequest]
) -> None:
    """Asking twice is free and gives the same summary."""
    first = run_needle(TASK, records)
    whole = records.read_bytes()
    scored.clear()
    second = run_needle(TASK, records)
    assert scored == []
    assert records.read_bytes() == whole
    assert {**first, "samples_per_s": 0} == {**second, "samples_per_s": 0}


def test_other_settings_refuse_to_continue(
    run_needle: Run, records: Path, scored: list[ScoreRequest]
) -> None:
    """A file of another grid, model or haystack is left as it is."""
    run_needle(TASK, records)
    whole = records.read_bytes()
    with pytest.raises(ConfigError, match=r"params\.num_distractors"):
        run_needle(TASK.model_copy(update={"num_distractors": 1}), records)
    with pytest.raises(ConfigError, match=r"params\.documents\.sha256"):
        run_needle(TASK, records, documents=[HeldOutDocument("a", "Another text.\n")])
    with pytest.raises(ConfigError, match="label"):
        run_needle(TASK, records, label="after")
    assert records.read_bytes() == whole


def test_sample_that_cannot_be_built_is_unscored(
    run_needle: Run, records: Path, scored: list[ScoreRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing is not zero: the mean is over the scored ones, the reason is recorded and counted."""
    build = NeedleBuilder.build

    def failing(self: NeedleBuilder, length: int, depth: float, sample: int) -> Any:
        if (length, depth) == (320, 0.5):
            raise DataError("no border here")
        return build(self, length, depth, sample)

    monkeypatch.setattr(NeedleBuilder, "build", failing)
    summary = run_needle(TASK, records)
    assert summary["mean"] == 1.0
    assert (summary["samples"], summary["scored"]) == (12, 10)
    assert summary["unscored"] == {"no border here": 2}
    cell = next(cell for cell in summary["cells"] if (cell["length"], cell["depth"]) == (320, 0.5))
    assert (cell["samples"], cell["scored"], cell["mean"], cell["interval"]) == (2, 0, None, None)
    record = next(record for record in read_records(records).samples if record["unscored"])
    assert record["score"] is record["achieved_length"] is None
    assert record["output"] == record["question"] == ""


def test_output_that_is_no_number_is_unscored(
    run_needle: Run, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that diverged has no accuracy of 0, it has none."""

    def diverged(model: object, requests: Sequence[ScoreRequest], *, batch_tokens: int) -> list[ScoreResult]:
        return [ScoreResult(np.full(6, np.nan, np.float32), np.zeros(6, np.int64), False) for _ in requests]

    monkeypatch.setattr(needle_run, "score", diverged)
    summary = run_needle(TASK, records)
    assert summary["mean"] is None
    assert summary["unscored"] == {runner.NOT_FINITE: 12}


def test_order_of_batches_changes_nothing(run_needle: Run, tmp_path: Path) -> None:
    """Real model: one sample at a time and many at a time give the same outputs and scores."""
    alone, together = tmp_path / "alone.jsonl", tmp_path / "together.jsonl"
    run_needle(TASK, alone, batch_tokens=1)
    run_needle(TASK, together, batch_tokens=4000)
    assert sorted(lines_of(alone)) == sorted(lines_of(together))
    assert 0.0 <= run_needle(TASK, alone)["mean"] <= 1.0


def test_perplexity_equals_brute_force(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    documents: list[HeldOutDocument],
    model_info: dict[str, Any],
    records: Path,
) -> None:
    """Tokens times log-likelihood, from whole logits, one window at a time."""
    task = PplTask(lengths=(64, 192), num_spans=2, num_buckets=6)
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
    task = PplTask(lengths=(64, 128), num_spans=1)
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


def test_wilson_interval_is_the_published_one() -> None:
    """9 of 10 gives 0.596 to 0.982 (Wilson 1927); a plain normal interval would pass 1."""
    interval = wilson_interval(9, 10)
    assert interval == pytest.approx((0.596, 0.982), abs=1e-3)
    assert wilson_interval(0, 0) is None
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-3)
