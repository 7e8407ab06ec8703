"""`longspan annotate` as a user types it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from longspan.data.rows.annotations import Annotations
from longspan.data.store import MDSDirectory
from longspan.models.hf import build_model, save_model

MODEL = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.fixture
def rows(longspan, store):
    """A plan of rows of 128 tokens and a teacher, in the current directory."""
    outcome = longspan("data pack store --length 128 --out rows")
    assert outcome.code == 0, outcome.err
    save_model(build_model(MODEL, seed=0), store.parent / "model", tokenizer=store.parent / "tokenizer")
    return store.parent


def test_dry_run_says_what_it_takes_and_writes_nothing(longspan, rows):
    before = sorted(rows.iterdir())
    outcome = longspan("annotate topk --model model --data rows --k 8 --dry-run --json")
    assert outcome.code == 0, outcome.err
    (found,) = json.loads(outcome.out).values()
    asked, *others = found["options"]
    assert asked["name"] == "--k 8" and asked["bytes_per_token"] == 8 * 4 + 2
    assert asked["num_bytes"] == found["num_bytes"] == 34 * found["tokens"]
    assert {"--k 8 --mass 0.9", "--k 8 --mass 0.99"} <= {option["name"] for option in others}
    table = longspan("annotate topk --model model --data rows --k 8 --dry-run")
    assert "bytes a token" in table.out and "saves" in table.out
    assert sorted(rows.iterdir()) == before


def test_shards_and_their_merge(longspan, rows):
    for shard in range(2):
        outcome = longspan(
            f"annotate topk --model model --data rows --k 4 --mass 0.5 --num-shards 2 --shard {shard} --out taught"
        )
        assert outcome.code == 0, outcome.err
        assert f"taught-{shard}" in outcome.out and "would save" not in outcome.out
    outcome = longspan("annotate topk --settings taught-1 --out again")  # what it wrote makes it again
    assert outcome.code == 0, outcome.err
    same = [(rows / folder / "longspan.json").read_text() for folder in ("taught-1", "again-1")]
    assert same[0] == same[1]
    outcome = longspan("annotate merge taught-1 taught-0 --out taught --json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)["taught"]
    assert found["rows"] == found["source_rows"] == len(Annotations(rows / "taught"))
    again = longspan("annotate topk --model model --data rows --k 4 --mass 0.5 --out taught")
    assert again.code == 0, again.err


def test_jobs_of_an_array_make_one_folder(longspan, rows):
    command = "annotate topk --model model --data rows --k 4 --out taught --num-jobs 1 --job-id 0"
    assert longspan(command).code == 0
    script = longspan("annotate topk --model model --data rows --out taught --num-jobs 3 --print-sbatch")
    assert "#SBATCH --array=0-2" in script.out and "longspan annotate topk" in script.out


def test_cepe_folders(longspan, rows):
    """Named as CEPE's code looks for them; retrieval reads passages instead of the encoder's window."""
    made = longspan(
        "data pairs store --mode concat --encoder 24 --decoder 16 --train-samples 6 --format cepe --out pairs"
    )
    assert made.code == 0, made.err
    windows = "--format cepe --k 5 --encoder-tokens 8 --decoder-tokens 12"
    command = f"annotate topk --model model --data pairs/train {windows}"
    outcome = longspan(command)
    assert outcome.code == 0, outcome.err
    folder = rows / "pairs" / "train-logits-enc8-dec12-model" / "texts"
    assert MDSDirectory(folder)[0]["target_prob"].shape == (12, 6)
    assert longspan(f"{command} --num-shards 2 --shard 1").code == 0
    assert (folder.parent / "texts-1").is_dir()
    missing = longspan(f"{command} --retrieval pairs/train")
    assert missing.code == 2 and "retrieved_token_ids" in missing.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data rows --model model", "give --out"),
        (
            "--data rows --model model --out taught --encoder-tokens 8",
            "--encoder-tokens is for --format cepe",
        ),
        ("--data rows --model model --out taught --retrieval-k 2", "--retrieval-k is for --format cepe"),
        ("--data nothere --model model --out taught", "nothere does not exist"),
        ("--data rows --model model --out taught --k 513", "1 to 512"),
        ("--data rows --model model --out taught --mass 2", "mass"),
        ("--data rows --model texts --out taught", "not a Hugging Face model folder"),
        ("--data texts --model model --out taught", "is not a store of packed rows"),
        ("--data texts --model model --format cepe", "holds no pairs"),
        ("--data rows --model model --out store", "already exists"),
        ("--data rows --model model --out taught --retrieval rows", "--format cepe"),
        ("--data rows --model model --out taught --shard 2 --num-shards 2", "0 to 1 of --num-shards"),
        ("--data rows --model model --out taught --cp 2 --workers 2", "one piece at a time"),
    ],
)
def test_mistakes_are_one_message(longspan, rows, arguments, message):
    outcome = longspan(f"annotate topk {arguments}")
    assert outcome.code == 2, outcome.err
    assert message in outcome.err and "Traceback" not in outcome.err


def test_merge_of_what_is_no_shard(longspan, rows):
    outcome = longspan("annotate merge store --out taught")
    assert outcome.code == 2 and "holds no annotations" in outcome.err


@pytest.mark.slow
def test_a_teacher_in_4_bits(longspan, rows):
    """Its predictions are near those of the whole weights, and the folder says how it was made."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    shutil.rmtree(rows / "taught", ignore_errors=True)
    for name, options in (("whole", ""), ("small", "--quantize nf4")):
        outcome = longspan(f"annotate topk --model model --data rows --k 4 --out {name} {options}")
        assert outcome.code == 0, outcome.err
    whole, small = Annotations(rows / "whole"), Annotations(rows / "small")
    assert small.manifest.teacher["quantization"] == "nf4"
    difference = np.abs(whole.row(0).tail - small.row(0).tail)
    assert 0 < difference.mean() < 0.1
