"""`longspan eval rescore`: what its options cannot do is one message."""

from __future__ import annotations


def test_a_rule_asks_no_judge(longspan, tmp_path):
    """--criteria kamradt beside --scorer contains scored by `contains` and said nothing of the criteria."""
    for words in (
        "--criteria kamradt",
        "--judge openai:m",
        "--base-url http://localhost/v1",
        "--cache replies",
    ):
        outcome = longspan(
            f"eval rescore records.jsonl --scorer contains {words} --out {tmp_path}/again.jsonl"
        )
        assert outcome.code == 2 and "--scorer judge" in outcome.err
