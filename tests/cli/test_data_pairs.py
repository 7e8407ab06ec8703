"""`longspan data pairs` and `retrieval` as a user types them."""

from __future__ import annotations

import json

import pytest


def test_pairs_and_their_retrieval_corpus(longspan, store):
    """One command writes all three parts; the separate one then finds the shard complete."""
    outcome = longspan(
        "data pairs store --mode concat --encoder 48 --decoder 16 --eval-samples 4 --train-samples 9 "
        "--retrieval-samples 5 --shard 3 --tokenizer tokenizer --format cepe --out out --json"
    )
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["written"] == ["out/test", "out/train", "out/retrieval/3"]
    assert [(count["part"], count["pairs"]) for count in found["counts"]] == [
        ("test", 4),
        ("train", 9),
        ("retrieval", 5),
    ]
    again = longspan("data retrieval store --tokenizer tokenizer --samples 5 --shard 3 --out out")
    assert again.code == 0, again.err
    shard = store.parent / "out" / "retrieval" / "3" / "texts.jsonl"
    assert len(shard.read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pairs store --mode ab --out out", "nothing to write"),
        ("pairs store --mode abc --eval-samples 1 --out out", "concat"),
        (
            "pairs store --mode ab --eval-samples 1 --format pickle --out out",
            "'pickle' is not one of 'mds', 'cepe'",
        ),
        ("pairs store --mode ab --eval-samples 1 --encoder 0 --out out", "encoder"),
        ("pairs store --mode ab --eval-samples 1 --weight cc=1 --out out", "weights above 0 of texts"),
        ("pairs store --mode ab --retrieval-samples 1 --out out", "needs --tokenizer"),
        ("pairs store --mode ab --eval-samples 1 --specials all --out out", "'all' is not one of 'none'"),
        ("pairs texts --mode ab --eval-samples 1 --out out", "no .npy token files"),
        ("retrieval store --tokenizer tokenizer --samples 5 --shard 100 --out out", "0 to 99"),
    ],
)
def test_mistakes_are_one_message(longspan, store, arguments, message):
    outcome = longspan(f"data {arguments}")
    assert outcome.code == 2
    assert message in outcome.err and "Traceback" not in outcome.err
    assert not (store.parent / "out").exists()
