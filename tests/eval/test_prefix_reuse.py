"""A grid with a real model: read once for all cells, and cell by cell, with the same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longspan.data.tokenizer import Tokenizer
from longspan.eval.held_out import HeldOutDocument
from longspan.eval.needle import NeedleTask
from longspan.eval.needle_config import NeedleConfig
from longspan.eval.needle_cost import grid_cost
from longspan.eval.needle_multikey import MultiKeyTask
from longspan.eval.prompts import PromptForm
from longspan.eval.records import read_records
from longspan.eval.runner import run_task
from longspan.infer.local import LocalAnswerer
from longspan.infer.plain import PlainAnswerer
from tests.eval.answerers import IDENTITY

LENGTHS, DEPTHS = (400, 600, 800, 1000), tuple(number / 10 for number in range(11))
FEWER = {"lengths": (300, 500), "depths": (0.0, 0.3, 0.6, 1.0), "samples": 2}


def make(task: type, documents: list[HeldOutDocument], tokenizer: Tokenizer, **values: Any) -> Any:
    settings = NeedleConfig.from_dict(
        {"lengths": LENGTHS, "depths": DEPTHS, "samples": 1, "seed": 5, **values}
    )
    return task(settings, documents, PromptForm(tokenizer))


def run(task: Any, answerer: Any, tokenizer: Tokenizer, out: Path) -> dict[str, dict[str, Any]]:
    run_task(task, answerer, tokenizer=tokenizer, label="x", out=out)
    samples = {record["id"]: record for record in read_records(out).samples}
    return {key: {**record, "seconds": 0} for key, record in samples.items()}


@pytest.mark.parametrize("kind", [NeedleTask, MultiKeyTask])
@pytest.mark.parametrize("mode", ["teacher_forced", "generate"])
def test_grid_read_once_gives_the_answers_of_cells_read_alone(
    kind: type,
    mode: str,
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    documents: list[HeldOutDocument],
    tmp_path: Path,
) -> None:
    """A cache that is branched at the wrong place, or not wound back, answers from another cell's text."""
    task = make(kind, documents, tokenizer, mode=mode, max_new_tokens=6, **FEWER)
    shared = LocalAnswerer(model, tokenizer, identity=IDENTITY, batch_tokens=1000)
    alone = PlainAnswerer(model, tokenizer, identity=IDENTITY, batch_tokens=1000)
    first = run(task, shared, tokenizer, tmp_path / "shared.jsonl")
    second = run(task, alone, tokenizer, tmp_path / "alone.jsonl")
    assert len(first) == 16 and first.keys() == second.keys()
    for key, record in first.items():
        other = second[key]
        assert record.pop("answer_nll", 0.0) == pytest.approx(other.pop("answer_nll", 0.0), rel=1e-4)
        assert record == other


def test_greedy_generation_matches_where_every_likeliest_token_does(
    model: torch.nn.Module, tokenizer: Tokenizer, documents: list[HeldOutDocument]
) -> None:
    """Teacher forcing is the result of greedy decoding at the price of one pass, or it measures something else.

    A random model gives its own continuation as the answer in half of the cells, so that both outcomes occur.
    """
    task = make(NeedleTask, documents, tokenizer, **FEWER)
    answerer = LocalAnswerer(model, tokenizer, identity=IDENTITY, batch_tokens=1000)
    requests = [
        task.build(planned).request._replace(max_new_tokens=6, stop_ids=()) for planned in task.plan()
    ]
    generated = dict(answerer.generate(requests))
    asked = []
    for index, request in enumerate(requests):
        ids = generated[index].token_ids
        assert ids is not None and request.answer_ids is not None
        wanted = np.asarray(ids) if index % 2 else request.answer_ids[:6]
        asked.append(request._replace(answer_ids=wanted.astype(np.int64)))
    outcomes = set()
    for index, answer in answerer.score(asked):
        wanted = asked[index].answer_ids
        assert wanted is not None and answer.token_ids is not None
        forced = bool(np.array_equal(answer.token_ids, wanted))
        greedy = bool(np.array_equal(generated[index].token_ids[: len(wanted)], wanted))
        assert forced == greedy, index
        outcomes.add(forced)
    assert outcomes == {True, False}


def test_tokens_read_are_those_of_the_closed_form(
    model: torch.nn.Module, tokenizer: Tokenizer, documents: list[HeldOutDocument], tmp_path: Path
) -> None:
    """What a dry run promises is what is read."""
    # Keys are of many tokens here, and one more or less counts where nothing else is read.
    for kind, least, tolerance in ((NeedleTask, 1.6, 0.03), (MultiKeyTask, 8.0, 0.15)):
        task = make(kind, documents, tokenizer)
        answerer = LocalAnswerer(model, tokenizer, identity=IDENTITY, batch_tokens=1000)
        run(task, answerer, tokenizer, tmp_path / f"{kind.__name__}.jsonl")
        cost = grid_cost(task.settings, PromptForm(tokenizer), multi_key=kind is MultiKeyTask)
        assert (cost.cells, cost.prompts, cost.prompt_tokens) == (44, 44, 11 * sum(LENGTHS))
        assert answerer.counters.tokens == pytest.approx(cost.tokens_read, rel=tolerance)
        assert cost.factor_linear > least
