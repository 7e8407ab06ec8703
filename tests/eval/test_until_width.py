"""Asking until an interval is narrow: which samples, in which order, and what the interval is worth then."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.cli.eval_options import share_of
from longspan.core.errors import ArgumentError
from longspan.core.intervals import clustered_interval
from longspan.data.tokenizer import Tokenizer
from longspan.eval import forecast
from longspan.eval.records import read_records
from longspan.eval.runner import run_task
from longspan.eval.task import Planned
from longspan.eval.until_width import UntilWidth
from tests.eval.answerers import Knowing
from tests.eval.test_runner import Copying


def grid(samples: int, depths: int = 1) -> list[tuple[str, Planned]]:
    cells = [(depth, sample) for depth in range(depths) for sample in range(samples)]
    return [
        (f"{d}/{s}", Planned((9, d, s), 9, fields={"length": 9, "depth": d, "sample": s})) for d, s in cells
    ]


def run(count: int, out: Path, tokenizer: Tokenizer, **options: Any) -> dict[str, Any]:
    """Ask a task whose answers are right but for every ninth."""

    def knows(prompt: str) -> str:
        number = int(prompt.removeprefix("copy "))
        return str(number if number % 9 else -1)

    answerer = Knowing(tokenizer, knows=knows)
    return run_task(Copying(count), answerer, tokenizer=tokenizer, label="x", out=out, **options)


def test_it_stops_at_a_look_and_says_so(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Samples that change no number worth having; a file that looks as if some of its samples were lost."""
    out = tmp_path / "records.jsonl"
    summary = run(300, out, tokenizer, until_width=0.2)
    low, high = summary["interval"]
    assert summary["samples"] == 40 and high - low <= 0.2
    narrow = {"until_width": 0.2, "planned": 300, "narrow": 1, "wider": 0}
    assert narrow.items() <= summary.items()
    assert json.loads(out.read_text().splitlines()[-1]) == {"kind": "footer", "samples": 40, **narrow}
    assert read_records(out).complete
    # Not the first of the file, which may be the easy ones.
    assert max(sample["number"] for sample in read_records(out).samples) > 200
    # Nothing is asked twice; a narrower one goes on, and without one all is asked.
    assert run(300, out, tokenizer, until_width=0.2)["samples_per_s"] == 0.0
    assert run(300, out, tokenizer, until_width=0.1)["samples"] == 160
    assert run(300, out, tokenizer)["samples"] == 300
    assert read_records(out).complete and read_records(out).header["params"]["count"] == 300


def test_a_forecast_is_of_the_samples_before_the_next_look(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many looks there will be is not known: the seconds to the next were told as those of all that is left."""
    monkeypatch.setattr(forecast, "MEASURED_SECONDS", 0.0)
    monkeypatch.setattr(forecast, "WORTH_SECONDS", 0.0)
    caplog.set_level(logging.INFO, "longspan")
    for width in (0.2, None):
        run(300, tmp_path / "records.jsonl", tokenizer, until_width=width)
    told = [each.message.partition(": about")[0] for each in caplog.records if "left, by" in each.message]
    assert told == ["copying x, until its next look"] * 2 + ["copying x"]


def test_a_killed_run_asks_what_it_would_have_asked(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Looks that depend on when they happen, rather than on what is recorded."""
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    run(300, whole, tokenizer, until_width=0.2)
    lines = whole.read_text().splitlines(keepends=True)
    killed.write_text("".join(lines[:28]))
    run(300, killed, tokenizer, until_width=0.2)
    assert {s["id"] for s in read_records(killed).samples} == {s["id"] for s in read_records(whole).samples}


def test_used_up_samples_are_said_to_be_too_few(tmp_path: Path, tokenizer: Tokenizer) -> None:
    summary = run(30, tmp_path / "records.jsonl", tokenizer, until_width=0.05)
    assert (summary["samples"], summary["narrow"], summary["wider"]) == (30, 0, 1)


def test_rows_of_a_column_stay_even() -> None:
    """A mean over depths that has more of the hard ones is not the mean over depths."""
    looks = UntilWidth("needle", grid(100, depths=3), 0.2)
    due = [id_.split("/") for id_ in looks.due({})]
    by_depth = [{sample for depth, sample in due if depth == name} for name in "012"]
    assert len(by_depth[0]) == 20 and by_depth[0] == by_depth[1] == by_depth[2]


@pytest.mark.parametrize(("share", "alike"), [(0.1, 0.0), (0.3, 0.0), (0.5, 0.0), (0.3, 0.3), (0.95, 0.5)])
def test_intervals_that_ended_the_asking_hold_what_they_promise(share: float, alike: float) -> None:
    """Looking until it is narrow ends where the spread happens to be small: intervals that hold too seldom."""
    depths = 3 if alike else 1
    samples = grid(320, depths)
    looks = UntilWidth("needle", samples, 0.2)
    rng, held, draws = np.random.default_rng(4), 0, 300
    for _ in range(draws):
        shares = np.full(320, share)
        if alike:
            shares = rng.beta(share * (1 - alike) / alike, (1 - share) * (1 - alike) / alike, 320)
        right = rng.random((depths, 320)) < shares
        recorded: dict[str, dict[str, Any]] = {}
        while due := looks.due(recorded):
            for id_ in due:
                depth, sample = map(int, id_.split("/"))
                recorded[id_] = {"score": float(right[depth, sample]), "sample": sample}
        scores = [record["score"] for record in recorded.values()]
        found = clustered_interval(scores, [record["sample"] for record in recorded.values()])
        assert found is not None and found[1] - found[0] <= 0.2
        held += found[0] <= share <= found[1]
    assert 0.915 <= held / draws <= 0.99


def test_unscored_samples_are_no_evidence() -> None:
    """Samples that failed made an interval narrow, or a task without an end."""
    looks = UntilWidth("needle", grid(50), 0.3)
    recorded: dict[str, dict[str, Any]] = {}
    asked = []
    while due := looks.due(recorded):
        asked.append(len(due))
        recorded |= {id_: {"score": None} for id_ in due}
    assert asked == [20, 20, 10]
    assert looks.said(recorded)["narrow"] == 0


def test_widths_are_shares() -> None:
    assert share_of("5%", "--until-width") == share_of("0.05", "--until-width") == 0.05
    for wrong in (0.0, 1.0, 5.0, float("nan")):
        with pytest.raises(ArgumentError, match="such as 5%"):
            UntilWidth("needle", grid(2), wrong)
    with pytest.raises(ArgumentError, match="not a number"):
        share_of("narrow", "--until-width")
