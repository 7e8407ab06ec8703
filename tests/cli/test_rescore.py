"""`longspan eval rescore`: what its options cannot do is one message."""

from __future__ import annotations

from longspan.data.tokenizer import load_tokenizer
from tests.eval.test_citations import asked, write_judge, write_released


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


def test_citations_by_a_model_that_is_run_here(longspan, corpus, tmp_path):
    """What was judged and what each metric comes to stands in the table; a model without a server has no address."""
    root, records = write_released(tmp_path), tmp_path / "cite.jsonl"
    asked(root, load_tokenizer(corpus / "tokenizer"), records, {"qampari": " Oslo [1], Rome [9], Bern."})
    write_judge(tmp_path / "judge", "1")
    words = f"eval rescore {records} --scorer citations --data-root {root} --judge {tmp_path}/judge"
    outcome = longspan(f"{words} --out {tmp_path}/judged.jsonl")
    assert outcome.code == 0, outcome.err
    assert "1 pairs judged, 0 of them without a verdict" in outcome.out and "citation_recall" in outcome.out
    outcome = longspan(f"{words} --base-url http://localhost/v1 --out {tmp_path}/other.jsonl")
    assert outcome.code == 2 and "a model that is run here has no server" in outcome.err
    outcome = longspan(
        f"eval rescore {records} --scorer citations --data-root {root} --out {tmp_path}/none.jsonl"
    )
    assert outcome.code == 2 and "which model judges is not said" in outcome.err
