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


def test_raw_input_is_audited_as_its_store_is(longspan, store):
    """Columns of raw text that no store can be chosen by, or a copy of all tokens that is left behind."""
    (store.parent / "raw").mkdir()
    lines = [json.dumps({"text": path.read_text(), "of": "a"}) for path in (store.parent / "texts").iterdir()]
    # Two of them stand twice, and one line is broken.
    (store.parent / "raw" / "a.jsonl").write_text("\n".join([*lines, *lines[:2], "{"]))
    reading = "--source-field of --tokenizer tokenizer"
    assert longspan(f"data tokenize raw {reading} --out made").code == 0
    by_store = longspan("data audit made --tokenizer tokenizer --out by-store --json")
    by_input = longspan(f"data audit raw {reading} --out by-input --plot by-input.png --json")
    assert by_input.code == 0, by_input.err
    assert json.loads(by_input.out)["rows"] == json.loads(by_store.out)["rows"]
    found, wanted = Measures.load("by-input"), Measures.load("by-store")
    assert found.columns.keys() == wanted.columns.keys() and found.stores[0].path.endswith("/raw")
    for name, column in wanted.columns.items():
        assert np.array_equal(found.columns[name], column), name
    assert not [path for path in store.parent.iterdir() if path.name.startswith(".by-input")]
    mixed = longspan(
        "data mix made --mode none --where exact_duplicate==0 --audit by-input --out some --json"
    )
    assert mixed.code == 0 and "by source and text" not in mixed.err
    assert json.loads(mixed.out)["documents"] == len(lines)


def test_documents_are_known_by_source_and_text(longspan, store):
    """A second audit because of another tokenizer, or one of other documents that is taken for this one's."""
    from longspan.data.tokenizer import train_bpe

    train_bpe(["other words " * 50], store.parent / "other", vocab_size=300)
    assert longspan("data audit texts --tokenizer other --out audit").code == 0
    mix = "data mix store --mode none --where near_duplicate==0 --audit audit --out some --json"
    mixed = longspan(mix)
    assert mixed.code == 0, mixed.err
    assert "by source and text alone" in mixed.err
    (store.parent / "texts2").mkdir()
    for path in sorted((store.parent / "texts").iterdir())[1:]:
        (store.parent / "texts2" / path.name).write_text(path.read_text())
    assert longspan("data audit texts2 --tokenizer tokenizer --out audit").code == 0
    refused = longspan(mix)
    # The folder names the source, which is part of a key.
    assert refused.code == 2 and "were not audited" in refused.err and "--source-field" in refused.err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("audit store texts --out out", "audited apart"),
        ("audit texts --out out", "--tokenizer"),
        ("audit store --text-field body --out out", "no effect on token stores"),
        ("audit texts --tokenizer tokenizer --order-by a --out out", "give group_by"),
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
