"""`longspan eval ppl` on a small random model."""

from __future__ import annotations

import json

import pytest

PPL = "eval ppl --model model --out run --num-documents 3 --json"


def test_texts_and_stores_give_the_same_numbers_in_one_table(longspan, model, tmp_path):
    """The layout of the published CSV: lengths in the first line, then a line for each model."""
    limits = "--xmin 32 --xmax 300 --ymin 1 --ymax 1000"
    lines = [
        "--data texts --label texts --lengths 64,128 --cut truncate",
        "--data store --label store --lengths 64,128 --cut truncate --csv ppl.csv",
        f"--data store --label sliding --lengths 128 --stride 96 --csv all.csv --plot ppl.svg {limits}",
    ]
    found = []
    for line in lines:
        outcome = longspan(f"{PPL} {line}")
        assert outcome.code == 0, outcome.err
        found.append(json.loads(outcome.out))
    assert [row["tokens"] for row in found[0]["by_length"]] == [3 * 63, 3 * 127]
    first, *others = (tmp_path / "ppl.csv").read_text().splitlines()
    assert first == ",64,128"
    written = {line.split(",")[0]: line.split(",")[1:] for line in others}
    assert sorted(written) == ["store", "texts"]
    for summary in found[:2]:
        values = [row["perplexity"] for row in summary["by_length"]]
        assert list(map(float, written[summary["label"]])) == pytest.approx(values, rel=1e-12)
    # A length at which a model was not measured is an empty cell.
    assert "\nsliding,," in (tmp_path / "all.csv").read_text()
    assert "</svg>" in (tmp_path / "ppl.svg").read_text()
    header = json.loads((tmp_path / "run/records/ppl-sliding.jsonl").read_text().splitlines()[0])
    assert header["params"]["stride"] == 96
    assert header["params"]["first_token"] == "context only, no begin-of-text token"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--data texts --full --truncate", "--truncate and --full set the same"),
        ("--data texts --cut full --max-length 64", "leave longer ones out with --max-tokens 64"),
        ("--data texts", "windows need lengths (cut: spans)"),
        ("--data texts --data store --cut full", "some inputs are tokenised and some are texts"),
        ("--data texts --lengths 64 --stride 65", "a stride of 65 would skip tokens"),
        ("--data texts --lengths 64 --plot p.png --xmin 64 --xmax 8", "--xmin is not below --xmax"),
        ("--data texts --lengths 64 --plot p.png --ymin -1", "--ymin is not a limit of the figure"),
    ],
)
def test_contradictions_are_named(longspan, model, line, message):
    """A setting that is silently dropped gives a number under another name."""
    outcome = longspan(f"{PPL} {line}")
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_servers_have_no_perplexity(longspan, model):
    """A chat server would be asked thousands of questions that it cannot answer."""
    outcome = longspan("eval ppl --model openai:x --tokenizer tokenizer --data texts --lengths 64 --out run")
    assert outcome.code == 2
    assert "servers do not say how likely a text is" in outcome.err


@pytest.mark.slow
def test_two_processes_write_the_records_of_one(longspan, model, tmp_path):
    """An evaluation that one process began goes on with two, and the other way round."""
    line = f"{PPL} --data store --lengths 64 --label x"
    alone = longspan(line)
    assert alone.code == 0, alone.err
    again = longspan(f"{line} --cp 2 --schedule ulysses")
    assert again.code == 0, again.err
    (tmp_path / "run/records/ppl-x.jsonl").unlink()
    shared = longspan(f"{line} --cp 2")
    assert shared.code == 0, shared.err
    one, two = json.loads(alone.out), json.loads(shared.out)
    assert json.loads(again.out)["by_length"] == one["by_length"]
    assert [row["nll"] for row in two["by_length"]] == pytest.approx(
        [row["nll"] for row in one["by_length"]], rel=1e-6
    )


@pytest.mark.parametrize(
    "command", ["eval ppl --model model --data texts --lengths 64 --out run", "data lengths store"]
)
def test_a_picture_has_the_ending_of_its_format(longspan, command: str) -> None:
    """--plot x.jpg wrote a PNG by that name; the ending is looked at before any work begins."""
    outcome = longspan(f"{command} --plot x.jpg")
    assert outcome.code == 2 and "a picture is of no such kind" in outcome.err
    assert ".png, .svg, .pdf" in outcome.err
