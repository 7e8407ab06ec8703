"""`longspan data audit` and `data mix --where` as a user types them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from longspan.core.files import read_json
from longspan.data.store.measures import Measures


def test_an_audit_with_everything(longspan, store, model):
    """A measure that is asked for but not written, or written over when another follows, would go unseen."""
    options = "--tokenizer tokenizer --model model --context 32 --scored 8 --long-range-documents 2"
    outcome = longspan(f"data audit store {options} --out audit --plot audit.png --json")
    assert outcome.code == 0, outcome.err
    rows = json.loads(outcome.out)["rows"]
    assert {"near_duplicate", "boilerplate", "language", "long_range"} <= set(rows[0])
    column = Measures.load("audit").columns["long_range"]
    assert 0 < np.isfinite(column).sum() <= 2 * len({row["source"] for row in rows})
    assert (store.parent / "audit.png").stat().st_size > 1000
    mixed = longspan("data mix store --mode none --where known(long_range) --audit audit --out some --json")
    assert mixed.code == 0, mixed.err
    assert json.loads(mixed.out)["documents"] == np.isfinite(column).sum()
    assert read_json(store.parent / "some" / "head.json")["head"]["spec"]["where"] == "known(long_range)"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("audit store --similarity 0.2 --out out", "similarity"),
        ("audit nothing --out out", "nothing"),
        ("audit store --context 64 --scored 32 --out out", "not longer than twice"),
        ("mix store --mode none --where long_range>1 --out out", "not known of the documents"),
        ("mix store --mode none --where tokens+1 --out out", "not a condition"),
        ("mix store --mode none --audit audit --out out", "only on a condition"),
        (
            "mix store --mode none --where tokens>1 --audit missing --out out",
            "missing is not a document audit",
        ),
    ],
)
def test_mistakes_are_one_message(longspan, store, command, message):
    """A traceback, or a folder left behind, in place of a message."""
    outcome = longspan(f"data {command}")
    assert outcome.code == 2 and message in outcome.err and "Traceback" not in outcome.err
    assert not (store.parent / "out").exists()
